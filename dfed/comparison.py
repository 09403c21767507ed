"""What ``dfed compare`` compares: every entry and seed with its whole config, and how far the run of each is."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dfed.compare_settings import (
    LARGEST_SEED,
    MOST_SEEDS,
    CompareSettings,
    EntrySettings,
    QuickSettings,
    check_compare,
    check_labels,
    overlap,
)
from dfed.config import Config, load_config
from dfed.differences import differences
from dfed.errors import ConfigError, Fault
from dfed.sweeps import swept, take_sweeps
from dfed.yaml_io import apply_override, read_yaml, set_value

__all__ = ["Comparison", "PlannedRun", "check_folder", "load_comparison", "progress_of"]

_OWN = ("runs", "configs", "comparison", "comparison_mean")
_LOGS = (".log", ".out", ".err")

Progress = Literal["new", "unfinished", "finished"]


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a comparison: an entry under one seed."""

    label: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Of its folder, log and config."""
        return f"{self.label}-s{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that is compared.

    Attributes:
        labels: Of the entries, in the order of the tables.
        runs: Seed by seed, so that what is there of an interrupted comparison can be compared.
        target_accuracy: None: ``target_share`` of what the reference reaches.
        reference: Label of the entry that the others are compared to.
        quick: If this is the short form: what was asked for, without what the command line has otherwise.
    """

    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: tuple[PlannedRun, ...]
    target_accuracy: float | None
    target_share: float
    reference: str
    quick: QuickSettings | None = None


def load_comparison(path: str | Path, overrides: Sequence[str] = (), *, strategies: Sequence[str] | None = None,
                    seeds: int | tuple[int, ...] | None = None, quick: bool = False) -> Comparison:
    """The comparison that a config file describes; every run's config is loaded.

    Args:
        overrides: ``key.sub=value``, of the config that all share or of its group ``compare``; with several values
            (``key.sub=a,b``) every entry is there with each of them.
        strategies: Only the entries of these labels or strategies; names that are neither are strategies with their defaults.
        seeds: Instead of the config's, at most 1,000.
        quick: Whether to take the short form, ``compare.quick``; settings of ``overrides`` are kept.

    Raises:
        ConfigError: With all faults there are, of the shared config, of the group, and of every entry.
    """
    raw, faults = read_yaml(path), list[Fault]()
    plain, sweeps = take_sweeps(overrides, faults)
    for override in plain:
        apply_override(raw, override, faults)
    compare = check_compare(raw.pop("compare", {}), faults)
    shared = _faults_of(raw)
    faults += shared
    if compare is None:
        raise ConfigError(faults)
    form = _short_form(compare, overrides, faults) if quick else None
    if form is not None:
        changed = _changed(raw, form.settings, found := list[Fault]())
        found += [fault for fault in _faults_of(changed) if fault not in shared]
        shared += found
        faults += [_of_settings("compare.quick", fault) for fault in found]
    entries = _chosen(compare, strategies)
    if form is not None:
        entries = [(field, _without_own(entry, compare.quick)) for field, entry in entries]
    entries = swept(entries, sweeps, raw, faults)
    if not entries:
        faults.append(Fault("compare.strategies", "must be given, here or by --strategies, but is not."))
    if strategies is not None or sweeps:
        check_labels(entries, faults)
    configs = {entry.label: _config(raw, entry, field, form, shared, faults) for field, entry in entries}
    wanted, field = (compare.seeds, "compare.seeds") if form is None else (form.seeds, "compare.quick.seeds")
    wanted, field = (wanted, field) if seeds is None else (seeds, "--seeds")
    numbers = _seeds(raw.get("seed", 0), wanted, field, faults)
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))  # what a sweep gets wrong is so in each of its entries
    labels = tuple(configs)
    runs = [PlannedRun(label=label, seed=seed, config=replace(config, seed=seed))
            for seed in numbers for label, config in configs.items() if config is not None]
    return Comparison(
        labels=labels, seeds=numbers, runs=tuple(runs), target_accuracy=compare.target_accuracy,
        target_share=compare.target_share, quick=form,
        reference=next((entry.label for _, entry in entries if entry.origin == compare.reference), labels[0]),
    )


def _short_form(compare: CompareSettings, overrides: Sequence[str], faults: list[Fault]) -> QuickSettings | None:
    """The short form, without what the command line sets; None with a fault noted if the config has none."""
    if compare.quick is None:
        faults.append(Fault("compare.quick", "must be given for --quick, but is not."))
        return None
    given = [override.partition("=")[0] for override in overrides]
    kept = {key: value for key, value in compare.quick.settings.items() if not any(overlap(key, each) for each in given)}
    return replace(compare.quick, settings=kept)


def _without_own(entry: EntrySettings, quick: QuickSettings | None) -> EntrySettings:
    """The entry without those of its settings that the short form sets: its own number of rounds would make that a long one."""
    assert quick is not None
    kept = {key: value for key, value in entry.settings.items() if not any(overlap(key, each) for each in quick.settings)}
    return replace(entry, settings=kept)


def _changed(raw: Mapping[str, Any], settings: Mapping[str, Any], faults: list[Fault]) -> dict[str, Any]:
    """A config with settings by dotted key; itself it stays as it is."""
    own = copy.deepcopy(dict(raw))
    for key, value in settings.items():
        set_value(own, key, copy.deepcopy(value), faults)
    return own


def _seeds(first: Any, wanted: int | tuple[int, ...], field: str, faults: list[Fault]) -> tuple[int, ...]:
    """The seeds themselves; a fault if a run would not take one of them. What is wrong with ``first`` is noted already."""
    if not isinstance(wanted, int):
        return wanted
    if type(first) is not int or not 0 <= first <= LARGEST_SEED:
        return ()
    if first + wanted - 1 > LARGEST_SEED:
        message = f"must be at most {LARGEST_SEED - first + 1}, as seeds start at `seed` ({first}), but is {wanted}."
        faults.append(Fault(field, message))
    return tuple(range(first, first + min(wanted, MOST_SEEDS)))


def _faults_of(raw: Mapping[str, Any]) -> list[Fault]:
    try:
        load_config(None, base=raw)
    except ConfigError as error:
        return list(error.faults)
    return []


def _chosen(compare: CompareSettings, names: Sequence[str] | None) -> list[tuple[str, EntrySettings]]:
    """The entries to compare, each with the field that faults of it are said of."""
    own = [(f"compare.strategies[{number}]", entry) for number, entry in enumerate(compare.strategies)]
    if names is None:
        return own
    found: list[tuple[str, EntrySettings]] = []
    for name in names:
        matching = ([pair for pair in own if pair[1].label == name]
                    or [pair for pair in own if pair[1].strategy["name"] == name])
        entry = EntrySettings(label=name.rpartition(":")[2], strategy={"name": name}, settings={})
        found += [pair for pair in matching or [("--strategies", entry)] if pair not in found]
    return found


def _config(raw: Mapping[str, Any], entry: EntrySettings, field: str, quick: QuickSettings | None, shared: Sequence[Fault],
            faults: list[Fault]) -> Config | None:
    """The whole config of an entry; None with those of its faults noted that the shared config does not have itself."""
    options = quick.entries.get(entry.origin, {}) if quick is not None else {}
    found: list[Fault] = []
    own = _changed({**raw, "strategy": {**entry.strategy, **options}}, entry.settings, found)
    if quick is not None:
        own = _changed(own, quick.settings, found)
    try:
        config = load_config(None, base=own)
    except ConfigError as error:
        found += error.faults
    found = [fault for fault in found if fault not in shared]
    faults += [_of_entry(fault, field, f"compare.quick.entries.{entry.origin}", options) for fault in found]
    return None if found or shared else config


def _of_entry(fault: Fault, field: str, quick: str, options: Mapping[str, Any]) -> Fault:
    """A fault of an entry's config, said of where it comes from: the entry, or its ``options`` in the short form."""
    name, _, rest = fault.field.partition(".")
    if name == "strategy":
        if re.split(r"[.\[]", rest)[0] in options:
            return Fault(f"{quick}.{rest}", fault.message)
        return Fault(f"{field}.{rest}" if rest and not field.startswith("--") else field, fault.message)
    return _of_settings(field, fault)


def _of_settings(field: str, fault: Fault) -> Fault:
    return Fault(f"{field}.settings", f"must fit the rest of the config, but with them {fault}")


def check_folder(folder: Path, comparison: Comparison) -> None:
    """Refuse a folder that is not a comparison's, or whose runs had other settings than they would have now.

    Raises:
        ConfigError: If it is; names the first setting that differs, and its two values.
    """
    try:
        found = sorted(folder.iterdir()) if folder.exists() else []
    except OSError as error:
        message = f"must be a folder that can be read, but {folder} is not: {error.strerror}."
        raise ConfigError([Fault("--out", message)]) from error
    foreign = [path.name for path in found
               if not (path.name.split(".")[0] in (*_OWN, "") or path.suffix in _LOGS)]
    if foreign:
        message = f"must be a new folder, or one of an earlier comparison, but {folder} holds {foreign[0]!r}."
        raise ConfigError([Fault("--out", message)])
    faults: dict[str, Fault] = {}
    for run in comparison.runs:
        path = folder / "runs" / run.name / "config.yaml"
        difference = _difference(path, run.config) if path.is_file() else None
        if difference is not None and run.label not in faults:
            name, old, new = difference
            message = (f"must be a folder whose runs have the same settings, but in {path.parent} `{name}` is {old}, where it "
                       f"would be {new} now; choose another folder, or move that one away.")
            faults[run.label] = Fault("--out", message)
    if faults:
        raise ConfigError(list(faults.values()))


def _difference(path: Path, config: Config) -> tuple[str, str, str] | None:
    """The first setting that a config file has otherwise: its name, the value there, and the value here."""
    try:
        there = load_config(path)
    except ConfigError as error:
        message = f"must be a folder whose runs can be gone on with, but in {path} {error.faults[0]}"
        raise ConfigError([Fault("--out", message)]) from error
    return next(differences(there, config), None)


def progress_of(folder: Path) -> Progress:
    """How far the run in ``folder`` is: not begun, begun, or ended in order."""
    if not (folder / "config.yaml").is_file():
        return "new"
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "unfinished"
    return "finished" if isinstance(summary, dict) and summary.get("finished") is True else "unfinished"
