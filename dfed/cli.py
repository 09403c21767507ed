"""The command line: ``dfed run`` and ``dfed list``.

Exit status: 0 done; 1 the run failed; 2 the config or the command line is wrong; 143 stopped by SIGTERM after a
checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from dfed import __version__
from dfed.errors import ConfigError, DataError, DfedError, Fault

__all__ = ["main"]

logger = logging.getLogger(__name__)

EXIT_FAILED, EXIT_CONFIG = 1, 2
_RANK_0_SPEAKS_S = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or options.command != "run"]
    if unknown:
        parser.error(f"unknown argument: {unknown[0]}")
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s r{rank} %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        if options.command == "list":
            return _list()
        words = [word for word in (options.config, *rest) if word is not None]
        return _run(words, options)
    except (ConfigError, DataError) as error:
        if rank != 0:
            # Rank 0 has the same fault and says so; the launcher ends this rank as soon as it has. If not, it is ours alone.
            time.sleep(_RANK_0_SPEAKS_S)
        print(f"dfed: {'' if rank == 0 else f'rank {rank}: '}{error}", file=sys.stderr)
        return EXIT_CONFIG
    except DfedError as error:
        print(f"dfed: rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dfed", description="Federated training under real memory limits.")
    parser.add_argument("--version", action="version", version=f"dfed {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run a federation", description="Run the federation that a config describes.",
                              usage="dfed run [CONFIG] [key.sub=value …] [--out DIR] [--resume DIR]")
    run.add_argument("config", nargs="?", help="a YAML file, then overrides key.sub=value")
    run.add_argument("--out", metavar="DIR", help="run folder (default: runs/NAME-DATE-TIME)")
    run.add_argument("--resume", metavar="DIR", help="go on with the run in this folder; its own config is the default")
    commands.add_parser("list", help="strategies, models, data sets and codecs", description="List what a config can name.")
    return parser


def _list() -> int:
    from dfed.registry import ALL

    for title, registry in ALL.items():
        print(f"{title}:")
        for name in registry:
            print(f"  {name:18} {registry.summary(name)}")
    return 0


def _run(words: list[str], options: argparse.Namespace) -> int:
    from dfed.checkpoint import latest
    from dfed.comm import choose_device
    from dfed.config import load_config
    from dfed.leader import execute
    from dfed.report.folder import CHECKPOINTS, RunFolder

    overrides = [word for word in words if "=" in word]
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError([Fault(files[1], "must have the form key.sub=value (one config file is enough).")])
    resume = Path(options.resume) if options.resume else None
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    out = resume or (Path(options.out) if options.out else None)
    if resume is not None and options.out and Path(options.out) != resume:
        raise ConfigError([Fault("--out", f"must be left out with --resume, or be {resume} too, but is {options.out}.")])
    if resume is None and restarted and out is not None and (out / "config.yaml").exists():
        resume = out  # the launcher started this job again after a failure
    if resume is not None and not (resume / "config.yaml").is_file():
        raise ConfigError([Fault("--resume", f"must be the folder of a run, but {resume} holds no config.yaml.")])
    if not files and resume is None:
        raise ConfigError([Fault("CONFIG", "must be given: a YAML file, or --resume DIR.")])
    config = load_config(files[0] if files else resume / "config.yaml", overrides)  # type: ignore[operator]
    if out is None:
        out = Path("runs") / f"{Path(files[0]).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = state = None
    if int(os.environ.get("RANK", "0")) == 0:
        if resume is not None:
            # Before anything is written: a checkpoint of another config is refused, and its folder stays as it is.
            state = latest(resume / CHECKPOINTS, config.fingerprint(choose_device(config.backend).type))
            if state is None:
                logger.warning("%s holds no checkpoint yet: starting from round 0", resume)
        folder = RunFolder(out)
        if resume is None:
            folder.check_new()
    return execute(config, folder=folder, state=state)
