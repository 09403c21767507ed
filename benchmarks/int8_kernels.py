"""8-bit kernels against float32: time and error of each layer's shape, and of whole frozen prefixes.

    python benchmarks/int8_kernels.py [--models resnet18 …] [--batch 32] [--repeats 9] [--markdown FILE]

Layers: every shape of convolution and linear map in the models, forwards and backwards to the input, on one thread, with
inputs as an 8-bit layer leaves them (channels last), against float32 on contiguous ones; interleaved, medians of the ratio
8 bits / float32. Quantising the input counts. Forwards, half of the inputs are zeros, as behind a ReLU.

Prefixes: the first half of a model's units, frozen, without gradient: as :func:`dfed.blocks.freeze_int8` makes them, against
float32 in evaluation mode.

Passing: back through all units behind the first but the head, frozen: only the backward pass, to the first unit's output.

The rules of `dfed/blocks/int8_table.py` are read off these tables. Last line: one JSON object. `forward_ratio_median` and
`gradient_ratio_median` are over the shapes for which `choose` takes an 8-bit kernel; errors likewise, norm over norm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfed import rng
from dfed.blocks import freeze_int8
from dfed.blocks.folding import Uses
from dfed.blocks.int8 import quantise
from dfed.blocks.int8_choice import choose
from dfed.blocks.int8_kernels import ConvGradient, Int8Conv, Int8Linear, LinearGradient
from dfed.blocks.int8_table import ConvShape, LinearShape
from dfed.client import Skeleton
from dfed.models import Chain, build_chain, materialise

SHAPE, CLASSES = (3, 32, 32), 10
MODELS = ("resnet18", "mobilenet_v2", "vgg11_bn", "vit_tiny")
CPU = torch.device("cpu")


def frozen(name: str) -> Chain:
    """The model on the meta device, without gradients."""
    return build_chain(name, {}, input_shape=SHAPE, num_classes=CLASSES).skeleton().requires_grad_(False)


def shapes(models: list[str], batch: int) -> dict[ConvShape | LinearShape, tuple[tuple[int, ...], str]]:
    """Each shape of layer, with that of its input and the first place where it occurs."""
    found: dict[ConvShape | LinearShape, tuple[tuple[int, ...], str]] = {}
    for name in models:
        chain, shape = frozen(name), SHAPE
        for unit in chain.unit_names:
            uses = Uses(chain.unit(unit), shape)
            for layer_name, layer in uses.layers.items():
                x = (batch, *uses.inputs[layer_name].shape[1:])
                found.setdefault(_shape(layer, x), (x, f"{name} {unit}.{layer_name}"))
            shape = chain.output_shapes()[unit]
    return found


def _shape(layer: Any, x: tuple[int, ...]) -> ConvShape | LinearShape:
    if isinstance(layer, nn.Linear):
        return LinearShape(layer.in_features, layer.out_features)
    return ConvShape(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                     layer.groups, x[2:])  # type: ignore[arg-type]


def ratio(work: Callable[[], object], reference: Callable[[], object], repeats: int) -> float:
    """Median over the repeats of the time of ``work`` over that of ``reference``, interleaved; two more go first."""
    ratios = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        middle = time.perf_counter()
        reference()
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return statistics.median(ratios[2:])


def error(got: Tensor, right: Tensor) -> float:
    """Norm of the difference over the norm of what is right."""
    return float((got - right).norm() / right.norm())


def layer(shape: ConvShape | LinearShape, x_shape: tuple[int, ...], repeats: int) -> tuple[float, float, float, float]:
    """Ratio and error of the forward pass, then of the gradient; NaN where there is no 8-bit gradient."""
    generator = rng.torch_generator(0, "layer")
    x = torch.randn(x_shape, generator=generator).relu()
    if isinstance(shape, LinearShape):
        weight = torch.randn(shape.out_features, shape.in_features, generator=generator)
        codes, scale = quantise(weight)
        forward, backward = Int8Linear(codes, scale, None), LinearGradient(codes, scale)
        right = F.linear(x, weight)
        grad = torch.randn(right.shape, generator=generator)
        return (ratio(lambda: forward(x), lambda: F.linear(x, weight), repeats), error(forward(x), right),
                ratio(lambda: backward(grad, x.shape), lambda: grad @ weight, repeats),
                error(backward(grad, x.shape), grad @ weight))
    weight = torch.randn(shape.out_channels, shape.in_channels // shape.groups, *shape.kernel, generator=generator)
    codes, scale = quantise(weight)
    geometry = (shape.stride, shape.padding, shape.dilation, shape.groups)
    conv = Int8Conv(codes, scale, None, shape)
    right = F.conv2d(x, weight, None, *geometry)
    grad = torch.randn(right.shape, generator=generator)
    last_x, last_grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    forward_ratio = ratio(lambda: conv(last_x), lambda: F.conv2d(x, weight, None, *geometry), repeats)
    forward_error = error(conv(last_x), right)
    if not ConvGradient.can(shape):
        return forward_ratio, forward_error, float("nan"), float("nan")
    back = ConvGradient(codes, scale, shape)

    def plain() -> Tensor:
        return torch.nn.grad.conv2d_input(x.shape, weight, grad, *geometry)

    return (forward_ratio, forward_error, ratio(lambda: back(last_grad, x.shape), plain, repeats),
            error(back(last_grad, x.shape), plain()))


def halves(name: str, start: int, stop: int, passes_gradient: bool) -> tuple[Chain, Chain]:
    """A model in float32 and one whose units from ``start`` up to ``stop`` are frozen in 8 bits, of the same values."""
    chain = frozen(name)
    real = materialise(chain.skeleton(), rng.torch_generator(0, "init")).eval()
    values = {key: value for key, value in real.state_dict().items() if value.is_floating_point()}
    inputs = [SHAPE, *chain.output_shapes().values()]
    for place in range(start, stop):
        unit = chain.unit(chain.unit_names[place])
        freeze_int8(unit, inputs[place], passes_gradient=passes_gradient, dense=place == stop - 1)
    Skeleton(chain.eval()).load(values, CPU)
    return real, chain


def prefix(name: str, batch: int, repeats: int) -> float:
    """Time of the frozen first half of a model in 8 bits over that in float32."""
    stop = len(frozen(name)) // 2
    real, chain = halves(name, 0, stop, passes_gradient=False)
    x = torch.randn(batch, *SHAPE, generator=rng.torch_generator(0, "images"))
    with torch.no_grad():
        return ratio(lambda: chain.run(x, stop=stop), lambda: real.run(x, stop=stop), repeats)


def passing(name: str, batch: int, repeats: int) -> float:
    """Time of the gradient's way back through frozen units in 8 bits over that in float32."""
    stop = len(frozen(name)) - 1
    real, chain = halves(name, 1, stop, passes_gradient=True)
    generator = rng.torch_generator(0, "features")
    x = torch.randn(batch, *real.output_shapes()[real.unit_names[0]], generator=generator, requires_grad=True)
    outs = [model.run(x, 1, stop) for model in (chain, real)]
    grad = torch.randn(outs[0].shape, generator=generator)
    calls = [lambda out=out: torch.autograd.grad(out, x, grad, retain_graph=True) for out in outs]
    return ratio(*calls, repeats)


def main() -> None:
    """Measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| layer | shape | forward | error | gradient | error | chosen |", "|---|---|---:|---:|---:|---:|---|"]
    chosen: dict[str, list[tuple[float, float]]] = {"forward": [], "gradient": []}
    for shape, (x_shape, place) in shapes(options.models, options.batch).items():
        figures, choice = layer(shape, x_shape, options.repeats), choose(shape)
        for way, taken, pair in (("forward", choice.forward, figures[:2]), ("gradient", choice.gradient, figures[2:])):
            chosen[way] += [pair] * taken
        ways = [way for way in ("forward", "gradient") if getattr(choice, way)]
        lines.append(f"| {place} | {_words(shape)} | {figures[0]:.2f} | {figures[1]:.2%} | {figures[2]:.2f} | {figures[3]:.2%} "
                     f"| {', '.join(ways) or 'float32'} |")
        print(lines[-1], flush=True)
    prefixes = {name: prefix(name, options.batch, options.repeats) for name in options.models}
    passings = {name: passing(name, options.batch, options.repeats) for name in options.models}
    lines += ["", "| 8 bits / float32 | first half | gradient through all but the ends |", "|---|---:|---:|"]
    lines += [f"| {name} | {value:.2f} | {passings[name]:.2f} |" for name, value in prefixes.items()]
    print("\n".join(lines[-2 - len(prefixes):]))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(json.dumps({
        "forward_ratio_median": round(statistics.median(ratio for ratio, _ in chosen["forward"]), 3),
        "gradient_ratio_median": round(statistics.median(ratio for ratio, _ in chosen["gradient"]), 3),
        "prefix_ratio": {name: round(value, 3) for name, value in prefixes.items()},
        "passing_ratio": {name: round(value, 3) for name, value in passings.items()},
        "worst_forward_error": round(max(error for _, error in chosen["forward"]), 4),
        "worst_gradient_error": round(max(error for _, error in chosen["gradient"]), 4),
    }))


def _words(shape: ConvShape | LinearShape) -> str:
    if isinstance(shape, LinearShape):
        return f"{shape.in_features} → {shape.out_features}"
    groups = "" if shape.groups == 1 else f" / {shape.groups}"
    channels = f"{shape.in_channels} → {shape.out_channels}{groups}"
    return f"{shape.kernel[0]}×{shape.kernel[1]}, {channels}, stride {shape.stride[0]}, {shape.size[0]}×{shape.size[1]}"


if __name__ == "__main__":
    main()
