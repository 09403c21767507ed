"""Augmentation of image batches: vectorised, with draws of its own for each sample, from a given generator."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["AUGMENTATIONS", "crop", "crop_flip", "flip", "none"]

PADDING = 4


def none(images: Tensor, generator: torch.Generator) -> Tensor:
    """No augmentation: gives back ``images`` themselves and draws nothing."""
    return images


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: (b, C, H, W), on any device; not changed.
        generator: CPU generator.
    """
    mirrored = torch.randint(2, (len(images), 1, 1, 1), generator=generator, dtype=torch.bool).to(images.device)
    return torch.where(mirrored, images.flip(3), images)


def crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pad each image by 4 pixels of zero on all sides and cut a random window of the old size.

    The images are normalised already, so the padding has the data set's mean colour.

    Args:
        images: (b, C, H, W), on any device; not changed.
        generator: CPU generator.
    """
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, (PADDING,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (b, C, 9, 9, H, W), a view
    top, left = torch.randint(2 * PADDING + 1, (2, len(images)), generator=generator).to(images.device)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """:func:`crop`, then :func:`flip`: the usual augmentation for CIFAR."""
    return flip(crop(images, generator), generator)


AUGMENTATIONS = {"none": none, "flip": flip, "crop": crop, "crop_flip": crop_flip}
"""What a config may name. Each maps images (b, C, H, W) and a generator to images of the same shape."""
