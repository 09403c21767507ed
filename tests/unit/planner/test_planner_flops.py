"""Operations of a forward pass against sums by hand."""

import pytest

from dfed.models import build_chain
from dfed.planner.flops import forward_flops


def _convolution(size, channels_in, channels_out, kernel=3):
    return 2 * size * size * channels_in * channels_out * kernel * kernel


def test_a_residual_network_by_hand():
    chain = build_chain("resnet8", {"width": 4}, input_shape=(1, 28, 28), num_classes=10)
    by_hand = _convolution(28, 1, 4) + 2 * _convolution(28, 4, 4)
    by_hand += _convolution(14, 4, 8) + _convolution(14, 8, 8) + _convolution(7, 8, 16) + _convolution(7, 16, 16) + 2 * 16 * 10
    assert forward_flops(chain.skeleton(), (1, 28, 28)) == by_hand


@pytest.mark.parametrize("depth", [1, 2])
def test_attention_is_counted(depth):
    tokens, width = 1 + 7 * 7, 24
    chain = build_chain("vit_tiny", {"depth": depth, "width": width, "heads": 3}, input_shape=(1, 28, 28), num_classes=10)
    projections, attention, layers = 4 * width * width, 2 * tokens * width, 2 * width * 4 * width
    by_hand = depth * 2 * tokens * (projections + attention + layers) + 2 * 49 * 16 * width + 2 * width * 10
    assert forward_flops(chain.skeleton(), (1, 28, 28)) == by_hand
