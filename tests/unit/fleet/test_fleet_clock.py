from __future__ import annotations

from dataclasses import replace

import pytest

from dfed.fleet import Cost, DeviceProfile, client_cost, round_time

PROFILE = DeviceProfile("t", None, flops=2e9, up=1e6, down=4e6, watts=3.0, radio_watts=0.5, availability=1, dropout=0)


def test_cost_by_hand():
    cost = client_cost(PROFILE, flops=8e9, bytes_down=2_000_000, bytes_up=3_000_000)
    assert cost == Cost(compute_s=4.0, down_s=0.5, up_s=3.0, energy_j=3.0 * 4.0 + 0.5 * 3.5)
    assert cost.total_s == 7.5
    assert client_cost(PROFILE, flops=0, bytes_down=0, bytes_up=0) == Cost(0.0, 0.0, 0.0, 0.0)
    with pytest.raises(AssertionError, match="negative"):
        client_cost(PROFILE, flops=0, bytes_down=-1, bytes_up=0)


def test_a_client_that_is_slowed_down_takes_longer_at_the_same_power():
    parts = {"flops": 8e9, "bytes_down": 2_000_000, "bytes_up": 3_000_000}
    usual, profile = client_cost(PROFILE, **parts), replace(PROFILE, straggle=0.5, slowdown=2.5)
    assert client_cost(profile, **parts) == client_cost(profile, **parts, slowed=False) == usual
    slowed = client_cost(profile, **parts, slowed=True)
    assert slowed == Cost(compute_s=10.0, down_s=1.25, up_s=7.5, energy_j=3.0 * 10.0 + 0.5 * 8.75)
    assert (slowed.total_s, slowed.energy_j) == (2.5 * usual.total_s, 2.5 * usual.energy_j)


def test_a_round_waits_for_its_slowest_client():
    slow_link, slow_chip = Cost(1.0, 2.0, 3.0, 99.0), Cost(5.0, 0.25, 0.25, 1.0)
    assert round_time([slow_chip, slow_link]) == 6.0
    assert round_time(iter([slow_chip])) == 5.5
    assert round_time([]) == 0.0
