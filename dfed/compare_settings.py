"""The group ``compare`` of a config: what ``dfed compare`` runs under the same fleet, data and seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfed.errors import Fault
from dfed.faults import shown, unknown_setting

__all__ = [
    "DEFAULT_SEEDS", "LARGEST_SEED", "MOST_SEEDS", "TARGET_SHARE", "CompareSettings", "EntrySettings", "QuickSettings",
    "check_compare", "check_labels", "overlap",
]

DEFAULT_SEEDS = 3
"""Number of seeds where the config names none."""

TARGET_SHARE = 0.95
"""Where the config names neither a target accuracy nor a share: that of the reference's mean final accuracy."""

MOST_SEEDS = 1000
"""Each is a run of every entry."""

LARGEST_SEED = 2**63 - 1
"""What a run accepts."""

_KEYS = ("quick", "reference", "seeds", "strategies", "target_accuracy", "target_share")
_QUICK_KEYS = ("entries", "seeds", "settings")
_NO_OPTIONS = ("label", "name", "settings")
_MOST_SHARE = 1.5
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_SAME_FOR_ALL = ("compare", "data", "fleet", "seed", "strategy")
_GROUPS = ("backend", "checkpoint", "client", "codecs", "memory", "metrics", "server")
_NOT_QUICK = ("compare", "seed", "strategy")


@dataclass(frozen=True, kw_only=True)
class EntrySettings:
    """One thing to compare.

    Attributes:
        label: Unique; names its runs' folders.
        strategy: As a config writes it: a group with ``name`` and options, which are not checked yet.
        settings: Settings of its runs only, by dotted key; none is a whole group, and none is inside another.
        swept_from: If a sweep made it: the label of the entry that it is made from.
    """

    label: str
    strategy: Mapping[str, Any]
    settings: Mapping[str, Any]
    swept_from: str | None = None

    @property
    def origin(self) -> str:
        """The label of the entry in the config."""
        return self.swept_from or self.label


@dataclass(frozen=True, kw_only=True)
class QuickSettings:
    """A short form of the comparison, for ``--quick``.

    Attributes:
        seeds: As those of the comparison.
        settings: Settings of all runs, by dotted key, in the place of the config's and the entries' own; no whole group either.
        entries: By label: options of the strategy in the place of the entry's own, not checked yet.
    """

    seeds: int | tuple[int, ...]
    settings: Mapping[str, Any]
    entries: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """The group ``compare``, valid in itself.

    Attributes:
        strategies: In the order of the tables; their labels differ.
        seeds: A number of seeds, counted from the config's own, or the seeds themselves.
        target_accuracy: What time and energy are counted to; None: a share of what the reference reaches.
        target_share: That share, in (0, 1.5].
        reference: Label of the entry that the others are compared to; None: the first.
        quick: A short form; None: the config has none.
    """

    strategies: tuple[EntrySettings, ...] = ()
    seeds: int | tuple[int, ...] = DEFAULT_SEEDS
    target_accuracy: float | None = None
    target_share: float = TARGET_SHARE
    reference: str | None = None
    quick: QuickSettings | None = None


def check_compare(raw: Any, faults: list[Fault]) -> CompareSettings | None:
    """The group as settings; None with the faults noted. The strategies' options and settings are not looked at."""
    if not isinstance(raw, Mapping):
        faults.append(Fault("compare", f"must be a group of settings, but is {shown(raw)}."))
        return None
    before = len(faults)
    faults.extend(Fault(f"compare.{key}", unknown_setting(str(key), _KEYS)) for key in raw if key not in _KEYS)
    entries = _entries(raw.get("strategies", []), faults)
    seeds = _seeds(raw.get("seeds", DEFAULT_SEEDS), "compare.seeds", faults)
    target, share, reference = raw.get("target_accuracy"), raw.get("target_share"), raw.get("reference")
    _check_number(target, "compare.target_accuracy", 1, faults)
    _check_number(share, "compare.target_share", _MOST_SHARE, faults)
    if target is not None and share is not None:
        message = f"must be left out, or null, where `compare.target_accuracy` is given, but is {shown(share)}."
        faults.append(Fault("compare.target_share", message))
    labels = [entry.label for entry in entries]
    if reference is not None and (reference not in labels and (len(faults) == before or not isinstance(reference, str))):
        wanted = f"one of the labels {', '.join(labels)}" if labels else "left out where no strategies are given"
        faults.append(Fault("compare.reference", f"must be {wanted}, but is {shown(reference)}."))
    quick = None if raw.get("quick") is None else _quick(raw["quick"], labels if len(faults) == before else None, faults)
    if len(faults) > before:
        return None
    return CompareSettings(strategies=tuple(entries), seeds=seeds, target_accuracy=target, reference=reference, quick=quick,
                           target_share=TARGET_SHARE if share is None else share)


def _check_number(raw: Any, field: str, most: float, faults: list[Fault]) -> None:
    if raw is not None and (type(raw) not in (int, float) or not 0 < raw <= most):
        faults.append(Fault(field, f"must be a number greater than 0 and at most {most}, or null, but is {shown(raw)}."))


def _quick(raw: Any, labels: Sequence[str] | None, faults: list[Fault]) -> QuickSettings | None:
    """The short form. ``labels``: of the entries; None: not known, as some are wrong."""
    place = "compare.quick"
    if not isinstance(raw, Mapping):
        faults.append(Fault(place, f"must be a group of settings, but is {shown(raw)}."))
        return None
    faults.extend(Fault(f"{place}.{key}", unknown_setting(str(key), _QUICK_KEYS)) for key in raw if key not in _QUICK_KEYS)
    seeds = _seeds(raw.get("seeds", 1), f"{place}.seeds", faults)
    settings = _settings(raw.get("settings", {}), f"{place}.settings", faults, is_quick=True)
    entries = raw.get("entries", {})
    if not isinstance(entries, Mapping):
        faults.append(Fault(f"{place}.entries", f"must be a group of labels, each with options, but is {shown(entries)}."))
        return None
    for label, options in entries.items():
        where = f"{place}.entries.{label}"
        if labels is not None and label not in labels:
            wanted = f"one of the labels {', '.join(labels)}" if labels else "no label, as no strategies are given"
            faults.append(Fault(f"{place}.entries", f"must name {wanted}, but names {shown(label)}."))
        elif not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
            faults.append(Fault(where, f"must be a group of the strategy's options, but is {shown(options)}."))
        else:
            faults.extend(Fault(where, f"must have options of the strategy only, but has {shown(key)}.")
                          for key in options if key in _NO_OPTIONS)
    return None if settings is None else QuickSettings(seeds=seeds, settings=settings, entries=dict(entries))


def _seeds(raw: Any, field: str, faults: list[Fault]) -> int | tuple[int, ...]:
    if type(raw) is int and 1 <= raw <= MOST_SEEDS:
        return raw
    if (isinstance(raw, list) and 1 <= len(raw) <= MOST_SEEDS
            and all(type(seed) is int and 0 <= seed <= LARGEST_SEED for seed in raw) and len(set(raw)) == len(raw)):
        return tuple(raw)
    message = (f"must be a number of seeds of at least 1 and at most {MOST_SEEDS}, or a list of as many different seeds of at "
               f"least 0 and at most {LARGEST_SEED}")
    faults.append(Fault(field, f"{message}, but is {shown(raw)}."))
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
    name = raw.get("name")
    if not isinstance(name, str) or not name:
        faults.append(Fault(f"{field}.name", f"must name a strategy, but is {shown(name)}."))
        return None
    label = raw.get("label", name.rpartition(":")[2])
    if not isinstance(label, str):
        faults.append(Fault(f"{field}.label", f"must be text, but is {shown(label)}."))
        return None
    settings = _settings(raw.get("settings", {}), f"{field}.settings", faults)
    if settings is None:
        return None
    strategy = {key: value for key, value in raw.items() if key not in ("label", "settings")}
    return EntrySettings(label=label, strategy=strategy, settings=settings)


def _settings(raw: Any, field: str, faults: list[Fault], *, is_quick: bool = False) -> dict[str, Any] | None:
    """Settings by dotted key. A group as a whole would take the place of the shared config's, whose other settings would be
    lost unseen."""
    if not isinstance(raw, Mapping) or not all(isinstance(key, str) for key in raw):
        faults.append(Fault(field, f"must be a group of settings key.sub: value, but is {shown(raw)}."))
        return None
    left_alone, why = (_NOT_QUICK, "") if is_quick else (_SAME_FOR_ALL, ", which are the same for all")
    groups, keys = {*_GROUPS, *_SAME_FOR_ALL}, list(raw)
    for number, key in enumerate(keys):
        path = _path(key)
        if path[0] in left_alone:
            faults.append(Fault(field, f"must leave {', '.join(left_alone)} alone{why}, but sets {shown(key)}."))
        elif len(path) == 1 and path[0] in groups:
            faults.append(Fault(field, f"must have the form key.sub: value, but sets the whole group {shown(key)}."))
        for other in keys[:number]:
            outer, inner = sorted((other, key), key=lambda each: len(_path(each)))
            if overlap(outer, inner):
                message = f"must set nothing twice, but has both {shown(outer)} and {shown(inner)}, which is part of it."
                faults.append(Fault(field, message))
    return dict(raw)


def _path(key: str) -> tuple[str, ...]:
    """The parts of a dotted key; ``tiers.0`` and ``tiers[0]`` are the same."""
    return tuple(part.rstrip("]") for part in re.split(r"[.\[]", key))


def overlap(key: str, other: str) -> bool:
    """Whether two dotted keys are the same, or one is of a part of what the other sets."""
    return all(mine == its for mine, its in zip(_path(key), _path(other), strict=False))


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
