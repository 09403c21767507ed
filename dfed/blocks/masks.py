"""Masks over single entries of a chain's matrices: which tensors they are for, and which entries are kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dfed.models import Chain

__all__ = ["inner_matrices", "norm_tensors", "top_mask"]

_ALL_BUT_SIGN = 0x7FFFFFFF
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def inner_matrices(chain: Chain) -> tuple[str, ...]:
    """Names of the matrices, of shape (out, in, …), between the first unit that has any and the last.

    Where convolutions (four dimensions) are among them: those of the units that have one.
    """
    matrices = [(name, parameter) for name, parameter in chain.named_parameters() if parameter.dim() >= 2]
    units = list(dict.fromkeys(chain.unit_of(name) for name, _ in matrices))
    inner = [(name, parameter) for name, parameter in matrices if chain.unit_of(name) in units[1:-1]]
    with_convolutions = {chain.unit_of(name) for name, parameter in inner if parameter.dim() == 4}
    return tuple(name for name, _ in inner if not with_convolutions or chain.unit_of(name) in with_convolutions)


def norm_tensors(chain: Chain) -> frozenset[str]:
    """Names of the parameters and floating-point buffers of all norms."""
    return frozenset(f"{prefix}.{name}" for prefix, module in chain.named_modules() if isinstance(module, _NORMS)
                     for name, tensor in module.state_dict().items() if tensor.is_floating_point())


def top_mask(score: Tensor, kept: int) -> Tensor:
    """Where the ``kept`` largest entries of ``score`` (float32) are, bool, of the same shape; of equal ones the first are.

    The smallest entry that is kept is found by halving the range of all float32 values, in their order as integers: on a CPU
    torch's own selections take 16 bytes an entry that no prediction of memory sees.
    """
    if kept == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    keys = score.flatten().view(torch.int32)
    keys = torch.where(keys < 0, keys ^ _ALL_BUT_SIGN, keys)  # floats below 0 are the larger, as integers, the smaller they are
    low, high = (torch.tensor(end, dtype=torch.int64, device=score.device) for end in (-(2**31), 2**31 - 1))
    for _ in range(32):
        middle = (low + high + 1) // 2
        enough = torch.count_nonzero(keys >= middle) >= kept  # a sum would convert them all, unseen
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    above, ties = keys > low, keys == low
    del keys
    place = ties.to(torch.int32).cumsum_(0)
    return (above | (ties & (place <= kept - torch.count_nonzero(above)))).view(score.shape)
