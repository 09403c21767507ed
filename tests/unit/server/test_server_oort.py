from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from test_server_samplers import chi_square

from dfed.server import View
from dfed.server.oort import Oort, exploration, scores


def view(times, round_index=0, seed=1):
    def unwanted(*_):
        raise AssertionError("walks the fleet")

    return View(seed=seed, rounds=100, round_index=round_index, num_clients=len(times),
                cost=lambda client: times[client], costs=unwanted, label_counts=unwanted)


def row(client, loss_rms=1.0, num_samples=10, num_visits=20, time=1.0, status="completed"):
    return {"client": client, "status": status, "loss_rms": loss_rms if status == "completed" else None,
            "num_samples": num_samples, "num_visits": num_visits if status == "completed" else 0, "sim_time_s": time}


def known(clients, preferred=1e9):
    """A state in which these took part: utility, round and time by client."""
    return {"clients": {str(client): list(value) for client, value in clients.items()}, "preferred_s": preferred,
            "step_s": preferred, "window": 0.0, "before": None}


def test_scores_are_those_of_the_paper():
    generator = np.random.default_rng(2)
    for round_number, preferred in ((2, 3.0), (30, 0.5), (77, math.inf), (1, 9.0)):
        utilities, times = generator.gamma(1.0, 5.0, size=60), generator.uniform(0.1, 6.0, size=60)
        last = generator.integers(1, max(2, round_number), size=60)
        found = scores(utilities, last, times, round_number=round_number, preferred_s=preferred)
        ordered = sorted(utilities)
        place = 0.98 * 59  # linear between the neighbours, as numpy's percentile
        cap = ordered[int(place)] + (place - int(place)) * (ordered[int(place) + 1] - ordered[int(place)])
        for i in range(60):
            value = (min(utilities[i], cap) - ordered[0]) / (cap - ordered[0])
            value += math.sqrt(0.1 * math.log(round_number) / last[i])
            if times[i] > preferred:
                value *= (preferred / times[i]) ** 2
            assert found[i] == pytest.approx(value, rel=1e-12, abs=1e-12)  # a handful of float64 operations
    equal = scores(np.array([2.0, 2.0]), np.array([1, 1]), np.array([1.0, 4.0]), round_number=1, preferred_s=2.0)
    assert equal.tolist() == [1.0, 0.25]


def test_exploration_falls_to_its_floor():
    assert [exploration(r) for r in (0, 1, 10)] == pytest.approx([0.9, 0.855, 0.9 * 0.95**10])
    assert exploration(29) > 0.2 == exploration(30) == exploration(1000)


def test_the_first_duration_is_a_percentile_and_the_state_is_small():
    times = np.random.default_rng(3).uniform(1, 9, size=500).tolist()
    times[7] = None  # has no plan
    state = Oort(percentile=30).init(view(times))
    assert state["preferred_s"] == state["step_s"] == np.percentile([t for t in times if t is not None], 30)
    assert state["clients"] == {}
    # Nobody has a plan yet: nothing is kept, so that it is asked again; then the first times that are known count.
    sampler, nobody = Oort(percentile=30), view([None] * 5)
    assert sampler.init(nobody) == {}
    assert sampler.cohort({}, nobody, size=3, admit=lambda client: False) == []
    assert sampler.advance({}, nobody, row={}, clients=[row(1, status="failed")]) == {}
    assert len(sampler.cohort({}, view([1.0] * 5), size=3, admit=lambda client: True)) == 4
    some = sampler.advance({}, nobody, row={}, clients=[row(1, time=2.0), row(2, time=5.0), row(3, status="oom", time=9.0)])
    assert some["preferred_s"] == some["step_s"] == pytest.approx(2.9)  # 30 % of the way from 2 to 5
    assert some["clients"].keys() == {"1", "2"}

    class Fleet:
        def __len__(self):
            return 10**9

        def __getitem__(self, client):
            return 1.0 + client % 2

    assert 1.0 <= Oort().init(view(Fleet()))["preferred_s"] <= 2.0  # looks at a thousand only
    asked: list[int] = []
    state = Oort().init(view(Fleet()))
    cohort = Oort().cohort(state, view(Fleet()), size=10, admit=lambda client: asked.append(client) or True)
    assert len(cohort) == 11
    assert len(asked) == 110


def test_advance_notes_who_completed():
    sampler, seen = Oort(), view([1.0] * 9, round_index=6)
    state = known({1: (5.0, 2, 1.0), 2: (7.0, 3, 2.0)})
    before = json.dumps(state)
    clients = [row(2, 0.5, 40, 160, 3.5), row(3, 2.0, 100, 30, 0.5), row(4, status="failed"), row(5, status="oom"),
               row(6, math.inf)]
    new = sampler.advance(state, seen, row={}, clients=clients)
    assert json.dumps(state) == before
    # |B| is the number of different samples: 40 of 160 visits, but 30 where steps were limited.
    assert new["clients"] == {"1": [5.0, 2, 1.0], "2": [40 * 0.5, 7, 3.5], "3": [30 * 2.0, 7, 0.5]}
    assert new["window"] == 80.0
    assert json.loads(json.dumps(new, allow_nan=False)) == new


def test_the_pacer_moves_when_utility_falls():
    sampler = Oort(window=3)
    state, moves = {**sampler.init(view([2.0] * 4)), "clients": {}}, []
    sums = [[9, 9, 9], [5, 5, 5], [6, 6, 6], [1, 1, 1], [0, 0, 1], [0, 0, 1]]
    for round_index, utility in enumerate(itertools.chain(*sums)):
        clients = [row(0, utility / 10), row(1, 0.0)]
        state = sampler.advance(state, view([2.0] * 4, round_index), row={}, clients=clients)
        moves.append(state["preferred_s"])
    # 27, 15, 18, 3, 1, 1: falls after the second window, the fourth and the fifth, not where it is equal.
    assert moves[2::3] == [2.0, 4.0, 4.0, 6.0, 8.0, 8.0]
    assert moves[4] == 2.0  # only at the end of a window


def test_unexplored_clients_come_in_proportion_to_their_speed():
    times, rounds = [1.0, 2.0, 4.0, 4.0], 8000
    counts = dict.fromkeys(itertools.permutations(range(4), 2), 0)
    for seed in range(rounds):
        counts[tuple(Oort().cohort(known({}), view(times, 0, seed), size=1, admit=lambda client: True))] += 1
    speed = 1 / np.array(times)
    expected = [rounds * speed[i] / speed.sum() * speed[j] / (speed.sum() - speed[i]) for i, j in counts]
    statistic, limit = chi_square(list(counts.values()), expected)
    assert statistic < limit


def test_explored_clients_come_in_proportion_to_their_utility_among_the_best():
    # Of 40, two are drawn (⌈1.1⌉; ε = 0.2 of two is none): from all with 95 % of the second best one's utility.
    utilities = {0: 10.0, 1: 9.8, 2: 9.7, 3: 9.2} | {client: 0.1 * client for client in range(4, 40)}
    state, rounds = known({client: (value, 1, 1.0) for client, value in utilities.items()}), 6000
    times = [1.0] * 40
    all_scores = scores(np.array(list(utilities.values())), np.ones(40), np.ones(40), round_number=41, preferred_s=math.inf)
    pool = [client for client in range(40) if all_scores[client] >= 0.95 * np.sort(all_scores)[-2]]
    assert pool == [0, 1, 2, 3]
    counts = dict.fromkeys(itertools.permutations(pool, 2), 0)
    for seed in range(rounds):
        asked: list[int] = []
        cohort = Oort().cohort(state, view(times, 40, seed), size=1, admit=lambda c, asked=asked: asked.append(c) or True)
        counts[tuple(cohort)] += 1
        assert asked == pool
    total = all_scores[pool].sum()
    expected = [rounds * all_scores[i] / total * all_scores[j] / (total - all_scores[i]) for i, j in counts]
    statistic, limit = chi_square(list(counts.values()), expected)
    assert statistic < limit


def test_shares_of_both_sorts_and_what_fills_up():
    times = [1.0 + client % 5 for client in range(200)]
    explored = {client: (float(client), 1 + client % 7, times[client]) for client in range(0, 200, 2)}
    for round_index, share in ((1, 0.855), (10, 0.9 * 0.95**10), (50, 0.2)):
        cohort = Oort().cohort(known(explored, 2.0), view(times, round_index), size=20, admit=lambda client: True)
        assert len(set(cohort)) == len(cohort) == 22  # 1.1 × 20, exactly
        assert sum(client % 2 for client in cohort) == round(share * 22)

    def sorts(state, size, admit, round_index=50):
        asked: list[int] = []
        cohort = Oort().cohort(state, view(times, round_index), size=size, admit=lambda c: asked.append(c) or admit(c))
        assert len(cohort) == len(set(cohort))
        assert all(type(client) is int and admit(client) for client in cohort)
        assert len(asked) == len(set(asked))
        return [sum(client % 2 == 0 for client in cohort), sum(client % 2 for client in cohort)]

    assert sum(sorts(known({}), 20, lambda client: True)) == 22
    assert sorts(known(explored), 20, lambda client: client % 2 == 0) == [22, 0]  # nobody unexplored is there
    assert sorts(known(explored), 20, lambda client: client % 2 == 1) == [0, 22]
    assert sorts(known(explored), 20, lambda client: client < 6) == [3, 3]
    assert sorts(known(explored), 300, lambda client: True) == [100, 100]
    assert sorts(known(explored), 150, lambda client: True) == [100, 65]  # of 165: 33 unexplored, and 32 for explored ones
    assert sorts(known(explored), 85, lambda client: client % 2 == 0 or client < 5) == [92, 2]
    assert sorts(known(explored), 20, lambda client: False) == [0, 0]


def test_the_state_survives_json():
    times = np.random.default_rng(5).uniform(1, 5, size=60).tolist()
    results = []
    for through in (lambda value: value, lambda value: json.loads(json.dumps(value, allow_nan=False, sort_keys=True))):
        sampler, cohorts = Oort(window=4), []
        state = through(sampler.init(view(times)))
        for round_index in range(25):
            seen = view(times, round_index)
            cohort = sampler.cohort(state, seen, size=6, admit=lambda client, r=round_index: (client + r) % 4 > 0)
            cohorts.append(cohort)
            clients = [row(c, 1 / (1 + c % 9 + round_index), 10 + c, 10 + c, times[c]) for c in cohort]
            state = through(sampler.advance(state, seen, row={}, clients=clients))
        results.append((cohorts, state))
    assert results[0] == results[1]  # also if the order of the clients in the file is another
    assert 20 < len(results[0][1]["clients"]) <= 60
