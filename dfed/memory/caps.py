"""Hard caps: what a client's training adds to a rank's memory is held to the client's budget.

* CUDA: ``torch.cuda.set_per_process_memory_fraction``; the caching allocator refuses what would exceed it. Granularity:
  the allocator's segments (2 MiB up to 10 MiB).
* Linux, CPU: the soft ``RLIMIT_DATA`` is set to the present data segment plus the budget; the kernel refuses what would
  exceed it, torch raises, and the limit is lifted again. Granularity: pages, plus holes below 16 KiB in the heap, and
  1 MiB of up to 24 KiB each made on purpose (:class:`dfed.memory.malloc.SmallReserve`).
* Elsewhere a hard cap is refused: there are ``memory.enforce: predicted`` and ``off``.

The peak is measured beside the cap: allocator statistics on CUDA; on Linux the high-water mark of resident memory above
where it stood at the start (pages; the kernel's own counters may lag by about 1 MiB). Outside Linux and CUDA there is no
measurement (None).

**Grey zone.** Close to a plan's peak the verdict may depend on what ran on the rank before. Let T be the predicted peak of
the plan's tensors and C the library overhead (``CPU_OVERHEAD_BYTES`` on the CPU, 0 on CUDA). A budget below
T·(1 − GREY_ZONE) − C is always too small, one above T·(1 + GREY_ZONE) + C always enough. Configs whose results must be the
same on any number of ranks keep their budgets out of what lies between.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from dfed.errors import ConfigError, Fault
from dfed.memory import malloc, measure
from dfed.settings import Settings

__all__ = ["GREY_ZONE", "CpuCap", "CudaCap", "MemoryMeter", "MemorySettings", "Uncapped", "check_cap", "is_out_of_memory",
           "make_cap"]

GREY_ZONE = 0.10
"""Relative distance from the predicted peak of a plan's tensors inside which the verdict may vary; see above."""

_OOM_TEXTS = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "Cannot allocate memory",
)
_OOM_TEXTS_UNDER_A_CAP = (
    "could not create a memory",
    "could not create a primitive",
    "could not execute a primitive",
)


class MemorySettings(Settings):
    """How clients are held to their budgets.

    Attributes:
        enforce: ``hard``: by the kernel or the CUDA allocator. ``predicted``: a client whose predicted peak exceeds its
            budget fails without training; the same on every system. ``off``: not at all; stated in the results.
    """

    enforce: Literal["hard", "predicted", "off"] = "hard"


@dataclass
class MemoryMeter:
    """Filled in when the guarded stretch ends: ``peak_bytes`` above the start, None where it was not measured."""

    peak_bytes: int | None = None


def is_out_of_memory(error: BaseException, *, capped: bool = True) -> bool:
    """Whether an exception says that memory ran out: torch's, Python's, or one of a library's under torch.

    Args:
        capped: Whether a hard cap was in force; some of oneDNN's errors mean a lack of memory only then.
    """
    texts = _OOM_TEXTS + (_OOM_TEXTS_UNDER_A_CAP if capped else ())
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(current, (RuntimeError, OSError)) and any(text in str(current) for text in texts):
            return True
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return False


class Uncapped:
    """No cap. Peaks are measured on Linux when asked for."""

    enforces = False

    def __init__(self, device: torch.device):
        self.device = device

    @contextmanager
    def guard(self, budget_bytes: int | None, *, measure_peak: bool = True) -> Iterator[MemoryMeter]:
        """Run the body under ``budget_bytes`` (None: unlimited) and measure the memory that it adds.

        Yields:
            The meter; its ``peak_bytes`` is set when the body ends, also by an exception.
        """
        meter = MemoryMeter()
        if not measure_peak or not sys.platform.startswith("linux"):
            yield meter
            return
        gc.collect()
        malloc.trim()
        start = measure.resident_bytes()
        counted = measure.reset_peak_resident()
        try:
            yield meter
        finally:
            if counted:
                meter.peak_bytes = max(0, measure.peak_resident_bytes() - start)


    def counts_new_code(self) -> bool:
        """Whether a body that just ran out of memory should run again; see :meth:`CpuCap.counts_new_code`."""
        return False


class CpuCap(Uncapped):
    """A cap by ``RLIMIT_DATA`` (Linux)."""

    enforces = True

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._code_bytes = measure.generated_code_bytes()

    def counts_new_code(self) -> bool:
        """Whether libraries have mapped code since this was last asked.

        A body that ran out of memory meanwhile should run again.

        oneDNN maps 256 KiB or more for each kernel that it generates, and hardly touches it. The limit counts all of it, so a
        rank that meets a network for the first time would call plans too large that fit. The kernels stay; the next try
        finds them there, under a limit that is set above them. When a try maps no more code, its verdict stands: it is
        that of a rank which knows the kernels, whatever ran on this one before.
        """
        before, self._code_bytes = self._code_bytes, measure.generated_code_bytes()
        return self._code_bytes > before

    @contextmanager
    def guard(self, budget_bytes: int | None, *, measure_peak: bool = True) -> Iterator[MemoryMeter]:
        """As :meth:`Uncapped.guard`; beyond the budget the kernel refuses memory and torch raises."""
        if budget_bytes is None:
            with super().guard(None, measure_peak=measure_peak) as meter:
                yield meter
            return
        import resource  # not on every platform

        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        reserve = malloc.SmallReserve()
        with closing(reserve), super().guard(budget_bytes) as meter, malloc.fill_holes():
            limit = measure.data_segment_bytes() + budget_bytes
            limit = limit if soft == resource.RLIM_INFINITY else min(limit, soft)
            try:
                resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
                reserve.release()
                yield meter
            finally:
                resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


class CudaCap:
    """A cap by the CUDA caching allocator. With ``enforce=False`` it only measures."""

    def __init__(self, device: torch.device, enforce: bool):
        self.device = device
        self.enforces = enforce

    @contextmanager
    def guard(self, budget_bytes: int | None, *, measure_peak: bool = True) -> Iterator[MemoryMeter]:
        """As :meth:`Uncapped.guard`; beyond the budget the allocator raises ``torch.OutOfMemoryError``."""
        gc.collect()
        if budget_bytes is not None:
            torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(self.device).total_memory
        start = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        capped = self.enforces and budget_bytes is not None
        if capped:
            assert budget_bytes is not None
            share = min(1.0, (torch.cuda.memory_reserved(self.device) + budget_bytes) / total)
            torch.cuda.set_per_process_memory_fraction(share, self.device)
        meter = MemoryMeter()
        try:
            yield meter
        finally:
            if capped:
                torch.cuda.set_per_process_memory_fraction(1.0, self.device)
            meter.peak_bytes = torch.cuda.max_memory_allocated(self.device) - start

    def counts_new_code(self) -> bool:
        """As :meth:`Uncapped.counts_new_code`: the allocator counts tensors only."""
        return False


def check_cap(settings: MemorySettings, device: torch.device, *, has_budgets: bool) -> None:
    """Refuse a hard cap where there is none to be had.

    Raises:
        ConfigError: If it is asked for there.
    """
    wanted = settings.enforce == "hard" and has_budgets and device.type != "cuda"
    if wanted and not (sys.platform.startswith("linux") and malloc.is_glibc()):
        raise _no_cap(device)


def _no_cap(device: torch.device) -> ConfigError:
    return ConfigError([Fault("memory.enforce", (
        f"must be 'predicted' or 'off' on this system ({sys.platform}, {device.type}), which offers no hard cap (Linux with "
        "glibc or CUDA does), but is 'hard'."
    ))])


def make_cap(settings: MemorySettings, device: torch.device, *, has_budgets: bool) -> Uncapped | CpuCap | CudaCap:
    """The cap for this rank; on Linux CPUs also sets the C allocator, tight where clients have budgets.

    Args:
        settings: The run's memory settings.
        device: Where clients train.
        has_budgets: Whether any client of the fleet has a budget.

    Raises:
        ConfigError: If a hard cap is asked for where there is none.
    """
    if device.type == "cuda":
        return CudaCap(device, enforce=settings.enforce == "hard")
    if settings.enforce != "hard" or not has_budgets:
        malloc.roomy()
        return Uncapped(device)
    check_cap(settings, device, has_budgets=has_budgets)
    if not malloc.tight():
        raise _no_cap(device)
    return CpuCap(device)
