"""The profile of a chain: what each unit costs in parameters, arithmetic, activations, bytes and time."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfed import rng
from dfed.client import Skeleton
from dfed.memory import predict_course, predict_levels
from dfed.models import Chain, materialise
from dfed.planner.flops import flop_counter
from dfed.planner.store import Store, describe

__all__ = ["UnitProfile", "measure_units", "profile_chain"]

_BATCH = 2  # batch norm in training wants more than one value a channel


@dataclass(frozen=True, kw_only=True)
class UnitProfile:
    """One unit of a chain. Figures of arithmetic and activations are for one sample.

    Attributes:
        num_params: Parameters.
        state_bytes: Parameters and floating-point buffers as float32: what crosses down or up, header apart.
        forward_flops, backward_flops: Floating-point operations (a product and a sum are two) of training the unit, with
            the gradient of its input unless it is the first.
        activation_bytes: What the unit's forward pass leaves in memory until its backward pass, its output included.
        output_shape: Without the batch dimension.
    """

    name: str
    num_params: int
    state_bytes: int
    forward_flops: float
    backward_flops: float
    activation_bytes: float
    output_shape: tuple[int, ...]


def profile_chain(chain: Chain, store: Store | None = None) -> list[UnitProfile]:
    """The profile of every unit, in order. Nothing is allocated or run."""
    rows = (store or Store(None)).get(["profile", describe(chain)], lambda: [asdict(row) for row in _profile(chain)])
    return [UnitProfile(**{**row, "output_shape": tuple(row["output_shape"])}) for row in rows]


def _profile(chain: Chain) -> list[UnitProfile]:
    kept = _activation_bytes(chain)
    shapes, rows, before = chain.output_shapes(), [], chain.input_shape
    for number, name in enumerate(chain.unit_names):
        unit = chain.unit(name)
        forward, backward = _flops(unit, before, needs_input_gradient=number > 0)
        tensors = [tensor for tensor in unit.state_dict().values() if tensor.is_floating_point()]
        rows.append(UnitProfile(
            name=name,
            num_params=sum(parameter.numel() for parameter in unit.parameters()),
            state_bytes=4 * sum(tensor.numel() for tensor in tensors),
            forward_flops=forward, backward_flops=backward, activation_bytes=kept[number], output_shape=shapes[name],
        ))
        before = shapes[name]
    return rows


def _activation_bytes(chain: Chain) -> list[float]:
    """By unit, and for one sample."""
    skeleton = Skeleton(chain.skeleton().requires_grad_(True))

    def work(x: Tensor) -> Iterator[None]:
        for name in chain.unit_names:
            x = skeleton.model.unit(name)(x)
            yield

    levels = []
    for size in (_BATCH, 2 * _BATCH):
        levels.append(predict_levels(lambda size=size: _ready(skeleton, torch.empty(size, *chain.input_shape)), work))
    per_sample = [(large - small) / _BATCH for small, large in zip(*levels, strict=True)]
    return [after - before for before, after in zip([0.0, *per_sample[:-1]], per_sample, strict=True)]


def _ready(skeleton: Skeleton, x: Tensor) -> Tensor:
    """``x``, once the skeleton has storage and is in training mode."""
    model = skeleton.model
    skeleton.load({name: torch.empty(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()},
                  torch.device("cpu"))
    model.set_generator(torch.Generator())
    model.train()
    return x


def _flops(unit: nn.Module, shape: tuple[int, ...], *, needs_input_gradient: bool) -> tuple[float, float]:
    counts: list[int] = []
    alone = Chain([("alone", unit)], input_shape=shape, num_classes=1, name="alone")
    skeleton = Skeleton(alone.skeleton().requires_grad_(True))

    def work(x: Tensor) -> None:
        with flop_counter() as counter:
            out = skeleton.model(x)
            counts.append(counter.get_total_flops())
            if out.requires_grad:
                out.sum().backward()
            counts.append(counter.get_total_flops())

    # A copy, which a unit may change in place, as it may not a leaf.
    predict_course(lambda: _ready(skeleton, torch.empty(_BATCH, *shape, requires_grad=needs_input_gradient).clone()), work)
    return counts[0] / _BATCH, (counts[1] - counts[0]) / _BATCH


def measure_units(chain: Chain, batch_size: int, device: torch.device, *, repeats: int = 5,
                  store: Store | None = None) -> list[tuple[float, float]]:
    """Seconds that each unit's forward and backward pass take here on a mini-batch: medians, after one turn as warm-up.

    Args:
        repeats: Turns that count.
        store: Where the figures are kept for this processor, number of threads and batch size.
    """
    depends = ["seconds", describe(chain), batch_size, repeats, _processor(device), torch.get_num_threads()]
    rows = (store or Store(None)).get(depends, lambda: _measure(chain, batch_size, device, repeats))
    return [(forward, backward) for forward, backward in rows]


def _processor(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device)]
    return [platform.node(), platform.processor(), torch.backends.cpu.get_cpu_capability()]


def _measure(chain: Chain, batch_size: int, device: torch.device, repeats: int) -> list[list[float]]:
    model = materialise(chain.skeleton(), rng.torch_generator(0, "profile"), device).train().requires_grad_(True)
    generator = torch.Generator(device=device)
    model.set_generator(generator)
    x = torch.randn(batch_size, *chain.input_shape, generator=rng.torch_generator(0, "profile", "x")).to(device)
    rows: list[list[Any]] = []
    for number, name in enumerate(chain.unit_names):
        turns = [_one_turn(model.unit(name), x, device, needs_input_gradient=number > 0) for _ in range(repeats + 1)]
        rows.append([statistics.median(turn[part] for turn in turns[1:]) for part in (0, 1)])
        with torch.no_grad():
            x = model.unit(name)(x)
    return rows


def _one_turn(unit: nn.Module, x: Tensor, device: torch.device, *, needs_input_gradient: bool) -> tuple[float, float]:
    x = x.detach().requires_grad_(needs_input_gradient).clone()  # which a unit may change in place, as it may not a leaf
    start = _now(device)
    out = unit(x)
    middle = _now(device)
    if out.requires_grad:
        out.backward(torch.ones_like(out))
    end = _now(device)
    for parameter in unit.parameters():
        parameter.grad = None
    return middle - start, end - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
