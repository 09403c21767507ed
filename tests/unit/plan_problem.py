"""The federation that the tests of ``dfed plan`` share."""

from __future__ import annotations

BASE = {
    "seed": 3, "rounds": 2, "cohort": 4, "strategy": {"name": "fedprox", "mu": 0.5},
    "model": {"name": "cnn", "channels": [8, 16], "hidden": 1024},
    "data": {"dataset": "synthetic", "shape": [1, 16, 16], "classes": 4, "samples": 400, "test_samples": 40,
             "partition": {"name": "shards", "shards_per_client": 1}},
    "fleet": {"clients": 8, "tiers": [{"name": "strong", "count": 5, "memory": 2.0},
                                      {"name": "weak", "count": 3, "memory": 0.4}]},
    "client": {"learning_rate": 0.05, "momentum": 0.9, "batch_size": 16, "epochs": 1},
    "metrics": {"tensorboard": False},
}
