"""FlexTrain on one device: one model that is trained at every depth, with one stem and one classifier for all.

Source: Unsal, Maatouk, De Domenico, Piovesan, Ayed, "FlexTrain: A Dynamic Training Framework for Heterogeneous Devices
Environments", 2023 (arXiv 2310.20457). This is its centralised form; for a fleet see :mod:`dfed.strategies.flextrain`.

Symbols: N_k, the first k of K depths, after which blocks are the identity, with a shortcut without parameters where the shape
changes, up to the one classifier. π, the shares of the devices for which the model is that can hold each depth and no larger
one. Each step draws k ~ π, one for the mini-batch. Its loss is CE(N_k) + β ‖f_k − f_k'‖², where k' is the next larger depth of
which π has any, f are the pooled features that the classifier takes, and f_k' is taken as given. The largest learns from none.

The prefix is passed once: the teacher goes on from what N_k puts out, without gradients. Its norms take the statistics of the
mini-batch and record none, neither beyond k nor in the classifier; its dropout is off. Blocks beyond k get no gradient, so that
neither weight decay nor momentum moves them.

Deviations: f is the input of the last linear layer, and ‖·‖² the mean over mini-batch and features (neither is said), as in a
fleet. Depths are those of :func:`dfed.blocks.cut_points`; those beyond the last of which π has any are no part of the
model.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from dfed import rng
from dfed.blocks.prefix import PrefixChain
from dfed.central.fleet_shares import fleet_shares
from dfed.central.method import Problem
from dfed.central.prefix_method import PrefixMethod
from dfed.errors import ConfigError, Fault
from dfed.faults import shown
from dfed.models.layers import Count, KeyedRandom
from dfed.strategies.flextrain import feature_distance

__all__ = ["CentralFlexTrain"]


class CentralFlexTrain(PrefixMethod):
    """Each step trains a depth that is drawn by how many devices hold it, and learns from the next larger (Unsal et al. 2023).

    Args:
        depths: How many depths there are, the full model included.
        cuts: The last unit of each depth but the last, instead; null: see :func:`dfed.blocks.cut_points`.
        shares: π, one for each depth, the smallest first; divided by their sum. null: by the config's fleet, or else all alike.
        beta: β, the weight of what a depth learns from the next larger; 0: nothing.
    """

    heeds_fleet = True

    def __init__(self, problem: Problem, *, depths: Count = 4, cuts: list[str] | None = None,
                 shares: list[Annotated[float, Field(ge=0)]] | None = None, beta: Annotated[float, Field(ge=0)] = 0.2):
        super().__init__(problem, depths=depths, cuts=cuts)
        self.beta, self.heeds_fleet = beta, shares is None
        if shares is None and problem.fleet is not None:
            shares = fleet_shares(problem, depths, cuts, beta)
        self.shares = _normalised(shares, len(self.stops))
        self._trained = [depth for depth, share in enumerate(self.shares, start=1) if share > 0]
        self.deepest = self._trained[-1]
        self._bounds = list(itertools.accumulate(self.shares[depth - 1] for depth in self._trained))[:-1]

    def depth_of(self, step: int) -> int:
        return self._trained[bisect.bisect_right(self._bounds, rng.uniform(self.problem.seed, "depth", step))]

    def share_of(self, depth: int) -> float:
        return self.shares[depth - 1]

    def teacher_of(self, depth: int) -> int | None:
        """The depth that this one learns from; None: it learns from nobody."""
        return next((larger for larger in self._trained if larger > depth), None) if self.beta else None

    def training_key(self) -> list[Any]:
        return ["flextrain", self.beta > 0, self._trained]

    def loss(self, model: PrefixChain, x: Tensor, y: Tensor, depth: int) -> Tensor:
        shared, larger = model.run_body(x, 0, depth), self.teacher_of(depth)
        # The student's pass through the classifier comes first: under autocast the casts that it makes carry gradients.
        scores, features = model.run_head_with_features(shared)
        loss = F.cross_entropy(scores.float() if scores.dtype.itemsize < 4 else scores, y)
        if larger is None:
            return loss
        with torch.no_grad(), _leaving_no_trace(model):
            teacher = model.run_head_with_features(model.run_body(shared.detach(), depth, larger))[1]
        return loss + self.beta * feature_distance(features, teacher)


def _normalised(shares: list[float] | None, num_depths: int) -> list[float]:
    if shares is None:
        return [1 / num_depths] * num_depths
    if len(shares) != num_depths:
        message = f"must be as many as this model has depths ({num_depths}), but are {len(shares)}."
        raise ConfigError([Fault("shares", message)])
    total = sum(shares)
    if not 0 < total < math.inf:
        raise ConfigError([Fault("shares", f"must have a sum above 0, but are {shown(shares)}.")])
    return [share / total for share in shares]


@contextmanager
def _leaving_no_trace(model: PrefixChain) -> Iterator[None]:
    """Norms take the statistics of the mini-batch, as in training, but record none; layers that draw do nothing."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
    drawing = [module for module in model.modules() if isinstance(module, KeyedRandom) and module.training]
    for norm in norms:
        norm.track_running_stats = False
    for layer in drawing:
        layer.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for layer in drawing:
            layer.training = True
