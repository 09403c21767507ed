"""In which settings two configs differ, and which of them a run that is gone on with must keep."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from dfed.config import Config, load_config
from dfed.errors import ConfigError, Fault
from dfed.faults import shown
from dfed.yaml_io import set_value

__all__ = ["check_same_bits", "differences"]

_ABSENT = object()


def differences(there: Config, here: Config) -> Iterator[tuple[str, str, str]]:
    """All single settings that differ: the dotted name, the value there, and the value here, as a message shows them."""
    for name, old, new in _differing(there, here):
        yield name, *("not set" if value is _ABSENT else shown(value) for value in (old, new))  # type: ignore[misc]


class _Settled(Protocol):
    """A config of a run, or of another kind of training."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, complete."""

    def fingerprint(self, device: str) -> str:
        """Hash of what decides the trained bits."""


def check_same_bits(there: _Settled, here: _Settled, device: str, load: Callable[..., _Settled] = load_config) -> None:
    """Refuse to go on with a run under settings that would give other bits.

    Args:
        there: The run's config.
        here: The one to go on with, of the same kind.
        device: As for :meth:`Config.fingerprint`.
        load: Makes a config of this kind, as :func:`dfed.config.load_config` does.

    Raises:
        ConfigError: Naming each such setting, and both values.
    """
    if there.fingerprint(device) == here.fingerprint(device):
        return
    faults = []
    for name, old, new in _differing(there, here):
        if new is _ABSENT or old is _ABSENT or _decides(there, name, new, device, load):
            values = ["not set" if value is _ABSENT else shown(value) for value in (old, new)]
            message = f"must be {values[0]}, as in the run that is resumed, whose bits depend on it, but is {values[1]}."
            faults.append(Fault(name, message))
    raise ConfigError(faults or [Fault("--resume", "must go with the settings of the run in it, but they differ.")])


def _decides(config: _Settled, name: str, value: Any, device: str, load: Callable[..., _Settled]) -> bool:
    """Whether the bits of a run are others with this setting alone changed; or if it cannot be changed alone."""
    raw = copy.deepcopy(config.to_dict())
    faults: list[Fault] = []
    set_value(raw, name, value, faults)
    try:
        return bool(faults) or load(None, base=raw).fingerprint(device) != config.fingerprint(device)
    except ConfigError:
        return True


def _differing(there: _Settled, here: _Settled) -> Iterator[tuple[str, Any, Any]]:
    before, now = (dict(_flat(config.to_dict())) for config in (there, here))
    for name in dict.fromkeys([*now, *before]):
        old, new = before.get(name, _ABSENT), now.get(name, _ABSENT)
        if old != new or type(old) is not type(new):
            yield name, old, new


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All single values, by their dotted names; empty groups and lists are values."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value:
        for number, part in enumerate(value):
            yield from _flat(part, f"{name}[{number}]")
    else:
        yield name, value
