from __future__ import annotations

import base64
import json
import math
import zlib

import numpy as np
import pytest
from test_server_samplers import chi_square

from dfed.server import View
from dfed.server.tifl import TiFL

MIXES = np.random.default_rng(0).integers(0, 9, size=(40, 3))  # samples of each class, client by client


def view(costs, rounds=50, round_index=0, seed=1, mixes=None):
    costs = np.asarray(costs, dtype=float)
    return View(
        seed=seed, rounds=rounds, round_index=round_index, num_clients=len(costs), costs=lambda: costs,
        cost=lambda client: None if math.isnan(costs[client]) else float(costs[client]),
        label_counts=lambda clients: None if mixes is None else mixes[list(clients)].sum(axis=0),
    )


def draw(sampler, state, seen, size=3, admit=lambda client: True):
    return sampler.cohort(state, seen, size=size, admit=admit)


def tiers_of(state):
    return np.frombuffer(zlib.decompress(base64.b64decode(state["tier_of"])), dtype=np.uint8)


def test_tiers_are_equal_stretches_of_the_clients_by_time():
    costs = np.random.default_rng(1).integers(1, 8, size=40).astype(float)  # with many ties
    costs[[0, 7, 39]] = math.nan
    state = TiFL().init(view(costs, mixes=MIXES))
    row = sorted((cost, client) for client, cost in enumerate(costs) if not math.isnan(cost))
    expected, start = np.full(40, 255), 0
    for tier, count in enumerate([8, 8, 7, 7, 7]):
        expected[[client for _, client in row[start : start + count]]] = tier
        start += count
    assert start == 37
    np.testing.assert_array_equal(tiers_of(state), expected)
    assert state["mix"] == [MIXES[expected == tier].sum(axis=0).tolist() for tier in range(5)]
    assert (state["turns"], state["chances"], state["accuracy"]) == ([0] * 5, [0.2] * 5, [None] * 5)
    assert TiFL().init(view([3.0, math.nan, 1.0]))["mix"] == [None, None]  # no more tiers than clients
    assert sorted(set(tiers_of(TiFL(tiers=3).init(view(costs))))) == [0, 1, 2, 255]


def test_clients_come_uniformly_from_a_tier_drawn_uniformly():
    costs = np.arange(40.0)
    sampler, rounds = TiFL(), 8000
    state = sampler.init(view(costs))
    drawn, picked = np.zeros(5), np.zeros(40)
    for round_index in range(rounds):
        cohort = draw(sampler, state, view(costs, rounds, round_index))
        tiers = {client // 8 for client in cohort}
        assert len(set(cohort)) == 3
        assert len(tiers) == 1
        drawn[tiers.pop()] += 1
        picked[cohort[0]] += 1
    for observed in (drawn, picked):
        statistic, limit = chi_square(observed, [rounds / len(observed)] * len(observed))
        assert statistic < limit


def test_a_round_costs_its_tier_a_credit():
    costs, rounds = np.arange(40.0), 23
    for seed in range(5):
        sampler = TiFL()
        state, turns = sampler.init(view(costs)), [0] * 5
        for round_index in range(rounds):
            seen = view(costs, rounds, round_index, seed)
            tier = draw(sampler, state, seen, size=1)[0] // 8
            assert turns[tier] < 5  # ⌈23 / 5⌉
            turns[tier] += 1
            before = json.dumps(state)
            new = sampler.advance(state, seen, row={}, clients=[])
            assert json.dumps(state) == before  # state in, state out
            state = new
            assert state["turns"] == turns
        assert sum(turns) == rounds
    # A run that has used up all credits, and is extended by none, still finds someone.
    full = {**state, "turns": [5] * 5}
    assert len(draw(sampler, full, view(costs, rounds, rounds))) == 3


def test_probabilities_follow_the_accuracies_every_interval():
    costs, sampler = np.arange(40.0), TiFL(interval=4)
    fresh = {**sampler.init(view(costs)), "accuracy": [0.9, 0.5, 0.7, 0.6, 0.8]}

    def chances(state, round_index, rounds=100):
        return sampler.advance(state, view(costs, rounds, round_index), row={}, clients=[])["chances"]

    for round_index in (0, 1, 3, 5):
        assert chances(fresh, round_index) == [0.2] * 5
    for round_index in (4, 8, 40):
        # (5 − rank) / 15; tier 1 is the worst: rank 0.
        assert chances(fresh, round_index) == pytest.approx([1 / 15, 5 / 15, 3 / 15, 4 / 15, 2 / 15], abs=1e-15)
    tied = {**fresh, "accuracy": [0.5, 0.5, 0.7, 0.7, 0.7]}
    assert chances(tied, 4) == pytest.approx([4.5 / 15, 4.5 / 15, 2 / 15, 2 / 15, 2 / 15], abs=1e-15)
    spent = {**fresh, "turns": [0, 20, 0, 0, 20]}  # of ⌈100 / 5⌉
    assert chances(spent, 4) == pytest.approx([1 / 6, 0, 2 / 6, 3 / 6, 0], abs=1e-15)
    unknown = {**fresh, "accuracy": [0.9, None, 0.7, 0.6, 0.8]}
    # Tier 1 keeps its fifth; the four others share the rest by rank.
    assert chances(unknown, 4) == pytest.approx([0.08, 0.2, 0.24, 0.32, 0.16], abs=1e-15)
    assert chances({**fresh, "accuracy": [None] * 5}, 4) == [0.2] * 5
    assert chances({**unknown, "turns": [0, 20, 0, 0, 0]}, 4) == pytest.approx([0.1, 0, 0.3, 0.4, 0.2], abs=1e-15)

    # The new probabilities hold in their first round already, and until the next change.
    counts, rounds = np.zeros(5), 4000
    for seed in range(rounds):
        counts[draw(sampler, fresh, view(costs, 100, 4, seed), size=1)[0] // 8] += 1
    statistic, limit = chi_square(counts, rounds * np.array([1, 5, 3, 4, 2]) / 15)
    assert statistic < limit
    later = sampler.advance(fresh, view(costs, 100, 4), row={}, clients=[])
    assert chances({**later, "accuracy": [0.1] * 5}, 5) == later["chances"]


def test_a_tiers_accuracy_is_that_of_its_class_mix():
    costs = np.arange(40.0)
    state = TiFL().init(view(costs, mixes=MIXES))
    by_class = np.array([0.25, 0.5, 1.0])

    def accuracy_on(mix):
        return 0.75 if mix is None else float((mix * by_class).sum() / mix.sum())

    found = TiFL().evaluated(state, accuracy_on)["accuracy"]
    for tier in range(5):
        mine = MIXES[8 * tier : 8 * tier + 8].sum(axis=0)
        assert found[tier] == pytest.approx(np.average(by_class, weights=mine), rel=1e-15)
    assert TiFL().evaluated(TiFL().init(view(costs)), accuracy_on)["accuracy"] == [0.75] * 5
    assert TiFL().evaluated(state, lambda mix: math.nan)["accuracy"] == [None] * 5


def test_only_admitted_clients_each_asked_once_and_the_next_tiers_fill_up():
    costs, sampler = np.arange(40.0), TiFL()
    costs[5] = math.nan  # never in a tier
    state = sampler.init(view(costs))
    tiers = tiers_of(state).astype(int)
    for round_index in range(30):
        asked: list[int] = []
        seen = view(costs, 100, round_index)
        cohort = draw(sampler, state, seen, 12, admit=lambda client, asked=asked: asked.append(client) or client % 2 == 0)
        assert len(set(cohort)) == 12
        assert all(type(client) is int and client % 2 == 0 for client in cohort)
        assert len(asked) == len(set(asked))
        assert 5 not in asked
        first = tiers[cohort[0]]
        order = [(tiers[client] - first) % 5 for client in cohort]
        assert order == sorted(order)  # the tier drawn, then the next slower ones, then from the fastest on
        assert set(asked) >= set(np.flatnonzero(tiers == first).tolist())  # nobody of it was left out
    everyone = draw(sampler, state, view(costs), 99)
    assert sorted(everyone) == [client for client in range(40) if client != 5]
    assert draw(sampler, state, view(costs), 5, admit=lambda client: False) == []


def test_clients_that_have_a_plan_later_join_the_tier_of_their_time():
    costs, sampler = np.repeat([1.0, 2.0, 4.0, 8.0, 16.0], 8), TiFL(interval=2)
    late = {3: 1.0, 12: 2.0, 33: 16.0}
    costs[[*late, 20]] = math.nan
    state = sampler.init(view(costs, mixes=MIXES))
    assert (tiers_of(state) == 255).sum() == 4
    then = 10 * costs  # all plans have become larger, the order is the same
    for client, cost in late.items():
        then[client] = 10 * cost
    for round_index in (0, 1, 3):  # not before the next change of probabilities
        new = sampler.advance(state, view(then, 100, round_index, mixes=MIXES), row={}, clients=[])
        assert (new["tier_of"], new["mix"]) == (state["tier_of"], state["mix"])
    before = json.dumps(state)
    new = sampler.advance(state, view(then, 100, 2, mixes=MIXES), row={}, clients=[])
    assert json.dumps(state) == before
    expected = tiers_of(state).copy()
    for client, cost in late.items():
        expected[client] = tiers_of(state)[np.flatnonzero(costs == cost)[1]]
    np.testing.assert_array_equal(tiers_of(new), expected)  # client 20 still has no plan
    assert new["mix"] == [MIXES[expected == tier].sum(axis=0).tolist() for tier in range(5)]
    assert json.loads(json.dumps(new, allow_nan=False)) == new
    again = sampler.advance(new, view(then, 100, 2, mixes=MIXES), row={}, clients=[])
    assert (again["tier_of"], again["mix"]) == (new["tier_of"], new["mix"])
    assert set(late) <= set(draw(sampler, new, view(then, 100, 4), size=40))
    lazy = sampler.advance(sampler.init(view(costs)), view(then, 100, 2), row={}, clients=[])
    assert lazy["mix"] == [None] * 5
    np.testing.assert_array_equal(tiers_of(lazy), expected)


def test_a_fleet_without_a_plan_waits():
    sampler, seen = TiFL(), view([math.nan] * 4)
    state = sampler.init(seen)
    assert state == {}
    assert draw(sampler, state, seen) == []
    assert sampler.advance(state, seen, row={}, clients=[]) == {}
    assert sampler.evaluated(state, lambda mix: 0.5) == {}


def test_the_state_survives_json():
    costs = np.random.default_rng(4).random(40)
    results = []
    for through in (lambda value: value, lambda value: json.loads(json.dumps(value, allow_nan=False))):
        sampler, cohorts = TiFL(interval=3), []
        state = through(sampler.init(view(costs, mixes=MIXES)))
        for round_index in range(20):
            seen = view(costs, 20, round_index)
            cohorts.append(draw(sampler, state, seen))
            state = through(sampler.advance(state, seen, row={}, clients=[]))
            state = through(sampler.evaluated(state, lambda mix: float(mix[0] / mix.sum())))
        results.append((cohorts, state))
    assert results[0] == results[1]
    assert len(set(results[0][1]["chances"])) > 1
    # A million clients take some 200 KB, however they are mixed.
    assert len(json.dumps(TiFL().init(view(np.random.default_rng(5).random(100_000))))) < 60_000
