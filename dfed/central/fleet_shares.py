"""The share of a fleet's devices whose largest depth that fits is each of a model's depths."""

from __future__ import annotations

from dfed.blocks import Splitting
from dfed.central.method import Problem
from dfed.client import Forms
from dfed.errors import ConfigError, Fault
from dfed.planner import Costs
from dfed.settings import format_bytes
from dfed.strategies import Problem as StrategyProblem
from dfed.strategies.flextrain import FlexTrain

__all__ = ["fleet_shares"]


def fleet_shares(problem: Problem, depths: int, cuts: list[str] | None, beta: float) -> list[float]:
    """For each depth, the smallest first, the number of devices for which it is the largest that the strategy ``flextrain`` can
    train on them, as the planner predicts it. Devices that none fits are left out.

    Raises:
        ConfigError: If none fits any device.
    """
    assert problem.fleet is not None, "there must be a fleet"
    chain, client = problem.chain, problem.settings.as_client()
    splitting = Splitting.by_unit(chain.unit_names)
    strategy = FlexTrain(StrategyProblem(chain=chain, splitting=splitting, phases=client.phases,
                                         num_clients=problem.fleet.num_clients, seed=problem.seed),
                         depths=depths, cuts=cuts, beta=beta)
    shapes = {name: tuple(value.shape) for name, value in chain.state_dict().items() if value.is_floating_point()}
    costs = Costs(strategy, client, Forms(strategy, splitting, shapes), problem.device, store=problem.store,
                  by_prediction=problem.by_prediction)
    needed = [costs.budget_bytes(strategy.plan_at(depth)) for depth in range(1, strategy.num_depths + 1)]
    counts = [0] * strategy.num_depths
    for budget, count in problem.fleet.budgets():
        fitting = [number for number, least in enumerate(needed) if budget is None or least <= budget]
        if fitting:
            counts[fitting[-1]] += count
    if not any(counts):
        message = (f"must have a device that fits a depth of this model, the smallest of which needs "
                   f"{format_bytes(min(needed))}, but has none.")
        raise ConfigError([Fault("fleet", message)])
    return [float(count) for count in counts]
