"""Convolutions in parts against torch's own, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dfed.client import ClientSettings
from dfed.models import convolutions_in_parts
from dfed.models.conv_parts import _Convolution


@pytest.fixture
def taken(monkeypatch):
    """How many samples each convolution in parts takes at a time."""
    sizes, apply = [], _Convolution.apply

    def counted(size, *arguments):
        sizes.append(size)
        return apply(size, *arguments)

    monkeypatch.setattr(_Convolution, "apply", counted)
    return sizes


@pytest.mark.parametrize("options", [
    {"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}, {"kernel_size": (1, 3)},
    {"kernel_size": 3, "dilation": 2, "groups": 2}, {"kernel_size": 3, "padding": 1, "groups": 4, "stride": (1, 2)},
])
@pytest.mark.parametrize(("batch", "parts", "size"), [(8, 4, 2), (7, 3, 3), (5, 5, 1), (9, 4, 3)])
def test_it_is_the_convolution(options, batch, parts, size, taken):
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(4, 8, **options).double()
    frozen = nn.Conv2d(8, 8, 1).double().requires_grad_(False)
    x = torch.randn(batch, 4, 12, 10, generator=generator, dtype=torch.float64, requires_grad=True)

    def results(number):
        x.grad, weight = None, None
        conv.zero_grad(set_to_none=True)
        with convolutions_in_parts(number):
            out = frozen(conv(x).relu())
            weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
            (out * weight).sum().backward()
        return [out.detach(), x.grad, *(parameter.grad for parameter in conv.parameters())]

    whole = results(1)
    assert not taken
    in_parts = results(parts)
    assert taken == [size, size]
    for ours, theirs in zip(in_parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # sums of up to 1e3 terms, in another order
    assert frozen.weight.grad is None


def test_it_is_left_whole_where_parts_do_not_pay(taken):
    conv, x = nn.Conv2d(4, 64, 3), torch.randn(8, 4, 6, 6)
    with convolutions_in_parts(4):
        conv(x)  # 288 values of the input in each part; the weight has eight times as many
        assert taken == [2]
        conv(x[:, :, :5])  # 240 values
        conv(x[:1])  # nothing to part
        conv(x[0])  # no mini-batch
        nn.Conv2d(4, 8, 3)(x[:3])  # fewer samples than parts
        assert taken == [2, 1]
        nn.Conv2d(4, 64, 3, padding="same")(x)
        F.conv2d(x, conv.weight, padding=1)
    conv(x)
    assert taken == [2, 1]


def test_no_gradient_is_worked_out_that_nobody_asks_for():
    conv, x = nn.Conv2d(4, 8, 3, bias=False), torch.randn(8, 4, 12, 12)
    counts = []
    for parts in (1, 4):
        with convolutions_in_parts(parts), FlopCounterMode(display=False) as counter:
            conv(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 8 * 8 * 10 * 10 * 4 * 9  # forwards, and the weight's gradient
    with torch.no_grad(), convolutions_in_parts(4):
        assert not conv(x).requires_grad


def test_it_is_refused_under_autocast():
    assert ClientSettings(conv_parts=4).conv_parts == 4
    for given, message in [({"conv_parts": 4, "precision": "bf16"}, "must leave `conv_parts` at 1 with the precision 'bf16'"),
                           ({"conv_parts": 0}, "greater than or equal to 1")]:
        with pytest.raises(ValueError, match=message):
            ClientSettings.model_validate(given)
