"""Units with values as after training, and the same in 8 bits: what the tests of frozen units share."""

from __future__ import annotations

import copy

import torch
from torch import nn

from dfed.blocks import freeze_int8
from dfed.client import Skeleton
from dfed.rng import torch_generator

torch.set_num_threads(1)
CPU = torch.device("cpu")
SHAPE = (3, 32, 32)


def normal(*shape: int, key: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator(key, "normal"))


def relative(got: torch.Tensor, right: torch.Tensor) -> float:
    return float((got.detach().double() - right.detach().double()).norm() / right.detach().double().norm())


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}


def scrambled(model: nn.Module) -> nn.Module:
    """Norm statistics and affine maps as after training, and biases; evaluation mode, no gradients."""
    generator = torch_generator(5, "scramble")
    model.requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                signs = torch.randint(0, 2, module.weight.shape, generator=generator) * 2 - 1
                module.weight.uniform_(0.5, 1.5, generator=generator).mul_(signs)
                nn.init.normal_(module.bias, generator=generator)
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.normal_(module.bias, generator=generator)
    return model


def frozen(unit: nn.Module, input_shape: tuple[int, ...], **options: bool) -> tuple[nn.Module, Skeleton]:
    """The same unit in 8 bits, with the same values."""
    hollow = nn.Sequential(copy.deepcopy(unit).to("meta"))
    freeze_int8(hollow[0], input_shape, **options)
    skeleton = Skeleton(hollow.eval())
    skeleton.load({f"0.{name}": value for name, value in values_of(unit).items()}, CPU)
    return hollow[0], skeleton


def kinds(unit: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in unit.named_modules() if not list(module.children()) and name}
