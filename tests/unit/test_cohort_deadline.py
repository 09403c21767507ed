"""Clients that something slows down, and the deadline that the server sets: who is late, and how long a round takes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from run_problem import assembled

from dfed.checkpoint import params_sha256
from dfed.cohort import choose_cohort, encode_order
from dfed.config import load_config
from dfed.drawing import begin
from dfed.errors import ConfigError
from dfed.planner import ClientPlanner, Limits
from dfed.planner.costs import with_batch
from dfed.rng import uniform
from dfed.round import lead_round
from dfed.round_rows import round_row

SMALL = {
    "rounds": 8,
    "cohort": 6,
    "seed": 5,
    "model": {"name": "mlp", "hidden": [600]},
    "data": {"dataset": "synthetic", "shape": [1, 16, 16], "classes": 4, "samples": 300, "test_samples": 40,
             "partition": {"name": "dirichlet", "alpha": 0.5, "min_samples": 4}},
    "fleet": {"clients": 20, "tiers": [
        {"name": "fast", "count": 8, "flops": 1e8, "straggle": 0.5, "slowdown": 3},
        {"name": "slow", "count": 10, "flops": 1e7, "down": 1e6, "dropout": 0.2, "straggle": 0.3, "radio_watts": 0.5},
        {"name": "tiny", "count": 2, "memory": "1 MiB", "down": 1e5, "straggle": 0.5},
    ]},
    "client": {"batch_size": 8, "learning_rate": 0.05},
    "memory": {"enforce": "predicted"},
}
DEADLINE = 2.0  # fast clients are done by then, and the slow ones with few samples, unless slowed down
ROUNDS = 8


@pytest.fixture(scope="module")
def make():
    found = {}

    def made(*overrides):
        if overrides not in found:
            (run, state), results = assembled(SMALL, overrides), []
            for _ in range(ROUNDS):
                results.append(lead_round(run.job, state))
                state = results[-1].state
            found[overrides] = run, results
        return found[overrides]

    return made


def first_state(run):
    return run.job.strategy.init(run.planning.first_params(SMALL["seed"]))


class Reference:
    """What a client's round takes, from the settings and the bytes of its messages, in float64."""

    def __init__(self, run, round_index, client):
        index = int(run.job.fleet.tier_of(np.array(client)))
        self.tier = run.config.fleet.tiers[index].model_dump()
        form = run.job.forms.of(run.job.strategy.full_plan(client))
        self.down = np.float64(sum(form.down_bytes(round_index, client).values()))
        self.up = np.float64(sum(form.up_bytes(round_index, client).values()))
        # 256 × 600 + 600 × 4 products, forward and for both gradients (none for the input), a product and a sum each.
        self.flops = np.float64(2 * run.job.partition.num_samples(client) * (2 * 256 * 600 + 3 * 600 * 4))
        self.slowed = uniform(SMALL["seed"], "straggle", round_index, client) < self.tier["straggle"]
        self.factor = np.float64(self.tier["slowdown"] if self.slowed else 1.0)

    def times(self, computes=True, sends=True):
        return (self.factor * self.down / self.tier["down"], self.factor * self.flops / self.tier["flops"] * computes,
                self.factor * self.up / self.tier["up"] * sends)

    def whole(self):
        return sum(self.times())


def check_client(run, row, deadline):
    reference = Reference(run, row["round"], row["client"])
    late = row["reason"] == "late"
    down, compute, up = reference.times(computes=row["status"] == "completed" or late, sends=row["status"] == "completed")
    assert row["slowed"] is bool(reference.slowed)
    # Sums of three, in another order: a few ulp.
    assert row["sim_time_s"] == pytest.approx(down + compute + up, rel=1e-14)
    joules = reference.tier["watts"] * compute + reference.tier["radio_watts"] * (down + up)
    assert row["energy_j"] == pytest.approx(joules, rel=1e-14)
    if row["status"] == "completed":
        assert deadline is None or row["sim_time_s"] <= deadline
    if late:
        assert reference.whole() > deadline
        assert (row["status"], row["rank"], row["bytes_up"], row["loss"], row["num_steps"]) == ("failed", None, 0, None, 0)
        assert row["bytes_down"] == reference.down


@pytest.mark.parametrize("deadline", [None, DEADLINE])
def test_rounds_take_what_an_independent_reference_says(make, deadline):
    run, results = make(*([] if deadline is None else [f"server.deadline_s={deadline}"]))
    seen, waits = {"completed": 0, "late": 0, "dropout": 0, "predicted": 0}, set()
    for result in results:
        for row in result.clients:
            check_client(run, row, deadline)
            seen[row["reason"] or row["status"]] += 1
        missing = [row for row in result.clients if row["reason"] in ("late", "dropout")]
        longest = max(row["sim_time_s"] for row in result.clients if row["reason"] != "late")
        expected = longest if deadline is None else deadline if missing else min(longest, deadline)
        waits.add(expected == deadline)
        assert result.row["sim_time_s"] == expected
        assert result.row["energy_j"] == sum(row["energy_j"] for row in result.clients)
        assert result.row["clients"]["selected"] == len(result.clients) == 6
        assert result.row["clients"]["failed"] == len(missing)
        assert result.row["bytes"]["down"] == sum(row["bytes_down"] for row in result.clients)
    assert all(seen[name] for name in ("completed", "dropout", "predicted"))
    assert bool(seen["late"]) == (deadline is not None)
    assert any(row["slowed"] and row["reason"] == "late" for result in results for row in result.clients) == bool(deadline)
    assert any(row["slowed"] and row["status"] == "completed" for result in results for row in result.clients)
    assert True in waits if deadline else waits == {False}


def test_straggling_changes_times_only(make):
    run, results = make()
    usual, plain = make(*[f"fleet.tiers.{i}.straggle=0" for i in range(3)])
    assert params_sha256(results[-1].state.params) == params_sha256(plain[-1].state.params)
    assert run.job.view(first_state(run)).costs().tolist() == usual.job.view(first_state(usual)).costs().tolist()
    apart = {"sim_time_s", "energy_j", "time_s", "peak_bytes", "slowed"}
    slowed = 0
    for one, other in zip(results, plain, strict=True):
        for row, without in zip(one.clients, other.clients, strict=True):
            assert {k: v for k, v in row.items() if k not in apart} == {k: v for k, v in without.items() if k not in apart}
            assert without["slowed"] is False
            factor = run.job.fleet.profile(row["client"]).slowdown if row["slowed"] else 1
            # A factor on each part against one on the sum: a few ulp.
            assert row["sim_time_s"] == pytest.approx(factor * without["sim_time_s"], rel=1e-14)
            assert row["energy_j"] == pytest.approx(factor * without["energy_j"], rel=1e-14)
            slowed += row["slowed"]
    assert slowed > 10


def test_a_deadline_that_nobody_misses_changes_how_long_the_missing_are_waited_for_only(make):
    _, results = make()
    _, patient = make("server.deadline_s=1000000")
    assert params_sha256(results[-1].state.params) == params_sha256(patient[-1].state.params)
    waited = set()
    for one, other in zip(results, patient, strict=True):
        for row, same in zip(one.clients, other.clients, strict=True):
            apart = {"time_s", "peak_bytes"}
            assert {k: v for k, v in row.items() if k not in apart} == {k: v for k, v in same.items() if k not in apart}
        dropped = any(row["reason"] == "dropout" for row in one.clients)
        assert other.row["sim_time_s"] == (1e6 if dropped else one.row["sim_time_s"])
        waited.add(dropped)
    assert waited == {True, False}


def test_late_clients_are_in_no_order_and_in_no_sum(make):
    run, results = make(f"server.deadline_s={DEADLINE}")
    usual, _ = make()
    assert params_sha256(results[-1].state.params) != params_sha256(make()[1][-1].state.params)
    state, late = first_state(run), 0
    for round_index in range(ROUNDS):
        state = replace(state, round_index=round_index)
        cohort, all_of_them = choose_cohort(run.job, state), choose_cohort(usual.job, state)
        assert cohort.plans == all_of_them.plans
        assert (cohort.dropped, cohort.refused) == (all_of_them.dropped, all_of_them.refused)
        assert all_of_them.late == frozenset()
        missed = {client for client in all_of_them.ranks if Reference(run, round_index, client).whole() > DEADLINE}
        assert cohort.late == missed
        assert cohort.ranks.keys() == all_of_them.ranks.keys() - missed
        assert (cohort.wanted, cohort.is_missing) == (6, bool(missed or cohort.dropped))
        assert all_of_them.is_missing == bool(all_of_them.dropped)
        order = encode_order(run.job, state, cohort)
        assert {task["client"] for tasks in order.meta["tasks"].values() for task in tasks} == cohort.ranks.keys()
        late += len(missed)
    assert late > 5


def test_a_round_in_which_everybody_is_late_leaves_the_model_alone(make):
    run, results = make("server.deadline_s=0.001", "memory.enforce=off")
    for result in results:
        assert {row["reason"] for row in result.clients} <= {"late", "dropout"}
        assert (result.row["sim_time_s"], result.row["train_loss"]) == (0.001, None)
        assert result.row["clients"]["completed"] == 0
    assert params_sha256(results[-1].state.params) == params_sha256(first_state(run).params)


def test_a_refused_client_is_waited_for_no_longer_than_the_deadline(make):
    only_tiny = {"fleet.clients": 8, "fleet.tiers": "[{name: tiny, count: 8, memory: 1 MiB, down: 1e5}]"}
    overrides = [f"{name}={value}" for name, value in only_tiny.items()]
    _, plain = make("rounds=9", *overrides)
    _, results = make("server.deadline_s=2.5", *overrides)
    for one, other in zip(plain, results, strict=True):
        assert {row["reason"] for row in other.clients} <= {"predicted"}
        assert other.row["sim_time_s"] == min(2.5, one.row["sim_time_s"])
    assert plain[0].row["sim_time_s"] > 2.5  # 600 KiB at 100 kB/s


# 1.1 × 10, by Oort itself and by the server; and 1.1 × ⌈1.01 × 10⌉ where both draw more.
@pytest.mark.parametrize(("asked", "drawn", "expected"), [
    (("sampler=oort",), 11, {"too many", "too few", "as many as wanted"}),
    (("server.over_selection=1.1",), 11, {"too many", "too few", "as many as wanted"}),
    (("sampler=oort", "server.over_selection=1.01"), 13, {"too many"}),
])
def test_of_too_many_the_late_are_taken_away_first_and_then_the_slowest(make, asked, drawn, expected):
    deadline, wanted = 3 * DEADLINE, 10
    run, results = make(*asked, f"cohort={wanted}", "memory.enforce=off", "fleet.tiers.1.dropout=0.05",
                        "fleet.tiers.2.down=1e6", f"server.deadline_s={deadline}")
    state, kinds = first_state(run), set()
    for result in results:
        cohort = choose_cohort(run.job, begin(run.job.sampler, state, lambda state=state: run.job.view(state)))
        assert len(cohort.plans) == drawn
        there = sorted(set(cohort.plans) - cohort.dropped)
        whole = {client: Reference(run, state.round_index, client).whole() for client in there}
        in_time = [client for client in there if whole[client] <= deadline]
        in_time.sort(key=lambda client: (whole[client], client))
        assert cohort.ranks.keys() == set(in_time[:wanted])
        assert cohort.late == set(there) - set(in_time[:wanted])
        missing = cohort.dropped | set(there) - set(in_time)
        assert (cohort.wanted, cohort.is_missing) == (wanted, bool(missing))
        waits = bool(missing) and len(in_time) < wanted
        rows = [row for row in result.clients if row["client"] not in cohort.late]
        longest = max((row["sim_time_s"] for row in rows), default=0.0)
        assert result.row["sim_time_s"] == (deadline if waits else min(deadline, longest))
        assert {row["client"] for row in result.clients if row["reason"] == "late"} == cohort.late
        kinds.add((len(in_time) > wanted, bool(missing), waits))
        state = result.state
    # Where as many as wanted are in time, whoever is missing is not waited for.
    assert expected <= {"too many" if more else "too few" if waits else "as many as wanted" for more, _, waits in kinds}
    assert all(missing for more, missing, _ in kinds if not more)


@pytest.mark.parametrize(("factor", "drawn"), [(1, 6), (1.1, 7), (1.5, 9), (2.5, 15), (100, 20)])
def test_over_selection_draws_more_than_are_wanted_but_not_more_than_there_are(make, factor, drawn):
    calm = [f"fleet.tiers.{index}.straggle=0" for index in range(3)] + ["fleet.tiers.1.dropout=0"]
    run, results = make(f"server.over_selection={factor}", "memory.enforce=off", *calm)
    assert run.job.drawn == drawn
    for result in results:
        done = [row for row in result.clients if row["status"] == "completed"]
        late = [row for row in result.clients if row["reason"] == "late"]
        assert (len(done), len(late), result.row["clients"]["selected"]) == (6, drawn - 6, drawn)
        longest = max(row["sim_time_s"] for row in done)
        assert result.row["sim_time_s"] == longest
        for row in late:
            assert Reference(run, row["round"], row["client"]).whole() >= longest * (1 - 1e-14)


def test_the_server_waits_for_the_missing_where_too_few_complete_the_round(make):
    """Who fails while training is not known when the cohort is made, and is not replaced."""
    run, results = make("server.over_selection=1.5", "memory.enforce=off", f"server.deadline_s={3 * DEADLINE}")
    seen = set()
    for result, state in zip(results, [first_state(run), *(each.state for each in results)], strict=False):
        cohort = choose_cohort(run.job, state)
        rows = [dict(row) for row in result.clients]
        done = [row for row in rows if row["status"] == "completed"]
        assert round_row(cohort, rows, state.round_index, 3 * DEADLINE)["sim_time_s"] == result.row["sim_time_s"]
        done[0].update(status="oom", reason="oom")
        fewer = round_row(cohort, rows, state.round_index, 3 * DEADLINE)["sim_time_s"]
        assert fewer == (3 * DEADLINE if cohort.is_missing else result.row["sim_time_s"])
        seen.add((cohort.is_missing, len(done)))
    assert (True, 6) in seen  # where nobody was waited for, as six were done


def test_who_asks_the_planner_is_told_and_who_does_not_finds_out(make):
    asking = ("strategy=exclusivefl", "memory.enforce=off", f"server.deadline_s={DEADLINE}")
    plain = [f"fleet.tiers.{i}.straggle=0" for i in range(3)]
    run, results = make(*asking, *plain)
    careless, found_out = make(*asking[1:], *plain)
    view, late = run.job.view(first_state(run)), set()
    for client in range(20):
        expected = Reference(run, 0, client)
        expected.factor = 1.0
        assert (view.cost(client) is None) == (expected.whole() > DEADLINE or run.job.fleet.profile(client).tier == "tiny")
        assert careless.job.view(first_state(run)).cost(client) == pytest.approx(expected.whole(), rel=1e-14)
    assert not any(row["reason"] == "late" for result in results for row in result.clients)
    assert any(result.row["clients"]["ineligible"] for result in results)
    for result in found_out:
        late |= {row["client"] for row in result.clients if row["reason"] == "late"}
        assert result.row["clients"]["ineligible"] == 0
    assert late
    assert all(view.cost(client) is None for client in late)
    slowed, surprised = make(*asking)  # what slows a client down is not foreseen
    assert slowed.job.view(first_state(slowed)).costs() == pytest.approx(view.costs(), nan_ok=True, rel=0)
    assert any(row["reason"] == "late" for result in surprised for row in result.clients)


def test_the_planner_keeps_the_deadline_beside_limits_of_the_strategy(make):
    run, _ = make("client={steps: 10, batch_size: 8}")
    costs, client = run.job.costs, int(run.job.fleet.tier_clients("fast", 1)[0])
    profile, plan = run.job.fleet.profile(client), run.job.strategy.full_plan(client)

    def planner(deadline_s):
        return ClientPlanner(costs, profile, 100, {}, Limits(deadline_s))

    time_s = planner(None).cost(plan).total_s
    for deadline_s, fits in ((None, True), (time_s, True), (math.nextafter(time_s, 0), False)):
        assert planner(deadline_s).fits(plan) is fits
        assert planner(deadline_s).best([plan]) == (plan if fits else None)
        assert planner(None).fits(plan, time_s=deadline_s) is fits
        assert planner(time_s).fits(plan, time_s=deadline_s) is fits
    assert not planner(time_s / 2).fits(plan, time_s=time_s)
    # Ten steps take the longer the larger the batch: the largest that is in time, one by one.
    for deadline_s in (time_s, 2.5 * time_s, time_s / 3, 1e-6):
        sizes = [size for size in range(1, 41) if planner(None).cost(with_batch(plan, size)).total_s <= deadline_s]
        expected = with_batch(plan, max(sizes)) if sizes else None
        assert planner(deadline_s).largest_batch(plan, 40) == expected
        assert planner(None).largest_batch(plan, 40, time_s=deadline_s) == expected
    assert planner(None).largest_batch(plan, 40) == with_batch(plan, 40)


@pytest.mark.parametrize(("override", "fault"), [
    ("server.deadline_s=0", "`server.deadline_s` must be greater than 0, but is 0."),
    ("server.deadline_s=-1.5", "`server.deadline_s` must be greater than 0, but is -1.5."),
    ("server.deadline_s=.inf", "`server.deadline_s` must be a finite number, but is inf."),
    ("server.deadline_s=soon", "`server.deadline_s` must be a number, but is 'soon'."),
    ("server.deadline_s=true", "`server.deadline_s` must be a number, but is true."),
    ("fleet.tiers.0.straggle=1.5", "`fleet.tiers[0].straggle` must be at most 1, but is 1.5."),
    ("fleet.tiers.0.straggle=-1", "`fleet.tiers[0].straggle` must be at least 0, but is -1."),
    ("fleet.tiers.0.slowdown=0.9", "`fleet.tiers[0].slowdown` must be at least 1, but is 0.9."),
    ("fleet.tiers.0.slowdown=.inf", "`fleet.tiers[0].slowdown` must be a finite number, but is inf."),
])
def test_settings_that_cannot_be(override, fault):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override], base=SMALL)
    assert [str(found) for found in caught.value.faults] == [fault]


def test_the_settings_are_written_and_decide():
    plain = load_config(None, base=SMALL)
    assert plain.server.deadline_s is None
    assert plain.to_dict()["server"]["deadline_s"] is None
    assert load_config(None, ["server.deadline_s="], base=SMALL) == plain
    prints = {plain.fingerprint()}
    for override in ("server.deadline_s=5", "server.deadline_s=5.5", "fleet.tiers.0.straggle=0.4", "fleet.tiers.0.slowdown=2"):
        config = load_config(None, [override], base=SMALL)
        again = load_config(None, base=config.to_dict())
        assert again == config
        assert again.fingerprint() == config.fingerprint()
        prints.add(config.fingerprint())
    assert len(prints) == 5
    written = plain.to_dict()["fleet"]["tiers"]
    assert [(tier["straggle"], tier["slowdown"]) for tier in written] == [(0.5, 3.0), (0.3, 4.0), (0.5, 4.0)]
