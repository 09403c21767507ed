"""What local learning is made of: heads, layers joined into blocks, the choice of an exit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from central_problem import CPU, base
from local_problem import neuroflux

from dfed.blocks.local_blocks import join_layers
from dfed.blocks.local_heads import head_filters, local_head
from dfed.blocks.local_net import LocalNet
from dfed.central.config import load_train_config
from dfed.central.exits import choose_exit
from dfed.central.prepared import prepare
from dfed.errors import ConfigError
from dfed.models import build_chain, materialise

torch.set_num_threads(1)


def test_layers_are_joined_while_their_batches_are_alike():
    def blocks(rates, state, budget, rho, at_most=100, smallest=1):
        def peak(first, stop, batch):
            return batch * max(rates[first:stop]) + state * (stop - first)

        found = join_layers([smallest] * len(rates), peak, lambda size: size <= budget, at_most, rho)
        assert [block.index for block in found] == list(range(len(found)))
        assert all(block.peak_bytes == peak(block.first, block.stop, block.batch) <= budget for block in found)
        return [(block.first, block.stop, block.batch) for block in found]

    assert blocks([10, 8, 5, 2, 2], 0, 400, 0.4) == [(0, 2, 40), (2, 5, 80)]
    assert blocks([10, 8, 5, 2, 2], 0, 400, 0.0) == [(0, 1, 40), (1, 2, 50), (2, 3, 80), (3, 5, 100)]
    assert blocks([10, 8, 5, 2, 2], 0, 400, 2.0) == [(0, 5, 40)]
    assert blocks([5, 8, 10], 0, 400, 0.5) == [(0, 3, 40)]  # the smallest of its layers'
    assert blocks([5, 8, 10], 0, 400, 0.4) == [(0, 2, 50), (2, 3, 40)]
    assert blocks([10, 10, 10], 100, 400, 0.4) == [(0, 2, 20), (2, 3, 30)]  # the state of a third would leave too little
    assert blocks([10, 10, 10], 190, 400, 0.9) == [(0, 1, 21), (1, 2, 21), (2, 3, 21)]
    assert blocks([10, 10], 0, 10**9, 0.0, at_most=7) == [(0, 2, 7)]
    assert blocks([10, 10], 0, 20, 0.0, smallest=2) == [(0, 2, 2)]


def test_heads():
    chain = build_chain("resnet8", {"width": 16}, input_shape=(3, 32, 32), num_classes=10)

    def filters(heads, gamma=0.5, smallest=16, largest=256):
        return [head_filters(chain, place, place + 1, heads, gamma, smallest, largest) for place in range(4)]

    assert filters("classic") == [256] * 4
    assert filters("scaled") == [16, 16, 16, 32]
    assert filters("scaled", gamma=1.0, largest=40) == [16, 16, 32, 40]
    # The stem keeps 2 maps of 16 channels (the convolution's output, the norm's), a head 2 of f. A block keeps 4 of its own.
    matched = filters("memory_matched", smallest=1)
    assert matched[0] == 15  # its pooled fields count, too
    assert matched[1:] == [pytest.approx(2 * width, rel=0.05) for width in (16, 32, 64)]  # as above
    head = local_head(chain, 3, 5)
    assert [type(layer).__name__ for layer in head] == ["Conv2d", "BatchNorm2d", "ReLU", "AvgPool2d", "Flatten", "Linear"]
    assert head.fc.in_features == 20
    real = materialise(LocalNet(chain, lambda start, stop: 5).layer_model(2), torch.Generator()).eval()
    x, pooled = torch.randn(2, 16, 32, 32, generator=torch.Generator().manual_seed(1)), []
    real.local3.flatten.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    out = real.run(x, 0, 1)
    hidden = real.local3.norm(real.local3.conv(out)).clamp(min=0)
    real.run(out, 1)
    assert torch.allclose(pooled[0], F.adaptive_avg_pool2d(hidden, 2), rtol=1e-5, atol=1e-6)  # another order of sums

    odd = build_chain("cnn", {"channels": [4, 4, 4], "kernel": 3}, input_shape=(1, 12, 12), num_classes=3)  # 6, 3, 1 pixels
    pools = [local_head(odd, stop, 5) for stop in (1, 2, 3, 4)]
    assert [type(head[0]).__name__ for head in pools] == ["Conv2d", "Conv2d", "Conv2d", "Linear"]
    assert [head.fc.in_features for head in pools] == [20, 20, 5, 512]
    assert "norm" not in dict(pools[0].named_children())
    assert pools[0].conv.bias is not None
    assert head_filters(odd, 3, 4, "scaled", 0.5, 16, 256) is None

    vit = LocalNet(build_chain("vit_tiny", {"depth": 2}, input_shape=(3, 8, 8), num_classes=3), lambda start, stop: None)
    assert [(layer.start, layer.stop, layer.head) for layer in vit.layers] == [(0, 2, "local1"), (2, 3, "head")]
    assert list(dict(vit.head(0).named_children())) == ["ln", "fc"]
    single = build_chain("mlp", {"hidden": []}, input_shape=(1, 4, 4), num_classes=3)
    with pytest.raises(ConfigError, match="must have a unit before its last one, but 'mlp' has one unit in all"):
        LocalNet(single, lambda start, stop: None)
    with pytest.raises(ConfigError, match=r"`smallest_filters` must be at most `largest_filters` \(2\), but is 3"):
        neuroflux(blocks=None, largest_filters=2)


def test_the_exit_is_the_shallowest_within_the_tolerance():
    found = {"exit 1": 0.7, "exit 2": 0.89, "exit 3": 0.9, "exit 4": 0.85}
    assert [choose_exit(found, tolerance) for tolerance in (0.0, 0.02, 0.2)] == ["exit 3", "exit 2", "exit 1"]
    for best in range(1, 1001):  # in thousandths: what lies exactly at the tolerance is within it
        for less in (1, 5, 10, 100):
            if less <= best:
                pair = {"exit 1": (best - less) / 1000, "exit 2": best / 1000}
                assert choose_exit(pair, less / 1000) == "exit 1"
                assert choose_exit(pair, (less - 0.5) / 1000) == "exit 2"
    assert neuroflux(blocks=None).choose(found) is None
    with pytest.raises(ConfigError, match=r"`metrics.split` must be 'validation' for the method 'neuroflux' with these"):
        prepare(load_train_config(None, base={**base(), "method": {"name": "neuroflux", "exit_tolerance": 0.01}}), CPU)
