"""Metrics: one line a round, one line a client and round, TensorBoard scalars, and the running totals of the summary."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dfed.settings import Settings

__all__ = ["EvaluationSettings", "MetricsSettings", "MetricsWriter", "add_totals", "empty_totals", "finite", "keep_rows_before"]

logger = logging.getLogger(__name__)

_CLIENT_COUNTS = ("selected", "completed", "oom", "failed", "ineligible", "unavailable")


class EvaluationSettings(Settings):
    """On what is evaluated, and how often.

    Attributes:
        every: Evaluate the global model every so many rounds (training by itself: epochs), and after the last.
        batch_size: Mini-batch of the evaluation.
        split: Held-out samples to evaluate on: the ``test`` set, or the ``validation`` share of the training data.
        test_at_end: With ``validation``: whether the last model is also evaluated on the test set, once.
    """

    every: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 500
    split: Literal["test", "validation"] = "test"
    test_at_end: bool = False

    def is_due(self, done: int, total: int) -> bool:
        """Whether the model is evaluated after ``done`` rounds of ``total``."""
        return done % self.every == 0 or done == total


class MetricsSettings(EvaluationSettings):
    """What is measured of a run, and how often.

    Attributes:
        tensorboard: Whether to write TensorBoard events.
        bytes_by_block: Whether each client's line also says what every block weighed; the rounds' lines always do.
        inertia: Whether to measure how far each unit of the global model moves; see :mod:`dfed.inertia`.
        inertia_reference: After so many completed rounds the global model is what later ones are compared to.
        effectiveness: Whether to measure what aggregation does to clients' accuracy; see
            :func:`dfed.personalised.effectiveness`.
        effectiveness_samples: Held-out samples of ``split`` on which that is measured, the same for all clients and rounds.
    """

    tensorboard: bool = True
    bytes_by_block: bool = False
    inertia: bool = False
    inertia_reference: Annotated[int, Field(ge=0)] = 3
    effectiveness: bool = False
    effectiveness_samples: Annotated[int, Field(ge=1)] = 500


def empty_totals(tier_names: Sequence[str]) -> dict[str, Any]:
    """Totals before the first round."""
    return {
        "clients": dict.fromkeys(_CLIENT_COUNTS, 0),
        "reasons": {},
        "tiers": {name: {"selected": 0, "completed": 0, "oom": 0, "failed": 0, "bytes_up": 0, "bytes_down": 0,
                         "predicted_bytes": None, "peak_bytes": None} for name in tier_names},
        "bytes": {"up": 0, "down": 0, "fabric": 0},
        "time_s": 0.0,
        "sim_time_s": 0.0,
        "energy_j": 0.0,
        "stale_statistics": 0,
    }


def add_totals(totals: Mapping[str, Any], row: Mapping[str, Any], clients: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """New totals with one round added: its row, and the rows of its clients. The old ones stay as they are."""
    new = json.loads(json.dumps(totals))
    for name in _CLIENT_COUNTS:
        new["clients"][name] += row["clients"][name]
    for name in ("up", "down", "fabric"):
        new["bytes"][name] += row["bytes"][name]
    for name in ("time_s", "sim_time_s", "energy_j"):
        new[name] += row[name]
    new["stale_statistics"] += row.get("statistics") == "stale"
    for client in clients:
        tier = new["tiers"][client["tier"]]
        tier["selected"] += 1
        tier[client["status"]] += 1
        tier["bytes_up"] += client["bytes_up"]
        tier["bytes_down"] += client["bytes_down"]
        tier["predicted_bytes"] = max(tier["predicted_bytes"] or 0, client["predicted_bytes"])
        if client["peak_bytes"] is not None and client["status"] == "completed":
            tier["peak_bytes"] = max(tier["peak_bytes"] or 0, client["peak_bytes"])
        if client["reason"] is not None:
            new["reasons"][client["reason"]] = new["reasons"].get(client["reason"], 0) + 1
    return new


def keep_rows_before(path: Path, name: str, number: int) -> list[dict[str, Any]]:
    """Drop from a file of JSON lines, if it is there, those whose ``name`` is ``number`` or more, and what is no such line.

    Returns:
        The rows that are kept.
    """
    if not path.exists():
        return []
    kept, lines = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that was being written when the run was killed
        if isinstance(row, dict) and row.get(name, number) < number:
            kept.append(row)
            lines.append(line + "\n")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)
    return kept


class MetricsWriter:
    """Writes ``metrics.jsonl`` and TensorBoard events under a run folder.

    Args:
        folder: The run folder.
        bytes_by_block: Whether clients' lines keep this field.
        next_round: Rows of this round and later ones, left by an interrupted run, are dropped. If a row of a round before
            it is not there, that is logged as a warning.
    """

    def __init__(self, folder: Path, *, next_round: int, tensorboard: bool, bytes_by_block: bool = False):
        self._path, self._left_out = folder / "metrics.jsonl", () if bytes_by_block else ("bytes_by_block",)
        kept = {row["round"] for row in keep_rows_before(self._path, "round", next_round) if row.get("kind") == "round"}
        missing = [number for number in range(next_round) if number not in kept]
        if missing:
            logger.warning("%s lacks %d of the %d rounds before round %d, the first of them round %d: figures that are made of "
                           "it will be wrong", self._path, len(missing), next_round, next_round, missing[0])
        self._file = self._path.open("a", encoding="utf-8")
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed by every rank

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=next_round)

    def write(self, row: Mapping[str, Any], clients: Sequence[Mapping[str, Any]]) -> None:
        """Write a round's row and its clients' rows, and flush."""
        for client in clients:
            kept = {name: value for name, value in client.items() if name not in self._left_out}
            self._file.write(json.dumps(finite({"kind": "client", **kept})) + "\n")
        self._file.write(json.dumps(finite({"kind": "round", **row})) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in _scalars(row):
                self._events.add_scalar(name, value, row["round"])
            self._events.flush()

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def _scalars(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in row.items():
        if name == "by_block":
            continue  # two curves for each block would bury the others
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "round":
            found.append((prefix + name, float(value)))
    return found


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
