"""Back-propagation: the model, or a prefix of it alone, trained from end to end; what other methods are measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from dfed.blocks.local_blocks import largest_batch
from dfed.blocks.prefix import PrefixChain
from dfed.central.costs import prefix_peak, prefix_peaks
from dfed.central.method import Problem
from dfed.central.peaks import smallest_batch
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
        batch: ``auto``: the largest mini-batch up to ``training.batch_size`` that fits the budget, and the learning rate times
            what it is of ``training.batch_size``. ``fixed``: ``training.batch_size``.
        micro_batch: Pass so many samples at a time, and add their gradients up over a mini-batch; ``auto``: as many as fit the
            budget. null: pass all of it.
    """

    def __init__(self, problem: Problem, *, depths: Count = 4, cuts: list[str] | None = None, depth: Count | None = None,
                 batch: Literal["fixed", "auto"] = "fixed", micro_batch: Literal["auto"] | Count | None = None):
        if batch == "auto" and micro_batch is not None:
            message = f"must be null with `batch` 'auto', which passes all of a mini-batch, but is {micro_batch!r}."
            raise ConfigError([Fault("micro_batch", message)])
        super().__init__(problem, depths=depths, cuts=cuts)
        if depth is not None and depth > len(self.stops):
            message = f"must be at most {len(self.stops)}, the number of depths of this model, but is {depth}."
            raise ConfigError([Fault("depth", message)])
        self.deepest = depth or len(self.stops)
        wanted = problem.settings.batch_size
        if batch == "auto":
            found = self._largest(prefix_peaks(self, self.deepest).at)
            self.problem = replace(problem, settings=problem.settings.model_copy(update={"batch_size": found}))
            self.rate_share = found / wanted
        elif micro_batch == "auto":
            self.micro_batch = self._largest(lambda size: prefix_peak(self, self.deepest, size))
        elif micro_batch is not None:
            self.micro_batch = min(micro_batch, wanted)

    def _largest(self, peak_at: Callable[[int], int]) -> int:
        """The largest number of samples, up to ``training.batch_size``, at which the predicted peak fits.

        Raises:
            ConfigError: If none does; names the smallest budget on which one does.
        """
        problem = self.problem
        wanted = min(problem.settings.batch_size, problem.data.num_samples)
        least = min(wanted, smallest_batch(prefix_peaks(self, self.deepest)))
        found = largest_batch(lambda size: problem.fits(peak_at(size)), least, wanted)
        if not found:
            raise problem.too_small(peak_at(least), f"a step on {least} sample{'s' * (least > 1)} at a time")
        return problem.settings.batch_size if found == wanted else found

    @classmethod
    def keyed_by(cls, options: Mapping[str, object]) -> frozenset[str]:
        return frozenset({"memory"} if "auto" in (options.get("batch"), options.get("micro_batch")) else ())

    def depth_of(self, step: int) -> int:
        return self.deepest

    def share_of(self, depth: int) -> float:
        return float(depth == self.deepest)

    def training_key(self) -> list[str]:
        return ["bp"]

    def loss(self, model: PrefixChain, x: Tensor, y: Tensor, depth: int) -> Tensor:
        scores = model.at_depth(x, depth)
        return F.cross_entropy(scores.float() if scores.dtype.itemsize < 4 else scores, y)
