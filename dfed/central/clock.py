"""Wall time of training steps, on a CPU and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["StepClock"]


class StepClock:
    """Adds up the seconds of steps, by kind. On a GPU they are the device's own, and nothing waits for them until the end."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def step(self, kind: str) -> Iterator[None]:
        """Around one step."""
        if self._on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((kind, start, end))
        else:
            begun = time.perf_counter()
            yield
            self._seconds[kind] = self._seconds.get(kind, 0.0) + time.perf_counter() - begun

    def seconds(self) -> dict[str, float]:
        """Of all steps so far; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        for kind, start, end in self._events:
            self._seconds[kind] = self._seconds.get(kind, 0.0) + start.elapsed_time(end) / 1000
        self._events.clear()
        return dict(self._seconds)
