import pytest
import torch

from dfed.blocks import Splitting
from dfed.client import ClientSettings, Forms
from dfed.memory import CPU_OVERHEAD_BYTES, GREY_ZONE
from dfed.models import build_chain
from dfed.plan import Phase, Plan
from dfed.planner import Costs
from dfed.registry import STRATEGIES
from dfed.strategies import Problem

CPU = torch.device("cpu")


def costs_of(model, options, shape, classes, *, strategy="fedavg", device=CPU, **settings):
    chain = build_chain(model, options, input_shape=shape, num_classes=classes)
    splitting = Splitting.by_unit(chain.unit_names)
    shapes = {name: tuple(t.shape) for name, t in chain.state_dict().items() if t.is_floating_point()}
    client = ClientSettings(**settings)
    problem = Problem(chain=chain, splitting=splitting, phases=client.phases, num_clients=1, seed=0,
                      fits=lambda plan, budget: True)
    made = STRATEGIES.get(strategy)(problem)
    costs = Costs(made, client, Forms(made, splitting, shapes), shape, device)
    weights = sum(parameter.numel() for parameter in chain.parameters())
    return costs, Plan(client=0, hold=splitting.names, train=splitting.names, phases=client.phases), weights


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
    tensors = costs.peak_bytes(plan) - CPU_OVERHEAD_BYTES
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


def test_fits_leaves_the_grey_zone_and_the_overhead():
    costs, plan, _ = costs_of("mlp", {"hidden": [200]}, (1, 16, 16), 10, batch_size=4)
    tensors = costs.peak_bytes(plan) - CPU_OVERHEAD_BYTES
    needed = tensors * (1 + GREY_ZONE) + CPU_OVERHEAD_BYTES
    assert costs.fits(plan, None)
    assert costs.fits(plan, int(needed) + 1)
    assert not costs.fits(plan, int(needed) - 1)
    assert not costs.fits(plan, 0)
    on_gpu, plan, _ = costs_of("mlp", {"hidden": [200]}, (1, 16, 16), 10, batch_size=4, device=torch.device("cuda", 0))
    assert on_gpu.peak_bytes(plan) == tensors
    assert on_gpu.fits(plan, int(tensors * (1 + GREY_ZONE)) + 1)
    assert not on_gpu.fits(plan, int(tensors * (1 + GREY_ZONE)) - 1)
