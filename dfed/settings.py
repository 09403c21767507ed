"""The base of all settings, and the types that several of them share.

Each part of dfed declares its settings beside itself, as a frozen pydantic model; ``config.py`` composes them. Strict:
no string becomes a number, no unknown key is ignored.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from collections.abc import Callable, Collection
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, create_model

__all__ = ["ByteRate", "Bytes", "Rate", "Settings", "format_bytes", "parse_quantity", "settings_of"]

_DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SPELLINGS = {
    "FLOP/s": {r"(?i:FLOPS|FLOP/s|FLOP)": 1.0},
    "B/s": {r"(?:B/s|Bps|(?i:bytes?/s))": 1.0, r"(?:b/s|bps|(?i:bits?/s))": 1 / 8},
}


class Settings(BaseModel):
    """Base of every settings class: frozen, strict, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


@functools.lru_cache(maxsize=4096)  # a fleet's file says the same of many clients
def parse_quantity(text: str, unit: str) -> float:
    """Read a number with an SI or binary prefix and a unit: ``"64MB"``, ``"1.5 GiB"``, ``"20 GFLOPS"``, ``"10 Mbps"``.

    Upper and lower case are alike, but for the letter that tells bits from bytes in a speed: ``B/s`` and ``Bps`` are
    bytes, ``b/s`` and ``bps`` are bits, eight to the byte.

    Args:
        text: The number, an optional prefix (k M G T P, Ki Mi Gi Ti) and the unit, which may be left out.
        unit: The unit expected and returned: ``"B/s"`` and ``"FLOP/s"`` are known in all their spellings, any other,
            e.g. ``"B"``, as it stands.

    Raises:
        ValueError: If the text is no such quantity, or is not finite.
    """
    number, factors = math.nan, {name.lower(): factor for name, factor in (_DECIMAL | _BINARY).items()}
    spellings = _SPELLINGS.get(unit, {rf"(?i:{re.escape(unit)})": 1.0})
    for spelling, scale in ({"": 1.0} | spellings).items():
        match = re.fullmatch(rf"\s*([0-9.eE+]+)\s*((?i:Ki|Mi|Gi|Ti|k|M|G|T|P))?{spelling}\s*", text)
        if match is not None:
            with contextlib.suppress(ValueError):
                number = float(match.group(1)) * factors[(match.group(2) or "").lower()] * scale
            break
    if not math.isfinite(number):
        raise ValueError(f"must be a number with an optional prefix and unit, such as '64 M{unit}', but is '{text}'.")
    return number


def _reader(unit: str) -> Callable[[object], object]:
    return lambda value: parse_quantity(value, unit) if isinstance(value, str) else value


def _bytes(value: object) -> object:
    return round(parse_quantity(value, "B")) if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(_bytes)]
"""A number of bytes: an integer, or text such as ``"64MB"``."""

Rate = Annotated[float, BeforeValidator(_reader("FLOP/s"))]
"""A speed of computing in FLOP/s: a number, or text such as ``"20 GFLOPS"``."""

ByteRate = Annotated[float, BeforeValidator(_reader("B/s"))]
"""A speed of a link in bytes/s: a number, or text such as ``"1.25 MB/s"`` or ``"10 Mbps"`` (bits)."""


def format_bytes(value: float | None) -> str:
    """Bytes for people: ``1.25 MiB``; ``–`` for None."""
    if value is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def settings_of(function: Callable[..., Any], given: Collection[str] = ()) -> type[Settings]:
    """The settings of ``function``: its keyword-only parameters, with their annotations and defaults.

    A function's signature is thus the one place that says which options it has.

    Args:
        function: A function, or a class (its ``__init__`` is read).
        given: Parameters that dfed itself passes and a config may not set.

    Raises:
        TypeError: If a keyword-only parameter has no annotation.
    """
    target = function.__init__ if inspect.isclass(function) else function  # type: ignore[misc]
    hints = get_type_hints(target, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or name in given:
            continue
        if name not in hints:
            raise TypeError(f"parameter `{name}` of {function!r} needs an annotation to be a setting.")
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[name] = (hints[name], default)
    return create_model(f"{getattr(function, '__name__', 'Options')}Settings", __base__=Settings, **fields)
