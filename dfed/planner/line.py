"""A plan's peak as a function of its batch size, found from one prediction or three."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["PeakLine"]


@dataclass(frozen=True)
class PeakLine:
    """Peak bytes as a function of the batch size: the largest of a few straight lines, and parabolas.

    At each allocation of a training step, the bytes held are those of the weights and the like, which do not depend on the
    batch, plus those of the samples, which are proportional to it, plus those of their pairs, as nHSIC compares them. So one
    prediction that tells them apart gives every other, or, without pairs, two do at two batch sizes; a third shows whether it
    is so: a batch worked off in parts is no straight line.

    Attributes:
        lines: (bytes, bytes per sample) of the lines that are the largest somewhere, least steep first.
        parabolas: (bytes, bytes per sample, bytes per pair) where there are pairs.
    """

    lines: tuple[tuple[float, float], ...]
    parabolas: tuple[tuple[float, float, float], ...] = ()

    @classmethod
    def over(cls, course: Iterable[tuple[float, float, float]]) -> PeakLine:
        """From bytes, bytes per sample and bytes per pair at each allocation; see :func:`dfed.memory.predict_lines`."""
        by_pairs: dict[float, set[tuple[float, float]]] = {}
        for base, rate, pairs in course:
            by_pairs.setdefault(float(pairs), set()).add((float(base), float(rate)))
        hulls = {pairs: _upper_hull(lines) for pairs, lines in sorted(by_pairs.items())}
        return cls(hulls.pop(0.0, ()), tuple((*line, pairs) for pairs, hull in hulls.items() for line in hull))

    @classmethod
    def through(
        cls, small: Sequence[int], small_batch: int, large: Sequence[int], large_batch: int,
        third: Sequence[int] | None = None, third_batch: int = 0,
    ) -> PeakLine | None:
        """From the courses (see :func:`dfed.memory.predict_course`) at two batch sizes, confirmed by a third if it is given.

        Returns:
            None if they did not make the same allocations, or not in proportion, so that nothing follows for other sizes.
        """
        if len(small) != len(large) or not small:
            return None
        if third is not None:
            across, further = large_batch - small_batch, third_batch - small_batch
            same = len(third) == len(small)
            if not same or any((b - a) * further != (c - a) * across for a, b, c in zip(small, large, third, strict=True)):
                return None
        rates = [(after - before) / (large_batch - small_batch) for before, after in zip(small, large, strict=True)]
        return cls.over((before - rate * small_batch, rate, 0.0) for before, rate in zip(small, rates, strict=True))

    @classmethod
    def from_json(cls, parts: Sequence[Sequence[float]]) -> PeakLine | None:
        """What :meth:`to_json` gave; None for nothing."""
        return cls.over((*part, 0.0)[:3] for part in parts) if parts else None

    def to_json(self) -> list[list[float]]:
        """All lines and parabolas."""
        return [list(part) for part in (*self.lines, *self.parabolas)]

    def at(self, batch_size: int) -> int:
        """Peak bytes at this batch size."""
        straight = (base + rate * batch_size for base, rate in self.lines)
        bent = (base + (rate + pairs * batch_size) * batch_size for base, rate, pairs in self.parabolas)
        return math.ceil(max((*straight, *bent)) - 1e-6)

    def largest_batch(self, limit_bytes: float) -> float:
        """The largest batch size (real, may be below 1 or infinite) whose peak is at most ``limit_bytes``."""
        bounds = [math.inf if base <= limit_bytes else -math.inf for base, rate in self.lines if rate <= 0]
        bounds += [(limit_bytes - base) / rate for base, rate in self.lines if rate > 0]
        for base, rate, pairs in self.parabolas:
            room = rate * rate + 4 * pairs * (limit_bytes - base)
            bounds.append((math.sqrt(room) - rate) / (2 * pairs) if room >= 0 else -math.inf)
        return min(bounds)


def _upper_hull(lines: set[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The lines that are the largest at some batch size of at least 0, least steep first."""
    hull: list[tuple[float, float]] = []
    for base, rate in sorted(lines, key=lambda line: (line[1], line[0])):
        while hull and (base >= hull[-1][0] or _hidden(hull, base, rate)):
            hull.pop()
        hull.append((base, rate))
    return tuple(hull)


def _hidden(hull: Sequence[tuple[float, float]], base: float, rate: float) -> bool:
    """Whether the last line of the hull lies nowhere above both its neighbour and the new line."""
    if len(hull) < 2:
        return False
    (first, first_rate), (middle, middle_rate) = hull[-2:]
    return (first - base) * (middle_rate - first_rate) <= (first - middle) * (rate - first_rate)
