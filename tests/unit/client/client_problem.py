"""A small problem that the tests of the client's side share."""

from __future__ import annotations

import torch

from dfed import rng
from dfed.blocks import Splitting
from dfed.client import Forms
from dfed.models import build_chain, materialise
from dfed.plan import Phase, Plan
from dfed.registry import STRATEGIES
from dfed.strategies import Problem

torch.set_num_threads(1)  # as `backend.threads` has it unless told otherwise
CPU = torch.device("cpu")
SHAPE, CLASSES = (1, 8, 8), 4
CNN = {"channels": [4, 6], "kernel": 3, "hidden": 16, "norm": "batch"}


class Small:
    """Chain, strategy, forms and first values of a model, and plans that train all of it."""

    def __init__(self, model="cnn", options=None, *, strategy="fedavg", shape=SHAPE,
                 make=None, up="fp32", **settings):
        options = CNN if options is None and model == "cnn" else options or {}
        self.chain = build_chain(model, options, input_shape=shape, num_classes=CLASSES)
        self.splitting = Splitting.by_unit(self.chain.unit_names)
        state = self.chain.state_dict()
        self.shapes = {name: tuple(t.shape) for name, t in state.items() if t.is_floating_point()}
        problem = Problem(chain=self.chain, splitting=self.splitting, phases=(Phase(batch_size=8, epochs=1),),
                          num_clients=5, seed=1)
        self.strategy = (make or STRATEGIES.get(strategy))(problem, **settings)
        self.forms = Forms(self.strategy, self.splitting, self.shapes, up=up)
        full = materialise(self.chain.skeleton(), rng.torch_generator(1, "init"))
        self.values = {name: value.detach().clone() for name, value in full.state_dict().items() if name in self.shapes}

    def plan(self, client=0, **fields):
        names = self.splitting.names
        return Plan(client=client, **{"hold": names, "train": names, "phases": self.strategy.problem.phases} | fields)

    def model(self):
        """A model with the first values, made without any of the code under test."""
        model = self.chain.skeleton().to_empty(device="cpu")
        missing = model.load_state_dict(self.values, strict=False).missing_keys
        for name in missing:  # counters of batch norm
            model.get_buffer(name).zero_()
        return model.train()


def data(count=20, shape=SHAPE, seed=0):
    generator = rng.torch_generator(seed, "test data")
    return torch.randn(count, *shape, generator=generator), torch.randint(CLASSES, (count,), generator=generator)
