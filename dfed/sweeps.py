"""Sweeps: ``key=a,b,c`` on the command line of ``dfed compare`` makes of every entry one for each value."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dfed.compare_settings import EntrySettings, overlap
from dfed.errors import Fault
from dfed.faults import shown
from dfed.yaml_io import parts_of

__all__ = ["Sweep", "swept", "take_sweeps"]

_MOST = 1000
_ONE_ONLY = {"compare": "belongs to the comparison as a whole", "seed": "has an option of its own, --seeds",
             "strategy": "has an option of its own, --strategies"}


@dataclass(frozen=True)
class Sweep:
    """One setting, and the values that it takes in turn."""

    key: str
    values: tuple[Any, ...]


def take_sweeps(overrides: Sequence[str], faults: list[Fault]) -> tuple[list[str], list[Sweep]]:
    """Overrides of one value, and those of several: ``client.learning_rate=0.1,0.2``, but not ``model.hidden=[8,8]``."""
    plain, sweeps = [], list[Sweep]()
    for override in overrides:
        key, _, text = override.partition("=")
        values = parts_of(text)
        if re.search(r"^\s*,|,\s*,|,\s*$", text):
            faults.append(Fault(key, f"must have no empty value, but is {shown(text)}."))
            continue
        if len(values) < 2:
            plain.append(override)
            continue
        top, _, rest = key.partition(".")
        why = _ONE_ONLY.get(top) if top != "strategy" or rest in ("", "name") else None
        if why is not None:
            faults.append(Fault(key, f"must be one value, as it {why}, but is {shown(text)}."))
            continue
        faults.extend(Fault(key, f"must be given once, but is there as {shown(each.key)}, too.") for each in sweeps
                      if overlap(key, each.key))
        if any(value in values[:number] for number, value in enumerate(values)):
            faults.append(Fault(key, f"must have different values, but is {shown(text)}."))
            continue
        sweeps.append(Sweep(key, tuple(values)))
    total = 1
    for sweep in sweeps:
        total *= len(sweep.values)
    if total > _MOST:
        message = f"must have so few values that there are at most {_MOST} combinations, but there are {total}."
        faults.append(Fault(sweeps[-1].key, message))
        return plain, []
    return plain, sweeps


def swept(entries: Sequence[tuple[str, EntrySettings]], sweeps: Sequence[Sweep], raw: Mapping[str, Any],
          faults: list[Fault]) -> list[tuple[str, EntrySettings]]:
    """Each entry, with the field that it stands in, once for each combination of values; the label says which.

    Args:
        raw: The config that all share.
    """
    if not sweeps:
        return list(entries)
    for sweep in sweeps:
        lacking = [entry.label for _, entry in entries if not _has_wrapper(sweep.key, entry, raw)]
        if lacking:
            group = ".".join(_parts(sweep.key)[:2])
            message = (f"must be a setting of all the entries, but {', '.join(lacking)} would get a `{group}` that there is "
                       "none of: choose the others by --strategies.")
            faults.append(Fault(sweep.key, message))
    found, names = [], _names([sweep.key for sweep in sweeps])
    for field, entry in entries:
        kept = {key: value for key, value in entry.settings.items() if not any(_is_within(key, sweep.key) for sweep in sweeps)}
        for values in itertools.product(*(sweep.values for sweep in sweeps)):
            named = [(sweep.key, value) for sweep, value in zip(sweeps, values, strict=True)]
            label = "-".join([entry.label, *(_short(names[key], value) for key, value in named)])
            found.append((field, replace(entry, label=label, settings={**kept, **dict(named)}, swept_from=entry.label)))
    return found


def _has_wrapper(key: str, entry: EntrySettings, raw: Mapping[str, Any]) -> bool:
    """Whether what the setting is of is around the entry's strategy already, if it is a wrapper's."""
    top, *rest = _parts(key)
    if top != "wrap" or len(rest) < 2:
        return True
    own = entry.settings.get("wrap", raw.get("wrap"))
    return (isinstance(own, Mapping) and rest[0] in own) or any(_parts(each)[:2] == [top, rest[0]] for each in entry.settings)


def _is_within(key: str, other: str) -> bool:
    """Whether ``key`` is ``other``, or a part of what that sets; of a group that it is a part of, the rest stays."""
    return overlap(key, other) and len(_parts(key)) >= len(_parts(other))


def _parts(key: str) -> list[str]:
    return re.sub(r"\[(\d+)\]", r".\1", key).split(".")


def _names(keys: Sequence[str]) -> dict[str, str]:
    """What labels call settings: their last part, and as many before it as tell them apart."""
    parts = {key: _parts(key) for key in keys}
    for count in range(1, 1 + max(map(len, parts.values()), default=0)):
        names = {key: ".".join(own[-count:]) for key, own in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return dict(zip(keys, keys, strict=True))


def _short(name: str, value: Any) -> str:
    """A setting as a part of a label: ``learning_rate0.1``."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", name + text.strip('[]{}" ')).strip("_")
