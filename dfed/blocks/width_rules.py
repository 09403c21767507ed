"""How kept channels pass through each kind of layer, one rule a class; see :mod:`dfed.blocks.width`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfed.blocks.narrowing import Kept, Narrowing, Rule, refused
from dfed.models.cifar_resnet import PadShortcut
from dfed.models.layers import num_groups

__all__ = ["RULES", "SelectShortcut"]


class SelectShortcut(nn.Module):
    """:class:`PadShortcut` between channels that do not start with the same ones; takes no more memory than that.

    Args:
        sources: For each channel that it puts out, its place among the inputs; −1: zero.
    """

    def __init__(self, sources: list[int]):
        super().__init__()
        self._runs: list[tuple[int, int]] = []  # first source (−1: zero) and number of channels
        for place, source in enumerate(sources):
            before = sources[place - 1] if place else None
            if before is not None and (source == before + 1 if source >= 0 and before >= 0 else source == before):
                self._runs[-1] = (self._runs[-1][0], self._runs[-1][1] + 1)
            else:
                self._runs.append((source, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, ::2, ::2]
        zero = x.new_zeros(1)
        return torch.cat([
            x[:, first:first + count] if first >= 0 else zero.expand(len(x), count, *x.shape[2:]) for first, count in self._runs
        ], dim=1)


def _as_features(kept: Kept, size: int, path: str) -> Kept:
    """``kept`` as a layer on ``size`` features sees it: as it is, or with the pixels of flattened feature maps."""
    if size % kept.size:
        raise refused(path, f"it takes {size} features, which {kept.size} channels do not divide")
    return kept if size == kept.size else kept.repeated(size // kept.size)


def _same(walk: Narrowing, module: Any, path: str, kept: Kept, target: Kept | None) -> Kept:
    return kept


def _flatten(walk: Narrowing, module: Any, path: str, kept: Kept, target: Kept | None) -> Kept:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise refused(path, "it flattens other dimensions than channels and pixels")
    return kept


def _sequential(walk: Narrowing, module: Any, path: str, kept: Kept, target: Kept | None) -> Kept:
    children = list(module.named_children())
    makers = [number for number, (_, child) in enumerate(children) if _makes_channels(child)]
    for number, (name, child) in enumerate(children):
        wanted = target if makers and number == makers[-1] else None
        kept = walk.layer(child, f"{path}.{name}", kept, wanted)
    return kept


def _makes_channels(module: nn.Module) -> bool:
    return any(isinstance(child, (nn.Conv2d, nn.Linear)) for child in module.modules())


def _conv(walk: Narrowing, module: Any, path: str, kept: Kept, target: Kept | None) -> Kept:
    size, groups = module.out_channels, module.groups
    if module.in_channels != kept.size:
        raise refused(path, f"it takes {module.in_channels} channels and is given {kept.size}")
    if groups == 1:
        out = walk.group(path, size) if target is None else target
        walk.cut(module, path, "weight", out.indices, kept.indices)
    else:
        out = _grouped(walk, module, path, kept)
        walk.cut(module, path, "weight", out.indices)
        module.groups = len(kept) // (module.in_channels // groups)
    walk.cut(module, path, "bias", out.indices)
    module.in_channels, module.out_channels = len(kept), len(out)
    return out


def _grouped(walk: Narrowing, module: Any, path: str, kept: Kept) -> Kept:
    """Groups are kept whole: those whose inputs are all there. A depthwise convolution has groups of one channel."""
    per_group = module.in_channels // module.groups
    there = np.unique(kept.indices // per_group)
    if len(there) * per_group != len(kept):
        raise refused(path, f"it has groups of {per_group} channels, of which some would keep a part only at this width")
    return Kept(there, module.groups).repeated(module.out_channels // module.groups)


def _linear(walk: Narrowing, module: Any, path: str, kept: Kept, target: Kept | None) -> Kept:
    inputs = _as_features(kept, module.in_features, path)
    out = walk.group(path, module.out_features) if target is None else target
    walk.cut(module, path, "weight", out.indices, inputs.indices)
    walk.cut(module, path, "bias", out.indices)
    module.in_features, module.out_features = len(inputs), len(out)
    return out


def _batch_norm(walk: Narrowing, module: Any, path: str, kept: Kept, target: Kept | None) -> Kept:
    inputs = _as_features(kept, module.num_features, path)
    for name in ("weight", "bias", "running_mean", "running_var"):
        walk.cut(module, path, name, inputs.indices)
    module.num_features = len(inputs)
    return kept


def _group_norm(walk: Narrowing, module: Any, path: str, kept: Kept, target: Kept | None) -> Kept:
    """As many groups as :func:`num_groups` gives the channels that are left, but no more than there were."""
    if module.num_channels != kept.size:
        raise refused(path, f"it works on {module.num_channels} features, not on the {kept.size} channels alone")
    if len(kept) != kept.size:
        most = min(module.num_groups, num_groups(len(kept)))
        module.num_groups = next(groups for groups in range(most, 0, -1) if len(kept) % groups == 0)
        for name in ("weight", "bias"):
            walk.cut(module, path, name, kept.indices)
        module.num_channels = len(kept)
    return kept


def _layer_norm(walk: Narrowing, module: Any, path: str, kept: Kept, target: Kept | None) -> Kept:
    if tuple(module.normalized_shape) != (kept.size,):
        raise refused(path, f"it works on {tuple(module.normalized_shape)}, not on the {kept.size} channels alone")
    for name in ("weight", "bias"):
        walk.cut(module, path, name, kept.indices)
    module.normalized_shape = (len(kept),)
    return kept


def _residual(walk: Narrowing, module: Any, path: str, kept: Kept, target: Kept | None) -> Kept:
    """torchvision's BasicBlock and Bottleneck: the body and the shortcut end in the same channels."""
    names = [name for name in ("conv1", "conv2", "conv3") if hasattr(module, name)]
    last = getattr(module, names[-1]).out_channels
    if module.downsample is None:
        target = kept
    elif target is None:
        target = walk.group(f"{path}.{names[-1]}", last)
    here = kept
    for name in names:
        here = walk.layer(getattr(module, name), f"{path}.{name}", here, target if name == names[-1] else None)
        here = walk.layer(getattr(module, f"bn{name[-1]}"), f"{path}.bn{name[-1]}", here)
    if isinstance(module.downsample, PadShortcut):
        module.downsample = _pad_shortcut(kept, target)
    elif module.downsample is not None:
        walk.layer(module.downsample, f"{path}.downsample", kept, target)
    return target


def _pad_shortcut(kept: Kept, target: Kept) -> nn.Module:
    """The shortcut that passes channel i on as channel i, where both are there."""
    places = {channel: place for place, channel in enumerate(kept.indices.tolist())}
    sources = [places.get(channel, -1) for channel in target.indices.tolist()]
    if sources[:len(kept)] == list(range(len(kept))):
        return PadShortcut(len(target) - len(kept))
    return SelectShortcut(sources)


def _inverted_residual(walk: Narrowing, module: Any, path: str, kept: Kept, target: Kept | None) -> Kept:
    return walk.layer(module.conv, f"{path}.conv", kept, kept if module.use_res_connect else target)


def _dense_layer(walk: Narrowing, module: Any, path: str, kept: Kept, target: Kept | None) -> Kept:
    walk.layer(module.norm, f"{path}.norm", kept)
    new = walk.layer(module.conv, f"{path}.conv", kept)
    return Kept(np.concatenate([kept.indices, kept.size + new.indices]), kept.size + new.size)


def _vit_embed(walk: Narrowing, module: Any, path: str, kept: Kept, target: Kept | None) -> Kept:
    width = module.conv_proj.out_channels
    out = walk.group(path, width, walk.heads) if target is None else target
    walk.layer(module.conv_proj, f"{path}.conv_proj", kept, out)
    for name in ("class_token", "pos_embedding"):
        walk.cut(module, path, name, None, None, out.indices)
    return out


def _encoder_block(walk: Narrowing, module: Any, path: str, kept: Kept, target: Kept | None) -> Kept:
    walk.layer(module.ln_1, f"{path}.ln_1", kept)
    _attention(walk, module.self_attention, f"{path}.self_attention", kept)
    walk.layer(module.ln_2, f"{path}.ln_2", kept)
    return walk.layer(module.mlp, f"{path}.mlp", kept, kept)


def _attention(walk: Narrowing, module: nn.MultiheadAttention, path: str, kept: Kept) -> None:
    """All heads, each with some of its dimensions; queries, keys and values with the same ones."""
    width, heads = module.embed_dim, module.num_heads
    if width != kept.size or len(kept) % heads or module.in_proj_weight is None or module.bias_k is not None:
        raise refused(path, "its attention does not work on the residual stream alone")
    of_head, size = len(kept) // heads, width // heads
    if of_head == size:
        return
    some = walk.group(path, size, walk.heads // heads).indices
    inside = (np.arange(heads)[:, None] * size + some).reshape(-1)
    rows = (np.arange(3)[:, None] * width + inside).reshape(-1)
    walk.cut(module, path, "in_proj_weight", rows, kept.indices)
    walk.cut(module, path, "in_proj_bias", rows)
    walk.cut(module.out_proj, f"{path}.out_proj", "weight", kept.indices, inside)
    walk.cut(module.out_proj, f"{path}.out_proj", "bias", kept.indices)
    module.out_proj.in_features = module.out_proj.out_features = len(kept)
    module.embed_dim = module.kdim = module.vdim = len(kept)
    module.head_dim = of_head


def _vit_head(walk: Narrowing, module: Any, path: str, kept: Kept, target: Kept | None) -> Kept:
    walk.layer(module.ln, f"{path}.ln", kept)
    return walk.layer(module.fc, f"{path}.fc", kept, target)


RULES: dict[str, Rule] = {
    **{f"torch.nn.modules.activation.{name}": _same for name in (
        "ReLU", "ReLU6", "LeakyReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish", "Hardswish", "Hardtanh", "Hardsigmoid",
        "Sigmoid", "LogSigmoid", "Tanh", "Softplus", "Softsign",
    )},
    **{f"torch.nn.modules.pooling.{name}": _same for name in (
        "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d",
    )},
    **{f"dfed.models.layers.{name}": _same for name in ("Dropout", "ChannelDropout", "StochasticDepth")},
    "torch.nn.modules.flatten.Flatten": _flatten,
    "torch.nn.modules.linear.Identity": _same,
    "torch.nn.modules.container.Sequential": _sequential,
    "torchvision.ops.misc.Conv2dNormActivation": _sequential,
    "torchvision.ops.misc.MLP": _sequential,
    "torchvision.models.vision_transformer.MLPBlock": _sequential,
    "torch.nn.modules.conv.Conv2d": _conv,
    "torch.nn.modules.linear.Linear": _linear,
    "torch.nn.modules.batchnorm.BatchNorm1d": _batch_norm,
    "torch.nn.modules.batchnorm.BatchNorm2d": _batch_norm,
    "torch.nn.modules.normalization.GroupNorm": _group_norm,
    "torch.nn.modules.normalization.LayerNorm": _layer_norm,
    "torchvision.models.resnet.BasicBlock": _residual,
    "torchvision.models.resnet.Bottleneck": _residual,
    "torchvision.models.mobilenetv2.InvertedResidual": _inverted_residual,
    "torchvision.models.vision_transformer.EncoderBlock": _encoder_block,
    "dfed.models.densenet.DenseLayer": _dense_layer,
    "dfed.models.vit.VitEmbed": _vit_embed,
    "dfed.models.vit.VitHead": _vit_head,
}
"""By exact class: a subclass may do otherwise."""
