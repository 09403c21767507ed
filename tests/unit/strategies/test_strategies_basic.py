import json

import pytest
import torch
import torch.nn.functional as F

from dfed import rng
from dfed.blocks import Splitting
from dfed.fleet import DeviceProfile
from dfed.models import build_chain, materialise
from dfed.plan import Phase, Plan
from dfed.region import WHOLE
from dfed.registry import STRATEGIES
from dfed.settings import settings_of
from dfed.state import ServerState
from dfed.strategies import Candidate, Problem

PLAIN = ["exclusivefl", "fedavg", "fedprox"]
OPTIONS = {"channels": [3], "kernel": 3, "hidden": 5, "norm": "batch"}


def problem():
    chain = build_chain("cnn", OPTIONS, input_shape=(1, 6, 6), num_classes=3)
    phases = (Phase(batch_size=4, epochs=2),)
    return Problem(chain=chain, splitting=Splitting.by_unit(chain.unit_names), phases=phases, num_clients=9, seed=1)


class UpTo:
    """A planner to which a plan fits if the budget is at least 1000."""

    def __init__(self, budget):
        self.budget, self.asked = budget, 0

    def best(self, plans):
        self.asked += 1
        return next((plan for plan in plans if self.budget is None or self.budget >= 1000), None)


def candidate(client=3, budget=None):
    profile = DeviceProfile(tier="t", budget_bytes=budget, flops=1e9, up=1e6, down=1e6, watts=1.0, radio_watts=1.0,
                            availability=1.0, dropout=0.0)
    return Candidate(client, 2, 50, profile, UpTo(budget))


def real_model(strategy, plan, dtype=torch.float32):
    return materialise(strategy.build(plan), rng.torch_generator(1, "test")).to(dtype)


STATE = ServerState(round_index=2, params={})


@pytest.mark.parametrize("name", PLAIN)
def test_full_training_of_the_whole_model(name):
    strategy = STRATEGIES.get(name)(problem())
    plan = strategy.plan(STATE, candidate())
    assert (plan.client, plan.hold, plan.train) == (3, ("conv0", "hidden", "head"), ("conv0", "hidden", "head"))
    assert plan.phases == (Phase(batch_size=4, epochs=2),)
    assert (plan.down, plan.up, plan.options) == ({}, {}, {})
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    model = strategy.build(plan)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model is not strategy.build(plan)
    reference = strategy.problem.chain.state_dict()
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in reference.items()}
    for tensor_name, tensor in reference.items():
        assert strategy.region(tensor_name, tuple(tensor.shape), plan) == WHOLE
        assert strategy.upload(tensor_name, tensor, WHOLE, plan) is tensor
    frozen = Plan(client=0, hold=plan.hold, train=("head",), phases=plan.phases)
    assert strategy.upload("conv0.conv.weight", reference["conv0.conv.weight"], WHOLE, frozen) is None
    assert strategy.upload("head.fc.bias", reference["head.fc.bias"], WHOLE, frozen) is reference["head.fc.bias"]
    params = {"w": torch.ones(1)}
    assert strategy.init(params) == ServerState(round_index=0, params=params)
    assert strategy.advance(STATE, STATE, {}) is STATE


@pytest.mark.parametrize("name", PLAIN)
def test_a_strategy_does_not_change_after_construction(name):
    strategy = STRATEGIES.get(name)(problem())
    before = dict(vars(strategy))
    plan = strategy.plan(STATE, candidate())
    model = real_model(strategy, plan)
    x, y = torch.randn(4, 1, 6, 6, generator=rng.torch_generator(2, "x")), torch.tensor([0, 1, 2, 0])
    strategy.receive(model, {}, plan)
    loss = strategy.loss(model, x, y, plan.phases[0])
    assert loss.shape == ()
    # At the global model itself, each of them is plain cross-entropy.
    assert loss.item() == pytest.approx(F.cross_entropy(model(x), y).item(), abs=0)
    assert vars(strategy) == before


def test_fedavg_takes_everybody_and_exclusivefl_those_that_fit():
    exclusive, everyone = (STRATEGIES.get(name)(problem()) for name in ("exclusivefl", "fedavg"))
    for budget, takes_part in ((None, True), (1000, True), (999, False), (0, False)):
        asking, silent = candidate(5, budget), candidate(5, budget)
        plan = exclusive.plan(STATE, asking)
        assert (plan is not None) == takes_part
        assert asking.planner.asked == 1
        if takes_part:
            assert plan == everyone.plan(STATE, silent)
        assert everyone.plan(STATE, silent) is not None
        assert silent.planner.asked == 0  # FedAvg does not ask


@pytest.mark.parametrize("mu", [0.0, 0.01, 3.0])
def test_fedprox_adds_the_proximal_term(mu):
    prox, plain = STRATEGIES.get("fedprox")(problem(), mu=mu), STRATEGIES.get("fedavg")(problem())
    plan = prox.plan(STATE, candidate())
    # float64 and evaluation mode, so that finite differences see the loss alone, and see it exactly enough.
    model, plain_model = (real_model(prox, plan, torch.float64).eval() for _ in range(2))
    prox.receive(model, {}, plan)
    generator = rng.torch_generator(4, "test")
    x, y = torch.randn(6, 1, 6, 6, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    anchors = [parameter.detach().clone() for parameter in plain_model.parameters()]
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), plain_model.parameters(), strict=True):
            step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
            parameter.add_(step)
            other.add_(step)
    phase = plan.phases[0]
    loss, plain_loss = prox.loss(model, x, y, phase), plain.loss(plain_model, x, y, phase)
    distance = sum(((p - a) ** 2).sum().item() for p, a in zip(model.parameters(), anchors, strict=True))
    assert loss.item() == pytest.approx(plain_loss.item() + mu / 2 * distance, rel=1e-12)
    loss.backward()
    plain_loss.backward()
    for parameter, other, anchor in zip(model.parameters(), plain_model.parameters(), anchors, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad + mu * (parameter.detach() - anchor), rtol=1e-12, atol=1e-14)
    # Finite differences of the whole loss. Step 1e-6: truncation and rounding are both below 1e-8 for a loss of order 1;
    # a kink of ReLU or pooling inside the step would show, and the fixed draw has none.
    for parameter in list(model.parameters())[:3]:
        entry = parameter.detach().view(-1)
        values = []
        for step in (1e-6, -2e-6):
            entry[0] += step
            values.append(prox.loss(model, x, y, phase).item())
        entry[0] += 1e-6
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(parameter.grad.view(-1)[0].item(), abs=1e-6)


def test_fedprox_leaves_norm_statistics_out():
    strategy = STRATEGIES.get("fedprox")(problem(), mu=1.0)
    plan = strategy.plan(STATE, candidate())
    model = real_model(strategy, plan).eval()
    strategy.receive(model, {}, plan)
    x, y = torch.zeros(2, 1, 6, 6), torch.tensor([0, 1])
    model.get_buffer("conv0.norm.running_mean").fill_(100.0)
    assert strategy.loss(model, x, y, plan.phases[0]).item() == F.cross_entropy(model(x), y).item()
    assert len(model.anchor) == len(list(model.parameters()))


def test_settings():
    fedprox = settings_of(STRATEGIES.get("fedprox"))
    assert fedprox().model_dump() == {"mu": 0.01}
    for bad in ({"mu": -0.1}, {"mu": "1"}, {"nu": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            fedprox(**bad)
    for name in ("fedavg", "exclusivefl"):
        assert settings_of(STRATEGIES.get(name))().model_dump() == {}
