"""Checkpoints: the server's state on disk. safetensors and JSON, written atomically, checked when read.

A checkpoint is a folder ``round_000042`` with ``state.json`` and ``state.safetensors``. It is written under a temporary
name, flushed to disk, and renamed; the JSON holds the SHA-256 of the tensors and of itself, so that one cut short or changed
is recognised and the one before it is taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dfed.errors import CheckpointError
from dfed.settings import Settings
from dfed.state import ServerState, save_file

__all__ = ["CheckpointSettings", "Saved", "client_versions", "latest", "latest_saved", "params_sha256", "save", "save_tensors"]

logger = logging.getLogger(__name__)

Made = TypeVar("Made")

_FORMAT = 4
_ROUND = "round"  # what checkpoints of a run are called after
_CHECKED = ("format", "fingerprint", "sha256", "tensors_sha256")


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: tensors by name, in the file's own order, and JSON values."""

    header: Mapping[str, Any]
    tensors: dict[str, Tensor]


class CheckpointSettings(Settings):
    """When the server's state is written to the run folder.

    Attributes:
        every: Rounds between checkpoints; one is also written at the end and on SIGTERM.
        keep: How many of the newest are kept.
    """

    every: Annotated[int, Field(ge=1)] = 10
    keep: Annotated[int, Field(ge=1)] = 2


def params_sha256(params: Mapping[str, Tensor]) -> str:
    """SHA-256 over every tensor's name, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(params):
        value = params[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def save(folder: Path, state: ServerState, fingerprint: str, keep: int) -> Path:
    """Write ``state`` into ``folder``; see :func:`save_tensors`.

    Args:
        fingerprint: Identifies the configuration; a checkpoint is only read back under the same one.

    Raises:
        CheckpointError: If the disk refuses it; what was written before is left as it is.
    """
    tensors = {f"params/{key}": value for key, value in state.params.items()}
    for key, slots in state.slots.items():
        tensors |= {f"slots/{slot}/{key}": value for slot, value in slots.items()}
    tensors |= {f"tensors/{key}": value for key, value in state.tensors.items()}
    tensors["clients"] = torch.tensor(sorted(state.clients.items()), dtype=torch.int64).view(-1, 2)
    header = {
        "round_index": state.round_index,
        "facts": state.facts,
        "sampler": state.sampler,
        "totals": state.totals,
        "infeasible": state.infeasible,
        "params": list(state.params),
    }
    return save_tensors(folder, _ROUND, state.round_index, Saved(header, tensors), fingerprint, keep)


def save_tensors(folder: Path, kind: str, number: int, saved: Saved, fingerprint: str, keep: int) -> Path:
    """Write the checkpoint ``<kind>_<number>`` into ``folder`` (made if need be), then remove all but the newest ``keep``.

    Checkpoints of larger numbers go too: training was resumed before them, so they were damaged.

    Args:
        kind: A word, the same for all checkpoints in the folder.
        fingerprint: As for :func:`save`.

    Raises:
        CheckpointError: If the disk refuses it; what was written before is left as it is.
    """
    name = f"{kind}_{number:06d}"
    partial, replaced = folder / f".{name}.partial", folder / f".{name}.replaced"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _put_back(folder, kind)
        for stale in (*folder.glob(f".{kind}_*.partial"), *folder.glob(f".{kind}_*.replaced")):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir()
        save_file(_apart(saved.tensors), partial / "state.safetensors")
        header = {"format": _FORMAT, "fingerprint": fingerprint, **saved.header,
                  "tensors_sha256": _file_sha256(partial / "state.safetensors")}
        header["sha256"] = _header_sha256(header)
        (partial / "state.json").write_text(json.dumps(header, indent=1), encoding="utf-8")
        for path in (partial / "state.safetensors", partial / "state.json", partial):
            _flush(path)
        target = folder / name
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        if replaced.exists() and not (folder / name).exists():
            replaced.rename(folder / name)
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"cannot write a checkpoint to {folder}: {error}") from error
    shutil.rmtree(replaced, ignore_errors=True)
    _prune(folder, kind, number, keep)
    return folder / name


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors with storage of their own, as the file format asks; copies only where they share it."""
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().contiguous()
        pointer = value.untyped_storage().data_ptr()
        separate[name] = value.clone() if pointer in storages else value
        storages.add(pointer)
    return separate


def _prune(folder: Path, kind: str, newest: int, keep: int) -> None:
    numbered = _numbered(folder, kind)
    kept = [path for number, path in numbered if number <= newest][:keep]
    for _, path in numbered:
        if path not in kept:
            try:
                shutil.rmtree(path)
            except OSError as error:
                logger.warning("checkpoint %s should go, but cannot be removed: %s", path, error)


def latest(folder: Path, fingerprint: str) -> ServerState | None:
    """The newest checkpoint of a run in ``folder`` that is whole; None if there is none at all.

    Raises:
        CheckpointError: If there are checkpoints and none is whole, or the newest whole one is of another configuration.
    """
    return latest_saved(folder, _ROUND, fingerprint, _server_state)


def latest_saved(folder: Path, kind: str, fingerprint: str, made_of: Callable[[Saved], Made]) -> Made | None:
    """As :func:`latest`, for what :func:`save_tensors` wrote.

    Args:
        made_of: Makes of a checkpoint what it stands for; what it raises of a ``KeyError`` or the like means damage.
    """
    problems = []
    with contextlib.suppress(OSError):  # where nothing can be written
        _put_back(folder, kind)
    for _, path in _numbered(folder, kind):
        try:
            return _read(path, fingerprint, made_of)
        except _Damaged as error:
            problems.append(f"{path.name}: {error}")
            logger.warning("checkpoint %s is damaged (%s); trying the one before", path, error)
    if problems:
        raise CheckpointError(f"no checkpoint in {folder} can be read: {'; '.join(problems)}")
    return None


class _Damaged(Exception):
    """A checkpoint that is not whole."""


def _read(path: Path, fingerprint: str, made_of: Callable[[Saved], Made]) -> Made:
    try:
        header: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if header["format"] != _FORMAT:
            raise CheckpointError(f"{path} must have format {_FORMAT}, but has {header['format']}.")
        if header.pop("sha256") != _header_sha256(header):
            raise _Damaged("the checksum of state.json differs")
        if _file_sha256(path / "state.safetensors") != header["tensors_sha256"]:
            raise _Damaged("the tensors' checksum differs")
        tensors = load_file(path / "state.safetensors")
        written_under = header["fingerprint"]
        made = made_of(Saved({key: value for key, value in header.items() if key not in _CHECKED}, tensors))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _Damaged(f"{type(error).__name__}: {error}") from error
    if written_under != fingerprint:
        raise CheckpointError(f"{path} was written by another configuration (or device): resume with its folder's own config.")
    return made


def _server_state(saved: Saved) -> ServerState:
    header, tensors = saved.header, dict(saved.tensors)
    plain = {key: header[key] for key in ("round_index", "facts", "sampler", "totals", "infeasible")}
    clients = dict(tensors.pop("clients").tolist())
    params = {name: tensors[f"params/{name}"] for name in header["params"]}  # the file has an order of its own
    slots: dict[str, dict[str, Tensor]] = {}
    own: dict[str, Tensor] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "slots":
            slot, _, name = rest.partition("/")
            slots.setdefault(name, {})[slot] = value
        elif kind == "tensors":
            own[rest] = value
    return ServerState(params=params, slots=slots, tensors=own, clients=clients, **plain)


def client_versions(folder: Path) -> list[dict[int, int]]:
    """Of every checkpoint in ``folder``: the clients' states that it refers to. What cannot be read refers to none."""
    found = []
    for _, path in _numbered(folder, _ROUND):
        with contextlib.suppress(OSError, SafetensorError), safe_open(path / "state.safetensors", framework="pt") as file:
            found.append(dict(file.get_tensor("clients").tolist()))
    return found


def _put_back(folder: Path, kind: str) -> None:
    """A checkpoint that was set aside for one that never came, as the process was killed in between, comes back."""
    for replaced in folder.glob(f".{kind}_*.replaced"):
        target = folder / replaced.name.removeprefix(".").removesuffix(".replaced")
        if not target.exists():
            replaced.rename(target)


def _numbered(folder: Path, kind: str) -> list[tuple[int, Path]]:
    """Checkpoint folders of this kind with their numbers, newest first."""
    if not folder.is_dir():
        return []
    name = re.compile(rf"{kind}_(\d{{6,}})")
    found = [(int(match.group(1)), path) for path in folder.iterdir() if (match := name.fullmatch(path.name))]
    return sorted(found, reverse=True)


def _header_sha256(header: Mapping[str, Any]) -> str:
    """SHA-256 of a header, before and after its trip through the file."""
    plain = json.loads(json.dumps(header))  # makes text of whole-number keys, which would sort otherwise
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
