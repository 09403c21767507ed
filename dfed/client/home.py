"""Where clients keep what they remember from one round to the next: files in the run folder, which every rank can reach.

A client's state is a few float32 tensors. The rank that plays the client reads the version that the server names, and writes
the next one beside it; the server takes note of it when the round is complete. So nothing of it crosses between ranks, any
rank can play any client, and a round that was interrupted is simply done again. Versions that no checkpoint needs any more are
removed.

``clients/000012/000034.safetensors`` is client 12's state as it left round 34. ``clients/000012/000034.features``, with its
marker ``000034.json``, holds the features that the client trains on from round 34 on, until there are others; see
:mod:`dfed.client.features`. They belong to the states of these rounds, and go with them.
"""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dfed.client.forms import Form
from dfed.data.row_file import room_for
from dfed.errors import CheckpointError
from dfed.settings import format_bytes
from dfed.state import save_file

__all__ = ["CLIENTS", "ClientHome", "errors_of", "next_state", "own_state"]

CLIENTS = "clients"
"""Name of the folder, inside a run folder, that holds the clients' states."""

_VERSION = re.compile(r"(\d{6,})\.(safetensors|features|json)")


class ClientHome:
    """The clients' states under one folder.

    Args:
        folder: Shared by all ranks. The server makes it.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def check_free(self, num_bytes: int) -> None:
        """Make sure that the disk has room for clients' features of so many bytes, those that are there counted.

        Raises:
            CheckpointError: If it has not; says what is needed.
        """
        free = room_for(self.folder, "*/*.features")
        if free < num_bytes:
            raise CheckpointError(f"the disk of {self.folder} must have {format_bytes(num_bytes)} free ({num_bytes} bytes) for "
                                  f"what the clients keep there, but has {format_bytes(free)}.")

    def path(self, client: int, version: int) -> Path:
        """The file of a client's state as it left round ``version``."""
        return self.folder / f"{client:06d}" / f"{version:06d}.safetensors"

    def features_path(self, client: int, version: int) -> Path:
        """The file of the features that a client trains on from round ``version`` on."""
        return self.folder / f"{client:06d}" / f"{version:06d}.features"

    def load(self, client: int, version: int | None) -> dict[str, Tensor]:
        """The client's state, float32 by name; empty before its first.

        Raises:
            CheckpointError: If it cannot be read, or was changed since it was written.
        """
        if version is None:
            return {}
        path = self.path(client, version)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
                expected = (file.metadata() or {}).get("crc32")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the state of client {client} as it left round {version} must be in {path}, but cannot be "
                                  f"read: {error}") from error
        if _checksum(client, version, tensors) != expected:
            raise CheckpointError(f"the state of client {client} as it left round {version} is damaged, or another's: the "
                                  f"checksum of {path} differs.")
        return tensors

    def save(self, client: int, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a client's state as it leaves round ``version``; all of it or nothing.

        Raises:
            CheckpointError: If the disk refuses it.
        """
        path = self.path(client, version)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        # Copies, as the file format wants storage that is not shared.
        own = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(own, partial, metadata={"crc32": _checksum(client, version, own)})
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise CheckpointError(f"cannot write the state of client {client} to {path}: {error}") from error

    def flush(self, versions: Mapping[int, int]) -> None:
        """Bring these clients' states to the disk itself, so that a checkpoint may refer to them.

        Raises:
            CheckpointError: If one is missing, or the disk refuses it.
        """
        folders = set()
        for client, version in versions.items():
            path = self.path(client, version)
            folders.add(path.parent)
            _flush(path)
        for folder in sorted(folders) + [self.folder] * bool(folders):
            _flush(folder)

    def check(self, versions: Mapping[int, int]) -> None:
        """Refuse to go on where a state is missing.

        Raises:
            CheckpointError: Naming the first.
        """
        for client, version in versions.items():
            if not self.path(client, version).is_file():
                raise CheckpointError(f"the state of client {client} as it left round {version} must be in "
                                      f"{self.path(client, version)}, but is not there.")

    def prune(self, needed: Iterable[Mapping[int, int]]) -> None:
        """Remove every version but those that one of ``needed`` (client → version) names, and features that belong to none
        of these. A file that will not go stays."""
        kept: dict[int, set[int]] = {}
        for versions in needed:
            for client, version in versions.items():
                kept.setdefault(client, set()).add(version)
        for folder in self.folder.glob("[0-9]*"):
            versions_kept = kept.get(int(folder.name), set()) if folder.name.isdigit() else set()
            found = [(path, _VERSION.fullmatch(path.name)) for path in folder.iterdir()]
            starts = [int(match.group(1)) for _, match in found if match is not None and match.group(2) == "features"]
            begun = {max((start for start in starts if start <= version), default=None) for version in versions_kept}
            for path, match in found:
                needed_here = versions_kept if match is not None and match.group(2) == "safetensors" else begun
                if match is None or int(match.group(1)) not in needed_here:
                    with contextlib.suppress(OSError):
                        path.unlink()


_ERROR, _OWN = "error/", "own/"


def own_state(kept: Mapping[str, Tensor], form: Form, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """What a strategy has a client remember, without what bears the name of a global tensor that the client does not hold now,
    or ``<anything>/`` and the name of one that it does not send.

    These would take the client's memory in vain; :func:`next_state` keeps them.

    Args:
        kept: All of the client's state.
        form: Of the plan that the client carries out.
        shapes: Of the global tensors.
    """
    own = {name.removeprefix(_OWN): value for name, value in kept.items() if name.startswith(_OWN)}
    sent = {entry.name for entry in form.up}
    return {name: value for name, value in own.items() if _is_wanted(name, form, sent, shapes)}


def _is_wanted(name: str, form: Form, sent: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    prefix, _, tensor = name.rpartition("/")
    return tensor not in shapes or (tensor in sent if prefix else tensor in form.regions)


def errors_of(kept: Mapping[str, Tensor], form: Form) -> dict[str, Tensor]:
    """What codecs left out of the parts of tensors that go up now."""
    named = {name.removeprefix(_ERROR): value for name, value in kept.items() if name.startswith(_ERROR)}
    return {entry.name: form.regions[entry.name].view(named[entry.name]) for entry in form.up if entry.name in named}


def next_state(kept: Mapping[str, Tensor], remembered: Mapping[str, Tensor], left_out: Mapping[str, Tensor], form: Form,
               shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A client's state after a round.

    Args:
        kept: Its state before.
        remembered: What the strategy has it remember; what :func:`own_state` left out stays besides.
        left_out: What the codecs left out, of each tensor that went up in a codec that leaves something out.
        shapes: Of the global tensors: what was left out of other parts of them stays.
    """
    given = {_OWN + name for name in own_state(kept, form, shapes)}
    state = {name: value for name, value in kept.items() if name not in given}
    for name, value in left_out.items():
        whole = state.get(_ERROR + name, torch.zeros(())).expand(shapes[name]).clone()
        form.regions[name].put_(whole, value)
        state[_ERROR + name] = whole
    return state | {_OWN + name: value for name, value in remembered.items()}


def _checksum(client: int, version: int, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of whose it is, names, shapes and bytes: against damage and mix-ups, not against malice."""
    sum_ = zlib.crc32(f"{client} {version}".encode())
    for name in sorted(tensors):
        value = tensors[name]
        sum_ = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), sum_)
        if value.numel():
            sum_ = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy(), sum_)
    return f"{sum_:08x}"


def _flush(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"the state of a client must reach the disk, but {path} does not: {error}") from error
