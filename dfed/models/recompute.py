"""Activation checkpointing: a unit's activations are dropped after the forward pass and computed again in the backward pass.

Chen et al., "Training deep nets with sublinear memory cost" (2016, arXiv:1604.06174), one segment per unit. The second
pass sees the random numbers of the first, and leaves running statistics alone, so that training gives the same bits
with and without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from dfed.errors import DfedError
from dfed.models.layers import KeyedRandom

__all__ = ["recomputed"]


def recomputed(unit: nn.Module, x: Tensor) -> Tensor:
    """``unit(x)``, with nothing kept for the backward pass but ``x`` itself.

    Args:
        unit: A module that does not change ``x`` in place.
        x: (batch, …).

    Raises:
        DfedError: If the unit changes ``x`` in place, so that it cannot be computed again.
    """
    generator = next((m.generator for m in unit.modules() if isinstance(m, KeyedRandom)), None)
    state = generator.get_state() if generator is not None else None
    runs, version = 0, x._version

    def run(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        if runs == 1:
            return unit(x)
        with _as_before(unit, generator, state):
            return unit(x)

    out: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
    if x._version != version:
        raise DfedError("activation checkpointing must find the input of a unit as it was, but this unit changes it in place: "
                        f"{unit}. Turn `client.activation_checkpointing` off, or the unit's first `inplace`.")
    return out


@contextmanager
def _as_before(unit: nn.Module, generator: torch.Generator | None, state: Tensor | None) -> Iterator[None]:
    """Draw what was drawn from ``state`` on, and keep running statistics as they are."""
    norms = [module for module in unit.modules() if isinstance(module, _NormBase) and module.training]
    # What has no numbers takes no part: statistics of the full width, where a width drawn for each step has none of its own.
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False) if not buffer.is_meta]
    now = generator.get_state() if generator is not None else None
    try:
        if generator is not None:
            assert state is not None
            generator.set_state(state)
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
        if generator is not None:
            assert now is not None
            generator.set_state(now)
