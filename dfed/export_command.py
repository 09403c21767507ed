"""``dfed export``: the trained model of a run, or a sub-model of it, as files that need nothing of dfed."""

from __future__ import annotations

import argparse
import gc
import logging
import re
from pathlib import Path

from dfed.errors import ConfigError, Fault
from dfed.export import DESCRIPTION, PROGRAM, WEIGHTS, Trained, figures, open_run, write
from dfed.settings import format_bytes

__all__ = ["export_text"]

logger = logging.getLogger(__name__)

_GLOBAL = "model"


def export_text(options: argparse.Namespace) -> str:
    """Do what ``dfed export`` was asked to; returns what it prints.

    Args:
        options: Of the command line; None or False where they were not given.

    Raises:
        ConfigError, DataError: If an option or the folder asks for what cannot be had.
        DfedError: If no checkpoint can be read, or the model cannot be exported.
    """
    _check_options(options)
    try:
        trained = open_run(Path(options.run))
        done, rounds = trained.state.round_index, trained.config.rounds
        if done < rounds:
            logger.warning("%s is not finished: this is the model of its newest checkpoint, after %d of %d rounds",
                           trained.path, done, rounds)
        if options.list:
            return _table(trained)
        variant = _chosen(trained, options)
        out = Path(options.out) if options.out else trained.path / "export" / _folder_name(variant or _GLOBAL)
        found = write(trained, variant, out)
    finally:
        gc.unfreeze()
    accuracy = "" if found["accuracy"] is None else f", {found['split']} accuracy {found['accuracy']:.4f}"
    return (f"{out}: {WEIGHTS}, {PROGRAM}, {DESCRIPTION}\n"
            f"  {variant or 'the global model'} of {trained.path} after round {done}: {found['num_params']:,} parameters, "
            f"{format_bytes(found['num_bytes'])}, {found['forward_flops']:,} FLOP a sample{accuracy}\n")


def _check_options(options: argparse.Namespace) -> None:
    """Find all that is wrong with the options themselves."""
    faults: list[Fault] = []
    given = {f"--{name}": getattr(options, name) for name in ("variant", "depth", "out")}
    if options.list:
        unused = [name for name, value in given.items() if value is not None]
        faults += [Fault(name, "must be left out with --list, which writes nothing.") for name in unused]
    elif options.variant is not None and options.depth is not None:
        faults.append(Fault("--depth", "must be left out with --variant, which names the same thing."))
    if options.depth is not None and not re.fullmatch(r"0*[1-9][0-9]*", options.depth):
        faults.append(Fault("--depth", f"must be a whole number of at least 1, but is '{options.depth}'."))
    for name, value in (("RUN", options.run), ("--out", options.out)):
        if value is not None and not value.strip():
            faults.append(Fault(name, f"must name a folder, but is {value!r}."))
    if faults:
        raise ConfigError(faults)


def _chosen(trained: Trained, options: argparse.Namespace) -> str | None:
    """The variant asked for; None: the global model."""
    known = trained.variants
    if options.depth is not None:
        field, value, wanted = "--depth", options.depth, [f"depth {int(options.depth)}", f"exit{int(options.depth)}"]
    elif options.variant is not None:
        field, value, wanted = "--variant", options.variant, [options.variant]
    else:
        return None
    found = [name for name in wanted if name in known]
    if not found:
        about = f"strategy '{trained.config.strategy.name}'"
        has = f"the variants of {about} are {', '.join(known)}" if known else f"{about} has no variants"
        what = "name a variant" if field == "--variant" else "be K of a variant called 'depth K' or 'exitK'"
        raise ConfigError([Fault(field, f"must {what}, but is '{value}': {has}.")])
    return found[0]


def _folder_name(variant: str) -> str:
    """The variant's name, without what a file system might take for something else."""
    return re.sub(r"[^\w .=+-]|^\.", "_", variant)


def _table(trained: Trained) -> str:
    """What can be exported: the global model, and the variants."""
    strategy, config = trained.run.job.strategy, trained.config
    lines = [("", "parameters", "accuracy", "loss")]
    for variant in (None, *trained.variants):
        count = sum(parameter.numel() for parameter in strategy.build(trained.plan_of(variant)).parameters())
        found = figures(trained, variant)
        lines.append((variant or "(global model)", f"{count:,}",
                      *("–" if found[name] is None else f"{found[name]:.4f}" for name in ("accuracy", "loss"))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [f"  {line[0]:{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
            for line in lines]
    head = f"{trained.path}: '{config.model.name}' under '{config.strategy.name}' after {trained.state.round_index} rounds"
    return "\n".join([head, *(row.rstrip() for row in rows), ""])
