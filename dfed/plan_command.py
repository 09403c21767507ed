"""``dfed plan``: what a fleet or a budget allows, before anything is run."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from rich.console import Console as Terminal
from torch import Tensor

from dfed import overview, planner
from dfed.client import ClientSettings
from dfed.config import Config, load_config
from dfed.data import Bundle, Dataset
from dfed.errors import ConfigError, Fault
from dfed.fleet.budget import parse_memory
from dfed.forecast import asking
from dfed.models import Chain
from dfed.planner import Split, Store
from dfed.planner.compiler import load_compiler_late
from dfed.planner.room import measurable_batch
from dfed.planner.ways import stage_ways, too_few_values
from dfed.registry import UnknownName
from dfed.report.plan import Findings, as_json, show
from dfed.run import Prepared

__all__ = ["blank", "plan_text"]

_TABLE_WIDTH = 400  # a long line wraps; a table made narrow would lose digits
_BLANK = "dfed.plan_command:blank"
_SHAPE, _CLASSES = "3,32,32", "10"
_FIELDS = {"data.shape": "--shape", "data.classes": "--classes", "fleet.tiers[0].memory": "--budget", "num_blocks": "--split"}
_IMAGES = f"must suit the images of data set '{_BLANK}', but "


def plan_text(words: Sequence[str], options: argparse.Namespace) -> str:
    """What ``dfed plan`` prints.

    Args:
        words: A config file or none, and overrides ``key.sub=value``.
        options: Of the command line; None or False where they were not given.

    Raises:
        ConfigError, DataError: If the config or an option asks for what cannot be had; an option's fault bears its name.
    """
    files = [word for word in words if "=" not in word]
    _check_options(files, options)
    load_compiler_late()
    with _of_options(bool(options.model)):
        findings = _find(_config(files, [word for word in words if "=" in word], options), options)
    if options.json:
        return as_json(findings) + "\n"
    return _shown(findings)


def _shown(findings: Findings) -> str:
    """The tables as standard output wants them: its colours, and the characters of its encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding=encoding, errors="replace", newline="")
    show(findings, Terminal(file=file, force_terminal=sys.stdout.isatty(), width=_TABLE_WIDTH, highlight=False))
    file.flush()
    return buffer.getvalue().decode(encoding)


def _check_options(files: Sequence[str], options: argparse.Namespace) -> None:
    """Find all that is wrong with the options themselves."""
    faults: list[Fault] = []
    if (len(files) == 1) == (options.model is not None):
        faults.append(Fault("CONFIG", "must be one YAML file, or else --model NAME, exactly one of the two."))
    elif files:
        for field, value, section in (("--budget", options.budget, "fleet"), ("--shape", options.shape, "data"),
                                      ("--classes", options.classes, "data")):
            if value is not None:
                faults.append(Fault(field, f"must go with --model; a config says so itself, in `{section}`."))
    checks: list[tuple[str, str | None, Callable[[str], Any]]] = [
        ("--budget", options.budget, parse_memory), ("--shape", options.shape, _shape), ("--classes", options.classes, _whole),
        ("--split", options.split, lambda text: text if text == "auto" else _whole(text)),
        ("--train", options.train, _given), ("--strategies", options.strategies, _names),
    ]
    for field, text, check in checks:
        try:
            if text is not None:
                check(text)
        except ValueError as error:
            faults.append(Fault(field, str(error)))
    if faults:
        raise ConfigError(faults)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"must be a whole number, but is '{text}'.") from None


def _shape(text: str) -> list[int]:
    parts = text.split(",")
    if len(parts) != 3:
        raise ValueError(f"must be three whole numbers, channels, height and width, such as {_SHAPE}, but is '{text}'.")
    return [_whole(part) for part in parts]


def _given(text: str) -> str:
    if not text.strip():
        raise ValueError(f"must be FIRST:LAST, FIRST: or :LAST, but is '{text}'.")
    return text


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"must be names with commas between them, none of them empty, but is '{text}'.")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"must name each strategy once, but names '{twice[0]}' {names.count(twice[0])} times.")
    return names


def _config(files: Sequence[str], overrides: Sequence[str], options: argparse.Namespace) -> Config:
    """The config to look at: a file's, or that of one device with the model asked about."""
    if files:
        return load_config(files[0], overrides)
    shape, classes = _shape(options.shape or _SHAPE), _whole(options.classes or _CLASSES)
    return load_config(None, overrides, base={
        "rounds": 1, "cohort": 1, "model": options.model, "data": {"dataset": _BLANK, "shape": shape, "classes": classes},
        "fleet": {"clients": 1, "tiers": [{"name": "device", "count": 1, "memory": options.budget}]},
    })


def blank(
    *,
    root: str | None,
    download: bool,
    cache: str | None,
    seed: int,
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)],
    classes: Annotated[int, Field(ge=1)],
) -> Bundle:
    """Empty images of any shape and number of classes: for a model by itself, which is planned but not trained.

    Args:
        root, download, cache, seed: Not needed: nothing is stored or drawn.
        shape: Channels, height and width.
        classes: Number of classes; each has a sample.
    """
    size = (shape[0], shape[1], shape[2])
    return Bundle(_Blank(size, classes), _Blank(size, classes))


class _Blank(Dataset):
    """Images of zeros; sample ``i`` is of class ``i`` modulo their number."""

    def __init__(self, shape: tuple[int, int, int], classes: int):
        self.num_samples, self.num_classes, self.shape = max(100, classes), classes, shape

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return indices % self.num_classes

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(indices), *self.shape), torch.from_numpy(self.labels(indices))


def _find(config: Config, options: argparse.Namespace) -> Findings:
    names = None if options.strategies is None else _names(options.strategies)
    choices = []
    if not options.model or names:
        with _naming("--strategies"):
            choices = overview.choices(config, names)
    prepared = overview.prepare_to_plan(config)
    survey = overview.Survey(prepared)
    strategies = [(choice.name, *found) for choice, found in zip(choices, survey.under_each(choices), strict=True)]
    with asking("fedavg", config.model.name):
        about = _about_the_model(prepared, options)
    return Findings(
        model=config.model.name, num_params=sum(p.numel() for p in prepared.chain.parameters()),
        batch_size=config.client.batch_size, budget_bytes=_budget(prepared, options), strategies=strategies, **about,
    )


def _budget(prepared: Prepared, options: argparse.Namespace) -> int | None:
    return prepared.fleet.profile(0).budget_bytes if options.model else None


def _about_the_model(prepared: Prepared, options: argparse.Namespace) -> dict[str, Any]:
    """What was asked about the model by itself."""
    client, store, about = prepared.config.client, planner.Store.of_user(prepared.config.data.cache), {}
    chain: Chain = prepared.chain
    if options.model or options.train or options.split:
        budget = _budget(prepared, options)
        with _naming("--train"):
            about["ways"] = planner.ways(chain, client, budget, train=options.train, store=store)
        if options.split:
            about["split"] = _split(chain, client, options.split, store)
            about["ways"] += stage_ways(chain, about["split"], client, budget, store)
    if options.units or options.measure:
        about["units"] = planner.profile_chain(chain, store)
    if options.measure:
        about["measured_batch"] = measurable_batch(chain, client, prepared.device, store)
        about["seconds"] = planner.measure_units(chain, about["measured_batch"], prepared.device, store=store)
    return about


def _split(chain: Chain, settings: ClientSettings, text: str, store: Store) -> Split:
    try:
        return planner.split_chain(chain, settings, num_blocks=None if text == "auto" else _whole(text), store=store)
    except ValueError as error:
        reason = too_few_values(error)
        if reason is None:
            raise
        message = f"must go with a `client.batch_size` at which all stages can be trained, but {reason}."
        raise ConfigError([Fault("--split", message)]) from error


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """A name that is not known is a fault of this option."""
    try:
        yield
    except UnknownName as error:
        raise ConfigError([Fault(field, str(error))]) from error


@contextmanager
def _of_options(model_by_itself: bool) -> Iterator[None]:
    """Faults of what an option has put into the config, or passed on, are said of the option."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([_of_option(fault, model_by_itself) for fault in error.faults]) from error


def _of_option(fault: Fault, model_by_itself: bool) -> Fault:
    if model_by_itself and fault.message.startswith(_IMAGES):
        return Fault("model", f"must suit images of this shape (--shape), but {fault.message.removeprefix(_IMAGES)}")
    field = fault.field.partition("[")[0] if fault.field.startswith("data.shape") else fault.field
    renamed = model_by_itself or field == "num_blocks"
    return Fault(_FIELDS.get(field, fault.field) if renamed else fault.field, fault.message)
