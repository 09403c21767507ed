"""The folder of a run or a training: what both leave behind, and who may write there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

import dfed
from dfed.comm import Link
from dfed.errors import ConfigError, Fault
from dfed.memory import MemorySettings
from dfed.metrics import finite
from dfed.yaml_io import dump_yaml, read_yaml

__all__ = ["CHECKPOINTS", "Folder"]

CHECKPOINTS = "checkpoint"
"""Name of the folder, inside a run folder, that holds the checkpoints."""

_KINDS = (("train", "method", "epoch_*"), ("run", "rounds", "round_*"))
"""Commands that write such folders, the setting by which their configs are known, and their checkpoints."""

_LOGS = (".log", ".out", ".err")
_PACKAGES = ("torch", "torchvision", "numpy", "pydantic", "safetensors")


class _Described(Protocol):
    """A config."""

    memory: MemorySettings

    def to_dict(self) -> dict[str, Any]:
        """As plain values, complete."""


class Folder:
    """A folder with what any training leaves behind: ``config.yaml``, ``environment.json``, ``checkpoint/``.

    Args:
        path: The folder; made if need be.

    Attributes:
        command: The command of dfed whose folder it is.
    """

    command = "train"

    def __init__(self, path: Path):
        self.path = path
        self._is_new = False

    def check_kind(self) -> None:
        """Refuse to go on in the folder of the other kind.

        Raises:
            ConfigError: If it is one.
        """
        (command, key, checkpoints), *others = sorted(_KINDS, key=lambda kind: kind[0] != self.command)
        for other_command, other_key, other_checkpoints in others:
            try:
                written = read_yaml(self.path / "config.yaml")
            except ConfigError:  # damaged: the checkpoints tell
                written = {}
            if not (key in written or any(self.checkpoints.glob(checkpoints))) and (
                    other_key in written or any(self.checkpoints.glob(other_checkpoints))):
                message = f"must be the folder of a `dfed {command}`, but {self.path} is that of a `dfed {other_command}`."
                raise ConfigError([Fault("--resume", message)])

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from writing here meanwhile, where the system can; makes the folder if need be.

        Raises:
            ConfigError: If another process holds it, or has begun here since :meth:`check_new`.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            message = f"must be a folder that can be written, but {self.path} is not: {error.strerror}."
            raise ConfigError([Fault("--out", message)]) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ConfigError([Fault("--out", f"must be a folder that no other process writes, but {self.path} is in use.")]
                              ) from error
        except OSError:  # a file system without locks
            pass
        try:
            if self._is_new:
                self.check_new()
            yield
        finally:
            os.close(descriptor)

    def check_new(self) -> None:
        """Refuse a folder that holds a run already, or anything else but logs (``*.log``, ``*.out``, ``*.err``) and hidden
        files, which a batch system or an earlier attempt may have left there.

        Raises:
            ConfigError: If it does, or cannot be listed.
        """
        self._is_new = True
        if (self.path / "config.yaml").exists():
            message = f"must be a new folder, or be continued with --resume, but {self.path} holds a run."
            raise ConfigError([Fault("--out", message)])
        try:
            found = sorted(self.path.iterdir()) if self.path.is_dir() else []
        except OSError as error:
            message = f"must be a folder that can be read, but {self.path} is not: {error.strerror}."
            raise ConfigError([Fault("--out", message)]) from error
        foreign = [path.name for path in found if path.is_dir() or not (path.suffix in _LOGS or path.name.startswith("."))]
        if foreign:
            message = f"must be a new or empty folder, but {self.path} holds {foreign[0]!r}"
            raise ConfigError([Fault("--out", message + (f" and {len(foreign) - 1} more." if len(foreign) > 1 else "."))])

    def create(self, config: _Described) -> None:
        """Make the folder, if need be, and write the resolved config into it. A summary that is there goes: more is to come.

        Raises:
            ConfigError: If it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            partial = self.path / ".config.yaml.partial"
            partial.write_text(dump_yaml(config.to_dict()), encoding="utf-8")
            partial.rename(self.path / "config.yaml")
            (self.path / "summary.json").unlink(missing_ok=True)
        except OSError as error:
            message = f"must be a folder that can be written, but {self.path} is not: {error.strerror}."
            raise ConfigError([Fault("--out", message)]) from error

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / CHECKPOINTS

    def write_environment(self, link: Link, config: _Described) -> None:
        """Write what the run ran on: versions, commit, ranks, backend and why."""
        self.write("environment.json", {
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "dfed": dfed.__version__,
            "git_commit": _git_commit(),
            "python": platform.python_version(),
            "packages": {name: metadata.version(name) for name in _PACKAGES},
            "system": platform.platform(),
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(link.device) if link.device.type == "cuda" else None,
            "ranks": link.transport.size,
            "client_ranks": list(link.transport.client_ranks),
            "device": str(link.device),
            "backend": link.backend,
            "backend_reason": link.reason,
            "memory_enforce": config.memory.enforce,
        })

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write ``value`` as the JSON file ``name``, whole or not at all."""
        partial = self.path / f".{name}.partial"
        partial.write_text(json.dumps(finite(value), indent=2) + "\n", encoding="utf-8")
        partial.rename(self.path / name)


def _git_commit() -> str | None:
    """The commit of the source tree that this package is run from; None for an installed package."""
    root = Path(dfed.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
                              capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
