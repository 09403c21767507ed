"""NeuroFlux: local learning in blocks, each with the largest mini-batch that its budget allows.

Source: Saikumar, Varghese, "NeuroFlux: Memory-Efficient CNN Training Using Adaptive Local Learning", EuroSys 2024 (arXiv
2402.14139); known to us by its abstract and summaries, so that much of this is our reconstruction: see docs/deviations.md.

Symbols: M, the budget; B_max, ``training.batch_size``; f, the filters of a layer's head; γ, filters for each channel; m(b), the
predicted peak of a local step on b samples; b = min(B_max, the largest with m(b) ≤ M); ρ, by how much the mini-batches of a
block's layers may differ; j*, the exit that is chosen.

Blocks are trained front to back, each for ``training.epochs`` epochs. The outputs of a block that is done, in evaluation mode,
are written to a file, from which the next one is trained. The learning rate of a block is the configured one times b / B_max.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dfed.blocks.local_blocks import join_layers
from dfed.blocks.local_heads import Filters, Heads, filters_by
from dfed.central.local_method import LocalMethod
from dfed.central.method import Problem

__all__ = ["NeuroFlux"]


class NeuroFlux(LocalMethod):
    """Layers learn by losses of their own, block by block, from cached activations (Saikumar and Varghese 2024).

    Args:
        heads: How wide the head of a layer is: ``scaled``: γ · channels; ``memory_matched``: as wide as it can be without
            keeping more activations than the layer; ``classic``: ``largest_filters``.
        gamma: γ, for ``scaled``.
        smallest_filters, largest_filters: No head has fewer or more.
        rho: ρ, by which share a layer's mini-batch may differ from that of its block's first layer.
        exit_tolerance: The shallowest exit is chosen whose accuracy on the validation samples is at most so much below the
            best; null: none is.
        cache: ``fp32`` or ``fp16``: the outputs of a trained block are kept in a file. ``none``: they are worked out again for
            each mini-batch.
    """

    def __init__(self, problem: Problem, *, heads: Heads = "scaled", gamma: Annotated[float, Field(gt=0, le=1000)] = 0.5,
                 smallest_filters: Filters = 16, largest_filters: Filters = 256, rho: Annotated[float, Field(ge=0)] = 0.4,
                 exit_tolerance: Annotated[float, Field(ge=0, le=1)] | None = None,
                 cache: Literal["fp32", "fp16", "none"] = "fp32"):
        filters_of = filters_by(problem.chain, heads, gamma, smallest_filters, largest_filters)
        super().__init__(problem, filters_of=filters_of, cache=cache, exit_tolerance=exit_tolerance)
        layers = range(len(self.net.layers))
        smallest = self.check_smallest([(layer, layer + 1) for layer in layers])
        self.blocks = join_layers(smallest, self._figures.peak_bytes, problem.fits, problem.settings.batch_size, rho)
