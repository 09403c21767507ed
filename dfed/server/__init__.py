"""The server's side of a round: samplers and server optimisers."""

from __future__ import annotations

from dfed.server.aggregate import Contribution, aggregate
from dfed.server.optimizers import ServerOptimizer
from dfed.server.samplers import Uniform, Weighted

__all__ = ["Contribution", "ServerOptimizer", "Uniform", "Weighted", "aggregate"]
