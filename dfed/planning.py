"""A strategy with the forms and costs of its plans: what both a run and ``dfed plan`` are made of."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dfed import rng
from dfed.blocks import Splitting
from dfed.client import Forms
from dfed.config import Choice, Config
from dfed.errors import ConfigError, Fault
from dfed.models import Chain, materialise
from dfed.models.init import initialise
from dfed.plan import Plan
from dfed.planner import Costs, Store
from dfed.planner.split import split_chain
from dfed.registry import STRATEGIES, WRAPPERS, calling
from dfed.strategies import Problem, Strategy

__all__ = ["Planning"]


class Planning:
    """The strategy ``choice`` at work on ``chain``, as ``config`` says.

    Args:
        num_clients: Size of the fleet.
        device: What clients train on.
        budgets, tiers: As :class:`dfed.strategies.Problem` has them.
        wraps: What is put around the strategy, the innermost first.

    Attributes:
        shapes: Of the global model's floating-point tensors, by name: the chain's, then the strategy's own.
        buffers: Names of those that are no parameters.

    Raises:
        ConfigError: If the model has no parameters, or the strategy cannot be made.
    """

    def __init__(self, config: Config, chain: Chain, choice: Choice, *, num_clients: int, device: torch.device,
                 budgets: tuple[tuple[int | None, int], ...] = (), tiers: tuple[str, ...] = (), wraps: Sequence[Choice] = ()):
        self.enforce, self._model = config.memory.enforce, config.model.name
        problem = Problem(
            chain=chain, splitting=Splitting.by_unit(chain.unit_names), phases=config.client.phases, num_clients=num_clients,
            seed=config.seed, budgets=budgets, tiers=tiers, rounds=config.rounds,
            fits=lambda plan, budget: self.costs.fits(plan, budget),
            split=lambda count: split_chain(chain, config.client, num_blocks=count, store=_store(config.data.cache)).splitting,
            budget_bytes=lambda plan: self.costs.budget_bytes(plan),
        )
        if not any(True for _ in chain.parameters()):
            message = f"must name a model with parameters to train, but '{config.model.name}' has none."
            raise ConfigError([Fault("model", message)])
        make = STRATEGIES.get(choice.name)
        with calling("strategy", choice.name):
            self.strategy: Strategy = _made(make, problem, choice, "strategy")
            for wrap in wraps:
                self.strategy = _made(WRAPPERS.get(wrap.name), self.strategy, wrap, f"wrap.{wrap.name}")
            self.splitting = self.strategy.splitting
            tensors, parameters = self._tensors(chain)
            self.shapes = {name: tuple(t.shape) for name, t in tensors.items() if t.is_floating_point()}
            self.buffers = frozenset(self.shapes) - parameters
            self.forms = Forms(self.strategy, self.splitting, self.shapes, down=config.codecs["down"].spec,
                               up=config.codecs["up"].spec)
            self.costs = Costs(
                self.strategy, config.client, self.forms, device, store=_store(config.data.cache),
                identity=[choice.to_dict(), *(wrap.to_dict() for wrap in wraps)],
                by_prediction=config.memory.enforce == "predicted",
            )

    def _tensors(self, chain: Chain) -> tuple[dict[str, Tensor], frozenset[str]]:
        """All tensors of the global model, and the names of its parameters."""
        tensors, parameters = dict(chain.state_dict()), {name for name, _ in chain.named_parameters()}
        for module, extra in self.strategy.extras.items():
            tensors |= {f"{module}.{name}": value for name, value in extra.state_dict().items()}
            parameters |= {f"{module}.{name}" for name, _ in extra.named_parameters()}
        return tensors, frozenset(parameters)

    def first_params(self, seed: int) -> dict[str, Tensor]:
        """The first global model: the chain's values do not depend on the strategy."""
        problem = self.strategy.problem
        found = dict(materialise(problem.chain.skeleton(), rng.torch_generator(seed, "init")).state_dict())
        for name, extra in self.strategy.extras.items():
            real = copy.deepcopy(extra).to_empty(device="cpu")
            initialise(real, rng.torch_generator(seed, "init", name), problem.chain.init_scheme)
            found |= {f"{name}.{rest}": value for rest, value in real.state_dict().items()}
        return {name: found[name].detach() for name in self.shapes}

    def full_plan(self) -> Plan:
        """Training of the full model as configured."""
        return self.strategy.full_plan()

    def full_budget_bytes(self) -> int:
        """The smallest budget that is sure to do for training the full model as configured.

        Raises:
            ConfigError: If a model of the user's own fails in training.
        """
        with calling("model", self._model):
            return self.costs.budget_bytes(self.full_plan())


def _made(make: Callable[..., Strategy], of: Problem | Strategy, choice: Choice, group: str) -> Strategy:
    """The strategy; what it finds wrong with its options is said of the config's fields, which are in ``group``."""
    try:
        return make(of, **choice.options)
    except ConfigError as error:
        raise ConfigError([
            Fault(f"{group}.{fault.field}" if fault.field in choice.options else fault.field, fault.message)
            for fault in error.faults
        ]) from error


@functools.cache
def _store(cache: str | None) -> Store:
    return Store.of_user(cache)
