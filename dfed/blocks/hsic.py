"""The normalised Hilbert-Schmidt independence criterion: how much one batch of vectors says about another.

Source: Gretton, Bousquet, Smola, Schölkopf, "Measuring Statistical Dependence with Hilbert-Schmidt Norms", ALT 2005; the
kernel and the normalisation are those of NeuLite (Wu et al. 2024, arXiv 2408.10826).

K_ij = exp(−‖x_i − x_j‖² / (2 σ² d)), d the number of features; H = I − 11ᵀ/m; HSIC(X, Y) = tr(K_X H K_Y H) / m²;
nHSIC = HSIC(X, Y) / √(HSIC(X, X) · HSIC(Y, Y)).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SIGMA", "centred_kernel", "nhsic"]

SIGMA = 5.0
"""σ of NeuLite's release."""

_TINY = 1e-12


def centred_kernel(x: Tensor, sigma: float = SIGMA) -> Tensor:
    """H K H of a batch: (m, …) to float32 (m, m), on the batch's device. Features are flattened."""
    with torch.autocast(x.device.type, enabled=False):
        flat = x.flatten(1).float()
        flat = flat - flat.mean(dim=0)  # distances stay, and what is subtracted below is smaller
        squares = flat.square().sum(dim=1)
        distances = (squares[:, None] + squares - 2 * flat @ flat.T).clamp(min=0)
        kernel = (distances / (-2 * sigma**2 * flat.shape[1])).exp()
        means = kernel.mean(dim=0)
        return kernel - means - means[:, None] + means.mean()


def nhsic(first: Tensor, second: Tensor) -> Tensor:
    """nHSIC of two batches, given by their :func:`centred_kernel`; a scalar from 0 (independent) to 1, float32.

    Where one of them has no spread (m = 1, or all samples alike) it is 0.
    """
    with torch.autocast(first.device.type, enabled=False):
        # m² is in the numerator as in the denominator; tr(A Bᵀ) is the sum of products, and both are symmetric.
        norms = (first.square().sum() * second.square().sum()).clamp(min=_TINY**2).sqrt()
        return (first * second).sum() / norms
