"""How large a batch this machine can take for a measurement, which no cap holds."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch

from dfed.client import ClientSettings
from dfed.errors import ConfigError, Fault
from dfed.models import Chain
from dfed.planner.bare import chain_costs
from dfed.planner.store import Store
from dfed.planner.ways import largest_batch, why_not
from dfed.settings import format_bytes

__all__ = ["free_bytes", "measurable_batch"]

_SHARE = 0.5  # of the free memory
_MEMINFO = Path("/proc/meminfo")
_OWN_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Memory of ``device`` that is free now; of a CPU what Linux calls available, within its control groups' limits. None
    where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if match is None else min([1024 * int(match.group(1)), *_left_by_groups()])


def _left_by_groups() -> list[int]:
    """What each control group (version 2) that this process is in leaves it."""
    with contextlib.suppress(OSError):
        for line in _OWN_GROUP.read_text().splitlines():
            if line.startswith("0::"):
                folder = _GROUPS / line[3:].lstrip("/")
                folders = [folder, *(parent for parent in folder.parents if parent.is_relative_to(_GROUPS))]
                return [left for left in map(_left_by_group, folders) if left is not None]
    return []


def _left_by_group(folder: Path) -> int | None:
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used) + (int(cached.group(1)) if cached else 0))


def measurable_batch(chain: Chain, settings: ClientSettings, device: torch.device, store: Store | None = None) -> int:
    """The configured batch size, or the largest power of two below it at which full training would, by prediction, take at
    most half of the memory that is free.

    Raises:
        ConfigError: If there is none, or training does not run at the configured batch size.
    """
    costs, plan = chain_costs(chain.skeleton().requires_grad_(True), settings, device, store)
    reason = why_not(costs, plan)
    if reason is not None:
        raise ConfigError([Fault("--measure", f"must go with a `client.batch_size` that can be trained, but {reason}.")])
    free = free_bytes(device)
    room = None if free is None else int(_SHARE * free)
    if costs.fits(plan, room):
        return settings.batch_size
    largest = min(largest_batch(costs, plan, room), settings.batch_size)
    if not largest:
        message = f"must go with a model that takes at most half of the memory that is free here, {format_bytes(free)}."
        raise ConfigError([Fault("--measure", message)])
    return 1 << (largest.bit_length() - 1)
