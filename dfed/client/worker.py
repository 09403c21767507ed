"""A rank's side of a round: play the clients assigned to this rank, one after another, each under its cap."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfed import rng
from dfed.client.down import Down
from dfed.client.evaluation import Trial
from dfed.client.features import ClientFeatures
from dfed.client.forms import Form, Forms, nothing
from dfed.client.home import errors_of, next_state, own_state
from dfed.client.report import FEATURES_LOST, ClientReport
from dfed.client.settings import ClientSettings, make_optimizer
from dfed.client.skeleton import Skeleton
from dfed.client.thread import TrainingThread
from dfed.client.training import on_cpu, rehearse, run_plan
from dfed.comm.partial_sums import PartialSums, check_update
from dfed.comm.wire import Message
from dfed.data import AUGMENTATIONS, Dataset, Partition, client_batches
from dfed.errors import CheckpointError, FeaturesLost, RankLost, SumsLost, UpdateRejected
from dfed.inertia import change_squares
from dfed.plan import Phase, Plan
from dfed.strategies import Strategy

__all__ = ["Worker"]

logger = logging.getLogger(__name__)

_LOOKED_AT = 4096
_MOST_SKELETONS = 64
_NONE: Mapping[str, str] = {}


class Worker:
    """Plays clients. Holds no state from one round to the next, save what saves time.

    Args:
        shapes: Of the global tensors, by name.
        cap: Holds clients to their budgets.
        forms: The wire form of each plan's messages.
        error_feedback: Whether clients make up for what codecs left out of earlier updates.
        abandoned: Asked after every step; true ends the work with :class:`RankLost`.
        units: The unit of each parameter, by name, if reports are to say how far each unit moved; else empty.
        trial: Tries clients' own models; None: they are not tried.
    """

    def __init__(
        self,
        strategy: Strategy,
        dataset: Dataset,
        partition: Partition,
        settings: ClientSettings,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        cap: Any,
        forms: Forms,
        device: torch.device,
        seed: int,
        error_feedback: bool,
        abandoned: Callable[[], bool],
        units: Mapping[str, str] = _NONE,
        trial: Trial | None = None,
    ):
        self._strategy, self._dataset, self._partition, self._settings = strategy, dataset, partition, settings
        self._shapes, self._cap, self._forms, self._device = shapes, cap, forms, device
        self._seed, self._abandoned, self._units, self._trial = seed, abandoned, units, trial
        self._augment = AUGMENTATIONS[settings.augment]
        self._skeletons: OrderedDict[str, Skeleton] = OrderedDict()
        self._thread = TrainingThread(device, self._warm_up)
        self._feeds_back = error_feedback
        self._measured: set[str] = set()
        self._warned: set[tuple[str, int | None]] = set()
        self._warned_augment = False

    def _warm_up(self) -> None:
        """One small step of the full model without a cap: loads what libraries load once, and keep for each thread."""
        skeleton, chain = Skeleton(self._strategy.problem.chain.skeleton()), self._strategy.problem.chain
        empty = {name: torch.zeros(shape) for name, shape in self._shapes.items()}
        skeleton.load(empty, self._device)
        generator = rng.device_generator(self._device, self._seed, "warm-up")
        skeleton.model.set_generator(generator)
        optimizer = make_optimizer(self._settings, skeleton.model.parameters(), 1.0)
        x = torch.zeros(2, *chain.input_shape, device=self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._settings.precision == "bf16"):
            scores = skeleton.model(x)
        F.cross_entropy(scores.float(), torch.zeros(2, dtype=torch.int64, device=self._device)).backward()
        optimizer.step()

    def work(
        self, message: Message, tasks: Sequence[Mapping[str, Any]], sums: PartialSums, deliver: Callable[[Message], None]
    ) -> list[dict[str, Any]]:
        """Play the clients of ``tasks`` for the round that ``message`` describes.

        Args:
            message: The round's broadcast.
            tasks: For each client ``client``, the ``plan``'s number among the message's, ``weight``; ``budget_bytes`` and the
                predicted ``peak_bytes`` if it has a budget; the version of its ``state`` if it has one.
            sums: Updates are folded into these, if the exchange is fused.
            deliver: Takes each client's update, if the exchange is per client, as soon as the client is done; of a client that
                failed an empty message of the kind ``nothing``.

        Returns:
            The clients' reports as JSON values.
        """
        plans = [Plan.from_json(plan) for plan in message.meta["plans"]]
        down = Down.of(message, [plans[task["plan"]] for task in tasks], seed=self._seed)
        reports = []
        for number, task in enumerate(tasks, start=1):
            plan = plans[task["plan"]].for_client(task["client"])
            report, update = self._play(plan, task, down, sums, last=number == len(tasks))
            reports.append(dict(vars(report)))
            if down.per_client:
                deliver(nothing(down.round_index, report.client) if update is None else update)
        return reports

    def _play(
        self, plan: Plan, task: Mapping[str, Any], down: Down, sums: PartialSums, *, last: bool
    ) -> tuple[ClientReport, Message | None]:
        form, budget_bytes = self._forms.of(plan), task.get("budget_bytes")
        kept = {} if down.home is None else down.home.load(plan.client, task.get("state"))
        report = ClientReport(client=plan.client, bytes_down=form.down_bytes(down.round_index, plan.client), bytes_up={})
        start, update, cap_bytes = time.perf_counter(), None, budget_bytes if self._cap.enforces else None
        tried_s = 0.0
        try:
            base = down.payload(plan, form)
            own = own_state(kept, form, self._shapes)
            train = partial(self._train, plan, form, base, task, down, report, own)
            tensors, remembered = self._thread.run_under(self._cap, train)
            cap_bytes = None  # what fails from here on is no fault of the device's
            tried_s = self._try_own_model(plan, down.round_index, report)
            report.bytes_up = form.up_bytes(down.round_index, plan.client)
            errors = errors_of(kept, form) if self._feeds_back else {}
            if down.per_client:
                update = form.encode_update(down.round_index, plan.client, tensors, base, errors)
                arrives = form.decode_update(update, base)
                check_update(arrives, down.ranges)
            else:
                arrives = form.through_codecs(down.round_index, plan.client, tensors, base, errors)
            if down.home is not None:
                left_out = form.left_out(tensors, arrives, errors) if self._feeds_back else {}
                down.home.save(plan.client, down.round_index, next_state(kept, remembered, left_out, form, self._shapes))
            report.change_squares = change_squares(arrives, base, self._units) if self._units else {}
            if not down.per_client:  # last: what is in the sums cannot fail any more
                sums.add(arrives, form.regions, task["weight"] * down.scale, down.ranges, last=last)
            report.keeps_state = down.home is not None
        except (RankLost, CheckpointError, SumsLost, KeyboardInterrupt):
            raise
        except FeaturesLost as error:
            report.status, report.reason, report.detail = "failed", FEATURES_LOST, str(error)
        except UpdateRejected as error:
            report.status, report.reason = "failed", error.reason
            report.loss = report.loss_rms = None
            report.detail = str(error) + (self._why_not_finite(plan) if error.reason == "non_finite" else "")
        except Exception as error:
            report.note(error, cap_bytes)
            report.bytes_up = {}
        finally:
            self._unload(plan)
        report.time_s = time.perf_counter() - start - tried_s
        if report.status != "completed":
            report.change_squares, report.own_correct = {}, None
            gc.collect()
            if report.reason in ("oom", "host_memory"):
                self._thread.replace()
            update = None
            self._warn(down.round_index, report, (plan.cost_key(), budget_bytes))
        return report, update

    def _try_own_model(self, plan: Plan, round_index: int, report: ClientReport) -> float:
        """Try the model that was just trained, if that is due; the seconds that it took.

        Not in the training thread, in which libraries would keep buffers that other clients' training does not find.
        """
        if self._trial is None or not self._trial.is_due(round_index) or self._strategy.feed(plan) is not None:
            return 0.0  # not due, or a model of features
        start = time.perf_counter()
        report.own_correct = self._trial.correct(self._skeletons[plan.shape_key()].model)
        return time.perf_counter() - start

    def _unload(self, plan: Plan) -> None:
        """Empty the plan's skeleton, and forget it if its strategy changed it for good."""
        skeleton = self._skeletons.get(plan.shape_key())
        if skeleton is not None and not skeleton.unload():
            del self._skeletons[plan.shape_key()]

    def _empty_skeleton(self, plan: Plan) -> Skeleton:
        """The plan's skeleton, emptied: what another try left in it would be freed under the cap, as if that made room."""
        self._unload(plan)
        key = plan.shape_key()
        if key not in self._skeletons:
            self._skeletons[key] = Skeleton(self._strategy.build(plan))
            while len(self._skeletons) > _MOST_SKELETONS:  # windows that move are other sub-models each round
                self._skeletons.popitem(last=False)
        self._skeletons.move_to_end(key)
        return self._skeletons[key]

    def _train(self, plan: Plan, form: Form, values: Mapping[str, Tensor], task: Mapping[str, Any], down: Down,
               report: ClientReport, client_state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        budget_bytes = task.get("budget_bytes")
        skeleton = self._empty_skeleton(plan)
        indices = self._partition.indices(plan.client)
        generator = rng.device_generator(self._device, self._seed, "layers", down.round_index, plan.client)

        draws = rng.numpy_generator(self._seed, "draw", down.round_index, plan.client)
        turns = itertools.count()  # two equal phases see the data in different orders
        features = self._features_of(plan, down, indices)

        def batches(phase: Phase) -> Iterable[tuple[Tensor, Tensor]]:
            keys = ("batches", down.round_index, plan.client, next(turns))
            dataset, places, augment = self._dataset, indices, self._augment
            if features is not None:
                dataset, places, augment = features.dataset, np.arange(len(indices)), None
            return client_batches(
                dataset, places, batch_size=phase.batch_size, epochs=phase.epochs, steps=phase.steps,
                generator=rng.torch_generator(self._seed, *keys), augment=augment, drop_last=phase.drop_last,
                at_once=features is None,
            )

        if self._cap.enforces and budget_bytes is not None and self._thread.must_rehearse(
            plan, len(indices), peak_bytes=task["peak_bytes"], budget_bytes=budget_bytes
        ):
            shape = self._strategy.problem.chain.input_shape
            rehearse(self._strategy, plan, skeleton, values, form.regions, self._settings, input_shape=shape,
                     num_samples=len(indices), device=self._device)
            skeleton = self._empty_skeleton(plan)
        # At full batches a plan's peak is the same for every client: those without a budget need one measurement a plan.
        measure_peak = budget_bytes is not None or plan.cost_key() not in self._measured
        meter = None
        try:
            with self._cap.guard(budget_bytes, measure_peak=measure_peak) as meter:
                result = run_plan(
                    self._strategy, plan, skeleton, values, form.regions, batches, self._settings,
                    rate_factor=down.rate_factor, device=self._device, generator=generator, after_batch=self._after_batch,
                    # Copies: the state counts against the budget, and what another try did to it is not seen here.
                    client_state={name: value.clone() for name, value in client_state.items()},
                    draw=lambda n: int(draws.integers(n)), features=features,
                )
                report.loss = float(result.loss_sum) / max(1, result.num_visits)
                report.loss_rms = math.sqrt(float(result.loss_square_sum) / max(1, result.num_visits))
        finally:
            report.peak_bytes = meter.peak_bytes if meter is not None else None
        self._measured.add(plan.cost_key())
        report.num_visits, report.num_steps = result.num_visits, result.num_steps
        return on_cpu(result.update, self._device), on_cpu(result.client_state, self._device)

    def _features_of(self, plan: Plan, down: Down, indices: np.ndarray) -> ClientFeatures | None:
        """What the plan's client trains on in the place of its samples, if it does; as far as it is there it is whole."""
        feed = self._strategy.feed(plan)
        if feed is None:
            return None
        assert down.home is not None, "a strategy whose clients train on features keeps state"
        if self._settings.augment != "none" and not self._warned_augment:
            self._warned_augment = True
            logger.warning("augmentation ('%s') is applied as long as clients train on their samples themselves, not to "
                           "features that they keep of them (said once)", self._settings.augment)
        features = ClientFeatures(self._strategy.problem.chain, feed, down.home, plan.client, self._dataset, indices)
        features.check()
        return features

    def _after_batch(self) -> None:
        if self._abandoned():
            raise RankLost("another rank of this job is gone; the round is abandoned.")

    def _warn(self, round_index: int, report: ClientReport, case: tuple[str, int | None]) -> None:
        """Log a failure; running out of memory once for each plan and budget, since it will happen every round."""
        if report.status == "oom":
            if case in self._warned:
                return
            self._warned.add(case)
        logger.warning("round %d client %d %s: %s", round_index, report.client, report.reason, report.detail)

    def _why_not_finite(self, plan: Plan) -> str:
        """What to look at when a client's update is not finite: its data, else the learning rate."""
        try:
            indices = self._partition.indices(plan.client)[:_LOOKED_AT]
            for part in np.array_split(indices, -(-len(indices) // plan.phases[0].batch_size)):
                images = self._dataset.batch(part)[0]
                bad = (~images.isfinite()).flatten(1).any(dim=1).nonzero()
                if len(bad):
                    return (f" The loss was not finite because the client's data are not: check the data (training sample "
                            f"{part[int(bad[0])]} holds NaN or infinity).")
        except Exception:  # the data were read a moment ago; no explanation is worth the rank
            return ""
        what = "data" if len(indices) < _LOOKED_AT else f"first {_LOOKED_AT} samples"
        return f" The client's {what} are finite: check the learning rate (`client.learning_rate`, `client.clip_norm`)."
