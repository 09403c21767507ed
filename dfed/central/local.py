"""Classic local learning, which NeuroFlux is measured against: every layer has a head of the same width.

``simultaneous``: every mini-batch trains all layers, each on what the one before puts out, without gradient between them
(Belilovsky, Eickenberg, Oyallon, "Decoupled Greedy Learning of CNNs", 2019, arXiv 1901.08164). ``sequential``: one layer after
another, each for all epochs, with a forward pass from the image each time (the same authors, "Greedy Layerwise Learning Can
Scale to ImageNet", 2018, arXiv 1812.11446). Both with the largest mini-batch that fits throughout.
"""

from __future__ import annotations

import functools
from typing import Annotated, Literal

from pydantic import Field

from dfed.blocks.local_blocks import Block, largest_batch
from dfed.blocks.local_heads import Filters, head_filters
from dfed.central.local_method import LocalMethod
from dfed.central.method import Problem

__all__ = ["ClassicLocal"]


class ClassicLocal(LocalMethod):
    """Layers learn by losses of their own, all in each step or one after another (Belilovsky et al. 2018, 2019).

    Args:
        order: ``simultaneous``: all layers in every mini-batch; ``sequential``: one after another.
        filters: Of every head's convolution.
        exit_tolerance: The shallowest exit is chosen whose accuracy on the validation samples is at most so much below the
            best; null: none is.
    """

    def __init__(self, problem: Problem, *, order: Literal["simultaneous", "sequential"] = "simultaneous",
                 filters: Filters = 256, exit_tolerance: Annotated[float, Field(ge=0, le=1)] | None = None):
        filters_of = functools.partial(head_filters, problem.chain, heads="classic", gamma=1.0, smallest=filters,
                                       largest=filters)
        super().__init__(problem, filters_of=filters_of, cache="none", exit_tolerance=exit_tolerance)
        count = len(self.net.layers)
        bounds = [(0, count)] if order == "simultaneous" else [(layer, layer + 1) for layer in range(count)]
        smallest = self.check_smallest(bounds)
        batch = min(self._largest(*bound, smallest) for bound in bounds)
        self.blocks = [Block(index, *bound, batch, self._figures.peak_bytes(*bound, batch))
                       for index, bound in enumerate(bounds)]

    def _largest(self, first: int, stop: int, smallest: list[int]) -> int:
        return largest_batch(lambda batch: self.problem.fits(self._figures.peak_bytes(first, stop, batch)),
                             max(smallest[first:stop]), self.problem.settings.batch_size)
