"""The group ``compare`` of a config: what ``dfed compare`` runs under the same fleet, data and seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfed.errors import Fault
from dfed.faults import shown, unknown_setting

__all__ = ["DEFAULT_SEEDS", "LARGEST_SEED", "MOST_SEEDS", "CompareSettings", "EntrySettings", "check_compare", "check_labels"]

DEFAULT_SEEDS = 3
"""Number of seeds where the config names none."""

MOST_SEEDS = 1000
"""Each is a run of every entry."""

LARGEST_SEED = 2**63 - 1
"""What a run accepts."""

_KEYS = ("reference", "seeds", "strategies", "target_accuracy")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_SAME_FOR_ALL = ("compare", "data", "fleet", "seed", "strategy")
_GROUPS = ("backend", "checkpoint", "client", "codecs", "memory", "metrics", "server")


@dataclass(frozen=True, kw_only=True)
class EntrySettings:
    """One thing to compare.

    Attributes:
        label: Unique; names its runs' folders.
        strategy: As a config writes it: a group with ``name`` and options, which are not checked yet.
        settings: Settings of its runs only, by dotted key; none is a whole group, and none is inside another.
    """

    label: str
    strategy: Mapping[str, Any]
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """The group ``compare``, valid in itself.

    Attributes:
        strategies: In the order of the tables; their labels differ.
        seeds: A number of seeds, counted from the config's own, or the seeds themselves.
        target_accuracy: What time and energy are counted to; None: a share of what the reference reaches.
        reference: Label of the entry that the others are compared to; None: the first.
    """

    strategies: tuple[EntrySettings, ...] = ()
    seeds: int | tuple[int, ...] = DEFAULT_SEEDS
    target_accuracy: float | None = None
    reference: str | None = None


def check_compare(raw: Any, faults: list[Fault]) -> CompareSettings | None:
    """The group as settings; None with the faults noted. The strategies' options and settings are not looked at."""
    if not isinstance(raw, Mapping):
        faults.append(Fault("compare", f"must be a group of settings, but is {shown(raw)}."))
        return None
    before = len(faults)
    faults.extend(Fault(f"compare.{key}", unknown_setting(str(key), _KEYS)) for key in raw if key not in _KEYS)
    entries = _entries(raw.get("strategies", []), faults)
    seeds = _seeds(raw.get("seeds", DEFAULT_SEEDS), faults)
    target, reference = raw.get("target_accuracy"), raw.get("reference")
    if target is not None and (type(target) not in (int, float) or not 0 < target <= 1):
        message = f"must be a number greater than 0 and at most 1, or null, but is {shown(target)}."
        faults.append(Fault("compare.target_accuracy", message))
    labels = [entry.label for entry in entries]
    if reference is not None and (reference not in labels and (len(faults) == before or not isinstance(reference, str))):
        wanted = f"one of the labels {', '.join(labels)}" if labels else "left out where no strategies are given"
        faults.append(Fault("compare.reference", f"must be {wanted}, but is {shown(reference)}."))
    if len(faults) > before:
        return None
    return CompareSettings(strategies=tuple(entries), seeds=seeds, target_accuracy=target, reference=reference)


def _seeds(raw: Any, faults: list[Fault]) -> int | tuple[int, ...]:
    if type(raw) is int and 1 <= raw <= MOST_SEEDS:
        return raw
    if (isinstance(raw, list) and 1 <= len(raw) <= MOST_SEEDS
            and all(type(seed) is int and 0 <= seed <= LARGEST_SEED for seed in raw) and len(set(raw)) == len(raw)):
        return tuple(raw)
    message = (f"must be a number of seeds of at least 1 and at most {MOST_SEEDS}, or a list of as many different seeds of at "
               f"least 0 and at most {LARGEST_SEED}")
    faults.append(Fault("compare.seeds", f"{message}, but is {shown(raw)}."))
    return DEFAULT_SEEDS


def _entries(raw: Any, faults: list[Fault]) -> list[EntrySettings]:
    if not isinstance(raw, list) or not all(isinstance(part, (str, Mapping)) for part in raw):
        faults.append(Fault("compare.strategies", f"must be a list of names and groups with a `name`, but is {shown(raw)}."))
        return []
    found = [_entry(part, f"compare.strategies[{number}]", faults) for number, part in enumerate(raw)]
    entries = [entry for entry in found if entry is not None]
    check_labels([(f"compare.strategies[{number}]", entry) for number, entry in enumerate(found) if entry is not None], faults)
    return entries


def _entry(raw: Any, field: str, faults: list[Fault]) -> EntrySettings | None:
    raw = {"name": raw} if isinstance(raw, str) else raw
    name, settings = raw.get("name"), raw.get("settings", {})
    if not isinstance(name, str) or not name:
        faults.append(Fault(f"{field}.name", f"must name a strategy, but is {shown(name)}."))
        return None
    label = raw.get("label", name.rpartition(":")[2])
    if not isinstance(label, str):
        faults.append(Fault(f"{field}.label", f"must be text, but is {shown(label)}."))
        return None
    if not isinstance(settings, Mapping) or not all(isinstance(key, str) for key in settings):
        faults.append(Fault(f"{field}.settings", f"must be a group of settings key.sub: value, but is {shown(settings)}."))
        return None
    _check_keys(list(settings), f"{field}.settings", faults)
    strategy = {key: value for key, value in raw.items() if key not in ("label", "settings")}
    return EntrySettings(label=label, strategy=strategy, settings=dict(settings))


def _check_keys(keys: Sequence[str], field: str, faults: list[Fault]) -> None:
    """A group as a whole would take the place of the shared config's, whose other settings would be lost unseen."""
    paths = {key: tuple(part.rstrip("]") for part in re.split(r"[.\[]", key)) for key in keys}
    for number, (key, path) in enumerate(paths.items()):
        if path[0] in _SAME_FOR_ALL:
            message = f"must leave {', '.join(_SAME_FOR_ALL)} alone, which are the same for all, but sets {shown(key)}."
            faults.append(Fault(field, message))
        elif len(path) == 1 and path[0] in _GROUPS:
            faults.append(Fault(field, f"must have the form key.sub: value, but sets the whole group {shown(key)}."))
        for other in keys[:number]:
            inner, outer = (key, other) if len(path) >= len(paths[other]) else (other, key)
            if paths[inner][:len(paths[outer])] == paths[outer]:
                message = f"must set nothing twice, but has both {shown(outer)} and {shown(inner)}, which is part of it."
                faults.append(Fault(field, message))


def check_labels(entries: Sequence[tuple[str, EntrySettings]], faults: list[Fault]) -> None:
    """Labels must differ, as folders do on every system, and be usable as folder names.

    Args:
        entries: Each with the field that it stands in; those of the command line stand in one together.
    """
    taken: dict[str, tuple[str, EntrySettings]] = {}
    for field, entry in entries:
        own, label = not field.startswith("--"), shown(entry.label)
        other = taken.setdefault(entry.label.lower(), (field, entry))
        if not _LABEL.fullmatch(entry.label):
            message = "at most 64 of the characters A–Z a–z 0–9 . _ + -, the first a letter or digit"
            wanted = f"must be {message}, but is {label}." if own else f"must give labels of {message}, but gives {label}."
            faults.append(Fault(f"{field}.label" if own else field, wanted))
        elif other[1] is not entry and own:
            faults.append(Fault(f"{field}.label", f"must differ from that of {other[0]}, but is {label} too; give a `label`."))
        elif other[1] is not entry:
            names = " and ".join(shown(each.strategy["name"]) for each in (other[1], entry))
            message = f"must give different labels, but {names} are both {label}; list them in the config, with a `label` each."
            faults.append(Fault(field, message))
