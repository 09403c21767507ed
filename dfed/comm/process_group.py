"""Joining the process group that a launcher prepared, and choosing its backend."""

from __future__ import annotations

import datetime
import os
import platform
import re
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoResult
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field

from dfed.comm import launcher
from dfed.comm.liveness import Liveness
from dfed.comm.transport import Local, ProcessGroup, Transport
from dfed.errors import ConfigError, Fault, RankLost
from dfed.settings import Settings

__all__ = ["BackendSettings", "Link", "choose_device", "join", "launched_size", "local_rank"]

_GREETING_S = 2.0  # how much longer than its timeout torch's client is given before it is left to itself


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
        ConfigError: If the backend asked for is not to be had here, or the launcher has not said where ranks meet.
        RankLost: If not all ranks come within ``backend.timeout_s``.
    """
    size = launched_size()
    if size == 1:
        if os.environ.get("RANK", "0") != "0":
            raise ConfigError([Fault("WORLD_SIZE", f"must be set beside RANK ({os.environ['RANK']}), but is not.")])
        return Link(Local(), device, "local", "one process needs no process group")
    launcher.follow_launcher()
    absent = launcher.agree(ready=True)
    if absent:
        message = f"rank {os.environ['RANK']} leaves, as there was an error before the ranks have met, on rank "
        raise RankLost(message + ", ".join(map(str, absent)), absent)
    store, rank = _meet(settings.timeout_s)
    # A launcher that starts a job again keeps its store: what the ranks of the last attempt wrote there must not be read.
    store = dist.PrefixStore(f"dfed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    try:
        liveness = Liveness(store, rank, size)
    except (RuntimeError, ValueError) as error:
        raise _missing(store, rank, size, settings.timeout_s) from error
    timeout = datetime.timedelta(seconds=settings.timeout_s)
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


def _meet(timeout_s: float) -> tuple[dist.Store, int]:
    """The store where all ranks sign in, and the number of this one."""
    faults = [Fault(name, "must be set where several processes are started (WORLD_SIZE), but is not.")
              for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if faults:
        raise ConfigError(faults)
    rank, port = int(os.environ["RANK"]), launcher.meeting_port()
    timeout = datetime.timedelta(seconds=timeout_s)
    where = f"{os.environ['MASTER_ADDR']}:{port} (MASTER_ADDR, MASTER_PORT)"
    try:
        store = _rendezvous(timeout).result(timeout_s + _GREETING_S)
    except (dist.DistError, NoResult) as error:
        if "EADDRINUSE" in str(error):
            message = f"must be a port that is free on {os.environ['MASTER_ADDR']}, but {port} is in use."
            raise ConfigError([Fault("MASTER_PORT", message)]) from error
        why = _said(error) or "nothing there answers as rank 0 would"
        raise RankLost(f"rank {rank} could not reach rank 0 at {where} within {timeout_s:g} s: {why}", (0,)) from error
    store.set_timeout(timeout)
    return store, rank


def _rendezvous(timeout: datetime.timedelta) -> Future[dist.Store]:
    """The store, when it is connected. In a thread that no one need wait for: where something else listens at the address and
    says nothing, torch's client waits for its greeting without end."""
    found: Future[dist.Store] = Future()

    def connect() -> None:
        try:
            # For a job of one, as rank 0 would wait here for the others, and could not tell which of them are missing.
            found.set_result(next(dist.rendezvous("env://", world_size=1, timeout=timeout))[0])
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=connect, name="rendezvous", daemon=True).start()
    return found


def _said(error: BaseException) -> str:
    """The words of an error of torch's, without the C++ frames that it was raised in."""
    return re.split(r"Exception raised from|frame #", str(error))[0].strip()


def _missing(store: dist.Store, rank: int, size: int, timeout_s: float) -> RankLost:
    """Who has not signed in, as far as the store can still say."""
    try:
        absent = tuple(other for other in range(size) if not store.check([f"pid/{other}"]))
    except (RuntimeError, ValueError):
        return RankLost(f"rank {rank} lost rank 0 while it waited for all {size} ranks to sign in", (0,))
    message = f"rank {rank} waited {timeout_s:g} s (`backend.timeout_s`) for all {size} ranks to sign in; missing: "
    return RankLost(message + (", ".join(map(str, absent)) or "none any more"), absent)


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
