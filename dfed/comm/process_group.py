"""Joining the process group that a launcher prepared, and choosing its backend."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field

from dfed.comm.liveness import Liveness
from dfed.comm.transport import Local, ProcessGroup, Transport
from dfed.errors import ConfigError, Fault
from dfed.settings import Settings

__all__ = ["BackendSettings", "Link", "choose_device", "join", "launched_size", "local_rank"]


class BackendSettings(Settings):
    """How ranks compute and talk.

    Attributes:
        name: ``auto`` takes NCCL where every rank has a GPU of its own, else Gloo.
        device: Where clients train; ``auto``: this node's GPUs in turn if there are any, else the CPU.
        timeout_s: How long a collective may take before the run gives up.
        threads: CPU threads of each rank. Results are the same for the same number of threads only.
    """

    name: Literal["auto", "gloo", "nccl"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_s: Annotated[float, Field(gt=0, le=30 * 86_400)] = 600.0
    threads: Annotated[int, Field(ge=1, le=256)] = 1


@dataclass(frozen=True)
class Link:
    """A rank's place in the run: the transport, the device to train on, and why the backend is what it is."""

    transport: Transport
    device: torch.device
    backend: str
    reason: str


def _environment(name: str, default: int) -> int:
    value = os.environ.get(name)
    return default if value is None else int(value)


def launched_size() -> int:
    """Number of processes that the launcher started (1 without a launcher)."""
    return _environment("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's number on its node (0 without a launcher)."""
    return _environment("LOCAL_RANK", 0)


def join(settings: BackendSettings, device: torch.device) -> Link:
    """Join the process group (collective), or stand alone where no launcher started several processes.

    Raises:
        ConfigError: If the backend asked for is not to be had here.
    """
    size = launched_size()
    if size == 1:
        return Link(Local(), device, "local", "one process needs no process group")
    timeout = datetime.timedelta(seconds=settings.timeout_s)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    # A launcher that starts a job again keeps its store: what the ranks of the last attempt wrote there must not be read.
    store = dist.PrefixStore(f"dfed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    liveness = Liveness(store, rank, size)
    backend, reason = _choose_backend(settings, _places(store, rank, size, device))
    own_store = dist.PrefixStore("process_group", store)
    options: dict[str, Any] = {"device_id": device} if backend == "nccl" else {}
    dist.init_process_group(backend, store=own_store, rank=rank, world_size=size, timeout=timeout, **options)
    where = device if backend == "nccl" else torch.device("cpu")
    return Link(ProcessGroup(where, liveness, pinned=device.type == "cuda"), device, backend, reason)


def choose_device(settings: BackendSettings) -> torch.device:
    """Where this rank trains.

    Raises:
        ConfigError: If the device asked for is not to be had here.
    """
    has_cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not has_cuda:
        raise ConfigError([Fault("backend.device", "must be 'auto' or 'cpu' on a machine without a usable GPU, but is "
                                                   "'cuda'.")])
    if settings.device == "cpu" or not has_cuda:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _places(store: dist.Store, rank: int, size: int, device: torch.device) -> list[str]:
    """Where every rank trains, by rank (collective): kind of device, host, and the GPU's own identity."""
    identity = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else ""
    store.set(f"place/{rank}", f"{device.type} {platform.node()} {identity}".strip())
    return [store.get(f"place/{other}").decode() for other in range(size)]


def _choose_backend(settings: BackendSettings, places: list[str]) -> tuple[str, str]:
    """The backend and why; from what all ranks know, so that all choose alike."""
    on_gpu = [place.startswith("cuda") for place in places]
    own_gpu = all(on_gpu) and len(set(places)) == len(places)
    if settings.name == "nccl" and not own_gpu:
        raise ConfigError([Fault("backend.name", f"must be 'auto' or 'gloo' where ranks share a device or train on the "
                                                 f"CPU ({', '.join(sorted(set(places)))}), but is 'nccl'.")])
    if settings.name != "auto":
        return settings.name, "backend.name asks for it"
    if own_gpu and dist.is_nccl_available():
        return "nccl", "every rank has a GPU of its own"
    if own_gpu:
        return "gloo", "this build of torch has no NCCL"
    if all(on_gpu):
        return "gloo", "ranks share a GPU, which NCCL refuses"
    return "gloo", "ranks train on the CPU" if not any(on_gpu) else "some ranks train on the CPU"
