"""The thread that clients train in.

When memory runs out while oneDNN generates code, its code generator notes the failure in a thread-local variable that
nobody clears, and every later kernel of that thread fails with "could not create a primitive". The rank therefore trains
in a thread that it can throw away: after a client ran out of memory the next one gets a fresh thread. The rank's own
thread, which evaluates and talks to the other ranks, is never touched.

A fresh thread is warmed up before a client's memory is counted: libraries keep buffers for each thread (about 11 MiB of
data segment), and OpenMP would start its pool under the client's limit, and end the process when it cannot.

Kernels that a client's training generates count against its limit, though no device would pay for them. A client that ran
out of memory while new kernels were generated is therefore trained again, until a try generates none.

Worse is what fails without a word. MKL keeps work buffers for each thread, up to some 25 MiB, and makes them when a product
first needs one so large; where the limit refuses it, MKL takes another way, which gives other bits. So a thread that meets
a plan for the first time *rehearses* it, one step without a limit, unless the budget is so large that nothing is refused,
or so small that the client will fail whatever its bits.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from dfed.memory import CPU_OVERHEAD_BYTES, GREY_ZONE, is_out_of_memory
from dfed.plan import Plan

__all__ = ["TrainingThread"]

Result = TypeVar("Result")

_PARALLEL = 65_536  # entries a thread for which torch shares out the work
_TRIES = 16
_ROOM_BYTES = 256 * 2**20  # far more than the kernels and buffers of any one network seen


class TrainingThread:
    """A thread that runs one piece of work at a time, and can be replaced.

    Args:
        device: Made the current device of the thread, if it is a GPU.
        warm_up: Run first in every fresh thread.
    """

    def __init__(self, device: torch.device, warm_up: Callable[[], None]):
        self._device, self._warm_up = device, warm_up
        self._rehearsed: dict[str, int] = {}
        self._executor = self._start()

    def _start(self) -> ThreadPoolExecutor:
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dfed-training")
        executor.submit(self._enter).result()
        return executor

    def _enter(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        num_threads = torch.get_num_threads()
        if num_threads > 1:
            torch.ones(num_threads * _PARALLEL).add_(1)  # large enough for the pool to be started
        self._warm_up()

    def run(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` in the thread and wait for it; its result, or its exception."""
        return self._executor.submit(work).result()

    def run_under(self, cap: Any, work: Callable[[], Result]) -> Result:
        """As :meth:`run`, for work that guards itself by ``cap``: again if it ran out of memory over newly generated code.

        Args:
            work: Must do the same each time.
        """
        for _ in range(_TRIES - 1):
            try:
                return self.run(work)
            except Exception as error:
                if not (is_out_of_memory(error, capped=cap.enforces) and cap.counts_new_code()):
                    raise
                traceback.clear_frames(error.__traceback__)  # which hold tensors of the try
            gc.collect()
            self.replace()
        return self.run(work)

    def must_rehearse(self, plan: Plan, num_samples: int, *, peak_bytes: int, budget_bytes: int | None) -> bool:
        """Whether this client's plan is to be rehearsed first: once in a thread, and again for larger mini-batches.

        Args:
            num_samples: The client's.
            peak_bytes: Predicted peak of the plan's tensors.
        """
        least = (1 - GREY_ZONE) * peak_bytes - CPU_OVERHEAD_BYTES
        most = (1 + GREY_ZONE) * peak_bytes + CPU_OVERHEAD_BYTES + _ROOM_BYTES
        if budget_bytes is None or not least <= budget_bytes <= most:
            return False
        key, samples = plan.cost_key(), min(num_samples, max(phase.batch_size for phase in plan.phases))
        if samples <= self._rehearsed.get(key, 0):
            return False
        self._rehearsed[key] = samples
        return True

    def replace(self) -> None:
        """End the thread and start a fresh one."""
        self._rehearsed.clear()
        self._executor.shutdown(wait=True)
        self._executor = self._start()

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown(wait=True)
