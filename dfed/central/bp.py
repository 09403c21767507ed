"""Back-propagation: the model, or a prefix of it alone, trained from end to end; what other methods are measured against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dfed.blocks.prefix import PrefixChain
from dfed.central.method import Problem
from dfed.central.prefix_method import PrefixMethod
from dfed.errors import ConfigError, Fault
from dfed.models.layers import Count

__all__ = ["BP"]


class BP(PrefixMethod):
    """The whole model, or one depth of it alone, is trained from end to end by back-propagation.

    The smaller depths of what it trains are evaluated at the end: what the model is worth when it is cut off.

    Args:
        depths: How many depths there are, the full model included.
        cuts: The last unit of each depth but the last, instead; null: see :func:`dfed.blocks.cut_points`.
        depth: The depth that is trained, an independent model of this size; null: all of the model.
    """

    def __init__(self, problem: Problem, *, depths: Count = 4, cuts: list[str] | None = None, depth: Count | None = None):
        super().__init__(problem, depths=depths, cuts=cuts)
        if depth is not None and depth > len(self.stops):
            message = f"must be at most {len(self.stops)}, the number of depths of this model, but is {depth}."
            raise ConfigError([Fault("depth", message)])
        self.deepest = depth or len(self.stops)

    def depth_of(self, step: int) -> int:
        return self.deepest

    def share_of(self, depth: int) -> float:
        return float(depth == self.deepest)

    def training_key(self) -> list[str]:
        return ["bp"]

    def loss(self, model: PrefixChain, x: Tensor, y: Tensor, depth: int) -> Tensor:
        scores = model.at_depth(x, depth)
        return F.cross_entropy(scores.float() if scores.dtype.itemsize < 4 else scores, y)
