"""A strategy with the forms and costs of its plans: what both a run and ``dfed plan`` are made of."""

from __future__ import annotations

import functools

import torch

from dfed.blocks import Splitting
from dfed.client import Forms
from dfed.config import Choice, Config
from dfed.errors import ConfigError, Fault
from dfed.models import Chain
from dfed.plan import Plan
from dfed.planner import Costs, Store
from dfed.registry import STRATEGIES, calling
from dfed.strategies import Problem, Strategy

__all__ = ["Planning"]


class Planning:
    """The strategy ``choice`` at work on ``chain``, as ``config`` says.

    Args:
        num_clients: Size of the fleet.
        device: What clients train on.

    Raises:
        ConfigError: If the model has no parameters, or the strategy cannot be made.
    """

    def __init__(self, config: Config, chain: Chain, choice: Choice, *, num_clients: int, device: torch.device):
        self.enforce, self._model = config.memory.enforce, config.model.name
        self.splitting = Splitting.by_unit(chain.unit_names)
        self.shapes = {name: tuple(t.shape) for name, t in chain.state_dict().items() if t.is_floating_point()}
        problem = Problem(
            chain=chain, splitting=self.splitting, phases=config.client.phases, num_clients=num_clients, seed=config.seed,
        )
        if not any(True for _ in chain.parameters()):
            message = f"must name a model with parameters to train, but '{config.model.name}' has none."
            raise ConfigError([Fault("model", message)])
        make = STRATEGIES.get(choice.name)
        with calling("strategy", choice.name):
            self.strategy: Strategy = make(problem, **choice.options)
            self.forms = Forms(self.strategy, self.splitting, self.shapes, down=config.codecs["down"].spec,
                               up=config.codecs["up"].spec)
            self.costs = Costs(
                self.strategy, config.client, self.forms, device, store=_store(config.data.cache), identity=choice.to_dict(),
            )

    def full_plan(self) -> Plan:
        """Training of the full model as configured."""
        names = self.splitting.names
        return Plan(client=0, hold=names, train=names, phases=self.strategy.problem.phases)

    def full_budget_bytes(self) -> int:
        """The smallest budget that is sure to do for training the full model as configured.

        Raises:
            ConfigError: If a model of the user's own fails in training.
        """
        with calling("model", self._model):
            return self.costs.budget_bytes(self.full_plan())


@functools.cache
def _store(cache: str | None) -> Store:
    return Store.of_user(cache)
