"""Blocks: contiguous groups of a chain's units that are frozen, trained, encoded or sent as one."""

from dfed.blocks.depth import ExitChain, check_names, classifier, cut_points, pad_to, paddable
from dfed.blocks.int8 import hold_int8
from dfed.blocks.masks import inner_matrices, norm_tensors, top_mask
from dfed.blocks.quantised import freeze_int8
from dfed.blocks.splitting import Splitting
from dfed.blocks.stages import cut, output_module, stage, tail_parameters, train_only

__all__ = [
    "ExitChain",
    "Splitting",
    "check_names",
    "classifier",
    "cut",
    "cut_points",
    "freeze_int8",
    "hold_int8",
    "inner_matrices",
    "norm_tensors",
    "output_module",
    "pad_to",
    "paddable",
    "stage",
    "tail_parameters",
    "top_mask",
    "train_only",
]
