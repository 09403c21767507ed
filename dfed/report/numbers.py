"""Numbers as a comparison shows them."""

from __future__ import annotations

import math

from dfed.report.comparison import Spread

__all__ = ["MIB", "both", "mib", "number", "percent", "ratio"]

MIB = 2**20


def both(spread: Spread, scale: float = 1.0, digits: int | None = None, sign: str = "") -> str:
    """``mean ± deviation`` in a unit; three digits that count, if none are said."""
    if spread.mean is None:
        return "–"
    mean = spread.mean * scale
    digits = _digits(mean) if digits is None else digits
    text = f"{mean:{sign},.{digits}f}"
    return text if spread.std is None else f"{text} ± {spread.std * scale:,.{digits}f}"


def number(value: float | None, scale: float = 1.0) -> str:
    """A number in a unit, with three digits that count."""
    return "–" if value is None else f"{value * scale:,.{_digits(value * scale)}f}"


def mib(value: float | None) -> str:
    """Bytes in MiB."""
    return "–" if value is None else f"{value / MIB:,.1f}"


def percent(value: float | None, digits: int) -> str:
    """A share in per cent."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def ratio(part: float | None, whole: float | None) -> float | None:
    """``part / whole``; None where there is none."""
    return None if part is None or not whole else part / whole


def _digits(value: float) -> int:
    """Decimals with which three digits count."""
    return max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
