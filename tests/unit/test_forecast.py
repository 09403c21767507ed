"""What ``dfed plan`` says of budgets that are spread over a tier, and of a deadline."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from plan_problem import BASE
from rich.console import Console as Terminal

from dfed.config import Choice, load_config
from dfed.forecast import device_order
from dfed.overview import Survey, prepare_to_plan
from dfed.planning import Planning
from dfed.report.plan import Findings, as_json, show

DATA = {**BASE["data"], "samples": 600, "partition": "iid"}


def prepared_for(fleet, **changes):
    return prepare_to_plan(load_config(None, base={**BASE, "data": DATA, "fleet": fleet, **changes}))


def said(rows, share):
    findings = Findings(model="cnn", num_params=1, batch_size=16, budget_bytes=None, strategies=[("plan", rows, share)])
    out = io.StringIO()
    show(findings, Terminal(file=out, width=200))
    assert json.loads(as_json(findings))["strategies"][0]["tiers"][0]["clients"] == rows[0].clients
    return out.getvalue()


def test_a_spread_tier_is_counted_client_by_client():
    prepared = prepared_for({"clients": 300, "tiers": [
        {"name": "spread", "count": 290, "memory": {"from": 0.5, "to": 1.5}}, {"name": "plain", "count": 10, "memory": 0.4},
    ]})
    survey, fleet = Survey(prepared), prepared.fleet
    for name in ("fedavg", "exclusivefl"):
        choice = Choice(name, {})
        planning = Planning(prepared.config, prepared.chain, choice, num_clients=300, device=prepared.device,
                            budgets=fleet.budgets())
        full = planning.costs.budget_bytes(planning.full_plan())
        peak = planning.costs.peak_bytes(planning.full_plan())
        budgets = np.array([fleet.profile(client).budget_bytes for client in range(300)])
        spread = budgets[fleet.tier_clients("spread", None)]
        (row, plain), share = survey.under(choice)
        assert (row.clients, row.budget_bytes, row.most_budget_bytes) == (290, spread.min(), spread.max())
        assert (plain.clients, plain.budget_bytes, plain.most_budget_bytes) == (10, *[budgets.min()] * 2)
        assert 0 < row.able == (spread >= full).sum() < 290
        assert row.unsure == (((spread >= peak) & (spread < full)).sum() if name == "fedavg" else 0)
        assert (share.clients, plain.able) == (row.able / 300, 0)
        sizes = prepared.partition.sizes()
        assert share.data == sizes[budgets >= full].sum() / sizes.sum()
        text = said([row, plain], share)
        assert "budgets differ within a tier: its figures are those of the smallest" in text
        assert f"{spread.min() / 2**20:.1f} to {spread.max() / 2**20:.1f}" in text


def test_a_spread_and_a_file_with_the_same_devices_give_the_same_rows(tmp_path):
    tier = {"name": "a", "count": 40, "memory": {"from": 0.6, "to": 1.2}, "flops": 1e9, "straggle": 0.25}
    prepared = prepared_for({"clients": 40, "tiers": [tier]})
    path = tmp_path / "fleet.csv"
    lines = [f"a,{prepared.fleet.profile(client).budget_bytes},1e9,0.25" for client in range(40)]
    path.write_text("\n".join(["tier,memory,flops,straggle", *lines, ""]))
    from_file = prepared_for({"csv": str(path)})
    assert from_file.fleet.budgets() == prepared.fleet.budgets()
    for choice in (Choice("fedavg", {}), Choice("exclusivefl", {})):
        assert Survey(from_file).under(choice) == Survey(prepared).under(choice)


def test_devices_that_differ_in_their_budget_only_stand_together():
    profile = prepared_for({"clients": 4, "tiers": [{"name": "a", "count": 4}]}).fleet.profile(0)
    mixed = [replace(profile, straggle=straggle, slowdown=slowdown, budget_bytes=budget)
             for budget in (None, 2**30, 2**20) for straggle in (0.5, 0.0) for slowdown in (2.0, 8.0)]
    order = sorted(mixed, key=device_order)
    assert [p.budget_bytes for p in order] == [2**20, 2**30, None] * 4
    assert len({device_order(p)[:-1] for p in mixed}) == 4


@pytest.mark.parametrize("share_in_time", [False, True])
def test_a_plan_that_takes_longer_than_the_deadline_does_not_fit(share_in_time):
    fleet = {"clients": 40, "tiers": [{"name": "fast", "count": 30, "memory": 2.0, "straggle": 1.0},
                                      {"name": "slow", "count": 10, "memory": 2.0, "flops": 1e7}]}
    plain, careful = Choice("fedavg", {}), Choice("exclusivefl", {})
    (fast, slow), share = Survey(prepared_for(fleet)).under(plain)
    assert (fast.able, slow.able, share.clients) == (30, 10, 1)
    assert 4 * fast.sim_time_s < slow.sim_time_s  # slowed down, the fast are still the faster ones, but that is not looked at
    deadline = slow.sim_time_s if share_in_time else float(np.nextafter(slow.sim_time_s, 0))
    survey = Survey(prepared_for(fleet, server={"deadline_s": deadline}))
    (same, row), share = survey.under(plain)
    assert same == fast
    if share_in_time:
        assert (row, share.clients) == (slow, 1)
        assert survey.under(careful)[0][1] == slow
        return
    why = f"the plan takes {slow.sim_time_s:g} simulated s, and `server.deadline_s` is {deadline:g}"
    assert row == replace(slow, able=0, verdict="no", fits=False, smallest_bytes=None, reason=why)
    assert share.clients == share.data == 30 / 40
    assert f"slow: no budget would do: {why}" in said([same, row], share)
    (same, row), share = survey.under(careful)
    assert same == fast
    assert (row.able, row.verdict, row.sim_time_s, row.smallest_bytes, share.clients) == (0, "no", None, None, 30 / 40)
    assert row.reason == ("the strategy has no plan for such a client, whatever its budget, within "
                          f"`server.deadline_s` ({deadline:g} s)")
