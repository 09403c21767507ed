"""Blocks: contiguous groups of a chain's units that are frozen, trained, encoded or sent as one."""

from dfed.blocks.splitting import Splitting

__all__ = ["Splitting"]
