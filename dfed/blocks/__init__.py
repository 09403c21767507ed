"""Blocks: contiguous groups of a chain's units that are frozen, trained, encoded or sent as one."""

from dfed.blocks.int8 import hold_int8
from dfed.blocks.splitting import Splitting
from dfed.blocks.stages import cut, output_module, stage, tail_parameters, train_only

__all__ = ["Splitting", "cut", "hold_int8", "output_module", "stage", "tail_parameters", "train_only"]
