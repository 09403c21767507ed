"""Budgets spread over a tier: their levels, who has which, and how a config says it."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from dfed.config import load_config
from dfed.errors import ConfigError
from dfed.fleet import Fleet, FleetSettings, TierSettings
from dfed.fleet.budget import MOST_LEVELS, MemorySpread, spread_budgets
from dfed.rng import Permutation
from dfed.yaml_io import dump_yaml

MIB = 2**20
PEAK = 100_000_007


def never() -> int:
    raise AssertionError("no budget is a fraction of the full model's peak")


def make(clients, peak=never, seed=3, **tiers):
    settings = FleetSettings(clients=clients, tiers=[TierSettings(name=n, **kw) for n, kw in tiers.items()])
    return Fleet.from_settings(settings, seed=seed, full_peak_bytes=peak)


def by_the_formula(start, end, num_clients):
    """The budget of the i-th client of a tier, one by one, in exact arithmetic; not rounded."""
    levels, start, end = min(num_clients, 256), Fraction(start), Fraction(end)
    return [start + (end - start) * (i * levels // num_clients + Fraction(1, 2)) / levels for i in range(num_clients)]


@pytest.mark.parametrize("num_clients", [1, 2, 7, 255, 256, 257, 300, 511, 512, 1000, 2560])
def test_levels_are_those_of_the_formula(num_clients):
    for start, end in ((10 * MIB, 90 * MIB), (2**62, 2**63 - 1), (MIB, MIB + 10), (5 * MIB, 5 * MIB)):
        found = spread_budgets(MemorySpread(**{"from": start, "to": end}), num_clients, never)
        each = np.repeat(np.array([budget for budget, _ in found], dtype=object), [count for _, count in found])
        exact = by_the_formula(start, end, num_clients)
        assert len(each) == num_clients
        assert all(abs(budget - value) <= Fraction(1, 2) for budget, value in zip(each, exact, strict=True))
        assert all(type(budget) is int and start <= budget <= end for budget, _ in found)
        budgets = [budget for budget, _ in found]
        assert budgets == sorted(set(budgets))  # no two levels with the same budget are told apart
        if end - start > MOST_LEVELS:
            assert len(found) == min(num_clients, MOST_LEVELS)
            sizes = {count for _, count in found}
            assert sizes <= {num_clients // len(found), -(-num_clients // len(found))}
    for start, end in ((0.12, 1.07), (0.5, 0.5), (0.011, 10.0)):
        found = spread_budgets(MemorySpread(**{"from": start, "to": end}), num_clients, lambda: PEAK)
        each = np.repeat([budget for budget, _ in found], [count for _, count in found]).tolist()
        exact = by_the_formula(start, end, num_clients)
        # Half a byte, and the rounding of shares as floats: 4 ulp of at most 10, times 1e8 bytes, is below 1e-6 bytes.
        assert all(abs(budget - value * PEAK) < 0.501 for budget, value in zip(each, exact, strict=True))


def test_a_single_client_has_the_middle_and_equal_ends_are_one_budget():
    assert spread_budgets(MemorySpread(**{"from": 2 * MIB, "to": 4 * MIB}), 1, never) == [(3 * MIB, 1)]
    assert spread_budgets(MemorySpread(**{"from": "50%", "to": 0.5}), 999, lambda: 10**8) == [(5 * 10**7, 999)]
    assert spread_budgets(None, 5, never) == [(None, 5)]
    assert spread_budgets(0.5, 5, lambda: 10**8) == [(5 * 10**7, 5)]


def test_clients_have_their_levels_in_the_keyed_order():
    tiers = {"plain": {"count": 70, "memory": "8MiB"}, "spread": {"count": 600, "memory": {"from": 0.12, "to": 1.07}},
             "free": {"count": 30}}
    asked = []
    fleet = make(700, lambda: asked.append(1) or PEAK, **tiers)
    assert asked == [1]
    place = Permutation(700, 3, "fleet").take(np.arange(700))
    tier = np.searchsorted([70, 670, 700], place, side="right")
    np.testing.assert_array_equal(fleet.tier_of(np.arange(700)), tier)
    assert fleet.tier_of(np.arange(700)).dtype == np.int64
    exact = by_the_formula(0.12, 1.07, 600)
    profiles = [fleet.profile(client) for client in range(700)]
    for client, profile in enumerate(profiles):
        assert profile.tier == ("plain", "spread", "free")[tier[client]]
        if profile.tier == "spread":
            assert abs(profile.budget_bytes - exact[place[client] - 70] * PEAK) < 0.501
        else:
            assert profile.budget_bytes == {"plain": 8 * MIB, "free": None}[profile.tier]
    kinds = fleet.kinds()
    assert (kinds.dtype, kinds.shape) == (np.int64, (700,))
    told_apart = {(int(kind), profile) for kind, profile in zip(kinds, profiles, strict=True)}
    assert len(told_apart) == len({kind for kind, _ in told_apart}) == len({profile for _, profile in told_apart}) == 258
    assert len({id(profile) for profile in profiles}) == 258  # nothing is made for a client
    counts = Counter(profile.budget_bytes for profile in profiles)
    assert dict(fleet.budgets()) == counts
    assert [budget for budget, _ in fleet.budgets()] == [*sorted(budget for budget in counts if budget is not None), None]
    assert fleet.has_budgets
    assert [fleet.tier_size(name) for name in fleet.tier_names] == [70, 600, 30]
    assert fleet.tier_clients("spread", None).tolist() == np.flatnonzero(tier == 1).tolist()
    assert fleet.tier_clients("spread", 9).tolist() == np.flatnonzero(tier == 1)[:9].tolist()
    other = make(700, lambda: PEAK, seed=4, **tiers)
    assert [other.profile(client) for client in range(700)] != profiles
    assert other.budgets() == fleet.budgets()
    # Which tier a client is in does not depend on how its tier's budgets are given.
    plain = make(700, lambda: PEAK, **{**tiers, "spread": {"count": 600, "memory": 0.5}})
    np.testing.assert_array_equal(plain.tier_of(np.arange(700)), tier)


def test_a_million_clients_share_256_budgets_and_cost_no_memory():
    tracemalloc.start()
    fleet = make(1_000_000, a={"share": 0.999999, "memory": {"from": "1 GB", "to": "2 GB"}}, b={"share": 0.000001})
    budgets = fleet.budgets()
    assert fleet.profile(999_999).tier in ("a", "b")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # one byte a client would be as much
    assert len(budgets) == 257
    assert sum(count for _, count in budgets) == 1_000_000
    assert budgets[-1] == (None, 1)
    assert {count for _, count in budgets[:-1]} == {3906, 3907}
    kinds, sizes = np.unique(fleet.kinds(), return_counts=True)
    assert kinds.tolist() == list(range(257))
    assert sizes.tolist() == [count for _, count in budgets]


def test_a_share_at_an_end_that_comes_to_less_than_1_mib_is_refused():
    tiers = {"a": {"count": 1, "memory": {"from": 0.01, "to": 0.02}}, "b": {"count": 1, "memory": 0.5},
             "c": {"count": 1, "memory": {"from": 0.01, "to": 1.0}}}
    with pytest.raises(ConfigError) as caught:
        make(3, lambda: 15 * MIB, **tiers)
    assert [fault.field for fault in caught.value.faults] == [
        "fleet.tiers[0].memory.from", "fleet.tiers[0].memory.to", "fleet.tiers[2].memory.from",
    ]
    assert str(caught.value.faults[2]) == (
        "`fleet.tiers[2].memory.from` must be at least 0.067, as the full model takes 15.00 MiB and a budget 1 MiB or more, "
        "but is 0.01, which is 153.60 KiB."
    )


SMALL = {
    "rounds": 1, "cohort": 1, "model": "cnn", "data": {"dataset": "digits"},
    "fleet": {"clients": 9, "tiers": [{"name": "a", "count": 9, "memory": {"from": "12%", "to": 1.07}}]},
}


@pytest.mark.parametrize(("memory", "faults"), [
    ("{from: 0.5}", ["`fleet.tiers[0].memory.to` must be given, but is not."]),
    ("{}", ["`fleet.tiers[0].memory.from` must be given, but is not.",
            "`fleet.tiers[0].memory.to` must be given, but is not."]),
    ("{from: 0.5, to: 0.4}", ["`fleet.tiers[0].memory.to` must be at least `from` (0.5), but is 0.4."]),
    ("{from: 2MiB, to: 1MiB}", ["`fleet.tiers[0].memory.to` must be at least `from` (2097152), but is 1048576."]),
    ("{from: 0.5, to: 64MB}", ["`fleet.tiers[0].memory.to` must be a share, as `from` is (0.5), but is 64000000."]),
    ("{from: 64MB, to: 200%}", ["`fleet.tiers[0].memory.to` must be bytes, as `from` is (64000000), but is 2.0."]),
    ("{from: null, to: 0.5}",
     ["`fleet.tiers[0].memory.from` must be bytes (64000000, '64MB') or a share (0.5, '50%'), but is null."]),
    ("{from: 0.0, to: 11.0}", [
        "`fleet.tiers[0].memory.from` must, as a fraction of the full model's peak, be at least 0.001 and at most 10, but is "
        "0.0; write bytes as an integer or as text such as '64MB'.",
        "`fleet.tiers[0].memory.to` must, as a fraction of the full model's peak, be at least 0.001 and at most 10, but is "
        "11.0; write bytes as an integer or as text such as '64MB'.",
    ]),
    ("{from: {from: 1, to: 2}, to: 0.5}", [
        "`fleet.tiers[0].memory.from` must be bytes (64000000, '64MB') or a share (0.5, '50%'), or be left out for no limit, "
        'but is {"from": 1, "to": 2}.',
    ]),
    ("{frm: 0.5, from: 0.1, to: 0.5}",
     ["`fleet.tiers[0].memory.frm` is not a setting; known here: from, to. Did you mean 'from'?"]),
])
def test_a_faulty_spread_is_named(memory, faults):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"fleet.tiers.0.memory={memory}"], base=SMALL)
    assert [str(fault) for fault in caught.value.faults] == faults


def test_a_spread_survives_being_written(tmp_path):
    config = load_config(None, base=SMALL)
    (tier,) = config.fleet.tiers
    assert dict(tier.memory) == {"from": 0.12, "to": 1.07}
    assert config.to_dict()["fleet"]["tiers"][0]["memory"] == {"from": 0.12, "to": 1.07}
    (tmp_path / "config.yaml").write_text(dump_yaml(config.to_dict()))
    again = load_config(tmp_path / "config.yaml")
    assert again == config == load_config(None, base=yaml.safe_load(yaml.safe_dump(config.to_dict())))
    assert again.fingerprint() == config.fingerprint()
    assert FleetSettings.model_validate_json(config.fleet.model_dump_json()) == config.fleet
    for change in ("fleet.tiers.0.memory.to=1.08", "fleet.tiers.0.memory.from=0.11", "fleet.tiers.0.memory=0.12"):
        assert load_config(None, [change], base=SMALL).fingerprint() != config.fingerprint()
    in_bytes = load_config(None, ["fleet.tiers.0.memory={from: 64MB, to: 1 GiB}"], base=SMALL)
    assert in_bytes.to_dict()["fleet"]["tiers"][0]["memory"] == {"from": 64_000_000, "to": 2**30}
    with pytest.raises(ValidationError):
        tier.memory.to = 2.0  # settings are frozen
