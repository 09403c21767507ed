"""Which of a run's models each device of the fleet can use after it, and what that is worth on average."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfed.client import Evaluation
from dfed.cohort import Job
from dfed.state import ServerState

__all__ = ["DeviceModels", "device_models"]

_MOST_CASES = 1000


@dataclass(frozen=True)
class DeviceModels:
    """How many devices use each model.

    Attributes:
        devices: By the name of one of the strategy's variants; None: the global model.
        without: Devices that have none, as the strategy has no plan for them.
    """

    devices: Mapping[str | None, int]
    without: int

    @property
    def variants(self) -> list[str]:
        """Names of the variants in use."""
        return [name for name in self.devices if name is not None]

    def accuracy(self, whole: Evaluation, variants: Mapping[str, Evaluation]) -> float | None:
        """Mean over the devices that have a model of that model's accuracy; None if no device has one.

        Args:
            whole: Of the global model.
            variants: Of the variants in use, at least.
        """
        total = sum(self.devices.values())
        if not total:
            return None
        return sum(count * (whole if name is None else variants[name]).accuracy for name, count in self.devices.items()) / total

    def to_json(self) -> dict[str, Any]:
        """For the summary: devices by variant (``global``: the global model), and ``without``."""
        return {"using": {"global" if name is None else name: count for name, count in self.devices.items()},
                "without": self.without}


def device_models(job: Job, state: ServerState) -> DeviceModels:
    """Who could use what after ``state``: the variant that belongs to the plan that each device would have in a next round.

    Equal devices with equally many samples are asked for once, unless what they can send is drawn. Of more than 1,000 cases so
    many are asked, at equal distances, and stand for the others.
    """
    sizes, asked = job.partition.sizes(), job.asked(state)
    have_data = np.flatnonzero(sizes > 0)
    _, first, counts = np.unique(asked.cases()[have_data], return_index=True, return_counts=True)
    if len(first) > _MOST_CASES:
        ends = np.linspace(0, len(first), _MOST_CASES + 1).astype(int)
        counts = np.add.reduceat(counts, ends[:-1])
        first = first[ends[:-1]]
    devices, without = Counter[str | None](), len(sizes) - len(have_data)
    for client, count in zip(have_data[first].tolist(), counts.tolist(), strict=True):
        plan = asked.plan(client)
        if plan is None:
            without += count
        else:
            devices[job.strategy.variant_of(plan)] += count
    return DeviceModels(dict(sorted(devices.items(), key=lambda item: str(item[0]))), without)
