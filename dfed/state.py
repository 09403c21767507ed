"""What survives a round: the server's state, and the running totals of the metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from dfed.errors import DfedError

__all__ = ["ServerState", "as_saved", "save_file"]


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """All that the server remembers between rounds, and all that a checkpoint holds.

    Attributes:
        round_index: Rounds completed so far.
        params: The global model: every floating-point parameter and buffer, float32 on the CPU, by state-dict name.
        slots: The server optimiser's tensors, by parameter name, then slot name.
        tensors: What the strategy remembers besides the model: float32 on the CPU, by names of its own.
        facts: Likewise; JSON values only.
        sampler: What the sampler remembers; JSON values only.
        totals: Running totals of the metrics; JSON values only.
        clients: Of each client that keeps a state, the round in which it wrote the newest; see :mod:`dfed.client.home`.
        infeasible: ``Plan.cost_key`` of each plan that ran out of memory, and the largest budget, in bytes, on which it did.
    """

    round_index: int
    params: Mapping[str, Tensor]
    slots: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    sampler: Mapping[str, Any] = field(default_factory=dict)
    totals: Mapping[str, Any] = field(default_factory=dict)
    clients: Mapping[int, int] = field(default_factory=dict)
    infeasible: Mapping[str, int] = field(default_factory=dict)


def as_saved(what: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` as a checkpoint would give it back.

    Args:
        what: Whose it is, for the message.

    Raises:
        DfedError: If it is no mapping of JSON values.
    """
    try:
        if not isinstance(value, Mapping):
            raise TypeError(f"a {type(value).__name__} is no mapping")
        return dict(json.loads(json.dumps(dict(value), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise DfedError(f"{what} must be JSON values by name, but cannot be saved: {error}.") from error


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the rights that any new file gets here; safetensors' own lets nobody else read it.

    Args:
        tensors: Contiguous, each with storage of its own.
        metadata: Text that the file's header holds besides.

    Raises:
        OSError, SafetensorError: If the disk refuses it; what is at ``path`` then is not to be used.
    """
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)
