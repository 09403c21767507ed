"""Server optimisers: how the global model follows the mean of the clients' models.

Reddi et al., "Adaptive Federated Optimization" (ICLR 2021), Algorithm 2, and Hsu, Qi and Brown, "Measuring the Effects
of Non-Identical Data Distribution for Federated Visual Classification" (2019), FedAvgM. With x the old tensor and
Δ = mean − x the pseudo-gradient (it points downhill, so it is added):

    sgd        x ← x + η Δ                                                         (FedAvg for η = 1)
    momentum   m ← β m + Δ;                        x ← x + η m                      (FedAvgM)
    adam       m ← β₁ m + (1 − β₁) Δ;  v ← β₂ v + (1 − β₂) Δ²;                x ← x + η m / (√v + τ)
    yogi       m ← β₁ m + (1 − β₁) Δ;  v ← v − (1 − β₂) Δ² sign(v − Δ²);      x ← x + η m / (√v + τ)

m starts at 0. The paper asks for v ≥ τ² at the start; here v starts at τ². There is no bias correction, as in
Algorithm 2, so ``adam`` differs from ``torch.optim.Adam``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

__all__ = ["ServerOptimizer", "adam", "momentum", "sgd", "yogi"]

_LearningRate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Decay = Annotated[float, Field(ge=0, lt=1)]
_Tau = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Slots = dict[str, Tensor]


class ServerOptimizer(ABC):
    """State in, state out: holds settings only; what survives a round are the slots that the caller keeps."""

    def init(self, name: str, tensor: Tensor) -> Slots:
        """The slots of the global tensor ``name`` before the first round.

        Returns:
            New tensors of the shape, dtype and device of ``tensor``; an empty dict if the optimiser keeps none.
        """
        return {}

    @torch.no_grad()
    def step(
        self, name: str, old: Tensor, mean: Tensor, slots: Slots, covered: Tensor | None = None
    ) -> tuple[Tensor, Slots]:
        """The global tensor ``name`` and its slots after one round. No argument is changed, none is returned.

        Args:
            name: Name of the tensor.
            old: The global tensor of this round, floating point.
            mean: The clients' mean, of the same shape and dtype. Entries that nobody covered may hold anything.
            slots: What :meth:`init` or the last ``step`` returned for this tensor.
            covered: Bool, of the same shape: which entries some client updated; None means all. Where it is false the
                tensor and its slots stay as they are.

        Returns:
            The new tensor and the new slots, of the dtypes of the old ones.
        """
        assert old.is_floating_point(), f"{name}: a server optimiser needs floating point, not {old.dtype}"
        assert (mean.shape, mean.dtype) == (old.shape, old.dtype), f"{name}: mean and old tensor differ in kind"
        new, new_slots = self._step(old, mean, slots)
        if covered is None:
            return new, new_slots
        assert (covered.shape, covered.dtype) == (old.shape, torch.bool), f"{name}: covered must be a mask of its shape"
        kept = {slot: torch.where(covered, value, slots[slot]) for slot, value in new_slots.items()}
        return torch.where(covered, new, old), kept

    @abstractmethod
    def _step(self, old: Tensor, mean: Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        """One step of all entries, in new tensors."""


@dataclass(frozen=True)
class _SGD(ServerOptimizer):
    learning_rate: float

    def _step(self, old: Tensor, mean: Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        if self.learning_rate == 1.0:  # old + (mean - old) would round
            return mean.clone(), {}
        return old + self.learning_rate * (mean - old), {}


@dataclass(frozen=True)
class _Momentum(ServerOptimizer):
    learning_rate: float
    momentum: float

    def init(self, name: str, tensor: Tensor) -> Slots:
        return {"m": torch.zeros_like(tensor)}

    def _step(self, old: Tensor, mean: Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        m = self.momentum * slots["m"] + (mean - old)
        return old + self.learning_rate * m, {"m": m}


@dataclass(frozen=True)
class _Adaptive(ServerOptimizer):
    learning_rate: float
    beta1: float
    beta2: float
    tau: float

    def init(self, name: str, tensor: Tensor) -> Slots:
        return {"m": torch.zeros_like(tensor), "v": torch.full_like(tensor, self.tau**2)}

    def _step(self, old: Tensor, mean: Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        delta = mean - old
        m = self.beta1 * slots["m"] + (1 - self.beta1) * delta
        v = self._second_moment(slots["v"], delta.square())
        return old + self.learning_rate * m / (v.sqrt() + self.tau), {"m": m, "v": v}

    @abstractmethod
    def _second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """The new v from the old one and Δ²."""


class _Adam(_Adaptive):
    def _second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * square


class _Yogi(_Adaptive):
    def _second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.beta2) * square * torch.sign(v - square)


def sgd(*, learning_rate: _LearningRate = 1.0) -> ServerOptimizer:
    """Moves towards the clients' mean; at learning rate 1 it takes the mean, to the bit (FedAvg)."""
    return _SGD(learning_rate)


def momentum(*, learning_rate: _LearningRate = 1.0, momentum: _Decay = 0.9) -> ServerOptimizer:
    """FedAvgM: momentum on the server (Hsu et al. 2019)."""
    return _Momentum(learning_rate, momentum)


def adam(
    *, learning_rate: _LearningRate = 0.1, beta1: _Decay = 0.9, beta2: _Decay = 0.99, tau: _Tau = 1e-3
) -> ServerOptimizer:
    """FedAdam: Adam on the server, without bias correction (Reddi et al. 2021)."""
    return _Adam(learning_rate, beta1, beta2, tau)


def yogi(
    *, learning_rate: _LearningRate = 0.1, beta1: _Decay = 0.9, beta2: _Decay = 0.99, tau: _Tau = 1e-3
) -> ServerOptimizer:
    """FedYogi: Yogi on the server, whose second moment grows no faster than it shrinks (Reddi et al. 2021)."""
    return _Yogi(learning_rate, beta1, beta2, tau)
