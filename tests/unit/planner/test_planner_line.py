"""The peak over batch sizes, against the largest of all lines one by one."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from dfed.memory import Level
from dfed.planner.line import PeakLine
from dfed.rng import numpy_generator

SIZES = [*range(1, 40), 63, 64, 100, 1000, 10**5]


def random_lines(case: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes, and bytes per sample, of the allocations of some work: few or many, alike or not, large or small."""
    draw = numpy_generator(0, "lines", case)
    count = int(draw.integers(1, 40))
    base_limit, rate_limit = (10 ** int(draw.integers(0, 11)) + 1 for _ in range(2))
    bases, rates = draw.integers(0, base_limit, count), draw.integers(0, rate_limit, count)
    if draw.random() < 0.3:
        rates[draw.random(count) < 0.5] = rates[0]
    if draw.random() < 0.3:
        bases[:] = np.sort(bases)[::-1]
        rates[:] = np.sort(rates)  # so that many lines are the largest somewhere
    return bases, rates


def course(lines: tuple[np.ndarray, np.ndarray], size: int) -> list[int]:
    return [int(base) + int(rate) * size for base, rate in zip(*lines, strict=True)]


@pytest.mark.parametrize(("small", "large"), [(8, 16), (2, 4), (1, 2), (3, 10), (16, 8)])
def test_the_largest_of_random_lines(small, large):
    hidden = 0
    for case in range(200):
        lines = random_lines(case)
        line = PeakLine.through(course(lines, small), small, course(lines, large), large)
        for size in SIZES:
            assert line.at(size) == max(course(lines, size)), (case, size)
        assert set(line.lines) <= {(float(base), float(rate)) for base, rate in zip(*lines, strict=True)}
        assert list(line.lines) == sorted(line.lines, key=lambda part: part[1])
        hidden += len({*zip(*lines, strict=True)}) - len(line.lines)
    assert hidden > 1000  # most lines are the largest nowhere


def test_no_line_is_there_for_nothing():
    for case in range(200):
        lines = random_lines(case)
        parts = PeakLine.through(course(lines, 8), 8, course(lines, 16), 16).lines
        # From one crossing to the next a line lies above all others; neighbours cross at growing batch sizes, from 0 on.
        crossings = [(a - b) / (rate_b - rate_a) for (a, rate_a), (b, rate_b) in itertools.pairwise(parts)]
        assert all(crossing > 0 for crossing in crossings)
        assert crossings == sorted(set(crossings))


def test_the_largest_batch_of_random_lines():
    met = {"none": 0, "some": 0, "all": 0}
    for case in range(300):
        lines = random_lines(case)
        line = PeakLine.through(course(lines, 8), 8, course(lines, 16), 16)
        peaks = [max(course(lines, size)) for size in range(65)]
        draw = numpy_generator(1, "limits", case)
        # Limits on a peak, a byte on either side of it, and anywhere.
        chosen = peaks[int(draw.integers(0, 65))]
        for limit in (chosen, chosen - 1, chosen + 1, float(draw.random() * 1.2 * peaks[-1]), 0):
            fitting = [size for size in range(65) if peaks[size] <= limit]
            got = line.largest_batch(limit)
            if not fitting:
                assert got < 0
                met["none"] += 1
            elif len(fitting) == 65:
                assert got >= 64
                met["all"] += 1
            else:
                assert math.floor(got) == fitting[-1], (case, limit)
                met["some"] += 1
    assert min(met.values()) > 50


def test_by_hand():
    # Weights 100 and 3 a sample; weights and their gradients 160 and 1 a sample; 120 and 2 a sample is never the largest.
    line = PeakLine.through([124, 168, 136], 8, [148, 176, 152], 16)
    assert line.lines == ((160.0, 1.0), (100.0, 3.0))
    assert [line.at(size) for size in (0, 1, 30, 31)] == [160, 161, 190, 193]
    assert line.largest_batch(159) < 0
    assert line.largest_batch(160) == 0
    assert line.largest_batch(190) == 30
    assert line.largest_batch(191) == pytest.approx(91 / 3)
    constant = PeakLine.through([7, 5], 8, [7, 5], 16)
    assert constant.lines == ((7.0, 0.0),)
    assert constant.at(10**9) == 7
    assert constant.largest_batch(7) == math.inf
    assert constant.largest_batch(6.9) == -math.inf


def test_courses_that_do_not_match():
    assert PeakLine.through([1, 2], 8, [1, 2, 3], 16) is None
    assert PeakLine.through([1, 2], 8, [1], 16) is None
    assert PeakLine.through([], 8, [], 16) is None


def test_a_line_survives_json():
    line = PeakLine.through(course(random_lines(7), 8), 8, course(random_lines(7), 16), 16)
    again = PeakLine(tuple((base, rate) for base, rate in json.loads(json.dumps(line.lines))))
    assert again == line
    assert again.at(10**6) == max(course(random_lines(7), 10**6))


def test_a_third_size_shows_what_is_no_straight_line():
    small, large = [100 + 8 * 4, 50 + 8 * 8], [100 + 16 * 4, 50 + 16 * 8]
    straight, square = [100 + 24 * 4, 50 + 24 * 8], [100 + 24 * 4, 50 + 24 * 8 + 1]
    assert PeakLine.through(small, 8, large, 16, straight, 24) == PeakLine.through(small, 8, large, 16)
    assert PeakLine.through(small, 8, large, 16, square, 24) is None
    assert PeakLine.through(small, 8, large, 16, straight[:1], 24) is None


def test_the_largest_of_random_parabolas():
    for case in range(100):
        bases, rates = random_lines(case)
        pairs = numpy_generator(0, "pairs", case).integers(0, 3, len(bases))
        line = PeakLine.over(zip(bases.tolist(), rates.tolist(), pairs.tolist(), strict=True))
        again = PeakLine.from_json(json.loads(json.dumps(line.to_json())))
        assert again == line

        def peak(size, bases=bases, rates=rates, pairs=pairs):
            return max(int(b) + int(r) * size + int(p) * size**2 for b, r, p in zip(bases, rates, pairs, strict=True))

        for size in SIZES:
            assert line.at(size) == peak(size), (case, size)
            largest = line.largest_batch(peak(size))
            assert largest >= size * (1 - 1e-9)
            if math.isfinite(largest):
                assert peak(math.floor(largest * (1 - 1e-9))) <= peak(size) < peak(math.ceil(largest * (1 + 1e-9)) + 1)
        assert line.largest_batch(min(bases) - 1.0) < 0 or max(bases) > min(bases)


def test_the_largest_of_random_capped_lines():
    kept = dropped = 0
    for case in range(100):
        bases, rates = random_lines(case)
        draw = numpy_generator(0, "capped", case)
        pairs = draw.integers(0, 2, len(bases)) * (draw.random() < 0.3)
        parts = draw.integers(0, 10 ** int(draw.integers(1, 6)), len(bases)) * draw.integers(0, 2, len(bases))
        most = int(draw.integers(1, 10 ** int(draw.integers(1, 8))))
        levels = [Level(*map(int, (base, rate, pair, part)), most if part else 0)
                  for base, rate, pair, part in zip(bases, rates, pairs, parts, strict=True)]
        line = PeakLine.over(levels)
        assert PeakLine.from_json(json.loads(json.dumps(line.to_json()))) == line
        kept, dropped = kept + len(line.capped), dropped + sum(level.capped > 0 for level in levels) - len(line.capped)
        for size in SIZES:
            peak = max(level.at(size) for level in levels)
            assert line.at(size) == peak, (case, size)
            largest = line.largest_batch(peak)
            assert largest >= size * (1 - 1e-9)
            if math.isfinite(largest):
                after = math.ceil(largest * (1 + 1e-9)) + 1
                assert max(level.at(math.floor(largest * (1 - 1e-9))) for level in levels) <= peak
                assert max(level.at(after) for level in levels) > peak
    assert kept > 50
    assert dropped > 50


def test_nothing_makes_no_line():
    assert PeakLine.from_json([]) is None
