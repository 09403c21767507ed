import gc
import itertools
import json
import logging
import math
import weakref

import numpy as np
import pytest
import torch
from client_problem import CLASSES, CPU, Small, data

from dfed import rng
from dfed.blocks import cut
from dfed.client import ClientReport, ClientSettings, Skeleton, Worker, run_plan
from dfed.client.home import ClientHome
from dfed.comm import wire
from dfed.comm.partial_sums import PartialSums, value_range, weight_scale
from dfed.data import client_batches
from dfed.data.dataset import ArrayDataset
from dfed.data.partitions import TablePartition
from dfed.errors import CheckpointError, RankLost
from dfed.memory import MemorySettings, make_cap
from dfed.memory.caps import Uncapped
from dfed.region import WHOLE, Index
from dfed.strategies.fedavg import FedAvg

SIZES = [20, 9, 33, 8, 1]


class Moody(FedAvg):
    """FedAvg whose clients misbehave as ``options["mood"]`` tells them."""

    def receive(self, model, client_state, plan):
        mood = plan.options.get("mood")
        if mood == "raise":
            raise ZeroDivisionError("a bad client")
        if mood == "oom":
            raise MemoryError("no more")
        if mood == "late oom":
            try:
                raise torch.OutOfMemoryError("tried to allocate too much")
            except RuntimeError as error:
                raise ValueError("wrapped") from error
        if mood == "weights":
            with torch.no_grad():
                model.get_parameter("head.fc.bias")[1] = math.nan
        if mood == "huge":
            model.huge = 1e20

    def loss(self, model, x, y, phase):
        loss = super().loss(model, x, y, phase)
        return loss * model.huge if hasattr(model, "huge") else loss


class Setting:
    def __init__(self, abandoned=lambda: False, cap=None, error_feedback=False, clients_folder=None, make=Moody, up="fp32",
                 **settings):
        self.small = Small(make=make, up=up)
        x, y = data(sum(SIZES), seed=2)
        self.dataset = ArrayDataset(x.numpy(), y.numpy().astype(np.int64), num_classes=CLASSES)
        bounds = np.cumsum([0, *SIZES])
        self.indices = [np.arange(start, stop) for start, stop in itertools.pairwise(bounds)]
        self.settings = ClientSettings(**{"learning_rate": 0.05, "momentum": 0.9, **settings})
        self.partition = TablePartition(np.arange(sum(SIZES)), np.array(SIZES), y.numpy(), CLASSES)
        self.worker = Worker(
            self.small.strategy, self.dataset, self.partition, self.settings, shapes=self.small.shapes,
            cap=cap or make_cap(MemorySettings(enforce="off"), CPU, has_budgets=False), forms=self.small.forms, device=CPU,
            seed=6, error_feedback=error_feedback, abandoned=abandoned,
        )
        self.clients_folder = clients_folder
        self.scale = weight_scale(sum(SIZES))

    def order(self, plans, exchange="fused"):
        shapes, splitting = self.small.shapes, self.small.splitting
        entries, length = wire.layout((name, splitting.block_of(name), "fp32", shape) for name, shape in shapes.items())
        meta = {"round": 2, "plans": json.loads(json.dumps([plan.to_json() for plan in plans])),
                "clients_folder": self.clients_folder, "scale": self.scale, "rate_factor": 0.5, "exchange": exchange,
                "ranges": {name: value_range(value) for name, value in self.small.values.items()}}
        return wire.encode("round", meta, entries, self.small.values, torch.zeros(length, dtype=torch.uint8))

    def task(self, client, mood=None, **fields):
        options = {"mood": mood} if mood else {}
        plan = self.small.plan(**{"client": client, "options": options, **fields})
        return {"client": client, "plan": plan, "weight": SIZES[client], "peak_bytes": 2**20}

    def work(self, tasks, exchange="fused"):
        sums, plans = PartialSums(self.small.shapes), [task["plan"] for task in tasks]
        numbered = [task | {"plan": number} for number, task in enumerate(tasks)]
        delivered = []
        reports = self.worker.work(self.order(plans, exchange), numbered, sums, delivered.append)
        assert [dict(message.meta) for message in delivered] == (
            [{"round": 2, "client": task["client"]} for task in tasks] if exchange == "per_client" else []
        )
        updates = [message for message in delivered if message.kind != "nothing"]
        return json.loads(json.dumps(reports)), updates, sums.flat.clone()

    def by_hand(self, client):
        """The client's update from run_plan, with the keys that the worker promises to use."""
        plan = self.small.plan(client=client)
        skeleton = Skeleton(self.small.strategy.build(plan))

        def batches(phase):
            return client_batches(self.dataset, self.indices[client], batch_size=phase.batch_size, epochs=phase.epochs,
                                  steps=phase.steps, generator=rng.torch_generator(6, "batches", 2, client, 0))

        return run_plan(self.small.strategy, plan, skeleton, self.small.values, self.small.forms.of(plan).regions, batches,
                        self.settings, rate_factor=0.5, device=CPU, generator=rng.torch_generator(6, "layers", 2, client))


@pytest.fixture(scope="module")
def setting():
    return Setting()


def test_sums_and_reports_are_those_of_the_clients(setting):
    clients = [3, 0, 4]
    reports, updates, sums = setting.work([setting.task(client) for client in clients])
    assert updates == []
    expected = PartialSums(setting.small.shapes)
    for client, report in zip(clients, reports, strict=True):
        result = setting.by_hand(client)
        form = setting.small.forms.of(setting.small.plan())
        ranges = {name: value_range(value) for name, value in setting.small.values.items()}
        expected.add(result.update, form.regions, SIZES[client] * setting.scale, ranges)
        assert (report["client"], report["status"], report["reason"], report["detail"]) == (client, "completed", None, None)
        assert report["num_visits"] == SIZES[client]
        assert report["num_steps"] == -(-SIZES[client] // 8)
        assert report["loss"] == float(result.loss_sum) / SIZES[client]
        assert report["loss_rms"] == math.sqrt(float(result.loss_square_sum) / SIZES[client])
        assert report["bytes_down"] == form.down_bytes(2, client)
        assert report["bytes_up"] == form.up_bytes(2, client)
        assert report["time_s"] > 0
    assert torch.equal(sums.view(torch.int64), expected.flat.view(torch.int64))
    # Another order, another history of the rank: the same bits.
    again = setting.work([setting.task(client) for client in (4, 3, 0)])
    assert torch.equal(again[2].view(torch.int64), sums.view(torch.int64))
    assert sorted(r["loss"] for r in again[0]) == sorted(r["loss"] for r in reports)


def test_exchange_per_client_gives_the_same_updates(setting):
    clients = [1, 2]
    _, _, sums = setting.work([setting.task(client) for client in clients])
    reports, updates, untouched = setting.work([setting.task(client) for client in clients], "per_client")
    assert not untouched.any()
    form, folded = setting.small.forms.of(setting.small.plan()), PartialSums(setting.small.shapes)
    for client, report, update in zip(clients, reports, updates, strict=True):
        form.check_update(update, 2, client, rank=0)
        ranges = {name: value_range(value) for name, value in setting.small.values.items()}
        folded.add(wire.decode(update), form.regions, SIZES[client] * setting.scale, ranges)
        assert report["bytes_up"] == form.up_bytes(2, client)
    assert torch.equal(folded.flat, sums)


@pytest.mark.parametrize("exchange", ["fused", "per_client"])
@pytest.mark.parametrize(("mood", "status", "reason", "text"), [
    ("raise", "failed", "exception", "ZeroDivisionError: a bad client"),
    ("oom", "failed", "host_memory", "out of memory without a cap, which is this machine's lack: no more"),
    ("late oom", "failed", "host_memory", "out of memory without a cap"),
    ("weights", "failed", "non_finite", "must be finite"),
    ("huge", "failed", None, "must"),
])
def test_a_client_that_fails_harms_nobody(setting, caplog, exchange, mood, status, reason, text):
    alone_reports, alone_updates, alone = setting.work([setting.task(0), setting.task(2)], exchange)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dfed"):
        reports, updates, sums = setting.work([setting.task(0), setting.task(1, mood), setting.task(2)], exchange)
    bad = reports[1]
    assert [report["status"] for report in reports] == ["completed", status, "completed"]
    assert bad["reason"] == reason or (reason is None and bad["reason"] in ("non_finite", "out_of_range"))
    assert text in bad["detail"]
    if mood == "raise":
        assert "Traceback" in bad["detail"]
        assert "in receive" in bad["detail"]
    assert (bad["bytes_up"] == {}) == (mood not in ("weights", "huge"))  # a refused update did cross
    assert bad["bytes_down"] == setting.small.forms.of(setting.small.plan(options={"mood": mood})).down_bytes(2, 1)
    # The others are as if it had not been there.
    assert torch.equal(sums.view(torch.int64), alone.view(torch.int64))
    assert [r["loss"] for r in (reports[0], reports[2])] == [r["loss"] for r in alone_reports]
    assert len(updates) == len(alone_updates) == (2 if exchange == "per_client" else 0)
    for update, other in zip(updates, alone_updates, strict=True):
        assert torch.equal(update.body, other.body)
    assert [report["status"] for report in setting.work([setting.task(1)])[0]] == ["completed"]


class Holds(Uncapped):
    """A cap in name: what runs out of memory under it has run into it."""

    enforces = True


def test_only_a_cap_in_force_makes_it_the_clients_memory():
    for cap, budget, expected in (
        (Holds(CPU), 2**20, ("oom", "oom")),
        (Holds(CPU), None, ("failed", "host_memory")),
        (Uncapped(CPU), 2**20, ("failed", "host_memory")),
    ):
        setting = Setting(cap=cap)
        (report,), _, _ = setting.work([setting.task(0, "oom") | {"budget_bytes": budget}])
        assert (report["status"], report["reason"]) == expected
        assert ("on a budget of 1.00 MiB" in report["detail"]) == (expected[0] == "oom")


def test_failures_are_logged_and_oom_only_once_per_plan_and_budget(caplog):
    setting = Setting(cap=Holds(CPU))
    tasks = [setting.task(0, "oom") | {"budget_bytes": 2**20},
             setting.task(1, "oom", details={"round": 9}) | {"budget_bytes": 2**20},  # needs as much: the same plan for memory
             setting.task(2, "raise"), setting.task(3, "raise")]
    with caplog.at_level(logging.WARNING, "dfed"):
        setting.work(tasks)
        setting.work(tasks[:1])
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "oom" in text]) == 1
    assert [text.partition(":")[0] for text in said if "exception" in text] == [
        "round 2 client 2 exception", "round 2 client 3 exception"
    ]


def test_a_rate_that_diverges_is_a_failed_client():
    setting = Setting(learning_rate=1e30)
    reports, _, sums = setting.work([setting.task(0), setting.task(2)])
    assert [(r["status"], r["reason"]) for r in reports] == [("failed", "non_finite")] * 2
    assert all("The client's data are finite: check the learning rate" in r["detail"] for r in reports)
    assert not sums.any()


def test_data_that_are_not_finite_are_named():
    setting = Setting()
    setting.dataset._images[SIZES[0] + 5, 0, 2, 3] = math.nan  # of client 1, in whichever mini-batch
    reports, _, sums = setting.work([setting.task(0), setting.task(1)])
    assert [r["reason"] for r in reports] == [None, "non_finite"]
    assert f"check the data (training sample {SIZES[0] + 5} holds NaN or infinity)" in reports[1]["detail"]
    assert sums.isfinite().all()


def test_a_mini_batch_too_small_for_batch_norm_is_explained():
    report = ClientReport(client=0, bytes_down={}, bytes_up={})
    error = None
    try:
        torch.nn.BatchNorm2d(2)(torch.ones(1, 2, 1, 1))
    except ValueError as caught:
        error = caught
    report.note(error, None)
    assert report.reason == "exception"
    assert "`client.drop_last: true` leaves out" in report.detail


def test_a_client_that_diverged_reports_no_loss():
    reports, _, _ = Setting(learning_rate=1e30).work([Setting().task(0)])
    assert reports[0]["reason"] == "non_finite"
    assert reports[0]["loss"] is reports[0]["loss_rms"] is None  # JSON has no NaN


def test_an_abandoned_job_ends_the_work():
    setting = Setting(abandoned=lambda: True)
    with pytest.raises(RankLost, match="the round is abandoned"):
        setting.work([setting.task(0)])


class Counts(FedAvg):
    """Its clients remember how often they were trained, and what they had last."""

    keeps_state = True

    def receive(self, model, client_state, plan):
        super().receive(model, client_state, plan)
        if plan.options.get("mood") == "raises":
            raise ValueError("no")
        model.turns = client_state.get("turns", torch.zeros(()))

    def remember(self, model, client_state, plan):
        return {"turns": model.turns + 1, "bias": model.get_parameter("head.fc.bias")}


def test_clients_remember_what_their_strategy_says(tmp_path):
    setting = Setting(make=Counts, clients_folder=str(tmp_path))
    home = ClientHome(tmp_path)
    (first, failed), _, _ = setting.work([setting.task(0), setting.task(1, "raises")])
    assert (first["keeps_state"], failed["keeps_state"]) == (True, False)
    assert not home.path(1, 2).exists()
    state = home.load(0, 2)
    assert state["own/turns"] == 1
    assert torch.equal(state["own/bias"], setting.by_hand(0).update["head.fc.bias"])
    home.save(0, 1, home.load(0, 2))
    setting.work([setting.task(0) | {"state": 1}])
    assert home.load(0, 2)["own/turns"] == 2
    with pytest.raises(CheckpointError, match="client 0 as it left round 9"):
        setting.work([setting.task(0) | {"state": 9}])
    with pytest.raises(CheckpointError, match="every rank must reach"):
        Setting(make=Counts, clients_folder=str(tmp_path / "elsewhere")).work([setting.task(0)])


def test_error_feedback_changes_what_arrives_the_second_time(tmp_path):
    results = {}
    for exchange in ("fused", "per_client"):
        folder = tmp_path / exchange
        folder.mkdir()
        setting = Setting(up="top_k(density=0.1)", error_feedback=True, clients_folder=str(folder))
        home = ClientHome(folder)
        _, updates, sums = setting.work([setting.task(0)], exchange)
        assert home.load(0, 2).keys() == {f"error/{entry.name}" for entry in setting.small.forms.of(setting.small.plan()).up
                                          if entry.codec != "fp32"}
        home.save(0, 1, home.load(0, 2))
        _, again, sums_again = setting.work([setting.task(0) | {"state": 1}], exchange)
        results[exchange] = home.load(0, 2)
        if exchange == "fused":
            assert not torch.equal(sums, sums_again)
        else:
            assert not torch.equal(updates[0].body, again[0].body)
    assert all(torch.equal(results["fused"][name], results["per_client"][name]) for name in results["fused"])


class Shallow(FedAvg):
    """Its clients hold the classifier only, and remember a tensor for each of its parameters."""

    keeps_state = True

    def build(self, plan):
        return cut(self.problem.chain, start="head")

    def receive(self, model, client_state, plan):
        model.given = sorted(client_state)

    def loss(self, model, x, y, phase):
        return model(x.flatten(1)[:, :16]).square().mean()

    def remember(self, model, client_state, plan):
        assert model.given == plan.options["wants"]
        return {**client_state, **{name: torch.full((), 2.0) for name, _ in model.named_parameters()}}


def test_what_was_kept_for_tensors_that_a_plan_does_not_hold_stays_outside_the_cap(tmp_path):
    setting, home = Setting(make=Shallow, clients_folder=str(tmp_path)), ClientHome(tmp_path)
    names = {name for name, _ in setting.small.chain.named_parameters()}
    home.save(0, 1, {f"own/{name}": torch.ones(()) for name in (*names, "turns")})
    head = sorted(name for name in names if name.startswith("head"))
    part = {"hold": ("head",), "train": ("head",), "options": {"wants": [*head, "turns"]}}
    (report,), _, _ = setting.work([setting.task(0, **part) | {"state": 1}])
    assert report["status"] == "completed", report["detail"]
    after = home.load(0, 2)
    assert after.keys() == {f"own/{name}" for name in (*names, "turns")}
    assert {name for name, value in after.items() if value == 2} == {f"own/{name}" for name in head}


def test_a_payload_is_kept_only_while_others_with_its_plan_are_to_come():
    alive, gone = [], []

    class Counted(Moody):
        def region(self, name, shape, plan):
            return Index((tuple(range(shape[0])),)) if shape else WHOLE  # a copy of everything

        def receive(self, model, client_state, plan):
            gc.collect()
            alive.append(sum(reference() is not None for reference in gone))

    setting = Setting(make=Counted)
    made = type(setting.small.forms.of(setting.small.plan())).received

    def received(form, values):
        payload = made(form, values)
        gone.append(weakref.ref(payload["head.fc.weight"]))
        return payload

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dfed.client.forms.Form.received", received)
        tasks = [setting.task(client, details={"draw": draw}) for client, draw in enumerate((0, 1, 0, 2))]
        reports, _, _ = setting.work(tasks)
    assert [report["status"] for report in reports] == ["completed"] * 4
    assert len(gone) == 3  # made once for the plan that two share
    assert alive == [1, 2, 1, 1]


class Odd(Counts):
    """Remembers in many ways; one of them cannot be kept, one changes what it was given."""

    def receive(self, model, client_state, plan):
        if plan.options.get("mood") == "in place" and client_state:
            client_state["turns"].add_(1)
        model.turns = client_state.get("turns", torch.zeros(()))

    def remember(self, model, client_state, plan):
        shared, mood = torch.ones(3), plan.options.get("mood")
        odd = {"number": {"a": 1.0}, "integers": {"a": torch.ones(3, dtype=torch.int64)}, "list": [shared],
               "sparse": {"a": shared.to_sparse()}, "shared": {"a": shared, "b": shared, "c": shared[1:]}}
        return odd.get(mood, {"turns": model.turns})


@pytest.mark.parametrize("exchange", ["fused", "per_client"])
def test_what_cannot_be_remembered_fails_the_client_and_leaves_the_sums_alone(exchange, tmp_path):
    setting = Setting(make=Odd, clients_folder=str(tmp_path))
    _, alone_updates, alone = setting.work([setting.task(0)], exchange)
    for mood in ("number", "integers", "list", "sparse"):
        reports, updates, sums = setting.work([setting.task(0), setting.task(1, mood)], exchange)
        assert [report["status"] for report in reports] == ["completed", "failed"]
        assert "`remember` must return" in reports[1]["detail"]
        assert torch.equal(sums, alone)
        assert len(updates) == len(alone_updates)
    (report,), _, _ = setting.work([setting.task(1, "shared")], exchange)
    assert report["keeps_state"]
    assert ClientHome(tmp_path).load(1, 2)["own/c"].tolist() == [1.0, 1.0]


class RetryingCap(Uncapped):
    """Says once that code was new."""

    enforces, times = True, 1

    def counts_new_code(self):
        self.times -= 1
        return self.times >= 0


def test_another_try_finds_the_state_as_the_first_one_did(tmp_path):
    results = []
    for times in (0, 1):
        folder = tmp_path / str(times)
        folder.mkdir()
        tries = []

        class Fails(Odd):
            def remember(self, model, client_state, plan, tries=tries, times=times):
                if type(model.turns) is torch.Tensor and client_state:
                    tries.append(1)
                    if len(tries) <= times:
                        raise MemoryError
                return super().remember(model, client_state, plan)

        cap = RetryingCap(CPU)
        setting = Setting(make=Fails, clients_folder=str(folder), cap=cap)
        setting.work([setting.task(0)])
        ClientHome(folder).save(0, 1, ClientHome(folder).load(0, 2))
        (report,), _, _ = setting.work([setting.task(0, "in place") | {"state": 1}])
        assert report["status"] == "completed"
        assert len(tries) == times + 1
        results.append(ClientHome(folder).load(0, 2)["own/turns"].item())
    assert results == [1.0, 1.0]
