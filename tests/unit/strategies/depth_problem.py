"""A small problem that the tests of the methods on depth share."""

from __future__ import annotations

import copy

import torch

from dfed import rng
from dfed.blocks import Splitting
from dfed.client import ClientSettings, Forms, Skeleton, run_plan
from dfed.fleet import DeviceProfile
from dfed.models import build_chain, materialise
from dfed.models.init import initialise
from dfed.planner import ClientPlanner, Costs
from dfed.registry import STRATEGIES, WRAPPERS
from dfed.strategies import Candidate, Problem

torch.set_num_threads(1)
CPU = torch.device("cpu")
CNN = {"channels": [4, 6, 5], "kernel": 3, "hidden": 8, "norm": "batch"}
SHAPE, CLASSES = (1, 8, 8), 3


class Small:
    """A strategy on a small chain with its forms and costs, as ``dfed.planning`` makes them, and first values."""

    def __init__(self, strategy, model="cnn", options=None, *, shape=SHAPE, num_clients=5, client=None, budgets=(),
                 tiers=("t",), wrap=None, rounds=1, **settings):
        self.chain = build_chain(model, CNN if options is None else options, input_shape=shape, num_classes=CLASSES)
        self.settings = ClientSettings(**{"batch_size": 8, "learning_rate": 0.05, **(client or {})})
        problem = Problem(
            chain=self.chain, splitting=Splitting.by_unit(self.chain.unit_names), phases=self.settings.phases,
            num_clients=num_clients, seed=1, budgets=budgets, tiers=tiers, rounds=rounds,
            fits=lambda plan, budget: self.costs.fits(plan, budget), budget_bytes=lambda plan: self.costs.budget_bytes(plan),
        )
        self.strategy = STRATEGIES.get(strategy)(problem, **settings)
        for name, options in (wrap or {}).items():
            self.strategy = WRAPPERS.get(name)(self.strategy, **options)
        self.values = dict(materialise(self.chain.skeleton(), rng.torch_generator(1, "init")).state_dict())
        for name, extra in self.strategy.extras.items():
            real = copy.deepcopy(extra).to_empty(device="cpu")
            initialise(real, rng.torch_generator(1, "init", name), self.chain.init_scheme)
            self.values |= {f"{name}.{rest}": value for rest, value in real.state_dict().items()}
        self.values = {name: value.detach() for name, value in self.values.items() if value.is_floating_point()}
        self.shapes = {name: tuple(value.shape) for name, value in self.values.items()}
        self.forms = Forms(self.strategy, self.strategy.splitting, self.shapes)
        self.costs = Costs(self.strategy, self.settings, self.forms, CPU)

    def candidate(self, budget=None, *, client=3, round_index=0, infeasible=(), tier="t"):
        """A client with this budget, and the real planner."""
        profile = DeviceProfile(tier=tier, budget_bytes=budget, flops=1e9, up=1e6, down=1e6, watts=1.0, radio_watts=1.0,
                                availability=1.0, dropout=0.0)
        return Candidate(client, round_index, 20, profile, ClientPlanner(self.costs, profile, 20, dict(infeasible)))

    def train(self, plan, x, y, *, values=None, client_state=None, rate_factor=1.0, dtype=torch.float32):
        """The result of local training on the whole of ``x`` in each step, as a client does it, and the trained model."""
        skeleton = Skeleton(self.strategy.build(plan))
        if dtype != torch.float32:
            skeleton = Skeleton(self.strategy.build(plan).to(dtype))
        form = self.forms.of(plan)
        sent = {entry.name: (values or self.values)[entry.name].to(dtype) for entry in form.down}
        result = run_plan(
            self.strategy, plan, skeleton, sent, form.regions,
            lambda phase: [(x.to(dtype), y)] * (phase.steps or phase.epochs), self.settings, rate_factor=rate_factor,
            device=CPU, generator=rng.torch_generator(3, "layers"), client_state=client_state or {},
        )
        return result, skeleton.model

    def model(self, plan, dtype=torch.float64):
        """The plan's sub-model with the first values, loaded without the code under test."""
        model = self.strategy.build(plan).to_empty(device="cpu").to(dtype)
        missing = model.load_state_dict({name: value for name, value in self.values.items() if name in model.state_dict()},
                                        strict=False).missing_keys
        assert all(name.endswith("num_batches_tracked") for name in missing), missing
        for name in missing:
            model.get_buffer(name).zero_()
        return model


def data(count=8, shape=SHAPE, seed=0):
    generator = rng.torch_generator(seed, "test data")
    return torch.randn(count, *shape, generator=generator), torch.randint(CLASSES, (count,), generator=generator)
