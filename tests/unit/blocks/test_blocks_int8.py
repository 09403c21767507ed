"""Frozen layers held as int8: their error, their gradients against autograd's, and what they keep."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfed.blocks import hold_int8, train_only
from dfed.blocks.int8 import Int8Conv2d, Int8Linear, dequantise, quantise
from dfed.memory import predict_levels, predict_peak
from dfed.models import build_chain, materialise
from dfed.rng import torch_generator

torch.set_num_threads(1)

ROUNDING = 127 * 2.0**-24  # of a number up to 127 to float32, in units of the scale


def normal(*shape: int, key: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator(key, "normal"))


@pytest.mark.parametrize("shape", [(7, 5), (6, 3, 3, 3), (4, 1, 5, 2), (3, 2, 1, 1), (1, 1)])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_error_of_an_entry_in_float64(shape, size):
    weight = normal(*shape) * size * 10.0 ** torch.arange(shape[0]).view(-1, *(1,) * (len(shape) - 1))
    before = weight.clone()
    whole, scale = quantise(weight)
    assert torch.equal(weight, before)
    assert whole.dtype == torch.int8
    assert whole.shape == weight.shape
    assert scale.dtype == torch.float32
    assert scale.shape == (shape[0],)
    rows = weight.double().flatten(1).numpy()
    # One rounding, of a quotient: the same bits as NumPy's.
    assert np.array_equal(scale.numpy(), np.abs(weight.flatten(1).numpy()).max(1) / np.float32(127))
    assert (np.abs(whole.flatten(1).numpy().astype(int)).max(1) == 127).all()
    steps = scale.double().numpy()[:, None]
    error = np.abs(whole.flatten(1).numpy() * steps - rows) / steps
    assert error.max() <= 0.5 + 2 * ROUNDING  # rounded to whole numbers, from a quotient of two rounded numbers
    values = dequantise(whole, scale)
    assert values.dtype == torch.float32
    assert values.shape == weight.shape
    assert (np.abs(values.double().flatten(1).numpy() - rows) / steps).max() <= 0.5 + 3 * ROUNDING  # and a product


def test_whole_multiples_of_the_scale_survive():
    whole = torch.randint(-127, 128, (5, 40), generator=torch_generator(0, "whole"))
    whole[:, 0] = 127
    weight = whole * torch.tensor([2.0**-12, 0.25, 1.0, 3.0, 1024.0])[:, None]
    got, scale = quantise(weight)
    assert torch.equal(got, whole.to(torch.int8))
    assert torch.equal(dequantise(got, scale), weight)


def test_channels_without_a_scale():
    tiny = 2.0**-140  # below it float32 loses digits, so that a scale of it would be off by half
    weight = torch.stack([torch.zeros(6), torch.full((6,), tiny), normal(6), torch.full((6,), -1e-45)]).view(4, 6, 1, 1)
    whole, scale = quantise(weight)
    assert scale[[0, 1, 3]].tolist() == [1, 1, 1]
    assert whole[[0, 1, 3]].abs().max() == 0
    values = dequantise(whole, scale)
    assert torch.equal(values[[0, 1, 3]], torch.zeros(3, 6, 1, 1))
    assert (values[2] - weight[2]).abs().max() <= scale[2] * (0.5 + 3 * ROUNDING)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_stays_seen(wrong):
    weight = normal(3, 8)
    weight[1, 4] = wrong
    values = dequantise(*quantise(weight))
    assert values[1].isnan().all()
    assert values[[0, 2]].isfinite().all()
    assert not Int8Linear(nn.Linear(8, 3)).weight.is_floating_point()


# Channels in and out, kernel, stride, padding, dilation, groups.
GEOMETRIES = [
    (3, 4, 3, 1, 0, 1, 1), (3, 4, 3, 2, 1, 1, 1), (4, 6, (3, 1), (2, 1), (1, 0), 1, 1), (4, 6, 3, 1, 2, 2, 1),
    (4, 6, (2, 3), (1, 3), (2, 1), (3, 1), 1), (4, 6, 3, 1, 1, 1, 2), (6, 6, 3, 2, 1, 1, 6), (6, 12, 5, 1, 2, 1, 6),
    (4, 8, 1, 1, 0, 1, 1), (4, 8, 1, 2, 0, 1, 4), (2, 2, 7, 3, 3, 1, 1), (8, 8, 3, 2, 2, 2, 4),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_convolution_and_its_gradient_to_the_bit(geometry, bias):
    num_in, num_out, kernel, stride, padding, dilation, groups = geometry
    layer = nn.Conv2d(num_in, num_out, kernel, stride, padding, dilation, groups, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(normal(*parameter.shape))
    held = Int8Conv2d(layer)
    weight = dequantise(*quantise(layer.weight))
    x, same = (normal(2, num_in, 11, 9, key=1).requires_grad_() for _ in range(2))
    out, expected = held(x), F.conv2d(same, weight, layer.bias, stride, padding, dilation, groups)
    assert torch.equal(out, expected)
    factor = normal(*out.shape, key=2)
    (out * factor).sum().backward()
    (expected * factor).sum().backward()
    assert x.grad.abs().max() > 0
    assert torch.equal(x.grad, same.grad)
    assert not held(x.detach()).requires_grad
    assert list(held.parameters()) == []
    assert {name: buffer.dtype for name, buffer in held.named_buffers()} == {
        "weight": torch.int8, "scale": torch.float32, **({"bias": torch.float32} if bias else {}),
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (2, 3, 4, 7), (7,)], ids=str)
def test_a_linear_layer_and_its_gradient(shape, bias):
    layer = nn.Linear(7, 4, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(normal(*parameter.shape))
    held = Int8Linear(layer)
    weight = dequantise(*quantise(layer.weight))
    x, same = (normal(*shape, key=1).requires_grad_() for _ in range(2))
    out, expected = held(x), F.linear(same, weight, layer.bias)
    assert torch.equal(out, expected)
    factor = normal(*out.shape, key=2)
    (out * factor).sum().backward()
    (expected * factor).sum().backward()
    # The same 4 products, which autograd may add up in another order: 4 roundings in each of the two sums.
    reached = factor.abs() @ weight.abs()
    assert ((x.grad - same.grad).abs() <= 8 * 2.0**-24 * reached).all()
    assert x.grad.abs().max() > 0
    assert not held(x.detach()).requires_grad
    assert list(held.parameters()) == []


def test_the_layer_keeps_its_own_values():
    layer = nn.Conv2d(3, 4, 3)
    held = Int8Conv2d(layer)
    before = {name: buffer.clone() for name, buffer in held.named_buffers()}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], buffer) for name, buffer in held.named_buffers())
    loaded = Int8Conv2d(nn.Conv2d(3, 4, 3))
    loaded.load_state_dict(held.state_dict())
    x = normal(1, 3, 5, 5)
    assert torch.equal(loaded(x), held(x))


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 8, 3, padding=1), lambda: nn.Linear(12, 8)], ids=["conv", "linear"])
def test_under_autocast_it_does_what_the_layer_does(make):
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(normal(*parameter.shape))
    held = Int8Conv2d(layer) if isinstance(layer, nn.Conv2d) else Int8Linear(layer)
    layer.requires_grad_(False).weight.copy_(dequantise(held.weight, held.scale))
    shape = (2, 3, 6, 6) if isinstance(layer, nn.Conv2d) else (5, 12)
    x, same = (normal(*shape, key=1).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = held(x), layer(same)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    factor = normal(*out.shape, key=2)
    (out.float() * factor).sum().backward()
    (expected.float() * factor).sum().backward()
    assert x.grad.dtype == torch.float32
    assert torch.equal(x.grad, same.grad)


def test_between_forward_and_backward_only_bytes_are_held():
    for layer, x in ((nn.Conv2d(32, 64, 3, padding=1), normal(2, 32, 4, 4)), (nn.Linear(300, 200), normal(3, 300))):
        held = Int8Conv2d(layer) if isinstance(layer, nn.Conv2d) else Int8Linear(layer)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda t: t):
            held(x.clone().requires_grad_()).sum().backward()
        assert {tensor.untyped_storage().data_ptr() for tensor in kept} == {
            buffer.untyped_storage().data_ptr() for buffer in (held.weight, held.scale)
        }


def test_bytes_by_hand():
    def prepare() -> tuple[nn.Module, torch.Tensor]:
        layer = nn.Conv2d(32, 64, 3, padding=1)
        return Int8Conv2d(layer), torch.empty(2, 32, 4, 4, requires_grad=True)

    def work(given):
        held, x = given
        out = held(x)
        yield  # the output alone
        out.backward(torch.empty_like(out))
        yield

    weight, inputs, outputs = 4 * 64 * 32 * 9, 4 * 2 * 32 * 16, 4 * 2 * 64 * 16
    assert predict_levels(prepare, work) == [outputs, outputs + inputs]
    # The weight is there as float32 while the layer computes: once, and no second copy.
    assert predict_peak(prepare, lambda given: given[0](given[1])) == weight + outputs
    one = 4  # a number that stands for the input, of which the gradient needs the shape only
    assert predict_peak(prepare, lambda given: list(work(given))) == weight + 2 * outputs + inputs + one
    held = Int8Conv2d(nn.Conv2d(32, 64, 3, bias=False))
    assert sum(buffer.nbytes for buffer in held.buffers()) == 64 * 32 * 9 + 4 * 64


class OwnLinear(nn.Linear):
    """Uses its weight in its own way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.square(), self.bias)


def some_layers() -> nn.Module:
    model = nn.Module()
    model.conv = nn.Conv2d(3, 4, 3)
    model.inner = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4), nn.ModuleList([nn.Linear(4, 3), nn.ReLU()]))
    model.trained = nn.Linear(3, 3)
    model.bias_trained = nn.Linear(3, 3)
    model.own = OwnLinear(3, 3)
    model.attention = nn.MultiheadAttention(4, 2)
    model.conv1d, model.transposed = nn.Conv1d(3, 3, 3), nn.ConvTranspose2d(3, 3, 3)
    model.same, model.mirrored = nn.Conv2d(3, 3, 3, padding="same"), nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
    model.requires_grad_(False)
    model.trained.requires_grad_(True)
    model.bias_trained.bias.requires_grad_(True)
    return model


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_which_layers_are_replaced(device):
    with torch.device(device):
        model = some_layers()
    before = dict(model.named_modules())
    hold_int8(model)
    after = dict(model.named_modules())
    assert list(after) == list(before)
    changed = {name: type(module) for name, module in after.items() if module is not before[name]}
    assert changed == {"conv": Int8Conv2d, "inner.0": Int8Conv2d, "inner.2.0": Int8Linear}
    assert {str(buffer.device) for buffer in model.conv.buffers()} == {device}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"trained.weight", "trained.bias", "bias_trained.bias"}
    hold_int8(model)
    assert dict(model.named_modules()) == after


def resnet(trained: tuple[str, ...]) -> nn.Module:
    chain = build_chain("resnet8", {}, input_shape=(3, 16, 16), num_classes=10)
    materialise(chain, torch_generator(0, "init"))
    train_only(chain, trained)
    return chain.train()


def steps(model: nn.Module, num_steps: int) -> list[float]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    x, y = normal(8, 3, 16, 16, key=1), torch.arange(8)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("trained", [("layer3_0", "head"), ("layer1_0", "head")], ids=["prefix frozen", "middle frozen"])
def test_a_network_trains_as_with_the_same_weights_in_float32(trained):
    model = resnet(trained)
    held, reference = copy.deepcopy(model), copy.deepcopy(model)
    hold_int8(held)
    for name, module in held.named_modules():
        if isinstance(module, (Int8Conv2d, Int8Linear)):
            reference.get_submodule(name).weight.copy_(dequantise(module.weight, module.scale))
    replaced = [name for name, module in held.named_modules() if isinstance(module, Int8Conv2d)]
    assert len(replaced) == 7 - 2  # of the convolutions, all but the two of the trained block
    assert not any(name.startswith(trained) for name in replaced)
    losses = steps(held, 4)
    assert losses == steps(reference, 4)
    assert losses[-1] < losses[0]
    moved = {name: tensor for name, tensor in reference.named_parameters() if tensor.requires_grad}
    assert {name.partition(".")[0] for name in moved} == set(trained)
    assert all(torch.equal(held.get_parameter(name), tensor) for name, tensor in moved.items())
    assert not torch.equal(held.get_submodule(trained[0]).conv1.weight, model.get_submodule(trained[0]).conv1.weight)


def test_a_network_is_near_the_one_in_float32():
    model = resnet(("head",))
    held = copy.deepcopy(model)
    hold_int8(held)
    for train in (True, False):
        held.train(train)
        model.train(train)
        with torch.no_grad():
            x = normal(8, 3, 16, 16, key=1)
            expected, got = (chain.run(x, stop="head") for chain in (model, held))
        # Errors are spread over ± half a scale, so their size is scale / √12. The largest of a channel's few hundred normal
        # weights is about 3 times their size, so a scale is 3/127 of it, an error 0.7 % of it; seven convolutions one after
        # another add up to √7 · 0.7 % = 1.8 %, less what the shortcuts pass by.
        assert 0.001 < (got - expected).norm() / expected.norm() < 0.03
