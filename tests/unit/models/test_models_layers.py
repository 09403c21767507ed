"""Keyed layers against torch's and torchvision's own, bit by bit."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from dfed.errors import ConfigError, DfedError
from dfed.models.layers import ChannelDropout, Dropout, StochasticDepth, keyed, norm_layer, num_groups, use_cifar_stem
from dfed.rng import torch_generator

torch.set_num_threads(1)

PAIRS = [
    (Dropout(0.3), nn.Dropout(0.3), (5, 7, 3, 2)),
    (Dropout(1.0), nn.Dropout(1.0), (5, 7)),
    (ChannelDropout(0.3), nn.Dropout1d(0.3), (5, 7, 3)),
    (ChannelDropout(0.3), nn.Dropout2d(0.3), (5, 7, 3, 2)),
    (ChannelDropout(0.3), nn.Dropout3d(0.3), (5, 7, 3, 2, 2)),
    (StochasticDepth(0.3, "row"), torchvision.ops.StochasticDepth(0.3, "row"), (9, 7, 3)),
    (StochasticDepth(0.3, "batch"), torchvision.ops.StochasticDepth(0.3, "batch"), (9, 7, 3)),
]


@pytest.mark.parametrize(("layer", "reference", "shape"), PAIRS, ids=lambda value: str(value))
def test_keyed_layers_match_torch_to_the_bit(layer, reference, shape):
    for training in (True, False):
        layer.train(training)
        reference.train(training)
        layer.generator = torch_generator(3, "dropout")
        ours = torch.randn(shape, generator=torch_generator(3, "x")).requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(torch_generator(3, "dropout").get_state())
            expected = [reference(theirs), reference(theirs)]
        got = [layer(ours), layer(ours)]  # the second draw follows on the first
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        (got[0] * got[1]).sum().backward()
        (expected[0] * expected[1]).sum().backward()
        assert torch.equal(ours.grad, theirs.grad)


def test_keyed_layers_need_a_generator_only_where_they_draw():
    x = torch.ones(4, 3, 2, 2)
    for layer in (Dropout(0.5), ChannelDropout(0.5), StochasticDepth(0.5, "row")):
        with pytest.raises(DfedError, match=f"{type(layer).__name__} must have a generator in training mode"):
            layer(x)
        assert layer.eval()(x) is x
        layer.train()
        layer.p = 0.0
        assert layer(x) is x
        layer.p = 0.5
        assert layer(x.to("meta")).is_meta
        layer.generator = type("Elsewhere", (), {"device": torch.device("cuda")})()
        with pytest.raises(DfedError, match=r"device of its input \(cpu\), but is on cuda"):
            layer(x)
    for make in (Dropout, lambda p: StochasticDepth(p, "row")):
        with pytest.raises(ConfigError, match=r"`p` must be at least 0 and at most 1, but is 1.5"):
            make(1.5)
    with pytest.raises(ConfigError, match="`mode` must be 'row' or 'batch', but is 'rows'"):
        StochasticDepth(0.5, "rows")


def test_keyed_replaces_layers_where_they_stand():
    encoder = torchvision.models.vision_transformer.EncoderBlock(2, 8, 16, 0.25, 0.0)
    module = nn.Sequential(nn.Dropout(0.1), encoder, torchvision.ops.StochasticDepth(0.2, "batch").eval())
    assert keyed(module, "unit") is module
    assert [type(child).__name__ for child in module] == ["Dropout", "EncoderBlock", "StochasticDepth"]
    assert isinstance(module[0], Dropout)
    assert module[0].p == 0.1
    assert isinstance(module[2], StochasticDepth)
    assert (module[2].p, module[2].mode, module[2].training) == (0.2, "batch", False)
    inside = [layer for layer in encoder.modules() if isinstance(layer, Dropout)]
    assert len(inside) == 3
    assert not any(isinstance(layer, nn.Dropout) for layer in module.modules())
    assert keyed(inside[0], "unit") is inside[0]
    with pytest.raises(ConfigError, match=r"`unit.0` must draw .* DropBlock3d"):
        keyed(nn.Sequential(torchvision.ops.DropBlock3d(0.1, 3)), "unit")
    swin = torchvision.models.swin_transformer.ShiftedWindowAttention(8, [2, 2], [0, 0], 2, attention_dropout=0.1)
    with pytest.raises(ConfigError, match=r"`unit.attention_dropout` must be 0, for ShiftedWindowAttention"):
        keyed(swin, "unit")


def test_group_norms_divide_the_channels():
    assert {c: num_groups(c) for c in (1, 2, 3, 4, 16, 24, 28, 64, 96, 76, 512, 1280)} == {
        **{1: 1, 2: 1, 3: 1, 4: 2, 16: 8, 24: 12, 28: 14, 64: 32, 96: 32, 76: 19, 512: 32, 1280: 32}
    }
    for channels in range(2, 200):
        groups = num_groups(channels)
        assert groups <= 32
        assert channels % groups == 0
        assert channels // groups >= 2
    assert isinstance(norm_layer("batch")(8), nn.BatchNorm2d)
    group = norm_layer("group")(48)
    assert (group.num_groups, group.num_channels) == (24, 48)


def test_stem_is_chosen_by_the_image():
    assert [use_cifar_stem("auto", (3, size, 64)) for size in (28, 63, 64, 224)] == [True, True, False, False]
    assert use_cifar_stem("cifar", (3, 224, 224))
    assert not use_cifar_stem("imagenet", (3, 28, 28))


@pytest.mark.parametrize("p", [0.25, 0.5, 0.1, 0.9, 1e-6, 1 - 1e-6])
def test_dropout_of_large_inputs_keeps_the_right_share_each_entry_by_itself(p):
    layer = Dropout(p)
    layer.generator = torch_generator(4, "large")
    x = torch.ones(513, 257)  # not a multiple of the four entries of a draw
    y = layer(x)
    kept = min(max(round((1 - p) * 2**16), 1), 2**16 - 1) / 2**16
    assert abs(kept - (1 - p)) <= 2**-16
    assert set(y.unique().tolist()) <= {0.0, float(torch.tensor(1.0) / kept)}
    alive = (y != 0).double()
    spread = (kept * (1 - kept)) ** 0.5
    # Five standard errors: the share over all entries, over each of a draw's four places, and of equal neighbours.
    assert abs(alive.mean() - kept) < 5 * spread / x.numel() ** 0.5
    flat = alive.view(-1)
    for lane in range(4):
        assert abs(flat[lane::4].mean() - kept) < 5 * spread / (x.numel() / 4) ** 0.5
    both = (flat[:-1] * flat[1:]).mean()
    assert abs(both - kept**2) < 5 * max(spread, 1e-3) / x.numel() ** 0.5 * 2
    again = Dropout(p)
    again.generator = torch_generator(4, "large")
    assert torch.equal(again(x), y)
