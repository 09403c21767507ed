"""Sweeps: ``key=a,b,c`` on the command line of ``dfed compare`` makes of every entry one for each value."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dfed.compare_settings import EntrySettings, overlap
from dfed.errors import Fault
from dfed.faults import shown
from dfed.yaml_io import parts_of

__all__ = ["Sweep", "swept", "take_sweeps"]

_MOST = 1000
_ONE_ONLY = {"compare": "belongs to the comparison as a whole", "seed": "has an option of its own, --seeds"}


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
        if len(values) < 2:
            plain.append(override)
            continue
        why = _ONE_ONLY.get(re.split(r"[.\[]", key)[0])
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


def swept(entries: Sequence[tuple[str, EntrySettings]], sweeps: Sequence[Sweep]) -> list[tuple[str, EntrySettings]]:
    """Each entry, with the field that it stands in, once for each combination of values; the label says which."""
    if not sweeps:
        return list(entries)
    found = []
    for field, entry in entries:
        kept = {key: value for key, value in entry.settings.items() if not any(overlap(key, sweep.key) for sweep in sweeps)}
        for values in itertools.product(*(sweep.values for sweep in sweeps)):
            named = [(sweep.key, value) for sweep, value in zip(sweeps, values, strict=True)]
            label = "-".join([entry.label, *(_short(key, value) for key, value in named)])
            found.append((field, replace(entry, label=label, settings={**kept, **dict(named)}, swept_from=entry.label)))
    return found


def _short(key: str, value: Any) -> str:
    """A setting as a part of a label: ``learning_rate0.1``."""
    name = re.split(r"[.\[]", key)[-1].rstrip("]")
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", name + text.strip('[]{}" ')).strip("_")
