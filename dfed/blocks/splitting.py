"""Splitting a chain of units into blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["Splitting"]


class Splitting:
    """A division of a chain's units into contiguous blocks.

    Args:
        blocks: Block name to its units, in the order of the chain.
    """

    def __init__(self, blocks: Mapping[str, tuple[str, ...]]):
        self.blocks = dict(blocks)
        self._block_of_unit = {unit: block for block, units in self.blocks.items() for unit in units}
        assert len(self._block_of_unit) == sum(len(units) for units in self.blocks.values()), "a unit stands twice"

    @classmethod
    def by_unit(cls, units: Iterable[str]) -> Splitting:
        """The finest splitting: one block a unit, of the same name."""
        return cls({unit: (unit,) for unit in units})

    @property
    def names(self) -> tuple[str, ...]:
        """Block names in the order of the chain."""
        return tuple(self.blocks)

    def block_of(self, tensor_name: str) -> str:
        """The block that holds a tensor of the state dict (``<unit>.<rest>``)."""
        return self._block_of_unit[tensor_name.partition(".")[0]]
