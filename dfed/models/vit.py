"""A small vision transformer (Dosovitskiy et al. 2021), made of torchvision's own encoder blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfed.errors import ConfigError, Fault
from dfed.models.chain import Chain
from dfed.models.layers import Count, Dropout, Probability, image_shape, torchvision_module

__all__ = ["VitEmbed", "VitHead", "vit_tiny"]

_EPS = 1e-6  # of the layer norms, as in torchvision


class VitEmbed(nn.Module):
    """Patches, class token, position embedding: (batch, channels, h, w) to (batch, 1 + num_patches, width).

    Args:
        channels: Channels of the image.
        num_patches: How many patches an image has.
        patch: Height and width of a patch in pixels.
        width: Length of the vector of one patch.
        dropout: Probability of zeroing an entry of the sum.
    """

    def __init__(self, channels: int, num_patches: int, patch: int, width: int, dropout: float):
        super().__init__()
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.conv_proj = nn.Conv2d(channels, width, patch, patch)
        self.pos_embedding = nn.Parameter(torch.empty(1, 1 + num_patches, width))
        self.dropout = Dropout(dropout)

    def keyed_init(self, generator: torch.Generator) -> None:
        """Class token 0, positions N(0, 0.02²), as in torchvision."""
        self.class_token.zero_()
        self.pos_embedding.normal_(std=0.02, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv_proj(x).flatten(2).permute(0, 2, 1)  # (batch, num_patches, width)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches], dim=1)
        return self.dropout(tokens + self.pos_embedding)


class VitHead(nn.Module):
    """Layer norm and a linear layer on the class token: (batch, tokens, width) to (batch, num_classes)."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.ln = nn.LayerNorm(width, eps=_EPS)
        self.fc = nn.Linear(width, num_classes)

    def keyed_init(self, generator: torch.Generator) -> None:
        """The linear layer starts at 0, as in torchvision, so the first step moves this layer alone."""
        self.fc.weight.zero_()
        self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.ln(x)[:, 0])


def vit_tiny(
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    depth: Count = 6,
    width: Count = 192,
    heads: Count = 3,
    patch: Count = 4,
    mlp_ratio: Count = 4,
    dropout: Probability = 0.0,
) -> Chain:
    """Vision transformer for small images: 6 blocks of width 192 with 3 heads on patches of 4 × 4 pixels.

    Units: ``embed`` (patches, class token, positions), ``block0`` … (torchvision's EncoderBlock), ``head``. It computes
    what ``torchvision.models.VisionTransformer`` of the same sizes computes, to the bit.

    Args:
        input_shape: (channels, height, width); height and width are multiples of ``patch``.
        num_classes: Number of classes.
        depth: Number of encoder blocks.
        width: Length of a token; a multiple of ``heads``.
        heads: Number of attention heads.
        patch: Height and width of a patch in pixels.
        mlp_ratio: Width of the hidden layer of each block, in units of ``width``.
        dropout: Probability after embedding, attention and both layers of the MLP (not on attention weights).
    """
    channels, height, width_px = image_shape(input_shape)
    if height % patch or width_px % patch:
        message = f"must divide the height and the width of the image ({height} × {width_px}), but is {patch}."
        raise ConfigError([Fault("patch", message)])
    if width % heads:
        raise ConfigError([Fault("width", f"must be a multiple of `heads` ({heads}), but is {width}.")])
    encoder_block = torchvision_module("models.vision_transformer").EncoderBlock
    num_patches = (height // patch) * (width_px // patch)
    units: list[tuple[str, nn.Module]] = [("embed", VitEmbed(channels, num_patches, patch, width, dropout))]
    for index in range(depth):
        block = encoder_block(heads, width, mlp_ratio * width, dropout=dropout, attention_dropout=0.0)
        units.append((f"block{index}", block))
    units.append(("head", VitHead(width, num_classes)))
    return Chain(units, input_shape=input_shape, num_classes=num_classes, name="vit_tiny", init="vit")
