"""One step of one layer by its own loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dfed.blocks.local_net import LocalNet
from dfed.central.session import Session
from dfed.central.settings import EpochSettings
from dfed.models import Chain

__all__ = ["layer_session", "local_step"]


def layer_session(net: LocalNet, layer: int, settings: EpochSettings, device: torch.device) -> Session:
    """What trains a layer with its head, with an optimiser of its own."""
    return Session(net.layer_model(layer), settings, device, lambda name: 0)


def local_step(session: Session, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A step of a layer and its head, by the cross-entropy of what the head makes of the layer's output.

    Args:
        x: What the layer takes, (b, …), without gradient.
        y: Labels, int64 (b,).

    Returns:
        The loss, a scalar; and the layer's output, before the step, both without gradient.
    """
    kept: list[Tensor] = []

    def loss(model: Chain, x: Tensor, y: Tensor) -> Tensor:
        out = model.run(x, 0, len(model) - 1)
        kept.append(out.detach())
        scores = model.run(out, len(model) - 1)
        return F.cross_entropy(scores.float() if scores.dtype.itemsize < 4 else scores, y)

    found = session.step(x, y, loss)
    session.drop_gradients()  # those of the next layer take their place
    return found, kept[0]
