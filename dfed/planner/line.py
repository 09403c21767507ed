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
    is so: a batch worked off in parts is no straight line. What grows up to some size and stays there is told apart, too.

    Attributes:
        lines: (bytes, bytes per sample) of the lines that are the largest somewhere, least steep first.
        parabolas: (bytes, bytes per sample, bytes per pair) where there are pairs.
        capped: (bytes, bytes per sample, bytes per pair, bytes per sample of a part, most of that part) where there is one.
    """

    lines: tuple[tuple[float, float], ...]
    parabolas: tuple[tuple[float, float, float], ...] = ()
    capped: tuple[tuple[float, float, float, float, float], ...] = ()

    @classmethod
    def over(cls, course: Iterable[Sequence[float]]) -> PeakLine:
        """From bytes, bytes per sample, and so on, at each allocation; see :class:`dfed.memory.Level`."""
        by_pairs: dict[float, set[tuple[float, float]]] = {}
        capped: set[tuple[float, float, float, float, float]] = set()
        for part in course:
            base, rate, pairs, of_part, most = (*map(float, part), 0.0, 0.0, 0.0)[:5]
            if of_part:
                capped.add((base, rate, pairs, of_part, most))
            else:
                by_pairs.setdefault(pairs, set()).add((base, rate))
        hulls = {pairs: _upper_hull(lines) for pairs, lines in sorted(by_pairs.items())}
        lines = hulls.pop(0.0, ())
        return cls(lines, tuple((*line, pairs) for pairs, hull in hulls.items() for line in hull), _uncovered(capped, lines))

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
        return cls.over((before - rate * small_batch, rate) for before, rate in zip(small, rates, strict=True))

    @classmethod
    def from_json(cls, parts: Sequence[Sequence[float]]) -> PeakLine | None:
        """What :meth:`to_json` gave; None for nothing."""
        return cls.over(parts) if parts else None

    def to_json(self) -> list[list[float]]:
        """All its parts."""
        return [list(part) for part in (*self.lines, *self.parabolas, *self.capped)]

    def at(self, batch_size: int) -> int:
        """Peak bytes at this batch size."""
        straight = (base + rate * batch_size for base, rate in self.lines)
        bent = (base + (rate + pairs * batch_size) * batch_size for base, rate, pairs in self.parabolas)
        capped = (base + (rate + pairs * batch_size) * batch_size + min(of_part * batch_size, most)
                  for base, rate, pairs, of_part, most in self.capped)
        return math.ceil(max((*straight, *bent, *capped)) - 1e-6)

    def largest_batch(self, limit_bytes: float) -> float:
        """The largest batch size (real, may be below 1 or infinite) whose peak is at most ``limit_bytes``."""
        bounds = [_largest(limit_bytes - base, rate) for base, rate in self.lines]
        bounds += [_largest(limit_bytes - base, rate, pairs) for base, rate, pairs in self.parabolas]
        bounds += [max(_largest(limit_bytes - base, rate + of_part, pairs), _largest(limit_bytes - base - most, rate, pairs))
                   for base, rate, pairs, of_part, most in self.capped]
        return min(bounds)


def _largest(room: float, rate: float, pairs: float = 0.0) -> float:
    """The largest batch that has this room."""
    if pairs > 0:
        square = rate * rate + 4 * pairs * room
        return (math.sqrt(square) - rate) / (2 * pairs) if square >= 0 else -math.inf
    if rate > 0:
        return room / rate
    return math.inf if room >= 0 else -math.inf


def _uncovered(capped: set[tuple[float, float, float, float, float]],
               lines: Sequence[tuple[float, float]]) -> tuple[tuple[float, float, float, float, float], ...]:
    """Those that no other, and no line, is above at every batch size as far as their numbers tell."""
    found = []
    for part in sorted(capped):
        base, rate, pairs, of_part, most = part
        below_other = any(other != part and all(a <= b for a, b in zip(part, other, strict=True)) for other in capped)
        below_line = pairs == 0 and any(
            (base <= high and rate + of_part <= steep) or (base + most <= high and rate <= steep) for high, steep in lines)
        if not below_other and not below_line:
            found.append(part)
    return tuple(found)


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
