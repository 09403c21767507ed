"""The server's loop over the rounds, and what the other ranks do meanwhile."""

from __future__ import annotations

import gc
import logging
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from dfed import checkpoint
from dfed.client import Evaluation
from dfed.client.home import ClientHome
from dfed.comm import Message, choose_device, join
from dfed.config import Config
from dfed.device_models import device_models
from dfed.errors import CheckpointError, ExchangeFailed, RankLost, SumsLost, WireError
from dfed.evaluation import evaluate, evaluate_test, evaluate_variants, follow_evaluation
from dfed.inertia_record import InertiaRecord
from dfed.metrics import MetricsWriter, add_totals, empty_totals
from dfed.personalised import PersonalisedAccuracy, effectiveness
from dfed.report.console import Console, causes
from dfed.report.folder import RunFolder
from dfed.round import lead_round, take_part
from dfed.run import Prepared, Run, StopFlag, assemble, prepare
from dfed.state import ServerState, as_saved

__all__ = ["EXIT_STOPPED", "Leader", "execute", "follow"]

logger = logging.getLogger(__name__)

EXIT_STOPPED = 128 + signal.SIGTERM


def execute(config: Config, *, folder: RunFolder | None, state: ServerState | None) -> int:
    """Carry out a run (collective over the launcher's processes). Returns the exit status: 0, or 143 after SIGTERM.

    Args:
        folder: Where the server writes; None on other ranks.
        state: Where the server goes on; None: from the start.

    Raises:
        DfedError: If the run cannot be carried out.
    """
    start = time.perf_counter()
    prepared = prepare(config, choose_device(config.backend))
    if folder is None:
        return _carry_out(prepared, None, state, start)
    with folder.held():  # not before: what cannot run leaves nothing behind
        folder.create(config)
        return _carry_out(prepared, folder, state, start)


def _carry_out(prepared: Prepared, folder: RunFolder | None, state: ServerState | None, start: float) -> int:
    config = prepared.config
    link = join(config.backend, prepared.device)
    stop = StopFlag()
    stop.install()  # not before: there was nothing to save, and a rank that waits for the others would not notice
    try:
        run = assemble(prepared, link, stop, clients_folder=folder.clients if folder is not None else None)
        if link.transport.is_server:
            assert folder is not None, "the server needs a run folder"
            status = Leader(run, folder, state=state, start=start).lead()
        else:
            status = follow(run)
    except BaseException as error:
        link.transport.close(error)
        raise
    finally:
        gc.unfreeze()
    link.transport.close()
    return status


class Leader:
    """The server's side of a run: rounds, evaluation, metrics, checkpoints, summary.

    Args:
        folder: Where everything is written.
        state: Where to go on; None: from the start.
        start: ``time.perf_counter()`` when the run began.
    """

    def __init__(self, run: Run, folder: RunFolder, *, state: ServerState | None, start: float):
        self._run, self._folder, self._config = run, folder, run.config
        self.state = state or self._first_state()
        self._home = self._clients_home()
        self._saved, self._stopped = self.state.round_index, False
        self._warned_empty = self._warned_stale = False
        self._evaluation: Evaluation | None = None
        self._personalised, self._inertia = PersonalisedAccuracy(run.job.partition), None
        if run.config.metrics.inertia:
            self._inertia = InertiaRecord(folder.path, units=run.job.units, reference=run.config.metrics.inertia_reference,
                                          state=self.state)
        self._console = Console(run.config, run.job, run.link)
        self._console.started(folder.path, self.state.round_index, time.perf_counter() - start)
        folder.write_environment(run.link, run.config)
        self._writer = MetricsWriter(
            folder.path, next_round=self.state.round_index, tensorboard=run.config.metrics.tensorboard,
            bytes_by_block=run.config.metrics.bytes_by_block,
        )

    def lead(self) -> int:
        """All remaining rounds (collective). Returns the exit status: 0, or 143 if it was asked to stop.

        Raises:
            DfedError: If the run cannot go on. The rounds that were completed are on disk, if the disk took them.
        """
        try:
            while self.state.round_index < self._config.rounds and not self._stopped:
                self.round()
            if self._evaluation is None:
                self.state, self._evaluation = evaluate(self._run, self.state)
                self._warn_if_stale(self._evaluation)
            # The launcher that asked to stop kills after a while: what is not needed to go on is left out.
            variants = {} if self._stopped else evaluate_variants(self._run, self.state)
            for evaluation in variants.values():
                self._warn_if_stale(evaluation)
            models = None if self._stopped else device_models(self._run.job, self.state)
            wants_test = self._config.metrics.test_at_end and models is not None
            test = evaluate_test(self._run, self.state, models.variants) if wants_test else None
            self.dismiss()
        except Exception as error:
            self._rescue(error)
            raise
        finally:
            self._writer.close()
            self._console.close()
        summary = self._folder.write_summary(
            self._config, self._run.job, self.state, self._evaluation, variants, test, models, self._stopped, self._personalised
        )
        self._console.finished(summary, self._folder.path)
        return EXIT_STOPPED if self._stopped else 0

    def _rescue(self, error: Exception) -> None:
        """After an error: keep the rounds that were completed, and let the other ranks go if they can be reached."""
        try:
            if self.state.round_index > self._saved:
                self._save()
        except CheckpointError as another:
            logger.error("the rounds since the last checkpoint are lost: %s", another)
        if not isinstance(error, (RankLost, WireError, SumsLost, ExchangeFailed)):
            self.dismiss()

    def dismiss(self) -> None:
        """Let the other ranks go (collective: they return from :func:`follow`)."""
        self._run.transport.broadcast(Message("stop", {"stopped": self._stopped}, (), torch.empty(0, dtype=torch.uint8)))

    def round(self) -> None:
        """One round with all that belongs to it: evaluation, metrics and checkpoint when they are due (collective)."""
        config = self._config
        result = lead_round(self._run.job, self.state)
        state, self._evaluation = result.state, None
        done = state.round_index
        self._stopped = result.stop_requested
        last = self._stopped or done == config.rounds
        due = config.metrics.is_due(done, config.rounds)
        if due or last:
            begun = time.perf_counter()
            state, self._evaluation = evaluate(self._run, state)
            result.row.update(
                accuracy=self._evaluation.accuracy, personalised_accuracy=self._personalised.of(self._evaluation),
                loss=self._evaluation.loss, evaluation_s=time.perf_counter() - begun,
            )
            if self._evaluation.sampled is not None:
                plan = self._run.job.strategy.evaluated(state)
                result.row["effectiveness"] = effectiveness(self._run.job, plan, result.completed, self._evaluation.sampled)
            if self._run.job.strategy.heeds_evaluation is not None:
                result.row["strategy"] = as_saved("what a strategy notes of a round", self._run.job.strategy.note(state))
            if self._evaluation.refused is not None:
                result.row["statistics"] = "stale"
                self._warn_if_stale(self._evaluation)
        if self._inertia is not None:
            result.row["inertia"] = self._inertia.measure(self.state, state, result.diversity)
        # An evaluation that comes of being stopped must not count when the run goes on.
        counted = result.row if due else {**result.row, "statistics": None}
        self.state = replace(state, totals=add_totals(state.totals, counted, result.clients))
        self._writer.write(result.row, result.clients)
        self._console.round_done(result.row)
        if not result.row["clients"]["completed"] and not self._warned_empty:
            self._warned_empty = True
            reasons = Counter(client["reason"] for client in result.clients)
            logger.warning("round %d changes nothing, as no client completed it: %s (said once)", done - 1,
                           causes(result.row["clients"], reasons))
        self._stopped = (self._stopped or self._run.job.stop_requested()) and done < config.rounds
        if done % config.checkpoint.every == 0 or last or self._stopped:
            self._save()

    def _warn_if_stale(self, evaluation: Evaluation) -> None:
        if evaluation.refused is not None and not self._warned_stale:
            self._warned_stale = True
            logger.warning("the model is evaluated with the norms' first statistics, as none can be worked out for it: %s "
                           "(said once)", evaluation.refused)

    def _save(self) -> None:
        settings = self._config.checkpoint
        fingerprint = self._config.fingerprint(self._run.link.device.type)
        if self._home is not None:
            self._home.flush({c: v for c, v in self.state.clients.items() if v >= self._saved})
        checkpoint.save(self._folder.checkpoints, self.state, fingerprint, settings.keep)
        if self._home is not None:
            self._home.prune([self.state.clients, *checkpoint.client_versions(self._folder.checkpoints)])
        self._saved = self.state.round_index

    def _clients_home(self) -> ClientHome | None:
        """Where clients keep their states, ready for use; None if they keep none."""
        folder = self._run.job.clients_folder
        if folder is None:
            return None
        home = ClientHome(Path(folder))
        home.folder.mkdir(parents=True, exist_ok=True)
        home.check(self.state.clients)
        job, values = self._run.job, self._run.job.strategy.feature_values(self.state)
        if values and self.state.round_index < self._config.rounds:
            home.check_free(4 * values * sum(map(job.partition.num_samples, range(job.fleet.num_clients))))
        return home

    def _first_state(self) -> ServerState:
        run = self._run
        state = run.job.strategy.init(run.planning.first_params(run.config.seed))
        return replace(state, totals=empty_totals(run.job.fleet.tier_names))


def follow(run: Run) -> int:
    """A client rank: do what the server's messages say until one says stop (collective). Returns the exit status."""
    while True:
        order = run.transport.broadcast(None)
        if order.kind == "round":
            take_part(run.job, order)
        elif order.kind in ("evaluate", "statistics"):
            follow_evaluation(run, order)
        else:
            return EXIT_STOPPED if order.meta["stopped"] else 0
