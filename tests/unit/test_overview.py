"""What ``dfed plan`` says, against the parts it is made of, and against a run."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from plan_problem import BASE

from dfed.config import Choice, load_config
from dfed.errors import ConfigError
from dfed.forecast import Forecast
from dfed.overview import Survey, choices, prepare_to_plan
from dfed.planning import Planning

MIB = 2**20
DEEPEST = """
from dfed.plan import Plan
from dfed.strategies import Strategy


class Deepest(Strategy):
    \"\"\"Trains the longest run of last blocks that fits.\"\"\"

    def plan(self, state, candidate):
        names = self.problem.splitting.names
        plans = [Plan(client=candidate.client, hold=names, train=names[start:], phases=self.problem.phases)
                 for start in range(len(names))]
        return candidate.planner.best(plans)
"""


@pytest.fixture(scope="module")
def prepared():
    return prepare_to_plan(load_config(None, base=BASE))


def planning_of(prepared, choice):
    return Planning(prepared.config, prepared.chain, choice, num_clients=8, device=prepared.device)


def test_rows_say_what_the_parts_say(prepared):
    (own, *others) = choices(prepared.config, None)
    assert (own.name, own.options) == ("fedprox", {"mu": 0.5})
    assert {choice.name for choice in others} >= {"fedavg", "exclusivefl"}
    plain = [choice for choice in others if choice.name in ("fedavg", "exclusivefl")]  # the others train something smaller
    for choice in (own, *plain):
        costs = planning_of(prepared, choice).costs
        plan = planning_of(prepared, choice).full_plan()
        (strong, weak), share = Survey(prepared).under(choice)
        assert (strong.tier, strong.clients, strong.able, strong.fits) == ("strong", 5, 5, True)
        assert (weak.tier, weak.clients, weak.able, weak.fits) == ("weak", 3, 0, False)
        assert strong.batch_size == weak.batch_size == 16
        assert (strong.peak_bytes, strong.needed_bytes) == (costs.peak_bytes(plan), costs.budget_bytes(plan))
        assert strong.smallest_bytes == weak.smallest_bytes == costs.budget_bytes(plan)
        assert strong.largest_batch == costs.largest_batch(plan, strong.budget_bytes, 10**5)
        assert weak.largest_batch == costs.largest_batch(plan, weak.budget_bytes, 10**5) < 16
        assert strong.trained_share == 1
        assert (strong.bytes_down, strong.bytes_up) == costs.message_bytes(plan)
        assert strong.flops == costs.flops(plan, 50)  # 400 samples in 8 equal shards
        assert strong.sim_time_s == strong.flops / 10e9 + strong.bytes_up / 1.25e6 + strong.bytes_down / 6.25e6
        assert (weak.peak_bytes is None) == (choice.name == "exclusivefl")
        assert (share.clients, share.data, share.num_classes) == (5 / 8, 5 / 8, 4)
        able = prepared.fleet.tier_clients("strong", None)
        labels = [prepared.data.train.labels(prepared.partition.indices(int(client))) for client in able]
        assert share.classes == len(np.unique(np.concatenate(labels)))


def test_the_smallest_budget_does_and_a_byte_less_does_not(prepared):
    for name in ("fedavg", "allsmall", "fedepth", "neulite", "neuroflux", "cocofl"):
        (choice,) = choices(prepared.config, [name])
        planning = planning_of(prepared, choice)
        forecast = Forecast(planning, name, prepared.plain.costs)
        profile = prepared.fleet.profile(0)
        smallest = forecast._smallest_budget(replace(profile, budget_bytes=None), 20, does=True)
        assert smallest == forecast._smallest_budget(replace(profile, budget_bytes=2 * smallest), 20, does=True)
        assert smallest == forecast._smallest_budget(replace(profile, budget_bytes=smallest - 1), 20, does=False)
        verdicts = [first and first.verdict for size in (smallest - 1, smallest, 2 * smallest)
                    for first in [forecast.first(replace(profile, budget_bytes=size), 20)]]
        assert verdicts[0] != "yes", name
        assert verdicts[1:] == ["yes", "yes"], name


def test_the_smallest_budget_of_a_strategy_with_smaller_plans(prepared, tmp_path, monkeypatch):
    (tmp_path / "deepest_plans.py").write_text(DEEPEST)
    monkeypatch.syspath_prepend(tmp_path)
    (choice,) = choices(prepared.config, ["deepest_plans:Deepest"])
    costs, full = planning_of(prepared, choice).costs, planning_of(prepared, choice).full_plan()
    head = type(full)(client=0, hold=full.hold, train=full.hold[-1:], phases=full.phases)
    (strong, weak), _ = Survey(prepared).under(choice)
    assert strong.smallest_bytes == weak.smallest_bytes == costs.budget_bytes(head) < costs.budget_bytes(full)
    assert strong.trained_share == 1
    assert weak.fits == (weak.budget_bytes >= weak.smallest_bytes)
    del sys.modules["deepest_plans"]


def survey_of(tmp_path, lines, **changes):
    path = tmp_path / "fleet.csv"
    path.write_text("\n".join(["tier,memory,flops", *lines, ""]))
    return Survey(prepare_to_plan(load_config(None, base={**BASE, **changes, "fleet": {"csv": str(path)}})))


def test_a_fleet_from_a_file_is_counted_client_by_client(prepared, tmp_path):
    (choice,) = choices(prepared.config, ["fedavg"])
    plan = planning_of(prepared, choice).full_plan()
    costs = planning_of(prepared, choice).costs
    enough, peak = costs.budget_bytes(plan), costs.peak_bytes(plan)
    lines = [f"a,{enough},1e9", f"a,{enough},2e9", "a,,2e9", f"a,{enough - 1},1e9"] + [f"b,{peak},1e9"] * 2
    lines += [f"b,{peak - 1},1e9", f"b,{2**20},1e9"]
    survey = survey_of(tmp_path, lines)
    (a, b), share = survey.under(choice)
    assert (a.clients, a.able, a.unsure, a.verdict, a.fits) == (4, 3, 1, "maybe", False)
    assert (a.budget_bytes, a.most_budget_bytes) == (enough - 1, None)
    assert (b.clients, b.able, b.unsure, b.verdict) == (4, 0, 2, "no")
    assert (b.budget_bytes, b.most_budget_bytes) == (2**20, peak)
    partition, labels = survey._prepared.partition, survey._prepared.data.train
    held = np.concatenate([partition.indices(client) for client in (0, 1, 2)])
    assert (share.clients, share.data) == (3 / 8, len(held) / 400)
    assert share.classes == len(np.unique(labels.labels(held))) < 4  # a shard each holds few classes
    nobody = survey_of(tmp_path, [f"a,{2**20},1e9"] * 8).under(choice)[1]
    assert (nobody.clients, nobody.data, nobody.classes, nobody.num_classes) == (0, 0, 0, 4)


def test_classes_are_counted_for_a_partition_without_regard_to_labels(tmp_path):
    data = {**BASE["data"], "samples": 8, "classes": 8, "partition": "iid"}
    survey = survey_of(tmp_path, ["a,,1e9", *[f"b,{2**20},1e9"] * 7], data=data)
    _, share = survey.under(choices(survey._prepared.config, ["fedavg"])[0])
    assert (share.clients, share.data, share.classes, share.num_classes) == (1 / 8, 1 / 8, 1, 8)


def test_many_budgets_are_judged_as_if_each_were_asked(prepared, tmp_path):
    (choice,) = choices(prepared.config, ["exclusivefl"])
    planning = planning_of(prepared, choice)
    needed = planning.costs.budget_bytes(planning.full_plan())
    budgets = [needed + step * 4096 for step in range(-40, 41)]
    data = {**BASE["data"], "samples": 400, "partition": "iid"}
    survey = survey_of(tmp_path, [f"a,{budget},{1 + place % 2}e9" for place, budget in enumerate(budgets)], data=data)
    (row,), _ = survey.under(choice)
    assert (row.able, row.unsure, row.clients) == (41, 0, 81)


def test_the_rule_of_the_run(tmp_path):
    base = {**BASE, "fleet": {"clients": 8, "tiers": [{"name": "a", "count": 8, "memory": 1.0}]}}
    config = load_config(None, base=base)
    planning = planning_of(prepare_to_plan(config), config.strategy)
    peak, needed = planning.costs.peak_bytes(planning.full_plan()), planning.full_budget_bytes()
    for enforce, budget, verdict in [("hard", needed, "yes"), ("hard", needed - 1, "maybe"), ("hard", peak, "maybe"),
                                     ("hard", peak - 1, "no"), ("predicted", peak, "yes"), ("predicted", peak - 1, "no"),
                                     ("off", 2**20, "yes")]:
        fleet = {"clients": 8, "tiers": [{"name": "a", "count": 8, "memory": budget}]}
        config = load_config(None, base={**BASE, "fleet": fleet, "memory": {"enforce": enforce}})
        (row,), _ = Survey(prepare_to_plan(config)).under(config.strategy)
        assert (row.verdict, row.fits) == (verdict, verdict == "yes"), (enforce, budget)
        assert (row.able, row.unsure) == (8 * (verdict == "yes"), 8 * (verdict == "maybe"))


OWN = """
import sys

from dfed.plan import Plan
from dfed.strategies import Strategy


class Never(Strategy):
    def plan(self, state, candidate):
        return None


class Refuses(Strategy):
    def plan(self, state, candidate):
        raise ValueError("not today")


class Text(Strategy):
    def plan(self, state, candidate):
        return "all"


class Unknown(Strategy):
    def plan(self, state, candidate):
        return Plan(client=0, hold=("stem",), train=("stem",), phases=self.problem.phases)


class Idle(Strategy):
    def plan(self, state, candidate):
        return Plan(client=0, hold=self.problem.splitting.names, train=(), phases=())


class Codec(Strategy):
    def plan(self, state, candidate):
        names = self.problem.splitting.names
        return Plan(client=0, hold=names, train=names, phases=self.problem.phases, up={names[0]: "zip"})


class Whole(Strategy):
    def plan(self, state, candidate):
        return self.full_plan(candidate.client)


class Divides(Whole):
    def loss(self, model, x, y, phase):
        return super().loss(model, x, y, phase) / 0 + 1 // 0


class Looks(Whole):
    def loss(self, model, x, y, phase):
        loss = super().loss(model, x, y, phase)
        return loss if loss.item() > 1 else 2 * loss


class Leaves(Whole):
    def build(self, plan):
        sys.exit(0)


class LeavesAtOnce(Whole):
    def __init__(self, problem):
        sys.exit()
"""


@pytest.mark.parametrize(("name", "said"), [
    ("Refuses", r"'own_strategies:Refuses' raised ValueError: not today \(.*own_strategies.py:"),
    ("Text", "must return a dfed.plan.Plan or None from `plan`, but 'own_strategies:Text' returns a str"),
    ("Unknown", "must plan with blocks out of conv0, conv1, hidden, head, but 'own_strategies:Unknown' names 'stem'"),
    ("Idle", "must plan at least one phase, but 'own_strategies:Idle' plans none"),
    ("Codec", "must plan what can be carried out, but 'own_strategies:Codec' does not: a codec must be one of .*'zip'"),
    ("Divides", "'own_strategies:Divides' raised ZeroDivisionError"),
    ("Looks", "'own_strategies:Looks' raised RuntimeError: it asks for the value of a tensor"),
    ("Leaves", "'own_strategies:Leaves' raised SystemExit: 0"),
    ("LeavesAtOnce", "'own_strategies:LeavesAtOnce' raised SystemExit"),
])
def test_a_strategy_of_ones_own_that_fails_is_named(name, said, prepared, tmp_path, monkeypatch):
    (tmp_path / "own_strategies.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_strategies", raising=False)
    with pytest.raises(ConfigError, match=f"`strategy` .*{said}"):
        Survey(prepared).under(Choice(f"own_strategies:{name}", {}))


def test_a_strategy_that_never_plans_has_no_budget_that_would_do(prepared, tmp_path, monkeypatch):
    (tmp_path / "own_strategies.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_strategies", raising=False)
    rows, share = Survey(prepared).under(Choice("own_strategies:Never", {}))
    for row in rows:
        assert (row.able, row.smallest_bytes, row.largest_batch, row.verdict) == (0, None, 0, "no")
        assert row.reason == "the strategy has no plan for such a client, whatever its budget"
    assert share.clients == 0


def test_a_batch_norm_that_sees_one_value_does_not_run():
    model = {"name": "resnet8"}
    data = {**BASE["data"], "shape": [1, 4, 4]}  # 1 × 1 in the last stage
    for batch_size, verdict in ((1, "no"), (2, "yes")):
        config = load_config(None, base={**BASE, "model": model, "data": data, "fleet": {
            "clients": 8, "tiers": [{"name": "a", "count": 8, "memory": "300MB"}]}, "client": {"batch_size": batch_size}})
        (row,), share = Survey(prepare_to_plan(config)).under(config.strategy)
        assert (row.verdict, row.able, share.clients) == (verdict, 8 * (verdict == "yes"), verdict == "yes")
        assert (row.smallest_bytes is None) == (row.peak_bytes is None) == (verdict == "no")
        assert ("batch norm" in (row.reason or "")) == (verdict == "no")
