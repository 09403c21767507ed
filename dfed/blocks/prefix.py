"""One model at several depths: prefixes of a chain that share its last unit, which the shorter reach by a shortcut.

This is the deep-to-shallow deactivation of FlexTrain (Unsal et al. 2023, arXiv 2310.20457): residual blocks from some point on
are the identity, and the classifier is the full model's. Where a block that is left out would have changed the shape, the
identity is the shortcut without parameters of small residual networks (He et al. 2016, option A).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dfed.blocks.depth import pad_to, paddable
from dfed.errors import ConfigError, Fault
from dfed.models import Chain

__all__ = ["RESERVED", "TO_HEAD", "PrefixChain", "Shortcut", "body_stops", "subsample_to"]

TO_HEAD = "to_head"  # the unit without parameters between body and head
RESERVED = (TO_HEAD, "prefix_stops", "_last_linear")
"""Names that no unit of the full model may have."""


def subsample_to(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The identity past units that are left out: (batch, …) to (batch, *shape).

    Of feature maps every second pixel is taken, in both directions, as often as it takes, and the new channels, which come
    last, are zero: what the option-A shortcuts of these units would do one after another. Where that does not lead to
    ``shape``, it is :func:`dfed.blocks.pad_to`.

    Args:
        x: With samples that are :func:`dfed.blocks.paddable` to ``shape``.
    """
    here = tuple(x.shape[1:])
    if here == tuple(shape):
        return x
    strides = _strides(here, tuple(shape))
    if strides is None:
        return pad_to(x, shape)
    return F.pad(x[:, :, :: strides[0], :: strides[1]], (0, 0, 0, 0, 0, shape[0] - here[0]))


def _strides(here: tuple[int, ...], there: tuple[int, ...]) -> tuple[int, int] | None:
    """The powers of two by which height and width shrink; None if there are none, or channels are lost."""
    if len(here) != 3 or len(there) != 3 or here[0] > there[0]:
        return None
    found = []
    for size, wanted in zip(here[1:], there[1:], strict=True):
        stride = 1
        while -(-size // stride) > wanted and stride < size:
            stride *= 2
        if -(-size // stride) != wanted:
            return None
        found.append(stride)
    return found[0], found[1]


class Shortcut(nn.Module):
    """:func:`subsample_to` ``shape`` as a module without parameters."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        return subsample_to(x, self.shape)

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


def body_stops(chain: Chain, stops: Sequence[int]) -> tuple[int, ...]:
    """Of depths that end as :func:`dfed.blocks.cut_points` says, how many units of the body (all but the last unit) each has.

    Raises:
        ConfigError: If the output of a depth cannot be brought to the last unit; names the unit that it ends with.
    """
    shapes, body = list(chain.output_shapes().values()), len(chain) - 1
    if not body:
        raise ConfigError([Fault("model", f"must have a unit before its last one, but '{chain.name}' has one unit in all.")])
    found = tuple(min(stop, body) for stop in stops)
    for stop in found:
        if not paddable(shapes[stop - 1], shapes[body - 1]):
            message = (f"must have an output that a shortcut can bring to the last unit, which takes {shapes[body - 1]}, but "
                       f"has {shapes[stop - 1]}.")
            raise ConfigError([Fault(chain.unit_names[stop - 1], message)])
    return found


class PrefixChain(Chain):
    """The first units of a chain, a shortcut without parameters (``to_head``), and the chain's last unit; on the meta device.

    It computes every depth that it holds: see :meth:`at_depth`. Its tensors have the names that they have in the chain, or
    those that ``rename`` gives their units.

    Args:
        chain: The full model; left as it is.
        stops: Units of the body at each depth, ascending (see :func:`body_stops`); called, it computes the last depth.
        rename: From a unit's name to another.

    Attributes:
        prefix_stops: ``stops``.
    """

    def __init__(self, chain: Chain, stops: Sequence[int], rename: Callable[[str], str] = str):
        whole, names = chain.skeleton(), chain.unit_names
        units: list[tuple[str, nn.Module]] = [(rename(name), whole.unit(name)) for name in names[: stops[-1]]]
        wanted = list(chain.output_shapes().values())[len(chain) - 2]
        super().__init__([*units, (TO_HEAD, Shortcut(wanted)), (rename(names[-1]), whole.unit(names[-1]))],
                         input_shape=chain.input_shape, num_classes=chain.num_classes, name=chain.name, init=chain.init_scheme)
        self.prefix_stops = tuple(stops)
        linears = [name for name, layer in self.unit(rename(names[-1])).named_modules() if isinstance(layer, nn.Linear)]
        self._last_linear = ".".join(filter(None, (rename(names[-1]), linears[-1]))) if linears else None

    def at_depth(self, x: Tensor, depth: int) -> Tensor:
        """Class scores (batch, num_classes) at ``depth``, from 1, whose last is that of the whole chain here."""
        return self.run_head(self.run_body(x, 0, depth))

    def run_body(self, x: Tensor, start: int, stop: int) -> Tensor:
        """From what depth ``start`` puts out (0: from the input) to what depth ``stop`` does, shortcut not included."""
        return self.run(x, self.prefix_stops[start - 1] if start else 0, self.prefix_stops[stop - 1])

    def run_head(self, x: Tensor) -> Tensor:
        """Class scores from what some depth puts out."""
        return self.run(x, TO_HEAD)

    def run_head_with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores from what some depth puts out, and the features (batch, …) that the last linear layer made them of.

        Where the last unit has no linear layer, the scores are the features.
        """
        if self._last_linear is None:
            scores = self.run_head(x)
            return scores, scores
        kept: list[Tensor] = []
        linear = self.get_submodule(self._last_linear)
        watch = linear.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
        try:
            scores = self.run_head(x)
        finally:
            watch.remove()
        return scores, kept[-1]
