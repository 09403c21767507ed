"""What is written down about a round and its clients afterwards: the lines of ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dfed.client import ClientReport
from dfed.cohort import Cohort, Job, cost_of
from dfed.fleet import Cost, round_time

__all__ = ["client_rows", "round_row"]


def client_rows(job: Job, cohort: Cohort, reports: Sequence[Mapping[str, Any]], round_index: int) -> list[dict[str, Any]]:
    """The clients' lines of metrics: those that reported, by number, then those that dropped out, were late or refused."""
    absent = [*_absent(job, cohort, cohort.dropped, "failed", "dropout", round_index),
              *_absent(job, cohort, cohort.late, "failed", "late", round_index),
              *_absent(job, cohort, cohort.refused, "oom", "predicted", round_index)]
    return [{"round": round_index, **_client_row(job, cohort, report, round_index)} for report in [*reports, *absent]]


def _absent(job: Job, cohort: Cohort, clients: Iterable[int], status: str, reason: str,
            round_index: int) -> list[dict[str, Any]]:
    """Reports of clients that no rank played: the model went down to them, nothing came up."""
    return [
        vars(ClientReport(client=client, status=status, reason=reason, bytes_up={},
                          bytes_down=job.forms.of(cohort.plans[client]).down_bytes(round_index, client)))
        for client in sorted(clients)
    ]


def _client_row(job: Job, cohort: Cohort, report: Mapping[str, Any], round_index: int) -> dict[str, Any]:
    """One client's line of metrics: its report, its device, and what the round cost it in virtual time and energy."""
    client, plan = report["client"], cohort.plans[report["client"]]
    profile, form = job.fleet.profile(client), job.forms.of(plan)
    down, up = sum(report["bytes_down"].values()), sum(report["bytes_up"].values())
    trains = report["status"] == "completed" or client in cohort.late
    cost = cost_of(job, client, plan, round_index, down=down, up=up, trains=trains)
    return {
        "client": client,
        "tier": profile.tier,
        "rank": cohort.ranks.get(client),
        **{name: report[name] for name in (
            "status", "reason", "loss", "loss_rms", "num_steps", "num_visits", "peak_bytes", "time_s"
        )},
        "num_samples": job.partition.num_samples(client),
        "plan": dict(plan.options),
        "budget_bytes": profile.budget_bytes,
        "predicted_bytes": job.costs.peak_bytes(plan),
        "bytes_up": up,
        "bytes_down": down,
        "bytes_header": report["bytes_down"].get("header", 0) + report["bytes_up"].get("header", 0),
        "bytes_by_block": {"down": form.down_blocks, "up": form.up_blocks if up else {}},
        "slowed": job.fleet.straggles(client, round_index),
        "sim_time_s": cost.total_s,
        "energy_j": cost.energy_j,
    }


def round_row(
    cohort: Cohort, clients: Sequence[Mapping[str, Any]], round_index: int, deadline_s: float | None
) -> dict[str, Any]:
    """The round's line of metrics, as far as it follows from its clients' lines and the deadline."""
    completed = [row for row in clients if row["status"] == "completed"]
    visits = sum(row["num_visits"] for row in completed)
    counts = {status: sum(row["status"] == status for row in clients) for status in ("completed", "oom", "failed")}
    return {
        "round": round_index,
        "train_loss": sum(row["loss"] * row["num_visits"] for row in completed) / visits if visits else None,
        "clients": {"selected": len(clients), **counts, "ineligible": cohort.ineligible, "unavailable": cohort.unavailable},
        "bytes": {"up": sum(row["bytes_up"] for row in clients), "down": sum(row["bytes_down"] for row in clients),
                  "by_block": {direction: _by_block(clients, direction) for direction in ("down", "up")}},
        "sim_time_s": _round_time(cohort, clients, deadline_s),
        "energy_j": sum(row["energy_j"] for row in clients),
    }


def _round_time(cohort: Cohort, clients: Sequence[Mapping[str, Any]], deadline_s: float | None) -> float:
    """Simulated seconds from the first byte sent until the server waits no longer."""
    num_done = sum(row["status"] == "completed" for row in clients)
    if deadline_s is not None and cohort.is_missing and num_done < cohort.wanted:
        return deadline_s
    waited_for = [Cost(row["sim_time_s"], 0.0, 0.0, row["energy_j"]) for row in clients if row["client"] not in cohort.late]
    longest = round_time(waited_for)
    return longest if deadline_s is None else min(longest, deadline_s)


def _by_block(clients: Sequence[Mapping[str, Any]], direction: str) -> dict[str, dict[str, int]]:
    """Bytes of all clients' tensors by block and part, headers apart."""
    total: dict[str, dict[str, int]] = {}
    for row in clients:
        for block, parts in row["bytes_by_block"][direction].items():
            mine = total.setdefault(block, {})
            for part, size in parts.items():
                mine[part] = mine.get(part, 0) + size
    return total
