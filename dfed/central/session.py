"""A model and its optimiser with storage, while they train: made from the tensors of a state, and turned into such again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfed.client import Skeleton, TrainingSettings, make_optimizer
from dfed.models import Chain
from dfed.models.layers import KeyedRandom

__all__ = ["Loss", "Session"]

Loss = Callable[[Chain, Tensor, Tensor], Tensor]
"""The model, images (b, …) and labels (b,), to a scalar."""


class Session:
    """Trains a chain, step by step. Between :meth:`load` and :meth:`unload` it holds storage.

    A parameter that a step gives no gradient is left as it is by the optimiser, weight decay and state included. Those that get
    theirs in the same steps are a group: torch's fused optimisers make the state of a group at once.

    Args:
        model: Without storage (meta device).
        group_of: From a parameter's name to its group.

    Attributes:
        draws: Whether some layer of the model draws random numbers in training.
    """

    def __init__(self, model: Chain, settings: TrainingSettings, device: torch.device, group_of: Callable[[str], int]):
        self.model, self._settings, self._device, self._group_of = model, settings, device, group_of
        self._skeleton = Skeleton(model)
        self._optimizer: torch.optim.Optimizer | None = None
        self.draws = any(isinstance(module, KeyedRandom) for module in model.modules())

    def load(self, tensors: Mapping[str, Tensor], slots: Mapping[str, Mapping[str, Tensor]], rate_factor: float) -> None:
        """Give the model copies of ``tensors`` and a new optimiser copies of ``slots``."""
        self._skeleton.load(tensors, self._device)
        for name, buffer in self.model.named_buffers():
            if name in tensors and not buffer.is_floating_point():
                buffer.copy_(tensors[name])
        self.model.train()
        self.model.recompute = self._settings.activation_checkpointing
        groups: dict[int, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            groups.setdefault(self._group_of(name), []).append(parameter)
        grouped: list[dict[str, Any]] = [{"params": members} for _, members in sorted(groups.items())]
        self._optimizer = make_optimizer(self._settings, grouped, rate_factor)
        for name, parameter in self.model.named_parameters():
            if slots.get(name):
                self._optimizer.state[parameter] = {
                    slot: value.to(self._device, copy=True) for slot, value in slots[name].items()
                }

    def step(self, x: Tensor, y: Tensor, loss_of: Loss, micro_batch: int | None = None) -> Tensor:
        """One optimiser step; returns the loss, a scalar without gradient.

        Args:
            micro_batch: The gradient of the mini-batch is added up over parts, of at most so many samples and as equal as can
                be, weighted by their numbers of samples; None: it is passed as a whole.
        """
        assert self._optimizer is not None, "load the session first"
        self._optimizer.zero_grad(set_to_none=True)
        if micro_batch is None or micro_batch >= len(y):
            loss = self._backward(x, y, loss_of, None)
        else:
            count = -(-len(y) // micro_batch)
            parts = zip(x.tensor_split(count), y.tensor_split(count), strict=True)
            loss = torch.stack([self._backward(*part, loss_of, len(part[1]) / len(y)) for part in parts]).sum()
        if self._settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip_norm)
        self._optimizer.step()
        return loss

    def _backward(self, x: Tensor, y: Tensor, loss_of: Loss, share: float | None) -> Tensor:
        """Add the gradient of a mini-batch, or of a part that is such a share of it; returns the loss, likewise weighted."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._settings.precision == "bf16"):
            loss = loss_of(self.model, x, y)
        if share is not None:
            loss = loss * share
        loss.backward()
        return loss.detach()

    def drop_gradients(self) -> None:
        """Let go of the gradients of the last step."""
        assert self._optimizer is not None, "load the session first"
        self._optimizer.zero_grad(set_to_none=True)

    def take(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """The model's tensors and the optimiser's, by name: those that are trained, no copies."""
        assert self._optimizer is not None, "load the session first"
        self._optimizer.zero_grad(set_to_none=True)
        state, slots = self._optimizer.state, {}
        for name, parameter in self.model.named_parameters():
            kept = {slot: value for slot, value in state.get(parameter, {}).items() if isinstance(value, Tensor)}
            if kept:
                slots[name] = kept
        return {name: value.detach() for name, value in self.model.state_dict(keep_vars=True).items()}, slots

    def unload(self) -> None:
        """Let go of all storage."""
        self._optimizer = None
        self._skeleton.unload()
