"""What a training step at some depth costs, found by taking it on tensors without storage."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfed.central.method import VariantCosts
from dfed.central.peaks import Peaks
from dfed.central.session import Session
from dfed.memory import predict_course
from dfed.planner.costs import what_counts
from dfed.planner.flops import flop_counter, flops_of
from dfed.planner.store import describe

if TYPE_CHECKING:
    from dfed.central.prefix_method import PrefixMethod

__all__ = ["prefix_costs", "prefix_peak", "prefix_peaks"]

_CPU = torch.device("cpu")
_FLOP_BATCH = 2  # batch norm in training wants more than one value a channel

Loaded = tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]


def prefix_costs(method: PrefixMethod, depth: int) -> VariantCosts:
    """Costs of a depth, and of a step that trains it while the optimiser holds its tensors for all that is trained."""
    settings, model = method.problem.settings, method.build(depth)
    batch = min(settings.batch_size, method.problem.data.num_samples)
    depends, store = _depends(method, depth), method.problem.store
    micro = method.micro_batch
    peak = prefix_peak(method, depth, batch if micro is None else micro)
    work = store.get([*depends, "flops"], lambda: _training_flops(method, depth))
    forward = store.get([*depends, "forward"], lambda: _forward_flops(method, depth))
    return VariantCosts(
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        num_bytes=4 * sum(value.numel() for value in model.state_dict().values() if value.is_floating_point()),
        forward_flops=forward, training_flops=work[0], int8_flops=work[1], peak_bytes=peak, share=method.share_of(depth),
    )


def _depends(method: PrefixMethod, depth: int) -> list[Any]:
    """What predictions for a depth depend on."""
    return ["central", describe(method.problem.chain, method), what_counts(method.problem.settings), method.training_key(),
            method.stops, method.deepest, depth]


def prefix_peaks(method: PrefixMethod, depth: int) -> Peaks:
    """Predicted peak of steps on whole mini-batches, by their size, all that training keeps between them included."""
    course = functools.partial(_course, method, depth, micro=None)
    return Peaks(method.problem.store, [*_depends(method, depth), "peak"], course)


def prefix_peak(method: PrefixMethod, depth: int, size: int) -> int:
    """Predicted peak of steps on mini-batches as configured, of which ``size`` samples pass at a time."""
    problem = method.problem
    batch = min(problem.settings.batch_size, problem.data.num_samples)
    if size >= batch:
        return prefix_peaks(method, depth).alone(batch)
    depends = [*_depends(method, depth), "micro"]
    peaks = Peaks(problem.store, depends, lambda micro: _course(method, depth, 2 * micro, micro=micro))
    return peaks.at(size) + max(0, batch - 2 * size) * 4 * math.prod(problem.chain.input_shape)  # of which two parts are there


def _course(method: PrefixMethod, depth: int, batch: int, micro: int | None) -> list[int]:
    before, session = method.new_session(_CPU), method.new_session(_CPU)

    def work(loaded: Loaded) -> None:
        session.load(*loaded, 1.0)
        for _ in range(2):  # the second finds the first one's mini-batch and gradients
            _step(session, method, depth, batch, micro)

    return predict_course(lambda: _trained(before, method), work)


def _training_flops(method: PrefixMethod, depth: int) -> list[float]:
    session, counter = method.new_session(_CPU), flop_counter()

    def work(loaded: Loaded) -> None:
        session.load(*loaded, 1.0)
        with counter:
            _step(session, method, depth, _FLOP_BATCH)

    predict_course(lambda: _empty(session), work)
    return [count / _FLOP_BATCH for count in flops_of(counter)]


def _forward_flops(method: PrefixMethod, depth: int) -> float:
    session, counter = method.new_session(_CPU), flop_counter()

    def work(loaded: Loaded) -> None:
        session.load(*loaded, 1.0)
        session.model.set_generator(torch.Generator())
        # In training mode: in evaluation mode attention runs as one operator, whose arithmetic is not counted.
        with counter, torch.no_grad():
            session.model.at_depth(torch.empty(_FLOP_BATCH, *method.problem.chain.input_shape), depth)  # type: ignore[operator]

    predict_course(lambda: _empty(session), work)
    return counter.get_total_flops() / _FLOP_BATCH


def _empty(session: Session) -> Loaded:
    tensors = session.model.state_dict(keep_vars=True)  # as they are: nothing may touch what is no fake tensor
    return {name: torch.empty(value.shape, dtype=value.dtype) for name, value in tensors.items()}, {}


def _trained(session: Session, method: PrefixMethod) -> Loaded:
    """What there is after a step of all that is trained, the optimiser's tensors included."""
    session.load(*_empty(session), 1.0)
    _step(session, method, method.deepest, _FLOP_BATCH)
    loaded = session.take()
    session.unload()
    return loaded


def _step(session: Session, method: PrefixMethod, depth: int, batch: int, micro: int | None = None) -> None:
    session.model.set_generator(torch.Generator())
    x = torch.empty(batch, *method.problem.chain.input_shape)
    session.step(x, torch.zeros(batch, dtype=torch.int64), method.loss_at(depth), micro)  # type: ignore[arg-type]
