"""Drawing with samplers that remember, in whole rounds: what they are told, what they keep, and who is not waited for."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from run_problem import assembled

from dfed.cohort import choose_cohort
from dfed.drawing import begin
from dfed.evaluation import evaluate
from dfed.fleet import client_cost
from dfed.plan import Plan
from dfed.round import lead_round
from dfed.server import StatefulSampler

SMALL = {
    "rounds": 6,
    "cohort": 4,
    "seed": 5,
    "strategy": "exclusivefl",
    "model": {"name": "mlp", "hidden": [600]},
    "data": {"dataset": "synthetic", "shape": [1, 16, 16], "classes": 4, "samples": 300, "test_samples": 40,
             "partition": {"name": "dirichlet", "alpha": 0.5, "min_samples": 4}},
    "fleet": {"clients": 20, "tiers": [
        {"name": "fast", "count": 6, "flops": 1e9},
        {"name": "slow", "count": 12, "flops": 1e8, "down": 1e5, "dropout": 0.2},
        {"name": "tiny", "count": 2, "memory": "1 MiB"},
    ]},
    "client": {"batch_size": 8, "learning_rate": 0.05},
    "memory": {"enforce": "off"},
}
VALIDATION = ("metrics.split=validation", "data.validation_fraction=0.2")


@pytest.fixture(scope="module")
def make():
    found = {}

    def made(*overrides):
        if overrides not in found:
            found[overrides] = assembled(SMALL, overrides)
        return found[overrides]

    return made


def test_costs_are_those_of_each_clients_own_plan(make, monkeypatch):
    run, state = make("sampler=tifl", *VALIDATION)
    job, asked_for = run.job, Counter()
    plan = type(job.strategy).plan

    def counting(self, state, candidate):
        asked_for[candidate.client] += 1
        return plan(self, state, candidate)

    monkeypatch.setattr(type(job.strategy), "plan", counting)
    view = job.view(state)
    assert not asked_for  # nobody is asked before it is wanted
    costs = view.costs()
    sizes, kinds = job.partition.sizes(), job.fleet.kinds()
    cases = set(zip(sizes.tolist(), kinds.tolist(), strict=True))
    assert sum(asked_for.values()) == len(cases) < 20  # one for each case
    for client in range(20):
        profile = job.fleet.profile(client)
        if profile.tier == "tiny":
            assert np.isnan(costs[client])
            assert view.cost(client) is None
            continue
        names = job.strategy.splitting.names
        full = Plan(client=client, hold=names, train=names, phases=job.strategy.problem.phases)
        down, up = job.costs.message_bytes(full)
        # 256 × 600 + 600 × 4 products, forward and for both gradients (none for the input), a product and a sum each.
        flops = 2 * sizes[client] * (2 * 256 * 600 + 3 * 600 * 4)
        expected = client_cost(profile, flops=flops, bytes_down=down, bytes_up=up).total_s
        assert view.cost(client) == pytest.approx(expected, rel=1e-12)
        assert costs[client] == pytest.approx(expected, rel=1e-3)  # headers hold the client's number, in one or two digits
    assert max(asked_for.values()) == 1


def test_tifl_learns_in_whole_rounds_where_it_was_evaluated(make):
    run, state = make("sampler={name: tifl, tiers: 3, interval: 2}", "metrics.every=2", *VALIDATION)
    saved, seen = state, []
    for _ in range(6):
        result = lead_round(run.job, saved)
        state, evaluation = evaluate(run, result.state)
        memory = state.sampler
        assert json.loads(json.dumps(memory, allow_nan=False)) == memory
        if state.round_index % 2:  # between, as where a run is stopped: what the sampler knows stays
            assert memory == result.state.sampler
        else:
            expected = [evaluation.accuracy_on(np.array(mix)) for mix in memory["mix"]]
            assert memory["accuracy"] == expected
        assert sum(memory["turns"]) == state.round_index
        assert result.row["clients"]["ineligible"] == 0  # those without a plan are in no tier
        seen.append(memory["chances"])
        saved = replace(state, sampler=json.loads(json.dumps(memory)))
    assert seen[0] == seen[1] == [1 / 3] * 3
    assert seen[2] == seen[3] != seen[0]
    assert sum(seen[2]) == pytest.approx(1)


def test_oort_waits_for_the_fastest_of_those_who_are_there(make):
    run, state = make("sampler=oort")
    job, late_ones = run.job, 0
    for round_index in range(6):
        cohort = choose_cohort(job, begin(job.sampler, state, lambda state=state: job.view(state)))
        assert len(cohort.plans) == 5  # 1.1 × 4, rounded up
        times = {client: job.view(state).cost(client) for client in cohort.plans}
        there = sorted(set(cohort.plans) - cohort.dropped, key=lambda client: (times[client], client))
        assert set(cohort.ranks) == set(there[:4])
        assert cohort.late == set(there[4:])
        result = lead_round(job, state)
        rows = {row["client"]: row for row in result.clients}
        assert rows.keys() == cohort.plans.keys()
        for client in cohort.late:
            row, (down, up) = rows[client], job.costs.message_bytes(cohort.plans[client])
            assert (row["status"], row["reason"], row["rank"], row["loss_rms"]) == ("failed", "late", None, None)
            assert (row["bytes_up"], row["bytes_down"]) == (0, down)
            assert row["sim_time_s"] == pytest.approx(times[client] - up / job.fleet.profile(client).up, rel=1e-9)
            late_ones += 1
        waited_for = [row["sim_time_s"] for client, row in rows.items() if client not in cohort.late]
        assert result.row["sim_time_s"] == max(waited_for)
        assert result.row["energy_j"] == sum(row["energy_j"] for row in result.clients)
        assert result.row["bytes"]["down"] == sum(row["bytes_down"] for row in result.clients)
        memory = result.state.sampler
        assert json.loads(json.dumps(memory, allow_nan=False)) == memory
        for client in cohort.ranks:
            samples, loss = rows[client]["num_samples"], rows[client]["loss_rms"]
            assert memory["clients"][str(client)] == [samples * loss, round_index + 1, rows[client]["sim_time_s"]]
        assert not {str(client) for client in cohort.late | cohort.dropped} & (
            set(memory["clients"]) - set(state.sampler.get("clients", {}))
        )
        state = result.state
    assert late_ones > 0


class Counts(StatefulSampler):
    """Draws the first clients, and counts; knows nothing of evaluations."""

    def init(self, view):
        return {"count": view.rounds}

    def cohort(self, state, view, *, size, admit):
        return [client for client in range(view.num_clients) if admit(client)][:size]

    def advance(self, state, view, *, row, clients):
        assert (row["round"], len(clients)) == (view.round_index, 4)
        return {"count": state["count"] + 1, 7: "text by now"}


def test_a_sampler_of_ones_own_remembers(make):
    run, state = make(f"sampler={__name__}:Counts", "metrics.every=1")
    state = lead_round(run.job, state).state
    assert state.sampler == {"count": 7, "7": "text by now"}
    state, _ = evaluate(run, state)
    assert lead_round(run.job, state).state.sampler["count"] == 8


def test_the_sampler_in_the_documentation_takes_turns(make, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "own_parts.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^`own_turns\.py`:\n\n```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "own_turns.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    run, state = make("sampler=own_turns:InTurn", "fleet.tiers.1.dropout=0.0")
    for _ in range(5):
        state = lead_round(run.job, state).state
    assert sorted(state.sampler.values()) == [1] * 16 + [2] * 2  # 18 can take part, 20 turns


def test_a_sampler_without_a_state_leaves_it_alone(make):
    run, state = make("sampler=weighted")
    state = replace(state, sampler={"left": "alone"})
    assert lead_round(run.job, state).state.sampler == {"left": "alone"}
