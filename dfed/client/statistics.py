"""Running statistics of norms, worked out anew from data: for methods whose clients keep none while they train.

Source: Diao, Ding, Tarokh, "HeteroFL", ICLR 2021 (arXiv 2010.01264), section 3, "static batch normalization": clients
normalise by the statistics of the mini-batch; the statistics of the global model are those of the clients' data, gathered
when it is evaluated. Here: the mean over mini-batches of a keyed order of training samples, each normalised by its own
statistics all the way, of the mini-batch's mean and unbiased variance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["STATISTICS_RANGE", "norm_statistics", "statistics_names"]

STATISTICS_RANGE = 2.0**20
"""Statistics below half of this are added up exactly, to a grid of 2⁻³²; larger ones belong to a model that diverges."""


def statistics_names(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the running means and variances of ``model``."""
    return {
        f"{path}.{name}": tuple(getattr(norm, name).shape)
        for path, norm in _norms(model).items() for name in ("running_mean", "running_var")
    }


@torch.no_grad()
def norm_statistics(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[dict[str, Tensor]]:
    """For each mini-batch (float32, of at least two samples) the statistics of every norm, by name; float32 on the CPU.

    The model is in evaluation mode apart from its norms. What it keeps of statistics is lost.
    """
    norms = _norms(model)
    with _of_one_batch(model, norms):
        for x in batches:
            model(x)
            yield {
                f"{path}.{name}": getattr(norm, name).detach().to("cpu", copy=True)
                for path, norm in norms.items() for name in ("running_mean", "running_var")
            }


def _norms(model: nn.Module) -> dict[str, _NormBase]:
    return {
        path: module for path, module in model.named_modules()
        if isinstance(module, _NormBase) and module.track_running_stats and module.running_mean is not None
    }


@contextmanager
def _of_one_batch(model: nn.Module, norms: dict[str, _NormBase]) -> Iterator[None]:
    """Have each norm normalise by the mini-batch, and its statistics be those of the last one."""
    momenta = {path: norm.momentum for path, norm in norms.items()}
    model.eval()
    for norm in norms.values():
        norm.train()
        norm.momentum = 1.0
    try:
        yield
    finally:
        for path, norm in norms.items():
            norm.momentum = momenta[path]
        model.eval()
