"""The command line: ``dfed run``, ``dfed train``, ``dfed plan``, ``dfed compare``, ``dfed export`` and ``dfed list``.

Exit status: 0 done; 1 the run failed, or the output of a command cannot be written; 2 the config or the command line is
wrong; 143 stopped by SIGTERM after a checkpoint (``compare`` also 130, by SIGINT).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dfed import __version__
from dfed.errors import ConfigError, DataError, DfedError, Fault

__all__ = ["main"]

logger = logging.getLogger(__name__)

EXIT_FAILED, EXIT_CONFIG = 1, 2
_RANK_0_SPEAKS_S = 5.0
_LAUNCHED = ("run", "train", "compare")  # what may be called by a launcher


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or options.command in ("list", "export")]
    if unknown:
        parser.error(f"unknown argument: {unknown[0]}")
    try:
        rank = _rank(options.command)
    except ConfigError as error:
        print(f"dfed: {error}", file=sys.stderr)
        return EXIT_CONFIG
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s r{rank} %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    if not _has_output(rank):
        return EXIT_FAILED
    try:
        if options.command == "list":
            return _to_output(_list())
        if options.command == "export":
            from dfed.export_command import export_text

            return _to_output(export_text(options))
        words = [word for word in (options.config, *rest) if word is not None]
        if options.command == "plan":
            from dfed.plan_command import plan_text

            return _to_output(plan_text(words, options))
        if options.command == "compare":
            from dfed.compare import compare

            return compare(words, options)
        if options.command == "train":
            from dfed.train_command import train

            file, overrides, out, resume = _places(words, options)
            return train(file, overrides, out, resume)
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
    except OSError as error:
        print(f"dfed: rank {rank}: a file cannot be read or written: {error}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        if options.command in _LAUNCHED:
            from dfed.comm import agree

            agree(ready=False)  # if they have not met by now, this rank will not


def _rank(command: str) -> int:
    """This process's number in its job, whatever launcher started it; only commands that may be launched ask MPI."""
    if command in _LAUNCHED:
        from dfed.comm import adopt

        adopt()
    return int(os.environ.get("RANK", "0"))


def _has_output(rank: int) -> bool:
    """Whether there is a standard output, for what rank 0 shows; it then takes any text, whatever its encoding."""
    if sys.stdout is None:
        if rank == 0:
            print("dfed: standard output is closed: send it to a file, or to /dev/null", file=sys.stderr)
        return rank != 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dfed", description="Federated training under real memory limits.")
    parser.add_argument("--version", action="version", version=f"dfed {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run a federation", description="Run the federation that a config describes.",
                              usage="dfed run [CONFIG] [key.sub=value …] [--out DIR] [--resume DIR]")
    run.add_argument("config", nargs="?", help="a YAML file, then overrides key.sub=value")
    run.add_argument("--out", metavar="DIR", help="run folder (default: runs/NAME-DATE-TIME)")
    run.add_argument("--resume", metavar="DIR", help="go on with the run in this folder; its own config is the default")
    _add_train(commands)
    _add_plan(commands)
    _add_compare(commands)
    _add_export(commands)
    commands.add_parser("list", help="strategies, models, data sets and codecs", description="List what a config can name.")
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train", help="train one model on one device, under a memory budget",
        description="Train the model that a config describes, by the method that it names.",
        usage="dfed train [CONFIG] [key.sub=value …] [--out DIR] [--resume DIR]",
    )
    train.add_argument("config", nargs="?", help="a YAML file, then overrides key.sub=value")
    train.add_argument("--out", metavar="DIR", help="folder for everything (default: runs/NAME-DATE-TIME)")
    train.add_argument("--resume", metavar="DIR", help="go on with the training in this folder; its config is the default")


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan", help="what a fleet or a budget allows, before anything is run",
        description="Predict who can train what, at which batch, and what a round costs. Nothing is trained.",
        usage="dfed plan CONFIG [key.sub=value …] [options]  or  dfed plan --model NAME [--budget BYTES] [key.sub=value …]",
    )
    plan.add_argument("config", nargs="?", help="a YAML file, then overrides key.sub=value")
    plan.add_argument("--strategies", metavar="A,B", help="only these (default: the config's own, then all others)")
    plan.add_argument("--model", metavar="NAME", help="a model by itself, without a config")
    plan.add_argument("--budget", metavar="BYTES", help="memory that the model may take, e.g. 512MB")
    plan.add_argument("--shape", metavar="C,H,W", help="shape of a sample, with --model (default: 3,32,32)")
    plan.add_argument("--classes", metavar="N", help="number of classes, with --model (default: 10)")
    plan.add_argument("--train", metavar="FIRST:LAST",
                      help="also: only these units trained, the others frozen; FIRST: and :LAST go to the ends")
    plan.add_argument("--split", metavar="T", help="also: cut into T blocks with the smallest peak, or 'auto' for any number")
    plan.add_argument("--units", action="store_true", help="also: the profile of every unit")
    plan.add_argument("--measure", action="store_true", help="also: measured seconds of every unit, on this machine")
    plan.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare", help="run strategies under the same fleet, data and seeds",
        description="Run every strategy under every seed, skip what is finished, go on with what was interrupted, and report.",
        usage="dfed compare CONFIG [key.sub=value …] [--strategies A,B] [--seeds N] [--quick] [--ranks N] [--out DIR] "
              "[--report]",
    )
    compare.add_argument("config", nargs="?", help="a YAML file, as a rule with a group `compare`, then overrides")
    compare.add_argument("--strategies", metavar="A,B", help="only these entries, or other strategies with their defaults")
    compare.add_argument("--seeds", metavar="N", help="number of seeds, or the seeds themselves: 0,1,2")
    compare.add_argument("--quick", action="store_true", help="the short form that `compare.quick` in the config describes")
    compare.add_argument("--ranks", metavar="N", default="1", help="processes of each run (default: 1)")
    compare.add_argument("--out", metavar="DIR", help="where everything goes (default: runs/NAME-compare; with --quick "
                                                      "runs/NAME-compare-quick)")
    other = compare.add_mutually_exclusive_group()
    other.add_argument("--report", action="store_true", help="run nothing: only make the tables of what is there")
    other.add_argument("--list", action="store_true", help="run nothing: only say which runs there are, one a line")
    other.add_argument("--only", metavar="N", help="only run number N of that list, and no tables; several may share a folder")


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export", help="a trained model as files that need nothing of dfed",
        description="Write the model of a run's newest checkpoint as a state dict and as a program of torch.export.",
        usage="dfed export RUN [--variant NAME | --depth K] [--out DIR]  or  dfed export RUN --list",
    )
    export.add_argument("run", metavar="RUN", help="the folder of a run")
    export.add_argument("--variant", metavar="NAME", help="a sub-model that the strategy names (default: the global model)")
    export.add_argument("--depth", metavar="K", help="short for the variant 'depth K' or 'exitK'")
    export.add_argument("--out", metavar="DIR", help="a new folder (default: RUN/export/NAME, or RUN/export/model)")
    export.add_argument("--list", action="store_true", help="write nothing: only say what can be exported")


def _to_output(text: str) -> int:
    """Write to standard output; returns the exit status.

    A reader that has seen enough, as with ``dfed list | head -1``, is no failure; output that goes nowhere else is.
    """
    assert sys.stdout is not None, "checked at the start"
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        from dfed.report.tables import drop_output

        drop_output()
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"dfed: standard output cannot be written: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _list() -> str:
    from dfed.registry import ALL

    lines = []
    for title, registry in ALL.items():
        lines += [f"{title}:", *(f"  {name:18} {registry.summary(name)}" for name in registry)]
    return "\n".join([*lines, ""])


def _places(words: list[str], options: argparse.Namespace) -> tuple[Path, list[str], Path, bool]:
    """Of ``run`` and ``train``: the config file, overrides, the folder to write to, and whether to go on with what it holds."""
    overrides = [word for word in words if "=" in word]
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError([Fault(files[1], "must have the form key.sub=value (one config file is enough).")])
    for name, value in (("--out", options.out), ("--resume", options.resume)):
        if value is not None and not value.strip():
            raise ConfigError([Fault(name, f"must name a folder, but is {value!r}.")])
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
    file = Path(files[0]) if files else resume / "config.yaml"  # type: ignore[operator]
    return file, overrides, out or Path("runs") / f"{file.stem}-{datetime.now():%Y%m%d-%H%M%S}", resume is not None


def _run(words: list[str], options: argparse.Namespace) -> int:
    from dfed.checkpoint import latest
    from dfed.comm import choose_device, is_orphaned
    from dfed.config import load_config
    from dfed.differences import check_same_bits
    from dfed.leader import execute
    from dfed.report.folder import CHECKPOINTS, RunFolder

    file, overrides, out, resume = _places(words, options)
    config = load_config(file, overrides)
    folder = state = None
    if int(os.environ.get("RANK", "0")) == 0:
        if resume:
            # Before anything is written: a checkpoint of another config is refused, and its folder stays as it is.
            RunFolder(out).check_kind()
            device, begun = choose_device(config.backend).type, None
            with contextlib.suppress(ConfigError):  # a damaged file says nothing: the checkpoint knows its own config
                begun = load_config(out / "config.yaml")
            if begun is not None:
                check_same_bits(begun, config, device)
            state = latest(out / CHECKPOINTS, config.fingerprint(device))
            if state is None:
                logger.warning("%s holds no checkpoint yet: starting from round 0", out)
            elif state.round_index > config.rounds:
                message = f"must be at least {state.round_index}, as so many are done in {out}, but is {config.rounds}."
                raise ConfigError([Fault("rounds", message)])
        folder = RunFolder(out)
        if not resume:
            folder.check_new()
    status = execute(config, folder=folder, state=state)
    if is_orphaned():
        logger.warning("the launcher of this rank has died: that was taken for a request to stop")
    return status
