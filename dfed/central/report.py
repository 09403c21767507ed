"""What training on one device shows on the terminal, and what its summary says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfed.central.method import VariantCosts
from dfed.central.prepared import Prepared
from dfed.central.state import Tally, TrainState
from dfed.checkpoint import params_sha256
from dfed.client import Evaluation
from dfed.fleet import DeviceProfile, client_cost
from dfed.report import tables
from dfed.report.console import Screen

__all__ = ["TrainScreen", "summary_of"]


def summary_of(prepared: Prepared, state: TrainState, evaluations: Mapping[str, Evaluation],
               test: Mapping[str, Evaluation], measured: tuple[float | None, str | None], finished: bool) -> dict[str, Any]:
    """The summary of a training.

    Args:
        evaluations: Of variants, by name, on ``metrics.split``; none if the training was stopped.
        test: Likewise, on the test set, with ``metrics.test_at_end``.
        measured: Joules that the device really took, or None and why they are not known.
    """
    config, method, totals = prepared.config, prepared.method, state.totals
    costs, tally = method.costs(), Tally(**totals["tally"])
    last, num_steps = list(costs)[-1], sum(tally.steps.values())
    flops = sum(costs[kind].training_flops * visits for kind, visits in tally.visits.items()) + tally.other_flops
    int8_flops = sum(costs[kind].int8_flops * visits for kind, visits in tally.visits.items())
    device = config.device
    profile = DeviceProfile(
        tier="device", budget_bytes=prepared.budget_bytes, flops=device.flops, watts=device.watts,
        int8_speedup=device.int8_speedup, up=1.0, down=1.0, radio_watts=0.0, availability=1.0, dropout=0.0,
    )
    simulated = client_cost(profile, flops=flops, int8_flops=int8_flops, bytes_down=0, bytes_up=0)
    whole = evaluations.get(last)
    return {
        "method": config.method.name,
        "model": config.model.name,
        "dataset": config.data.dataset,
        "seed": config.seed,
        "epochs": state.epoch,
        "steps": num_steps,
        "finished": finished,
        "split": config.metrics.split,
        "accuracy": None if whole is None else whole.accuracy,
        "loss": None if whole is None else whole.loss,
        "test": _figures(test[last]) if last in test else None,
        "variants": {name: {
            **(_figures(evaluations[name]) if name in evaluations else {"accuracy": None, "loss": None}),
            **({"test": _figures(test[name])} if name in test else {}),
            **_costs(prepared, cost),
            "steps": tally.steps.get(name, 0),
            "step_share": tally.steps.get(name, 0) / num_steps if num_steps else None,
            "step_s": tally.seconds[name] / tally.steps[name] if tally.seconds.get(name) else None,
        } for name, cost in costs.items()},
        "params_sha256": params_sha256(state.tensors),
        "num_params": costs[last].num_params,
        "num_samples": prepared.data.train.num_samples,
        "memory_enforce": config.memory.enforce,
        "budget_bytes": prepared.budget_bytes,
        "predicted_bytes": method.peak_bytes,
        "needed_bytes": prepared.needed_bytes(method.peak_bytes),
        "peak_bytes": totals["peak_bytes"],
        "time_s": totals["time_s"],
        "training_flops": flops,
        "training_int8_flops": int8_flops,
        "sim_time_s": simulated.compute_s,
        "energy_j": simulated.energy_j,
        "measured_j": measured[0],
        "measured_j_missing": measured[1],
    }


def _costs(prepared: Prepared, cost: VariantCosts) -> dict[str, Any]:
    return {
        "num_params": cost.num_params,
        "bytes": cost.num_bytes,
        "forward_flops": cost.forward_flops,
        "training_flops": cost.training_flops,
        "predicted_bytes": cost.peak_bytes,
        "needed_bytes": prepared.needed_bytes(cost.peak_bytes),
        "share": cost.share,
    }


def _figures(found: Evaluation) -> dict[str, float]:
    return {"accuracy": found.accuracy, "loss": found.loss}


class TrainScreen(Screen):
    """Writes to standard output: a table of what is trained, a line an epoch, a table of what came of it."""

    def started(self, prepared: Prepared, path: Path, state: TrainState) -> None:
        """Say what is about to be trained."""
        config, method, budget = prepared.config, prepared.method, prepared.budget_bytes
        limit = "no budget" if budget is None else f"budget {_mebibytes(budget)} MiB ({config.memory.enforce})"
        self._say(f"dfed train: {config.method.name}, {config.model.name}, {config.data.dataset}, "
                  f"{prepared.data.train.num_samples:,} samples, {method.num_epochs} epochs, on {prepared.device}, {limit}")
        if budget is not None and config.memory.enforce == "off":
            self._say("warning: memory.enforce is off: training is not held to its budget")
        table = tables.make_table("trained", "share", "parameters", "state\nMiB", "forward\nMFLOP", "training\nMFLOP",
                                  "predicted\nMiB", "needs\nMiB", "fits")
        for name, cost in method.costs().items():
            needs = prepared.needed_bytes(cost.peak_bytes)
            tables.add_row(table, [
                name, f"{cost.share:.1%}", f"{cost.num_params:,}", f"{cost.num_bytes / 2**20:,.2f}",
                f"{cost.forward_flops / 1e6:,.1f}", f"{cost.training_flops / 1e6:,.1f}",
                _mebibytes(cost.peak_bytes), _mebibytes(needs),
                "yes" if budget is None or needs <= budget else "no",
            ])
        self._try(lambda: self._terminal.print(table))
        if (blocks := method.table()) is not None:
            order = tables.make_table(*blocks[0])
            for row in blocks[1]:
                tables.add_row(order, row)
            self._try(lambda: self._terminal.print(order))
        self._say(f"folder: {path}" + (f"; going on after {_place(state)}" if state.epoch or state.step else ""))

    def epoch_done(self, row: Mapping[str, Any], num_epochs: int) -> None:
        """Show an epoch's figures."""
        parts = [f"train loss {row['train_loss']:.3f}"]
        if row.get("accuracy") is not None:
            parts.append(f"accuracy {row['accuracy']:.4f}")
        if row["peak_bytes"] is not None:
            parts.append(f"peak {_mebibytes(row['peak_bytes'])} MiB")
        parts.append(f"{row['time_s']:.2f} s")
        self._say(f"epoch {row['epoch'] + 1}/{num_epochs} | {' | '.join(parts)}")

    def finished(self, summary: Mapping[str, Any], path: Path, state: TrainState) -> None:
        """Show what came of each variant, and the totals."""
        if not summary["finished"]:
            self._say(f"stopped on request after {_place(state)}; go on with: python -m dfed train --resume {path}")
            return
        table = tables.make_table("trained", "steps", "ms a step", "parameters", "accuracy", "loss")
        for name, found in summary["variants"].items():
            tables.add_row(table, [
                name, f"{found['steps']:,}", "–" if found["step_s"] is None else f"{1000 * found['step_s']:.2f}",
                f"{found['num_params']:,}", f"{found['accuracy']:.4f}", f"{found['loss']:.4f}",
            ])
        self._try(lambda: self._terminal.print(table))
        if (chosen := summary.get("exit")) is not None:
            self._say(f"chosen: {chosen['name']} ({chosen['param_share']:.1%} of the parameters, accuracy "
                      f"{chosen['accuracy']:.4f}, {chosen['samples_per_s']:,.0f} samples/s; the whole model "
                      f"{chosen['full_samples_per_s']:,.0f})")
        if summary["test"] is not None:
            self._say(f"test accuracy {summary['test']['accuracy']:.4f}, loss {summary['test']['loss']:.4f}")
        joules = summary["measured_j"]
        real = "" if joules is None else f", measured {joules:.0f} J"
        self._say(f"peak {_mebibytes(summary['peak_bytes'])} MiB (predicted {_mebibytes(summary['predicted_bytes'])}), time "
                  f"{summary['time_s']:.1f} s, {summary['training_flops'] / 1e9:,.1f} GFLOP, simulated "
                  f"{summary['sim_time_s']:.0f} s, {summary['energy_j']:.0f} J{real}")
        self._say(f"folder: {path}")


def _place(state: TrainState) -> str:
    return f"epoch {state.epoch}" + (f" and {state.step} steps" if state.step else "")


def _mebibytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:,.1f}"
