import dataclasses

import pytest
import torch
from torch import nn

from dfed.blocks import Splitting
from dfed.client import ClientSettings, Forms
from dfed.fleet import DeviceProfile
from dfed.memory import CPU_OVERHEAD_BYTES, GREY_ZONE
from dfed.models import Chain, build_chain
from dfed.plan import Phase, Plan
from dfed.planner import ClientPlanner, Costs, Limits, Store, chain_costs, learn, with_batch
from dfed.registry import STRATEGIES
from dfed.strategies import Problem, Strategy

CPU = torch.device("cpu")


def costs_of(model, options, shape, classes, *, strategy="fedavg", device=CPU, by_prediction=False, **settings):
    chain = build_chain(model, options, input_shape=shape, num_classes=classes)
    splitting = Splitting.by_unit(chain.unit_names)
    shapes = {name: tuple(t.shape) for name, t in chain.state_dict().items() if t.is_floating_point()}
    client = ClientSettings(**settings)
    problem = Problem(chain=chain, splitting=splitting, phases=client.phases, num_clients=1, seed=0)
    made = STRATEGIES.get(strategy)(problem)
    costs = Costs(made, client, Forms(made, splitting, shapes), device, by_prediction=by_prediction)
    weights = sum(parameter.numel() for parameter in chain.parameters())
    return costs, Plan(client=0, hold=splitting.names, train=splitting.names, phases=client.phases), weights


def chain_problem():
    chain = build_chain("mlp", {"hidden": [32]}, input_shape=(1, 8, 8), num_classes=4)
    phases = (Phase(batch_size=8, epochs=1),)
    return Problem(chain=chain, splitting=Splitting.by_unit(chain.unit_names), phases=phases, num_clients=1, seed=0)


def test_flops_of_an_mlp_by_hand():
    costs, plan, _ = costs_of("mlp", {"hidden": [20, 30]}, (1, 4, 4), 10, batch_size=8, epochs=3)
    # A product and a sum for each weight and sample: forward, gradient of the weight, and gradient of the input, which the
    # first layer does not need.
    layers = [16 * 20, 20 * 30, 30 * 10]
    per_sample = sum(2 * 3 * size for size in layers) - 2 * layers[0]
    assert costs.flops(plan, 1) == 3 * per_sample
    assert costs.flops(plan, 50) == 3 * 50 * per_sample
    assert costs.flops(Plan(client=4, hold=plan.hold, train=plan.train, phases=plan.phases), 50) == 150 * per_sample
    steps = Plan(client=0, hold=plan.hold, train=plan.train, phases=(Phase(batch_size=8, steps=5),))
    assert costs.flops(steps, 20) == (8 + 8 + 4 + 8 + 8) * per_sample
    assert costs.flops(steps, 3) == 5 * 3 * per_sample


def test_flops_of_a_cnn_by_hand():
    options = {"channels": [4, 6], "kernel": 3, "hidden": 10, "norm": "batch"}
    costs, plan, _ = costs_of("cnn", options, (3, 8, 8), 5, batch_size=4)
    conv0, conv1 = 8 * 8 * 4 * 3 * 9, 4 * 4 * 6 * 4 * 9  # pixels out · channels out · channels in · kernel
    hidden, head = 6 * 2 * 2 * 10, 10 * 5
    per_sample = 2 * (2 * conv0 + 3 * (conv1 + hidden + head))
    assert costs.flops(plan, 7) == 7 * per_sample
    phases = (Phase(batch_size=4, epochs=1), Phase(batch_size=2, epochs=2))
    two = Plan(client=0, hold=plan.hold, train=plan.train, phases=phases)
    assert costs.flops(two, 7) == 3 * 7 * per_sample


@pytest.mark.parametrize(("settings", "states"), [
    ({}, 0), ({"momentum": 0.9}, 1), ({"optimizer": "adam"}, 2), ({"optimizer": "adamw", "clip_norm": 1.0}, 2),
])
def test_peak_of_a_wide_layer_by_hand(settings, states):
    # One sample, so that weights outweigh everything else: weight, gradient and the optimiser's state, all at once.
    costs, plan, weights = costs_of("mlp", {"hidden": []}, (1, 32, 32), 1000, batch_size=1, **settings)
    tensors = costs.peak_bytes(plan)
    # Beside them: input, logits, losses: 4 KiB each, a few at a time; a norm's work space where gradients are clipped.
    assert 0 <= tensors - 4 * weights * (2 + states) <= 64 * 1024
    assert costs.peak_bytes(plan) is not None
    assert costs.peak_bytes(Plan(client=9, hold=plan.hold, train=plan.train, phases=plan.phases)) == costs.peak_bytes(plan)


def test_peak_grows_with_the_batch_and_with_what_the_strategy_keeps():
    peaks = {}
    for batch in (8, 64, 128, 256):
        costs, plan, weights = costs_of("cnn", {"hidden": 32}, (1, 16, 16), 10, batch_size=batch)
        peaks[batch] = costs.peak_bytes(plan)
    assert peaks[8] < peaks[64] < peaks[128] < peaks[256]
    # Where activations make the peak, all but the weights is proportional to the batch.
    assert peaks[256] - peaks[128] == 2 * (peaks[128] - peaks[64])
    prox, plan, weights = costs_of("cnn", {"hidden": 32}, (1, 16, 16), 10, batch_size=8, strategy="fedprox")
    assert prox.peak_bytes(plan) >= peaks[8] + 4 * weights  # the copy of the global model


def test_convolutions_in_parts_are_predicted_as_whole_ones():
    whole, plan, _ = costs_of("cnn", {"channels": [4]}, (1, 8, 8), 4, batch_size=16)
    parted, _, _ = costs_of("cnn", {"channels": [4]}, (1, 8, 8), 4, batch_size=16, conv_parts=5)
    assert [parted.peak_bytes(with_batch(plan, size)) for size in (3, 16)] == [
        whole.peak_bytes(with_batch(plan, size)) for size in (3, 16)]
    assert parted._line(plan) == whole._line(plan)
    assert parted._line(plan) is not None


def test_fits_leaves_the_grey_zone_and_the_overhead():
    costs, plan, _ = costs_of("mlp", {"hidden": [200]}, (1, 16, 16), 10, batch_size=4)
    tensors = costs.peak_bytes(plan)
    needed = tensors * (1 + GREY_ZONE) + CPU_OVERHEAD_BYTES
    assert costs.fits(plan, None)
    assert costs.budget_bytes(plan) == int(needed) + 1  # rounded up
    assert costs.fits(plan, int(needed) + 1)
    assert not costs.fits(plan, int(needed) - 1)
    assert not costs.fits(plan, 0)
    on_gpu, plan, _ = costs_of("mlp", {"hidden": [200]}, (1, 16, 16), 10, batch_size=4, device=torch.device("cuda", 0))
    assert on_gpu.peak_bytes(plan) == tensors
    assert on_gpu.fits(plan, int(tensors * (1 + GREY_ZONE)) + 1)
    assert not on_gpu.fits(plan, int(tensors * (1 + GREY_ZONE)) - 1)


def test_where_prediction_is_the_verdict_a_plan_fits_from_its_peak_on():
    """``memory.enforce: predicted`` refuses a client below the peak, and nobody else."""
    costs, plan, _ = costs_of("cnn", {"hidden": 32}, (1, 16, 16), 10, batch_size=16, by_prediction=True)
    peak = costs.peak_bytes(plan)
    assert costs.budget_bytes(plan) == peak
    assert costs.fits(plan, peak)
    assert not costs.fits(plan, peak - 1)
    for batch in (1, 7, 100):
        exact = costs.peak_bytes(with_batch(plan, batch))
        assert costs.largest_batch(plan, exact, 200) == batch
        assert costs.largest_batch(plan, exact - 1, 200) == batch - 1


@pytest.mark.parametrize(("model", "options"), [
    ("cnn", {"hidden": 32}), ("resnet8", {}), ("vit_tiny", {"depth": 1, "width": 24}),
])
def test_a_peak_at_any_batch_size_follows_from_one_prediction(model, options):
    costs, plan, _ = costs_of(model, options, (3, 16, 16), 10, batch_size=32, momentum=0.9)
    for size in (2, 5, 16, 37, 100):
        assert costs.peak_bytes(with_batch(plan, size)) == costs.peak_bytes_at(with_batch(plan, size))


@pytest.mark.parametrize(("model", "strategy"), [("cnn", "fedavg"), ("vit_tiny", "fedavg"), ("cnn", "neulite"),
                                                 ("cnn", "fjord")])
def test_flops_are_the_same_whether_the_peak_was_asked_for_before(model, strategy):
    """Counted on the way or by themselves; nHSIC's grow with the square of the batch, and are counted by themselves."""
    found = []
    for asks_first in (True, False):
        costs, plan, _ = costs_of(model, {}, (3, 32, 32), 10, strategy=strategy, batch_size=32)
        if asks_first:
            costs.peak_bytes(plan)
        found.append(costs.flops(plan, 100))
    assert found[0] == found[1] > 0


def test_the_largest_batch_fits_and_the_next_does_not():
    costs, plan, _ = costs_of("resnet8", {}, (3, 16, 16), 10, batch_size=4, momentum=0.9)
    for budget in (30 * 2**20, 33 * 2**20, 100 * 2**20):
        size = costs.largest_batch(plan, budget, 10**6)
        assert size > 1
        assert costs.fits(with_batch(plan, size), budget)
        assert not costs.fits(with_batch(plan, size + 1), budget)
        assert costs.largest_batch(plan, budget, 3) == 3
    assert costs.largest_batch(plan, 12 * 2**20, 100) == 0
    assert costs.largest_batch(plan, None, 77) == 77
    # Phases with batches of their own have no line; the search then predicts.
    phases = (Phase(batch_size=4, epochs=1), Phase(batch_size=8, epochs=1))
    two = Plan(client=0, hold=plan.hold, train=plan.train, phases=phases)
    assert costs.peak_bytes(two) == costs.peak_bytes(with_batch(two, 8))
    assert costs.largest_batch(two, 33 * 2**20, 10**6) == costs.largest_batch(with_batch(two, 1), 33 * 2**20, 10**6)


def profile(budget, **changes):
    return DeviceProfile(**{"tier": "t", "budget_bytes": budget, "flops": 1e9, "up": 1e6, "down": 2e6, "watts": 2.0,
                            "radio_watts": 1.0, "availability": 1.0, "dropout": 0.0, **changes})


def test_the_best_plan_for_a_client():
    costs, full, _ = costs_of("resnet8", {}, (3, 16, 16), 10, batch_size=64, momentum=0.9)
    plans = [with_batch(full, size) for size in (64, 32, 8)]
    enough = [costs.budget_bytes(plan) for plan in plans]
    assert sorted(enough, reverse=True) == enough
    for number, budget in enumerate(enough):
        planner = ClientPlanner(costs, profile(budget), 100, {})
        assert planner.best(plans) == plans[number]
        assert [planner.fits(plan) for plan in plans] == [i >= number for i in range(3)]
    assert ClientPlanner(costs, profile(enough[-1] - 1), 100, {}).best(plans) is None
    assert ClientPlanner(costs, profile(None), 100, {}).best(plans) == plans[0]
    # Time and bytes: the cost by hand, and a limit on either side of it.
    planner = ClientPlanner(costs, profile(None), 100, {})
    down, up = costs.message_bytes(full)
    seconds = costs.flops(full, 100) / 1e9 + down / 2e6 + up / 1e6
    assert planner.cost(full).total_s == pytest.approx(seconds, rel=1e-12)
    assert planner.fits(full, time_s=seconds * 1.001, upload_bytes=up)
    assert not planner.fits(full, time_s=seconds * 0.999)
    assert not planner.fits(full, upload_bytes=up - 1)
    assert planner.best(plans, time_s=seconds * 0.9) is None
    assert planner.largest_batch(full, 50) == with_batch(full, 50)
    assert planner.largest_batch(full, 50, time_s=seconds * 0.9) is None


def test_a_clients_own_limits_are_shares_of_plain_training():
    costs, full, _ = costs_of("resnet8", {}, (3, 16, 16), 10, batch_size=16)
    names = full.hold
    less = Plan(client=0, hold=full.hold, train=names[-1:], phases=full.phases)  # the same arithmetic, but a small upload

    def planner(client, deadline_s=None, upload_share=None, **device):
        limits = Limits.of(costs, profile(None, **device), client, 100, deadline_s=deadline_s, upload_share=upload_share)
        return ClientPlanner(costs, profile(None, **device), 100, {}, limits)

    assert planner(0).limits == Limits(None, None)
    for client in (0, 15, 105):  # the client's number is in the header: its digits count
        mine, small = full.for_client(client), less.for_client(client)
        seconds, (_, up) = planner(client).cost(mine).total_s, costs.message_bytes(mine)
        half = planner(client, time_share=0.5)
        assert half.limits.time_s == pytest.approx(0.5 * seconds, rel=1e-12)
        assert not half.fits(mine)
        assert planner(client, time_share=1.0).fits(mine)
        assert planner(client, time_share=1.0, deadline_s=0.25 * seconds).limits.time_s == 0.25 * seconds
        least = costs.message_bytes(small)[1] / up
        for share, sends in ((1.0, [mine, small]), (0.999, [small]), (least * 1.001, [small]), (least * 0.999, [])):
            limited = planner(client, upload_share=share)
            assert [plan for plan in (mine, small) if limited.fits(plan)] == sends
            assert limited.fits(small, upload_bytes=0) is False


def test_what_ran_out_of_memory_is_not_tried_again():
    costs, full, _ = costs_of("resnet8", {}, (3, 16, 16), 10, batch_size=32, momentum=0.9)
    budget = costs.budget_bytes(full)
    infeasible = learn({}, full, budget)
    assert learn(infeasible, full, budget - 5) == infeasible
    assert learn(infeasible, full, budget + 5)[full.cost_key()] == budget + 5
    other_client = Plan(client=7, hold=full.hold, train=full.train, phases=full.phases, up={"head": "fp16"})
    for size, fails in ((budget, True), (budget - 1, True), (budget + 1, False), (None, False)):
        planner = ClientPlanner(costs, profile(size), 100, infeasible)
        assert planner.failed_before(full) == planner.failed_before(other_client) == fails
        if size is not None and size >= budget:
            assert planner.fits(full) == (not fails)
    planner = ClientPlanner(costs, profile(budget), 100, infeasible)
    assert planner.largest_batch(full, 32) == planner.largest_batch(full, 500) == with_batch(full, 16)
    assert planner.largest_batch(full, 9) == with_batch(full, 9)


class Pairs(Strategy):
    """A loss over all pairs of samples of a mini-batch."""

    def plan(self, state, candidate):
        return self.full_plan(candidate.client)

    def loss(self, model, x, y, phase):
        scores = model(x)
        return (scores @ scores.T).square().mean()


def test_a_loss_over_pairs_is_predicted_at_its_own_batch_size():
    chain = build_chain("mlp", {"hidden": [8]}, input_shape=(1, 4, 4), num_classes=4)
    splitting = Splitting.by_unit(chain.unit_names)
    shapes = {name: tuple(tensor.shape) for name, tensor in chain.state_dict().items()}
    client = ClientSettings(batch_size=1024, steps=3)
    strategy = Pairs(Problem(chain=chain, splitting=splitting, phases=client.phases, num_clients=1, seed=0))
    costs = Costs(strategy, client, Forms(strategy, splitting, shapes), CPU)
    plan = Plan(client=0, hold=list(splitting.names), train=list(splitting.names), phases=client.phases)
    matrix = 4 * 1024**2
    assert costs.peak_bytes(plan) == costs.peak_bytes_at(plan) >= 2 * matrix  # the matrix and its square's gradient
    assert costs.largest_batch(plan, costs.budget_bytes(plan), 5000) == 1024


class Switch(nn.Module):
    """Keeps less where the batch is large."""

    def forward(self, x):
        return x * 2 if len(x) > 4096 else x * x.exp() * x.sigmoid()


def test_what_a_model_of_the_users_own_does_with_a_large_batch_is_not_held_for_what_it_does_with_a_small_one():
    chain = Chain([("a", nn.Sequential(nn.Flatten(), nn.Linear(48, 8))), ("b", Switch()), ("c", nn.Linear(8, 4))],
                  input_shape=(3, 4, 4), num_classes=4, name="switch")
    costs, plan = chain_costs(chain, ClientSettings(batch_size=32), CPU)
    for size in (2, 32, 500):
        assert costs.peak_bytes(with_batch(plan, size)) == costs.peak_bytes_at(with_batch(plan, size))


def test_one_step_never_meets_the_optimisers_state():
    costs, plan, _ = costs_of("cnn", {"hidden": 2048}, (3, 32, 32), 10, batch_size=64, optimizer="adam")
    once = Plan(client=0, hold=plan.hold, train=plan.train, phases=(Phase(batch_size=64, steps=1),))
    more = Plan(client=0, hold=plan.hold, train=plan.train, phases=(Phase(batch_size=64, steps=2),))
    assert once.cost_key() != plan.cost_key() == more.cost_key()
    assert costs.peak_bytes(more) == costs.peak_bytes(plan)
    # Where activations make the peak, the two moments lie beside them from the second step on.
    assert costs.peak_bytes(once) < costs.peak_bytes(plan)


def test_strategies_that_train_alike_share_their_predictions(monkeypatch):
    small, store = chain_problem(), Store(None)
    names = small.splitting.names
    made, predictions, each = {}, [], Costs._each_course
    monkeypatch.setattr(Costs, "_each_course", lambda self, plan, *how: predictions.append(plan) or each(self, plan, *how))
    for name, clients in (("fedavg", 1), ("exclusivefl", 20), ("fedprox", 20)):
        problem = dataclasses.replace(small, num_clients=clients)
        strategy = STRATEGIES.get(name)(problem)
        shapes = {n: tuple(t.shape) for n, t in problem.chain.state_dict().items() if t.is_floating_point()}
        costs = Costs(strategy, ClientSettings(), Forms(strategy, problem.splitting, shapes), CPU, store=store, identity=name)
        before = len(predictions)
        peak = costs.peak_bytes(Plan(client=0, hold=names, train=names, phases=problem.phases))
        made[name] = (peak, len(predictions) - before)
    assert made["fedavg"][1] > 0
    assert made["exclusivefl"] == (made["fedavg"][0], 0)
    assert made["fedprox"][1] > 0  # whose loss keeps the received weights
    assert made["fedprox"][0] > made["fedavg"][0]
