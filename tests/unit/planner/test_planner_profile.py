"""The profile of a chain against figures by hand, the costs of the whole, and what autograd really keeps."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from dfed.blocks import cut
from dfed.client import ClientSettings
from dfed.models import Chain, build_chain, materialise
from dfed.planner import Store, chain_costs, measure_units, profile_chain
from dfed.registry import MODELS
from dfed.rng import torch_generator

torch.set_num_threads(1)

CPU = torch.device("cpu")


def test_an_mlp_by_hand():
    chain = build_chain("mlp", {"hidden": [20, 30]}, input_shape=(2, 3, 4), num_classes=10)
    rows = profile_chain(chain)
    assert [row.name for row in rows] == ["hidden0", "hidden1", "head"]
    assert [row.num_params for row in rows] == [24 * 20 + 20, 20 * 30 + 30, 30 * 10 + 10]
    assert [row.state_bytes for row in rows] == [4 * row.num_params for row in rows]
    weights = [24 * 20, 20 * 30, 30 * 10]
    # A product and a sum for each weight; backward once for the weight and once for the input, which the first unit skips.
    assert [row.forward_flops for row in rows] == [2 * size for size in weights]
    assert [row.backward_flops for row in rows] == [2 * weights[0], 4 * weights[1], 4 * weights[2]]
    # ReLU works in place: each unit leaves its output and nothing else.
    assert [row.activation_bytes for row in rows] == [80, 120, 40]
    assert [row.output_shape for row in rows] == [(20,), (30,), (10,)]
    assert all(tensor.is_meta for tensor in chain.state_dict().values())


def test_a_cnn_by_hand():
    options = {"channels": [4, 6], "kernel": 3, "hidden": 10, "norm": "batch"}
    chain = build_chain("cnn", options, input_shape=(3, 8, 8), num_classes=5)
    conv0, conv1, hidden, head = profile_chain(chain)
    assert (conv0.num_params, conv1.num_params) == (4 * 3 * 9 + 8, 6 * 4 * 9 + 12)  # no bias; weight and bias of the norm
    assert conv0.state_bytes == 4 * (conv0.num_params + 8)  # mean and variance; the counter does not travel
    assert (hidden.num_params, head.num_params) == (24 * 10 + 10, 10 * 5 + 5)
    products = [64 * 4 * 3 * 9, 16 * 6 * 4 * 9, 24 * 10, 10 * 5]  # pixels · channels out · channels in · kernel
    rows = [conv0, conv1, hidden, head]
    assert [row.forward_flops for row in rows] == [2 * size for size in products]
    assert [row.backward_flops for row in rows] == [2 * products[0], *(4 * size for size in products[1:])]
    # The convolution's output, that of the norm (the ReLU's too), the pooled one with 8 bytes of index for each 4 of value.
    assert conv0.activation_bytes == 4 * (2 * 4 * 64 + 3 * 4 * 16)
    assert conv1.activation_bytes == 4 * (2 * 6 * 16 + 3 * 6 * 4)
    # Flattened is the same memory. The pooled image stays for the gradient of the weight.
    assert (hidden.activation_bytes, head.activation_bytes) == (40, 20)
    assert [row.output_shape for row in rows] == [(4, 4, 4), (6, 2, 2), (10,), (5,)]


def test_batch_and_trained_parts_do_not_matter():
    chain = build_chain("resnet8", {"width": 4}, input_shape=(3, 8, 8), num_classes=10)
    rows = profile_chain(chain)
    chain.unit("layer1_0").requires_grad_(False)
    assert profile_chain(chain) == rows
    assert not any(parameter.requires_grad for parameter in chain.unit("layer1_0").parameters())
    materialise(chain, torch_generator(0, "init")).eval()
    before = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    assert profile_chain(chain) == rows
    assert all(torch.equal(tensor, before[name]) for name, tensor in chain.state_dict().items())
    assert not chain.training


def levels_for_real(chain: Chain, batch_size: int) -> list[int]:
    """Bytes behind each unit in a real forward pass: what autograd has saved so far, and the unit's output.

    Parameters, buffers and the chain's input do not count, and a storage counts once.
    """
    x = torch.randn(batch_size, *chain.input_shape, generator=torch_generator(0, "x"))
    given = {tensor.untyped_storage().data_ptr() for tensor in [x, *chain.parameters(), *chain.buffers()]}
    saved: dict[int, torch.UntypedStorage] = {}  # held here, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage
        return tensor

    levels = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for name in chain.unit_names:
            x = chain.unit(name)(x)
            here = {pointer: storage.nbytes() for pointer, storage in saved.items()}
            here[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            levels.append(sum(here.values()))
    return levels


def trained(chain: Chain) -> Chain:
    materialise(chain, torch_generator(0, "init")).train()
    chain.set_generator(torch_generator(0, "layers"))
    return chain


OPTIONS = {"vit_tiny": {"depth": 2, "width": 24, "dropout": 0.1}, "cnn": {"norm": "batch", "dropout": [0.2, 0.2]}}


DEEPER = {"resnet20", "resnet34", "resnet56", "vgg16_bn", "vgg19_bn"}  # more of the units of another
PARTS = {"densenet40": ("block1_9", "block2_2"), "mobilenet_v2": (None, "block6"), "resnet50": (None, "layer2_2")}


@pytest.mark.parametrize("name", sorted({*MODELS} - DEEPER))
def test_every_kind_of_unit(name):
    size = 32 if name.startswith("vgg") else 12
    chain = build_chain(name, OPTIONS.get(name, {}), input_shape=(3, size, size), num_classes=10)
    if name in PARTS:
        with torch.device("meta"):
            head = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
            head(torch.empty(1, *chain.output_shapes()[chain.unit_names[chain.index_of(PARTS[name][1]) - 1]]))
        chain = cut(chain, *PARTS[name], end=[("end", head)])
    rows = profile_chain(chain)
    assert [row.name for row in rows] == list(chain.unit_names)
    assert {row.name: row.output_shape for row in rows} == chain.output_shapes()

    # Units add up to the whole.
    assert sum(row.num_params for row in rows) == sum(parameter.numel() for parameter in chain.parameters())
    floats = [tensor for tensor in chain.state_dict().values() if tensor.is_floating_point()]
    assert sum(row.state_bytes for row in rows) == sum(4 * tensor.numel() for tensor in floats)
    costs, plan = chain_costs(chain, ClientSettings(batch_size=4), CPU)
    assert sum(row.forward_flops + row.backward_flops for row in rows) == costs.flops(plan, 1)
    # Behind the first unit each has twice the work backward, for its weights and for its input. Attention's products are
    # worked out once more, which adds half of them.
    ratios = [row.backward_flops / row.forward_flops for row in rows]
    assert ratios[0] == (2 if name == "densenet40" else 1)  # a dense layer begins with a norm, which has weights as well
    assert all(2 <= ratio <= 2.5 if name == "vit_tiny" else ratio == 2 for ratio in ratios[1:])

    # What autograd keeps for real, as far as it grows with the batch: means and variances of a batch norm do not.
    trained(chain)
    small, large = levels_for_real(chain, 2), levels_for_real(chain, 6)
    per_sample = [(after - before) / 4 for before, after in zip(small, large, strict=True)]
    assert list(itertools.accumulate(row.activation_bytes for row in rows)) == per_sample
    assert all(row.activation_bytes > 0 for row in rows[:-1])


def test_a_grouped_convolution_by_hand():
    units = [("a", nn.Conv2d(4, 8, 1)), ("b", nn.Conv2d(8, 8, 3, padding=1, groups=8)), ("c", nn.Conv2d(8, 4, 3, groups=2)),
             ("up", nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)), ("head", nn.Sequential(nn.Flatten(), nn.Linear(96, 10)))]
    rows = profile_chain(Chain(units, input_shape=(4, 4, 4), num_classes=10, name="groups"))
    # Each output of a group takes in the channels of its group only; backward, both gradients take as much again.
    products = [16 * 8 * 4, 16 * 8 * 1 * 9, 4 * 4 * 4 * 9, 4 * 4 * 3 * 4, 96 * 10]
    assert [row.forward_flops for row in rows] == [2 * size for size in products]
    assert [row.backward_flops for row in rows] == [2 * products[0], *(4 * size for size in products[1:])]


def plain_layers() -> Chain:
    """A chain as an ``nn.Sequential`` makes it: units without parameters, and some that change their input."""
    units = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 5, 1),
             nn.Hardtanh(inplace=True), nn.Flatten(), nn.Linear(80, 10)]
    return Chain([(f"u{i}", unit) for i, unit in enumerate(units)], input_shape=(3, 8, 8), num_classes=10, name="plain")


def test_units_that_change_their_input():
    chain = plain_layers()
    rows = profile_chain(chain)
    pixels, pooled = 4 * 4 * 64, 4 * 4 * 16
    # Output; another for the norm; the ReLU works in place; values and 8-byte indices; output; what the next one keeps of its
    # input before it changes it; the same memory; output.
    assert [row.activation_bytes for row in rows] == [pixels, pixels, 0, 3 * pooled, 4 * 5 * 16, 4 * 5 * 16, 0, 40]
    assert [row.forward_flops for row in rows] == [2 * 64 * 4 * 27, 0, 0, 0, 2 * 16 * 5 * 4, 0, 0, 2 * 800]
    assert [row.num_params for row in rows] == [112, 8, 0, 0, 25, 0, 0, 810]
    assert sum(row.activation_bytes for row in rows) == (levels_for_real(trained(plain_layers()), 3)[-1]
                                                         - levels_for_real(trained(plain_layers()), 2)[-1])
    timed = measure_units(chain, 2, CPU, repeats=1)
    assert all(forward > 0 and backward > 0 for forward, backward in timed)


def test_a_profile_is_kept(tmp_path, monkeypatch):
    chain = build_chain("resnet8", {"width": 4}, input_shape=(3, 8, 8), num_classes=10)
    rows = profile_chain(chain, Store(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
    assert profile_chain(chain, Store(tmp_path)) == rows == profile_chain(chain)
    monkeypatch.setattr("dfed.planner.profile._profile", lambda chain: pytest.fail("it is read, not worked out again"))
    kept = profile_chain(chain, Store(tmp_path))
    assert kept == rows
    assert [type(row.output_shape) for row in kept] == [tuple] * 5


def test_seconds_of_units(tmp_path):
    options = {"channels": [4, 6], "hidden": 10, "norm": "batch", "dropout": [0.1, 0.1]}
    chain = build_chain("cnn", options, input_shape=(3, 8, 8), num_classes=5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    seconds = measure_units(chain, 4, CPU, repeats=3, store=Store(tmp_path))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert all(tensor.is_meta for tensor in chain.state_dict().values())
    assert len(seconds) == len(chain)
    assert all(0 < forward < 60 and 0 < backward < 60 for forward, backward in seconds)
    # Times never repeat themselves to the bit, so equal ones were kept.
    assert measure_units(chain, 4, CPU, repeats=3, store=Store(tmp_path)) == seconds
    assert len(list(tmp_path.iterdir())) == 1
    assert measure_units(chain, 4, CPU, repeats=3) != seconds
    others = [measure_units(chain, 5, CPU, repeats=3, store=Store(tmp_path)),
              measure_units(chain, 4, CPU, repeats=2, store=Store(tmp_path))]
    assert len({tuple(rows) for rows in [seconds, *others]}) == 3
    assert len(list(tmp_path.iterdir())) == 3
