"""Early exits: which one is chosen, and how fast it is."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfed.client import Skeleton
from dfed.data import Dataset

__all__ = ["choose_exit", "exit_figures", "samples_per_second"]

_BATCH, _REPEATS, _LEAST_S = 64, 5, 0.05


def choose_exit(accuracies: Mapping[str, float], tolerance: float) -> str:
    """The first exit whose accuracy is within ``tolerance`` of the best.

    Args:
        accuracies: By exit, the shallowest first.
    """
    least = max(accuracies.values()) - tolerance - 1e-9  # less than one sample of any set, more than what rounding does
    return next(name for name, accuracy in accuracies.items() if accuracy >= least)


@torch.inference_mode()
def samples_per_second(models: Mapping[str, Callable[[], nn.Module]], tensors: Mapping[str, Tensor], data: Dataset,
                       device: torch.device) -> dict[str, float]:
    """Measured throughput of inference, by model: the median of several stretches of mini-batches of 64.

    Each stretch lasts at least 50 ms; the models take turns, so that what else the machine does strikes all of them.

    Args:
        models: Makers of modules without storage.
        data: Its first samples are passed, again and again.
    """
    images = data.batch(np.arange(_BATCH) % data.num_samples)[0].to(device)
    skeletons, rounds = {name: Skeleton(make()) for name, make in models.items()}, dict[str, int]()
    for name, skeleton in skeletons.items():
        skeleton.load(tensors, device)
        skeleton.model.eval()
        skeleton.model(images)
        rounds[name] = math.ceil(_LEAST_S / min(_time(skeleton.model, images, 1) for _ in range(3)))
    found: dict[str, list[float]] = {name: [] for name in skeletons}
    for _ in range(_REPEATS):
        for name, skeleton in skeletons.items():
            found[name].append(_BATCH * rounds[name] / _time(skeleton.model, images, rounds[name]))
    return {name: statistics.median(values) for name, values in found.items()}


def _time(model: nn.Module, images: Tensor, rounds: int) -> float:
    """Seconds of so many passes."""
    _wait(images.device)
    begun = time.perf_counter()
    for _ in range(rounds):
        model(images)
    _wait(images.device)
    return max(time.perf_counter() - begun, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def exit_figures(name: str, variants: Mapping[str, Any], units: tuple[str, ...], rates: Mapping[str, float]) -> dict[str, Any]:
    """What a summary says of the chosen exit.

    Args:
        variants: Figures of all exits, as the summary has them, the full model's last.
        units: Of the chosen exit.
        rates: Samples a second of the chosen exit and of the full model.
    """
    own, full = variants[name], variants[list(variants)[-1]]
    return {
        "name": name,
        "units": list(units),
        "num_params": own["num_params"],
        "param_share": own["num_params"] / full["num_params"],
        "accuracy": own["accuracy"],
        "test": own.get("test"),
        "forward_flops": own["forward_flops"],
        "samples_per_s": rates[name],
        "full_samples_per_s": rates[list(variants)[-1]],
    }
