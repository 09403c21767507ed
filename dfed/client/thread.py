"""The thread that clients train in.

When memory runs out while oneDNN generates code, its code generator notes the failure in a thread-local variable that
nobody clears, and every later kernel of that thread fails with "could not create a primitive". The rank therefore trains
in a thread that it can throw away: after a client ran out of memory the next one gets a fresh thread. The rank's own
thread, which evaluates and talks to the other ranks, is never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["TrainingThread"]

Result = TypeVar("Result")


class TrainingThread:
    """A thread that runs one piece of work at a time, and can be replaced.

    Args:
        device: Made the current device of the thread, if it is a GPU.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._executor = self._start()

    def _start(self) -> ThreadPoolExecutor:
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dfed-training", initializer=self._enter)
        # The thread's stack belongs to the data segment: it must be there before a cap is set.
        executor.submit(lambda: None).result()
        return executor

    def _enter(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def run(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` in the thread and wait for it; its result, or its exception."""
        return self._executor.submit(work).result()

    def replace(self) -> None:
        """End the thread and start a fresh one."""
        self._executor.shutdown(wait=True)
        self._executor = self._start()

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown(wait=True)
