"""The server's side of a round: samplers and server optimisers."""

from __future__ import annotations

from dfed.server.aggregate import Contribution, aggregate
from dfed.server.optimizers import ServerOptimizer
from dfed.server.samplers import StatefulSampler, Uniform, View, Weighted

__all__ = ["Contribution", "ServerOptimizer", "StatefulSampler", "Uniform", "View", "Weighted", "aggregate"]
