"""The loop over the epochs: train under the cap, evaluate, write down, save."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dfed.central.capped import Capped, Stretch
from dfed.central.energy import EnergyMeter
from dfed.central.exits import exit_figures, samples_per_second
from dfed.central.prepared import Prepared
from dfed.central.report import TrainScreen, summary_of
from dfed.central.state import Tally, TrainState, empty_totals, save_state
from dfed.client import Evaluation, Skeleton, combine, evaluate_batch
from dfed.data import Dataset
from dfed.errors import CheckpointError
from dfed.metrics import finite, keep_rows_before
from dfed.report.folder import Folder
from dfed.run import StopFlag

__all__ = ["EXIT_STOPPED", "Trainer"]

logger = logging.getLogger(__name__)

EXIT_STOPPED = 128 + signal.SIGTERM


class Trainer:
    """Trains what was prepared, from a state to the end.

    Args:
        folder: Where everything is written; made already.
        state: Where to go on; None: from the start.
        stop: Set when the training is to stop.
    """

    def __init__(self, prepared: Prepared, folder: Folder, *, state: TrainState | None, stop: StopFlag):
        self._prepared, self._config, self._method = prepared, prepared.config, prepared.method
        self._folder, self._stop = folder, stop
        self.state = state or TrainState(tensors=self._method.first_tensors(), totals=empty_totals())
        self._saved = (self.state.epoch, self.state.step) if state is not None else None
        self._energy, self._screen = EnergyMeter(prepared.device), TrainScreen()
        self._evaluation: tuple[str, Evaluation] | None = None
        self._rows = folder.path / "metrics.jsonl"
        keep_rows_before(self._rows, "epoch", self.state.epoch)

    def train(self) -> int:
        """All remaining epochs. Returns the exit status: 0, or 143 if it was asked to stop.

        Raises:
            DfedError: If it cannot go on. The epochs that were completed are on disk, if the disk took them.
        """
        self._screen.started(self._prepared, self._folder.path, self.state)
        self._method.work_in(self._folder.path / "cache", self.state.epoch)
        capped = Capped(self._prepared)
        try:
            while self.state.epoch < self._method.num_epochs and not self._stop.is_set:
                self._epoch(capped)
        except BaseException as error:
            self._stop.is_set = True  # for the thread, which the program waits for when it ends
            if isinstance(error, Exception):
                self._rescue()
            raise
        finally:
            capped.close()
            self._method.close(self.state.epoch == self._method.num_epochs)
        finished = self.state.epoch == self._method.num_epochs
        evaluations, test = self._final() if finished else ({}, {})
        joules = self.state.totals["joules"]
        missing = None if joules is not None else self._energy.reason or "a part of the training went unmeasured"
        summary = summary_of(self._prepared, self.state, evaluations, test, (joules, missing), finished)
        chosen = self._method.choose({name: found.accuracy for name, found in evaluations.items()}) if evaluations else None
        if chosen is not None:
            summary["exit"] = self._exit(chosen, summary["variants"])
        self._folder.write("summary.json", summary)
        self._screen.finished(summary, self._folder.path, self.state)
        return 0 if finished else EXIT_STOPPED

    def _epoch(self, capped: Capped) -> None:
        """What is left of the epoch in progress, or as much of it as there is time for."""
        before, epoch, joules = self.state, self.state.epoch, self._energy.read()
        stretch = capped.epoch(before, lambda: self._stop.is_set)
        after = self._energy.read()
        taken = after - joules if after is not None and joules is not None else None
        totals = _added(before.totals, stretch, taken)
        self.state = replace(stretch.outcome.state, totals=totals)
        if self.state.epoch > epoch:
            self.state = replace(self.state, totals={**totals, "epoch": empty_totals()["epoch"]})
            self._completed(epoch, totals["epoch"])
        done, last = self.state.epoch, self.state.epoch == self._method.num_epochs
        if last or self._stop.is_set or done % self._config.checkpoint.every == 0:
            self._save()

    def _completed(self, epoch: int, figures: Mapping[str, Any]) -> None:
        """Evaluate, if it is due, and write the epoch's line."""
        tally = Tally(**figures["tally"])
        row = {
            "kind": "epoch", "epoch": epoch, "train_loss": tally.loss_sum / max(1, sum(tally.visits.values())),
            "learning_rate": self._method.learning_rate_at(epoch),
            "time_s": figures["time_s"], "steps": tally.steps, "peak_bytes": figures["peak_bytes"],
        }
        self._evaluation = None
        if (epoch + 1) % self._config.metrics.every == 0 or epoch + 1 == self._method.num_epochs:
            begun = time.perf_counter()
            name = self._method.variant_after(epoch)
            found = self._evaluate(self._method.variants()[name], self._prepared.held_out)
            self._evaluation = (name, found)
            row |= {"variant": name, "accuracy": found.accuracy, "loss": found.loss,
                    "evaluation_s": time.perf_counter() - begun}
        with self._rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row)) + "\n")
        self._screen.epoch_done(row, self._method.num_epochs)

    def _final(self) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
        """Of every variant on ``metrics.split``; if that is wanted, also on the test set, of the chosen variant and the whole
        model where the method chooses, and else of all."""
        variants = dict(self._method.variants())
        found = dict([self._evaluation] if self._evaluation is not None else [])
        found = {name: found.get(name) or self._evaluate(model, self._prepared.held_out) for name, model in variants.items()}
        if not self._config.metrics.test_at_end:
            return found, {}
        chosen = self._method.choose({name: figures.accuracy for name, figures in found.items()})
        tested = variants if chosen is None else (chosen, list(variants)[-1])
        return found, {name: self._evaluate(variants[name], self._prepared.data.test) for name in variants if name in tested}

    def _exit(self, name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
        """What the summary says of the variant that the method chose."""
        variants, last = self._method.variants(), list(figures)[-1]
        rates = samples_per_second({each: variants[each] for each in dict.fromkeys([name, last])}, self.state.tensors,
                                   self._prepared.held_out, self._prepared.device)
        names = self._prepared.method.problem.chain.unit_names
        held = {tensor.partition(".")[0] for tensor in variants[name]().state_dict()}
        return exit_figures(name, figures, tuple(unit for unit in names if unit in held), rates)

    def _evaluate(self, make: Callable[[], nn.Module], data: Dataset) -> Evaluation:
        skeleton, size = Skeleton(make()), self._config.metrics.batch_size
        skeleton.load(self.state.tensors, self._prepared.device)
        skeleton.model.eval()
        with torch.inference_mode():
            return combine([[evaluate_batch(skeleton.model, data, number, batch_size=size, device=self._prepared.device)
                             for number in range(-(-data.num_samples // size))]])

    def _save(self) -> None:
        fingerprint = self._config.fingerprint(self._prepared.device.type)
        save_state(self._folder.checkpoints, self.state, fingerprint, self._config.checkpoint.keep)
        self._saved = (self.state.epoch, self.state.step)

    def _rescue(self) -> None:
        """After an error: keep the epochs that were completed."""
        try:
            if (self.state.epoch or self.state.step) and (self.state.epoch, self.state.step) != self._saved:
                self._save()
        except CheckpointError as error:
            logger.error("the epochs since the last checkpoint are lost: %s", error)


def _added(totals: Mapping[str, Any], stretch: Stretch, joules: float | None) -> dict[str, Any]:
    """Totals with what was done under the cap, in all and in the epoch in progress."""
    new = json.loads(json.dumps(totals))
    for part in (new, new["epoch"]):
        part["time_s"] += stretch.time_s
        peaks = [peak for peak in (part["peak_bytes"], stretch.peak_bytes) if peak is not None]
        part["peak_bytes"] = max(peaks, default=None)
        part["tally"] = vars(Tally(**part["tally"]).plus(stretch.outcome.tally))
    new["joules"] = None if joules is None or new["joules"] is None else new["joules"] + joules
    return new
