"""Whatever started this process: its place in the job, in the variables that ``torch.distributed`` reads.

``torchrun`` sets them itself. ``mpiexec`` and ``srun`` say the same in words of their own, and not where to meet: :func:`adopt`
asks MPI, or works it out from the names that SLURM gives its nodes. The launcher that stands closest to the process counts:
torchrun under srun is torchrun, and so is mpiexec in a job of SLURM's mpiexec.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dfed.errors import ConfigError, Fault

__all__ = ["adopt", "agree", "first_host", "follow_launcher", "is_orphaned", "meeting_port", "without_launcher"]

_OWN = re.compile(
    "RANK|LOCAL_RANK|GROUP_RANK|ROLE_RANK|ROLE_NAME|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_WORLD_SIZE|ROLE_WORLD_SIZE|MASTER_ADDR"
    "|MASTER_PORT|TORCHELASTIC_.*|PET_.*|OMPI_.*|PMI_.*|PMIX_.*|PRTE_.*|HYDI?_.*|MPI_LOCAL.*|MPI4PY_MPIABI"
    "|SLURM_(PROCID|LOCALID|NODEID|NTASKS|NPROCS|STEP_.*|STEPID|GTIDS)")
_MPI = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))  # Open MPI; MPICH and its descendants
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # numbers from here on are a job's batch script or interactive shell, not a step of srun's
_FIRST_PORT, _NUM_PORTS, _STEP_STRIDE = 10_000, 20_000, 4_099  # below the ports that systems give to outgoing connections
_PR_SET_PDEATHSIG = 1

_RANGES = r"\[\w+(?:-\w+)?(?:,\w+(?:-\w+)?)*\]"
_HOSTS = re.compile(rf"(?:[^\s,\[\]]|{_RANGES})+(?:,(?:[^\s,\[\]]|{_RANGES})+)*")  # gpu[03-05,9]-ib,login1

_open_mpi: Any = None  # the module, from when this process has found its place through it until all agree
_launcher_pid = 0


@dataclass(frozen=True)
class _Place:
    """A process's place in the job, and the variables that say so."""

    rank: int
    size: int
    names: tuple[str, str]


def adopt() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this process as its launcher has placed it.

    Collective over the processes that ``mpiexec`` started. Nothing is set for a process that is alone. What is set already is
    left as it is, so that MASTER_ADDR and MASTER_PORT can be given by hand.

    Raises:
        ConfigError: If the variables contradict each other, or do not tell where the processes meet.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        for name in ("RANK", "LOCAL_RANK"):
            _number(name, 0)
        if "WORLD_SIZE" in os.environ and _checked("RANK", "WORLD_SIZE", 0).size > 1 and os.environ.get("MASTER_PORT"):
            meeting_port()
        return
    slurm, mpi = _slurm(), _mpi()
    if mpi is not None and mpi.size > 1 and (slurm is None or (mpi.rank, mpi.size) != (slurm.rank, slurm.size)):
        found = _meet_by_mpi(mpi)
    elif slurm is not None and slurm.size > 1:
        found = _meet_by_slurm(slurm)
    else:
        return
    for name, value in found.items():
        os.environ.setdefault(name, str(value))


def meeting_port() -> int:
    """The port where the processes meet, from MASTER_PORT, which is set.

    Raises:
        ConfigError: If it is none.
    """
    text = os.environ["MASTER_PORT"]
    if not (re.fullmatch(r"[0-9]{1,5}", text) and 1 <= int(text) <= 65_535):
        raise ConfigError([Fault("MASTER_PORT", f"must be a port from 1 to 65535, but is {text!r}.")])
    return int(text)


def agree(ready: bool) -> tuple[int, ...]:
    """Tell the other processes of ``mpiexec`` whether this one is ready to meet them, and say goodbye to MPI (collective).

    Without MPI, or when it was called before, it does nothing. So nobody waits for a rank that has refused its settings, and
    ``mpiexec``, which ends a job whose processes go without goodbye, need not end any.

    Returns:
        The ranks that are not ready.
    """
    global _open_mpi
    if _open_mpi is None:
        return ()
    answers = _open_mpi.COMM_WORLD.allgather(ready)
    _open_mpi.Finalize()
    _open_mpi = None
    return tuple(rank for rank, answer in enumerate(answers) if not answer)


def follow_launcher() -> None:
    """Where torchrun started this process: have the kernel send it SIGTERM if torchrun dies (Linux), so that it does not go on
    alone."""
    global _launcher_pid
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        _launcher_pid = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def is_orphaned() -> bool:
    """Whether the torchrun that started this process has died since :func:`follow_launcher`."""
    return _launcher_pid not in (0, os.getppid())


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that are not about a process's place in a job: what a new job may be started with."""
    return {name: value for name, value in environment.items() if not _OWN.fullmatch(name)}


def first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes it: ``gpu[03-05,9]-ib,login1`` begins with ``gpu03-ib``. Not checked."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None, "the pattern matches nothing, too"
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _slurm() -> _Place | None:
    """The place in a step that srun started; None in the shell of a job, where SLURM sets most of the variables as well."""
    step = os.environ.get("SLURM_STEP_ID", "")
    if not step.isdecimal() or int(step) >= _FIRST_SPECIAL_STEP or "SLURM_PROCID" not in os.environ:
        return None
    return _checked("SLURM_PROCID", "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS")


def _mpi() -> _Place | None:
    return next((_checked(*names) for names in _MPI if any(name in os.environ for name in names)), None)


def _meet_by_mpi(place: _Place) -> dict[str, Any]:
    global _open_mpi
    try:
        import mpi4py
    except ModuleNotFoundError as error:
        message = (f"must be installed where mpiexec starts dfed (pip install 'dfed[mpi]'), as {place.names[1]} is "
                   f"{place.size}, but is not.")
        raise ConfigError([Fault("mpi4py", message)]) from error
    mpi4py.rc.finalize = False  # `agree` does it
    if place.names == _MPI[0]:  # else mpi4py takes an MPICH that lies beside Python, whichever mpiexec was called
        os.environ.setdefault("MPI4PY_MPIABI", "openmpi")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        message = f"must load the MPI whose mpiexec started this process, but could not: {error}."
        raise ConfigError([Fault("mpi4py", message)]) from error
    world = MPI.COMM_WORLD
    rank, size = world.rank, world.size
    if (rank, size) != (place.rank, place.size):
        MPI.Finalize()
        message = (f"must be built for the MPI whose mpiexec started this process (rank {place.rank} of {place.size} by "
                   f"{place.names[0]} and {place.names[1]}), but finds rank {rank} of {size}.")
        raise ConfigError([Fault("mpi4py", message)])
    _open_mpi = MPI
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    host = "127.0.0.1" if node.size == size else socket.gethostname()
    address, port = world.bcast((os.environ.get("MASTER_ADDR", host), os.environ.get("MASTER_PORT", _free_port())))
    return {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": node.rank, "MASTER_ADDR": address, "MASTER_PORT": port}


def _meet_by_slurm(place: _Place) -> dict[str, Any]:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    name = next((name for name in names if os.environ.get(name)), names[0])
    nodes = os.environ.get(name, "")
    if not os.environ.get("MASTER_ADDR"):
        if not nodes:
            raise ConfigError([Fault(name, f"must be set beside {place.names[0]}, or MASTER_ADDR, but is not.")])
        if not _HOSTS.fullmatch(nodes):
            raise ConfigError([Fault(name, f"must be a list of hosts, such as 'gpu[03-05,9],login1', but is {nodes!r}.")])
    host = first_host(nodes)
    # Another port for every job on a node, and for most steps of a job; all its processes work it out alike.
    port = _FIRST_PORT + (_number("SLURM_JOB_ID") + _STEP_STRIDE * _number("SLURM_STEP_ID")) % _NUM_PORTS
    return {"RANK": place.rank, "WORLD_SIZE": place.size, "LOCAL_RANK": _number("SLURM_LOCALID"),
            "MASTER_ADDR": "127.0.0.1" if host == nodes else host, "MASTER_PORT": port}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def _checked(rank_name: str, size_name: str, default_rank: int | None = None) -> _Place:
    rank, size = _number(rank_name, default_rank), _number(size_name)
    if not rank < size:
        raise ConfigError([Fault(rank_name, f"must be at least 0 and less than `{size_name}` ({size}), but is {rank}.")])
    return _Place(rank, size, (rank_name, size_name))


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ConfigError([Fault(name, "must be a whole number, as launchers set it, but is "
                                       f"{'not set' if name not in os.environ else repr(text)}.")])
    return int(text)
