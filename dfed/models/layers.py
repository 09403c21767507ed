"""Layers that draw from a generator handed to them, norms by name, and what several model builders share.

torch's own dropout draws from the global generator, which makes a client's numbers depend on whatever ran before it in
the same process. The layers here draw from ``layer.generator``, which :meth:`dfed.models.chain.Chain.set_generator`
sets.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dfed.errors import ConfigError, DfedError, Fault

__all__ = [
    "ChannelDropout",
    "Count",
    "Dropout",
    "KeyedRandom",
    "Norm",
    "Probability",
    "Stem",
    "StochasticDepth",
    "image_shape",
    "keyed",
    "norm_layer",
    "num_groups",
    "torchvision_module",
    "use_cifar_stem",
]

Count = Annotated[int, Field(ge=1)]
"""A whole number of at least 1."""

Probability = Annotated[float, Field(ge=0, lt=1)]
"""A probability below 1."""

Norm = Literal["batch", "group"]
"""The normalisation of a convolutional model; see :func:`norm_layer`."""

Stem = Literal["auto", "cifar", "imagenet"]
"""The first layers of a model made for large images; see :func:`use_cifar_stem`."""

SMALL_IMAGE = 64  # pixels


_MANY = 65_536


class KeyedRandom(nn.Module):
    """Base of the layers that draw random numbers while training.

    ``generator`` must be on the device type of the layer's input. It is no part of the state dict, and a copy of the
    layer has none: two models must not share one stream. On the meta device nothing is drawn and none is needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator: torch.Generator | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "generator": None}

    def _fill(self, mask: Tensor, keep: float) -> Tensor:
        """Fill ``mask`` in place with 1/keep (with probability ``keep``) or 0, and return it."""
        generator = None
        if not mask.is_meta:
            generator = self.generator
            layer = type(self).__name__
            if generator is None:
                raise DfedError(f"{layer} must have a generator in training mode: call `chain.set_generator` first.")
            if generator.device.type != mask.device.type:
                raise DfedError(
                    f"the generator of {layer} must be on the device of its input ({mask.device.type}), "
                    f"but is on {generator.device.type}."
                )
        if mask.device.type == "cpu" and mask.numel() >= _MANY and 0 < keep < 1:
            return _fill_many(mask, keep, generator)
        mask.bernoulli_(keep, generator=generator)
        return mask.div_(keep) if keep > 0 else mask


def _fill_many(mask: Tensor, keep: float, generator: torch.Generator | None) -> Tensor:
    """The same from 16 random bits an entry, four entries a draw: about three times as fast as torch's ``bernoulli_``."""
    kept = min(max(round(keep * 2**16), 1), 2**16 - 1)
    words = torch.empty(-(-mask.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    lanes = words.view(torch.int16)[:mask.numel()].view(mask.shape)
    return mask.copy_(lanes < kept - 2**15).div_(kept / 2**16)


class Dropout(KeyedRandom):
    """Dropout (Srivastava et al. 2014): each entry is zeroed with probability ``p``, the others divided by 1 - p.

    Given the same generator state it returns the bits of ``nn.Dropout`` on the CPU for inputs of fewer than 65,536 entries.
    For larger ones it draws 16 bits an entry, which is faster, and rounds the probability to a multiple of 2⁻¹⁶. Never in
    place.

    Args:
        p: Probability of zeroing, in [0, 1].
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        self.p = _checked(p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * self._fill(torch.empty_like(x), 1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ChannelDropout(Dropout):
    """Dropout of whole channels (Tompson et al. 2015): ``nn.Dropout1d``, ``2d`` and ``3d`` on (batch, channels, …)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        assert x.ndim >= 2, f"input must be (batch, channels, …), not {tuple(x.shape)}"
        return x * self._fill(x.new_empty(x.shape[:2] + (1,) * (x.ndim - 2)), 1 - self.p)


class StochasticDepth(KeyedRandom):
    """Stochastic depth (Huang et al. 2016), as torchvision's layer of that name.

    Args:
        p: Probability of zeroing, in [0, 1].
        mode: ``"row"``: each sample by itself; ``"batch"``: all samples together.
    """

    def __init__(self, p: float, mode: Literal["row", "batch"]):
        super().__init__()
        if mode not in ("row", "batch"):
            raise ConfigError([Fault("mode", f"must be 'row' or 'batch', but is '{mode}'.")])
        self.p = _checked(p)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        rows = x.shape[0] if self.mode == "row" else 1
        return x * self._fill(x.new_empty((rows,) + (1,) * (x.ndim - 1)), 1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode}"


def _checked(p: float) -> float:
    if not 0 <= p <= 1:
        raise ConfigError([Fault("p", f"must be at least 0 and at most 1, but is {p}.")])
    return float(p)


_REPLACED: dict[str, Callable[[Any], KeyedRandom]] = {
    "torch.nn.modules.dropout.Dropout": lambda layer: Dropout(layer.p),
    "torch.nn.modules.dropout.Dropout1d": lambda layer: ChannelDropout(layer.p),
    "torch.nn.modules.dropout.Dropout2d": lambda layer: ChannelDropout(layer.p),
    "torch.nn.modules.dropout.Dropout3d": lambda layer: ChannelDropout(layer.p),
    "torchvision.ops.stochastic_depth.StochasticDepth": lambda layer: StochasticDepth(layer.p, layer.mode),
}
_REFUSED = {
    "torch.nn.modules.dropout._DropoutNd",  # base of AlphaDropout, FeatureAlphaDropout, and of subclasses of one's own
    "torch.nn.modules.activation.RReLU",
    "torch.nn.modules.pooling.FractionalMaxPool2d",
    "torch.nn.modules.pooling.FractionalMaxPool3d",
    "torchvision.ops.drop_block.DropBlock2d",  # base of DropBlock3d
    "torchvision.ops.stochastic_depth.StochasticDepth",
}
_REFUSED_WITH = {  # layers that draw where one of these attributes is above 0
    "torch.nn.modules.activation.MultiheadAttention": ("dropout",),
    "torch.nn.modules.rnn.RNNBase": ("dropout",),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("dropout", "attention_dropout"),
}


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def keyed(module: nn.Module, path: str) -> nn.Module:
    """Replace what draws from torch's global generator inside ``module``, in place, by keyed layers.

    Layers are known by class; a call such as ``torch.nn.functional.dropout`` in a ``forward`` cannot be seen.

    Args:
        module: Any module; changed.
        path: Its name, for messages.

    Returns:
        ``module``, or the layer that stands in for it.

    Raises:
        ConfigError: If a layer draws from the global generator and has no keyed counterpart; names the layer.
    """
    if isinstance(module, KeyedRandom):
        return module
    make = _REPLACED.get(_qualified(type(module)))
    if make is not None:
        return make(module).train(module.training)
    _refuse(module, path)
    for name, child in list(module._modules.items()):
        if child is not None and (replaced := keyed(child, f"{path}.{name}")) is not child:
            setattr(module, name, replaced)
    return module


def _refuse(module: nn.Module, path: str) -> None:
    layer = type(module).__name__
    why = "draws from torch's global generator and cannot be given another"
    for base in map(_qualified, type(module).__mro__):
        if base in _REFUSED:
            raise ConfigError([Fault(path, f"must draw from a generator handed to it, but {layer} {why}.")])
        for attribute in _REFUSED_WITH.get(base, ()):
            if (value := getattr(module, attribute)) > 0:
                raise ConfigError([Fault(f"{path}.{attribute}", f"must be 0, for {layer} {why}, but is {value}.")])


def num_groups(channels: int) -> int:
    """Groups of a GroupNorm: the most that divide ``channels``, are at most 32, and hold at least 2 channels each.

    32 is the default of Wu and He (2018). Groups of one channel would make it an instance norm, which is avoided
    wherever there are 2 channels or more.
    """
    return max(groups for groups in range(1, 33) if channels % groups == 0 and (groups == 1 or channels >= 2 * groups))


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups(channels), channels)


def norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    """The constructor of a norm over a number of channels: BatchNorm2d, or a GroupNorm of :func:`num_groups`."""
    return nn.BatchNorm2d if norm == "batch" else _group_norm


def image_shape(input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """``input_shape`` as (channels, height, width).

    Raises:
        ConfigError: If it does not have three dimensions.
    """
    if len(input_shape) != 3:
        raise ConfigError([Fault("input_shape", f"must be (channels, height, width), but is {input_shape}.")])
    channels, height, width = input_shape
    return channels, height, width


def use_cifar_stem(stem: Stem, input_shape: tuple[int, ...]) -> bool:
    """Whether a model starts without reducing the image: ``"auto"`` says so below 64 pixels of height or width."""
    _, height, width = image_shape(input_shape)
    return stem == "cifar" or (stem == "auto" and min(height, width) < SMALL_IMAGE)


def torchvision_module(name: str) -> ModuleType:
    """``torchvision.<name>``, imported when first asked for.

    Raises:
        ConfigError: If torchvision does not import.
    """
    try:
        return importlib.import_module(f"torchvision.{name}")
    except (ImportError, RuntimeError) as error:  # RuntimeError: its operators do not fit this torch
        message = (
            f"needs torchvision, which does not import: {error}. It must be the build for torch {torch.__version__}; "
            "a CPU-only torch does not go with the torchvision of the default registry."
        )
        raise ConfigError([Fault("model", message)]) from error
