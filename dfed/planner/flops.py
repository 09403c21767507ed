"""Counting floating-point operations: torch's counter, with one of its formulas put right."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from dfed.memory.storageless import MOST_KNOWN

__all__ = ["OperatorCounter", "attention_in_parts", "flop_counter", "flops_by_type", "flops_of", "forward_flops"]


@contextmanager
def attention_in_parts() -> Iterator[None]:
    """Inside, attention in evaluation mode does not run as one operator, whose arithmetic is not counted."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def flop_counter() -> FlopCounterMode:
    """A context that counts operations (a product and a sum are two) of all that runs inside; see ``get_total_flops``."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


_counted: dict[Hashable, int] = {}


class OperatorCounter:
    """Counts operations as :func:`flop_counter` does, but not by module, so that it keeps hold of no tensor: for
    :func:`dfed.memory.predict_course`, as its ``counter``.

    Args:
        batch: The size of the batch if it is a prime.

    Attributes:
        counts: Operations of each operator.
        proportional: Whether every count was a multiple of ``batch``, and none of its square.
    """

    def __init__(self, batch: int | None = None) -> None:
        self.counts: dict[Any, int] = {}
        self.proportional = batch is not None
        self._batch = batch
        self._formulas = flop_counter().flop_registry

    def count(self, func: Any, args: Any, kwargs: Any, out: Any, key: Hashable) -> None:
        """Add one operator; see :class:`dfed.memory.Counter`."""
        operator = func.overloadpacket
        if operator not in self._formulas:
            return
        count = _counted.get(key) if key is not None else None
        if count is None:
            count = int(self._formulas[operator](*args, **kwargs, out_val=out))
            if key is not None:
                if len(_counted) >= MOST_KNOWN:
                    _counted.clear()
                _counted[key] = count
        self.counts[operator] = self.counts.get(operator, 0) + count
        if self._batch is not None:
            self.proportional &= count == 0 or (count % self._batch == 0 and count % self._batch**2 != 0)


def forward_flops(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Floating-point operations of the forward pass of one sample (a product and a sum are two), in evaluation mode.

    Args:
        model: On the meta device; left in evaluation mode.
        input_shape: Of a sample.
    """
    with attention_in_parts(), flop_counter() as counter, torch.no_grad():
        model.eval()(torch.empty(1, *input_shape, device="meta"))
    return counter.get_total_flops()


def flops_by_type(counts: Mapping[Any, int]) -> tuple[int, int]:
    """Operations in floating point, and operations in int8, which are oneDNN's own operators, of the operations of each
    operator."""
    int8 = sum(count for operator, count in counts.items() if str(operator).startswith("onednn."))
    return sum(counts.values()) - int8, int8


def flops_of(counter: FlopCounterMode) -> tuple[int, int]:
    """As :func:`flops_by_type`, of what torch's counter counted."""
    return flops_by_type(counter.get_flop_counts()["Global"])


def _convolution_backward(
    grad_shape: Sequence[int], x_shape: Sequence[int], weight_shape: Sequence[int], _bias: Any, _stride: Any, _padding: Any,
    _dilation: Any, transposed: bool, _output_padding: Any, _groups: int, wanted: Sequence[bool], **_: Any,
) -> int:
    """As much as the forward pass for each of the gradients of input and weight.

    Torch's own formula takes the gradient of a grouped convolution's weight for that of a full one: ``groups`` times as much.
    """
    return conv_flop_count([*x_shape], [*weight_shape], [*grad_shape], transposed=transposed) * (wanted[0] + wanted[1])
