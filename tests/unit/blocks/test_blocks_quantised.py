"""Units frozen in 8 bits against the same units in float32: values, folded norms, gradients, and what they keep."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from quantised_problem import SHAPE, frozen, kinds, normal, relative, scrambled
from torch import nn

from dfed.blocks import freeze_int8
from dfed.blocks.int8 import dequantise, quantise
from dfed.blocks.int8_kernels import has_full_range
from dfed.blocks.quantised import Frozen
from dfed.models import build_chain, materialise
from dfed.rng import torch_generator


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 32], ids=["dense", "depthwise"])
def test_a_folded_norm_against_float64(groups, bias, affine):
    unit = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1, groups=groups, bias=bias), nn.BatchNorm2d(32, affine=affine))
    unit = scrambled(unit)
    if affine:
        unit[1].weight.data[3:5] = 0
    held, _ = frozen(unit, (32, 9, 9))
    assert kinds(held) == {"0": "FrozenConv2d", "1": "Identity"}
    x = normal(4, 32, 9, 9)
    right, got = copy.deepcopy(unit).double()(x.double()), held(x)
    assert relative(got, right) < 0.03  # 0.7 % from the weights, 1 % from inputs in 8 bits
    if affine:
        # Where γ is 0 there is nothing but β, less a rounding of what it would have been shifted by.
        assert torch.allclose(got[:, 3:5], unit[1].bias[3:5].view(1, 2, 1, 1).expand(4, 2, 5, 5), atol=1e-6)
    if groups > 1:  # computed in float32: what is left is the weights' rounding, the same as of the unfolded weights
        rounded = copy.deepcopy(unit).double()
        rounded[0].weight.copy_(dequantise(*quantise(unit[0].weight)))
        # Products of 9 numbers in float32, and the folding: a few roundings of 6e-8.
        assert relative(got, rounded(x.double())) < 1e-6


class Odd(nn.Module):
    """Convolutions whose norms must stay: another user of the output, a norm or a convolution called twice, a trained one."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("added", "returned", "twice", "trained", "seen", "plain", "words", "before_trained"):
            setattr(self, name, nn.Conv2d(8, 8, 3, padding="same" if name == "words" else 1))
        for name in ("added", "twice", "seen", "plain", "words", "before_trained"):
            setattr(self, f"{name}_norm", nn.BatchNorm2d(8))
        self.no_statistics = nn.BatchNorm2d(8, track_running_stats=False)
        self.spare = nn.Linear(8, 8)
        self.requires_grad_(False)
        self.trained.requires_grad_(True)
        self.before_trained_norm.requires_grad_(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.added(x)
        x = self.added_norm(y) + y
        x = self.twice_norm(self.twice(self.twice_norm(self.twice(x))))
        y = self.seen(x)
        x = self.seen_norm(y.view(y.shape)) + self.before_trained_norm(self.before_trained(x))
        x = self.no_statistics(self.plain_norm(self.plain(x)))
        return self.returned(self.trained(self.words_norm(self.words(x))))


def test_which_norms_are_folded():
    with torch.device("meta"):
        unit = Odd().train()
    freeze_int8(unit, (8, 5, 5))
    norms = {"added_norm", "twice_norm", "seen_norm", "words_norm", "before_trained_norm", "no_statistics"}
    assert {name for name, kind in kinds(unit).items() if kind == "BatchNorm2d"} == norms
    assert {name for name, kind in kinds(unit).items() if kind == "Identity"} == {"plain_norm"}
    layers = {name for name, module in unit.named_modules() if isinstance(module, Frozen)}
    assert layers == {"added", "returned", "seen", "plain", "before_trained"}
    assert all(module.training for module in unit.modules() if not isinstance(module, (Frozen, nn.Identity)))
    assert {name.partition(".")[0] for name, _ in unit.named_parameters()} == norms - {"no_statistics"} | {
        "trained", "twice", "words", "spare", "no_statistics"}
    before = kinds(unit)
    freeze_int8(unit, (8, 5, 5))
    assert kinds(unit) == before


FOLDED = {"resnet18": 20, "mobilenet_v2": 52, "vgg11_bn": 8, "densenet40": 0, "vit_tiny": 0}
UNITS = {
    "resnet18": ("stem", "layer1_0", "layer2_0", "layer4_1", "head"),
    "mobilenet_v2": ("stem", "block0", "block2", "block3", "block13", "last"),
    "vgg11_bn": ("conv1_0", "conv3_0", "conv5_1"),
    "densenet40": ("stem", "block1_3", "transition1", "block3_11"),
    "vit_tiny": ("embed", "block2", "head"),
}


def smooth(unit: nn.Module) -> None:
    """No ReLU and no maximum: where a small error changes a sign or a place, the gradient jumps, whatever the kernels do."""
    for module in unit.modules():
        for name, child in module.named_children():
            if isinstance(child, (nn.ReLU, nn.ReLU6)):
                setattr(module, name, nn.Softplus())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size))


@pytest.mark.parametrize("name", UNITS)
def test_whole_units_of_models(name):
    chain = build_chain(name, {}, input_shape=SHAPE, num_classes=10)
    inputs = dict(zip(chain.unit_names, [SHAPE, *chain.output_shapes().values()], strict=False))
    hollow = chain.skeleton().requires_grad_(False)
    for unit in chain.unit_names:
        freeze_int8(hollow.unit(unit), inputs[unit])
    assert sum(kind == "Identity" for kind in kinds(hollow).values()) == FOLDED[name]
    layers = [module for module in chain.modules() if type(module) in (nn.Conv2d, nn.Linear)]
    assert sum(isinstance(module, Frozen) for module in hollow.modules()) == len(layers)
    assert hollow.output_shapes() == chain.output_shapes()
    for unit in UNITS[name]:
        real = materialise(chain.skeleton(), torch_generator(1, "init")).unit(unit)
        if unit == "head" and name == "vit_tiny":
            nn.init.normal_(real.fc.weight, generator=torch_generator(2, "head"))
        smooth(real)
        scrambled(real)
        held, _ = frozen(real, inputs[unit], passes_gradient=True)
        x = normal(2, *inputs[unit], key=1).requires_grad_()
        other = x.detach().clone().requires_grad_()
        right, got = real(x), held(other)
        # Each layer adds 1.2 % (see the kernels' tests), three of them on a path at most; shortcuts dilute it. Where the
        # processor has no dot product of bytes, inputs and gradients have half as many codes.
        halved = 1 if has_full_range() else 2
        assert relative(got, right) < 0.03 * halved, unit
        assert got.is_contiguous()
        grad = normal(*right.shape, key=3)
        for out, leaf in ((right, x), (got, other)):
            out.backward(grad)
            assert leaf.grad.is_contiguous()
        assert relative(other.grad, x.grad) < 0.05 * halved, unit


def saved_bytes(model, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The output, and the bytes of all storages that are kept for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return model(x), sum(kept.values())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11_bn"])
def test_what_is_kept_for_the_backward_pass(name):
    chain = materialise(build_chain(name, {}, input_shape=SHAPE, num_classes=10), torch_generator(1, "init"))
    scrambled(chain)
    place = 3
    unit, shape = chain.unit_names[place], list(chain.output_shapes().values())[place - 1]
    held, _ = frozen(chain.unit(unit), shape, passes_gradient=True)
    x = normal(2, *shape)
    out, prefix_bytes = saved_bytes(held, x)
    assert not out.requires_grad
    assert prefix_bytes == 0
    out, passing_bytes = saved_bytes(held, x.requires_grad_())
    _, real_bytes = saved_bytes(chain.unit(unit), x)
    assert out.requires_grad
    assert passing_bytes < 0.7 * real_bytes  # outputs of activations and places of maxima, no inputs of layers


def test_autocast_keeps_types_and_gradients():
    layers = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3, groups=8)
    real = scrambled(nn.Sequential(*layers))
    held, _ = frozen(real, (32, 8, 8), passes_gradient=True)
    grads = []
    for unit, enabled in ((real, False), (held, True)):
        x = normal(2, 32, 8, 8).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = unit(x)
        F.mse_loss(out.float(), torch.ones(out.shape)).backward()
        assert x.grad.dtype == torch.float32
        grads.append(x.grad)
    # bfloat16 keeps 8 bits, as the kernels do; ReLUs change sides where errors change signs, which costs the square root of the
    # share of them: 1 % of them are 10 %.
    assert relative(*reversed(grads)) < 0.2
