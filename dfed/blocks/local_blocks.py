"""Layers joined into blocks that are trained together, each block with the largest mini-batch that its budget allows.

Source: the partitioner of NeuroFlux (Saikumar and Varghese, EuroSys 2024, arXiv 2402.14139): neighbours are joined while their
mini-batches are alike. How alike (ρ) is ours, and so is what a block as a whole must fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Block", "join_layers", "largest_batch"]


@dataclass(frozen=True)
class Block:
    """Layers that are trained in the same epochs.

    Attributes:
        index: Its place.
        first, stop: Its layers, from ``first`` up to and not including ``stop``.
        batch: Samples in a mini-batch.
        peak_bytes: Predicted peak of its training.
    """

    index: int
    first: int
    stop: int
    batch: int
    peak_bytes: int


def join_layers(smallest: list[int], peak_of: Callable[[int, int, int], int], fits: Callable[[int], bool], at_most: int,
                rho: float) -> list[Block]:
    """Cut layers into blocks, front to back.

    With b(i…j) the largest mini-batch at which layers i to j fit together, layer j joins the block that begins with layer i
    while |b(j) − b(i)| / b(i) ≤ ρ and (b(i) − b(i…j)) / b(i) ≤ ρ. The block's mini-batch is the smallest of its layers' and
    of its own as a whole.

    Args:
        smallest: Of each layer, the smallest mini-batch on which it can be trained; it must fit by itself.
        peak_of: From first layer, end and batch size to predicted bytes.
        fits: Whether a predicted peak stays within the budget.
        at_most: The largest mini-batch.
    """

    def largest(first: int, stop: int) -> int:
        return largest_batch(lambda batch: fits(peak_of(first, stop, batch)), max(smallest[first:stop]), at_most)

    alone = [largest(layer, layer + 1) for layer in range(len(smallest))]
    assert all(alone), "each layer must fit by itself"
    blocks: list[Block] = []
    first = 0
    while first < len(alone):
        start, batch, stop = alone[first], alone[first], first + 1
        while stop < len(alone) and abs(alone[stop] - start) <= rho * start:
            together = min(batch, alone[stop], largest(first, stop + 1))
            if together == 0 or start - together > rho * start:
                break
            batch, stop = together, stop + 1
        blocks.append(Block(len(blocks), first, stop, batch, peak_of(first, stop, batch)))
        first = stop
    return blocks


def largest_batch(fits: Callable[[int], bool], at_least: int, at_most: int) -> int:
    """The largest size from ``at_least`` to ``at_most`` that fits; 0 if ``at_least`` does not.

    Where a size fits, smaller ones do.
    """
    at_most = max(at_least, at_most)
    if fits(at_most):
        return at_most
    if not fits(at_least):
        return 0
    low, high = at_least, at_most  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
