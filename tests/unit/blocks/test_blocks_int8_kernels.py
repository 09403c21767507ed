"""8-bit kernels against float64: errors, exactness on whole numbers, ranges of processors, and which kernels are chosen."""

from __future__ import annotations

import logging
import math
import os
import platform
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dfed.blocks import int8_choice, int8_kernels
from dfed.blocks.int8 import quantise
from dfed.blocks.int8_choice import choose, works
from dfed.blocks.int8_kernels import ConvGradient, Int8Conv, Int8Linear, LinearGradient, quantise_input
from dfed.blocks.int8_table import MEASURED, Choice, ConvShape, LinearShape
from dfed.memory import predict_course
from dfed.planner.flops import flop_counter
from dfed.rng import torch_generator

torch.set_num_threads(1)

needs_kernels = pytest.mark.skipif(not works("conv"), reason="this torch has no 8-bit kernels on this processor")


def normal(*shape: int, key: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator(key, "normal"))


def whole(low: int, high: int, *shape: int, key: int = 0) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=torch_generator(key, "whole"))


def relative(got: torch.Tensor, right: torch.Tensor) -> float:
    return float((got.double() - right.double()).norm() / right.double().norm())


def last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 7, 4), (2, 3, 300, 300), (6, 4), (5,), (2, 1, 3, 3), (2, 3, 1, 1)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_codes_of_an_input(monkeypatch, full, shape, size):
    monkeypatch.setattr(int8_kernels, "has_full_range", lambda: full)
    signed = normal(*shape) * size
    for x, zero, largest in ((signed, 128 if full else 64, 127 if full else 63), (signed.abs(), 0, 255 if full else 127)):
        codes, scale, got_zero = quantise_input(x)
        assert (codes.dtype, codes.shape, got_zero) == (torch.uint8, x.shape, zero)
        assert scale == pytest.approx(float(x.abs().max()) / largest, rel=1e-6)  # float32's rounding
        steps = codes.double().numpy() - zero
        assert np.abs(steps).max() == largest
        # Half a step, and the rounding of a number up to 255 in float32, twice.
        assert np.abs(steps - x.double().numpy() / scale).max() <= 0.5 + 255 * 2.0**-23
        if x.ndim == 4:
            assert codes.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(quantise_input(last(x))[0], codes)


def test_codes_of_odd_inputs():
    assert quantise_input(torch.zeros(2, 3))[:2][1] == 1.0
    assert not quantise_input(torch.full((2, 3), 1e-44))[0].any()  # no scale of full precision: as if zero
    for odd in (math.nan, math.inf, -math.inf):
        codes, scale, zero = quantise_input(torch.tensor([[0.0, 1.0, odd]]))
        assert math.isnan(scale)
        assert (codes == zero).all()
    assert quantise_input(torch.empty(0, 3, 4, 4))[0].shape == (0, 3, 4, 4)
    half = quantise_input(torch.tensor([0.5, 1.5, 2.5, 255.0]))
    assert half[0].tolist() == [0, 2, 2, 255] or not int8_kernels.has_full_range()  # halves go to the even code
    codes, scale, zero = quantise_input(torch.tensor([-9.0, -1.0, 0.0, 2.0, 9.0]), scale=2.0**-5)
    largest = 127 if int8_kernels.has_full_range() else 63
    assert (codes.int() - zero).tolist() == [-largest, -32, 0, min(64, largest), largest]
    assert scale == 2.0**-5


CASES = [  # channels in and out, kernel, stride, padding, dilation, groups, height and width
    ConvShape(3, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, (16, 16)),
    ConvShape(64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, (8, 8)),
    ConvShape(64, 128, (3, 3), (2, 2), (1, 1), (1, 1), 1, (9, 9)),
    ConvShape(32, 16, (3, 3), (2, 2), (1, 1), (1, 1), 1, (8, 8)),
    ConvShape(20, 12, (3, 3), (1, 1), (1, 1), (1, 1), 1, (7, 5)),
    ConvShape(64, 128, (1, 1), (2, 2), (0, 0), (1, 1), 1, (9, 8)),
    ConvShape(144, 24, (1, 1), (1, 1), (0, 0), (1, 1), 1, (6, 6)),
    ConvShape(1, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1, (12, 12)),
    ConvShape(3, 64, (7, 7), (2, 2), (3, 3), (1, 1), 1, (33, 33)),
    ConvShape(3, 48, (4, 4), (4, 4), (0, 0), (1, 1), 1, (18, 16)),
    ConvShape(16, 24, (5, 3), (3, 2), (2, 0), (1, 1), 1, (17, 14)),
    ConvShape(16, 24, (3, 3), (1, 1), (2, 2), (2, 2), 1, (11, 11)),
    ConvShape(16, 24, (3, 3), (2, 1), (1, 2), (1, 2), 1, (11, 10)),
    ConvShape(16, 24, (2, 2), (1, 1), (0, 0), (1, 1), 1, (5, 5)),
    ConvShape(32, 64, (3, 3), (1, 1), (1, 1), (1, 1), 4, (9, 9)),
    ConvShape(32, 64, (3, 3), (2, 2), (1, 1), (1, 1), 2, (9, 9)),
    ConvShape(24, 24, (3, 3), (1, 1), (1, 1), (1, 1), 24, (9, 9)),
    ConvShape(24, 48, (3, 3), (2, 2), (1, 1), (1, 1), 24, (10, 10)),
    ConvShape(512, 512, (3, 3), (1, 1), (1, 1), (1, 1), 1, (2, 2)),
]


def weight_of(shape: ConvShape) -> tuple[int, ...]:
    return (shape.out_channels, shape.in_channels // shape.groups, *shape.kernel)


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: ConvShape) -> torch.Tensor:
    return F.conv2d(x, weight, bias, shape.stride, shape.padding, shape.dilation, shape.groups)


def back(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, shape: ConvShape) -> torch.Tensor:
    return torch.nn.grad.conv2d_input(x.shape, weight, grad, shape.stride, shape.padding, shape.dilation, shape.groups)


@needs_kernels
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_convolution_and_gradient_against_float64(shape):
    weight, bias = normal(*weight_of(shape)), normal(shape.out_channels)
    codes, scale = quantise(weight)
    conv, gradient = Int8Conv(codes, scale, bias, shape), ConvGradient(codes, scale, shape)
    for x in (normal(4, shape.in_channels, *shape.size, key=1), normal(1, shape.in_channels, *shape.size, key=2).relu()):
        right = convolve(x.double(), weight.double(), bias.double(), shape)
        got = conv(x)
        assert (got.dtype, got.shape) == (torch.float32, right.shape)
        # An error of scale / √12, where the scale is the largest over 127 and the largest is 3 to 5 times the size of a normal
        # number: 0.7 to 1.1 %, from inputs and from weights.
        assert relative(got, right) < 0.03
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(conv(last(x)), got)
        assert torch.equal(conv(x), got)
        assert relative(conv(x.bfloat16()), right) < 0.03
        assert conv(x.bfloat16()).dtype == torch.bfloat16
        grad = normal(*right.shape, key=3)
        right_grad = back(x, weight.double(), grad.double(), shape)
        got_grad = gradient(grad, x.shape)
        assert (got_grad.dtype, got_grad.shape) == (torch.float32, x.shape)
        # As above; channels of different scales share the range of the gradient.
        assert relative(got_grad, right_grad) < 0.05
        assert torch.equal(gradient(last(grad), x.shape), got_grad)
        assert gradient(grad.bfloat16(), x.shape).dtype == torch.bfloat16


@needs_kernels
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_whole_numbers_are_exact(shape):
    largest = 127 if int8_kernels.has_full_range() else 63
    codes, scale = whole(-127, 127, *weight_of(shape)).to(torch.int8), torch.ones(shape.out_channels)
    bias = whole(-1000, 1000, shape.out_channels, key=1)
    for low, high in ((-largest, largest), (0, 2 * largest + 1)):
        x = whole(low, high, 2, shape.in_channels, *shape.size, key=2)
        x[:, 0, 0, 0] = high if low == 0 else low  # the scale is 1
        # Sums of fewer than 2¹³ products below 2¹⁵ are below 2²⁸: exact in float64, rounded once to float32.
        right = convolve(x.double(), codes.double(), bias.double(), shape)
        assert torch.equal(Int8Conv(codes, scale, bias.float(), shape)(x.float()), right.float()) or relative(
            Int8Conv(codes, scale, bias.float(), shape)(x.float()), right) < 2.0**-24  # sum and bias are rounded apart
        grad = whole(low, high, *right.shape, key=3)
        grad[:, 0, 0, 0] = high if low == 0 else low
        scales = 2.0 ** whole(-3, 3, shape.out_channels)
        got = ConvGradient(codes, scales, shape)(grad / scales.view(-1, 1, 1), x.shape)
        assert torch.equal(got, back(x, codes.double(), grad.double(), shape).float())


@needs_kernels
@pytest.mark.parametrize("sizes", [(192, 768), (768, 192), (7, 5), (1, 1), (100, 33)])
@pytest.mark.parametrize("leading", [(4,), (3, 5), (2, 3, 4), ()])
def test_linear_maps(sizes, leading):
    weight, bias, x = normal(sizes[1], sizes[0]), normal(sizes[1]), normal(*leading, sizes[0], key=1)
    if not leading:
        x = x[None]
    codes, scale = quantise(weight)
    right, got = F.linear(x.double(), weight.double(), bias.double()), Int8Linear(codes, scale, bias)(x)
    assert (got.dtype, got.shape) == (torch.float32, right.shape)
    assert relative(got, right) < 0.03  # as for convolutions
    grad = normal(*right.shape, key=2)
    back_got = LinearGradient(codes, scale)(grad, x.shape)
    assert back_got.shape == x.shape
    # One product a sum: its own error is not averaged with others'. Half a step of 127, twice, at the most.
    assert relative(back_got, grad.double() @ weight.double()) < 0.05
    numbers = whole(-63, 63, *x.shape)
    numbers.view(-1)[0] = -127 if int8_kernels.has_full_range() else -63
    exact = Int8Linear(codes, torch.ones_like(scale), None)(numbers.float())
    assert torch.equal(exact, F.linear(numbers.double(), codes.double()).float())


@needs_kernels
def test_odd_numbers_pass():
    shape = ConvShape(16, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, (6, 6))
    codes, scale = quantise(normal(8, 16, 3, 3))
    conv = Int8Conv(codes, scale, torch.arange(8.0), shape)
    assert conv(torch.empty(0, 16, 6, 6)).shape == (0, 8, 6, 6)
    assert torch.equal(conv(torch.zeros(1, 16, 6, 6)), torch.arange(8.0).view(1, 8, 1, 1).expand(1, 8, 6, 6))
    broken = normal(1, 16, 6, 6)
    broken[0, 3, 2, 2] = math.nan
    assert conv(broken).isnan().all()  # a scale for all: what is broken is seen, not lost
    other = normal(3, 16, 11, 4)  # of another size than it was packed for
    assert relative(conv(other), convolve(other, normal(8, 16, 3, 3), torch.arange(8.0), shape)) < 0.03  # as above
    assert relative(ConvGradient(codes, scale, shape)(normal(3, 8, 11, 4), other.shape),
                    back(other, normal(8, 16, 3, 3), normal(3, 8, 11, 4), shape)) < 0.05


@needs_kernels
@pytest.mark.parametrize("shape", CASES[:6], ids=str)
def test_without_storage_the_same_tensors_are_made_and_counted(shape):
    real_x = normal(2, shape.in_channels, *shape.size)
    weight = torch.empty(weight_of(shape), dtype=torch.int8)
    real = convolve(real_x, weight.float(), None, shape)

    def prepare():
        codes, scale = torch.empty(weight_of(shape), dtype=torch.int8), torch.empty(shape.out_channels)
        return (Int8Conv(codes, scale, None, shape), ConvGradient(codes, scale, shape), torch.empty(real_x.shape),
                torch.empty(real.shape))

    with flop_counter() as flops:
        course = predict_course(prepare, lambda made: made[0](made[2]))
    assert flops.get_total_flops() == 2 * real.numel() * weight[0].numel()
    entries = real_x.numel()
    if not shape.is_subsampled:
        # The codes, the piece that is being rounded and the codes with channels last; then these codes and the output.
        assert max(course) == max(2 * entries + 4 * min(entries, 2**17), entries + 4 * real.numel())

    def pass_back(made):
        assert made[1](made[3], real_x.shape).shape == real_x.shape

    assert max(predict_course(prepare, pass_back)) >= 4 * real_x.numel() + real.numel()
    got = Int8Conv(weight.to("meta"), torch.empty(shape.out_channels, device="meta"), None, shape)(real_x.to("meta"))
    assert (got.shape, got.device.type) == (real.shape, "meta")


@needs_kernels
def test_a_kernel_that_is_wrong_or_missing_is_never_chosen(monkeypatch, caplog):
    dense, linear = LinearShape(256, 256), ConvShape(64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, (8, 8))
    assert choose(dense) == choose(linear) == Choice(forward=True, gradient=True)
    right = int8_kernels._linear
    try:
        for wrong, text in ((lambda *args: right(*args) * 1.02, "is wrong"), (None, "fails")):
            works.cache_clear()
            caplog.clear()
            monkeypatch.setattr(int8_kernels, "_linear", wrong)
            with caplog.at_level(logging.WARNING):
                assert choose(dense) == Choice(forward=False, gradient=False)
                assert choose(dense) == Choice(forward=False, gradient=False)
                assert choose(linear) == Choice(forward=True, gradient=True)
            assert [record.getMessage().count(text) for record in caplog.records] == [1]
    finally:
        works.cache_clear()


_OLD = """
import torch
from dfed.blocks import int8_choice, int8_kernels
torch.set_num_threads(1)
for full in (True, False):
    int8_kernels.has_full_range = int8_choice.has_full_range = lambda: full
    int8_choice.works.cache_clear()
    print(*(int8_choice.works(kind) for kind in ("conv", "grouped conv", "linear")))
"""


@needs_kernels
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the older instructions are those of x86")
def test_the_smaller_range_is_right_where_bytes_saturate():
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _OLD], env=environment, capture_output=True, text=True, check=True)
    # With 8 bits the products saturate, and the trial sees it; with the smaller range they do not.
    assert done.stdout.split() == ["False"] * 3 + ["True"] * 3
    assert 2 * 127 * 127 <= 2**15 - 1 < 2 * 255 * 127


def test_the_rules_fit_the_table(monkeypatch):
    monkeypatch.setattr(int8_choice, "works", lambda kind: True)
    for timed in MEASURED:
        choice = choose(timed.shape)
        assert timed.gradient < 1 or not choice.gradient, timed
        assert timed.forward < 1.1 or not choice.forward, timed
    assert sum(choose(timed.shape).forward for timed in MEASURED) > len(MEASURED) / 2
    depthwise = ConvShape(96, 96, (3, 3), (1, 1), (1, 1), (1, 1), 96, (16, 16))
    assert choose(depthwise) == choose(LinearShape(512, 10)) == Choice(forward=False, gradient=False)
    blind = ConvShape(256, 256, (1, 1), (1, 1), (1, 1), (1, 1), 1, (8, 8))  # its outer outputs see padding only
    assert choose(blind) == Choice(forward=True, gradient=False)
    for small, large in pairwise(ConvShape(64, out, (3, 3), (1, 1), (1, 1), (1, 1), 1, (8, 8)) for out in (1, 2, 4, 64)):
        assert choose(small).forward <= choose(large).forward  # more products for each entry never make it worse
