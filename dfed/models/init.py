"""First values of parameters and buffers, drawn from one generator and from nothing else.

Modules are visited children first, in the order of registration. A module's own tensors are filled by the first of:

1. its method ``keyed_init(generator)``, which must fill all of them and may also overwrite its children's;
2. the rule for its class below, which depends on the chain's scheme for convolutions and linear layers.

Anything else that has tensors is refused by name: its ``reset_parameters`` would draw from torch's global generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dfed.errors import ConfigError, Fault

__all__ = ["Scheme", "initialise"]

Scheme = Literal["torch", "resnet", "densenet", "vgg", "vit"]
"""Rules for convolutions and linear layers.

``torch``: torch's defaults. ``resnet``: convolutions by He et al. (2015), fan out, as torchvision's ResNet; linear
layers by default. ``densenet``: the same, biases of linear layers 0 (Huang et al.'s own code). ``vgg``: convolutions
the same, linear layers N(0, 0.01²), biases 0, as torchvision's VGG and MobileNetV2. ``vit``: as torchvision's
VisionTransformer: patch projection truncated normal, MLPs Xavier uniform, their biases N(0, 1e-12).
"""

Rule = Callable[[Any, torch.Generator], None]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
)
_WEIGHTED = {"weight", "bias"}
_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}
_ATTENTION = {f"{part}_proj_weight" for part in ("in", "q", "k", "v")} | {"in_proj_bias", "bias_k", "bias_v"}


def initialise(module: nn.Module, generator: torch.Generator, scheme: Scheme = "torch") -> None:
    """Fill every parameter and buffer of ``module``, in place.

    Args:
        module: A module on the CPU, its tensors allocated.
        generator: A CPU generator; advanced.
        scheme: Rules for convolutions and linear layers.

    Raises:
        ConfigError: If a parameter or buffer is covered by no rule; names it.
    """
    with torch.no_grad():
        _visit(module, "", generator, scheme)


def _visit(module: nn.Module, path: str, generator: torch.Generator, scheme: Scheme) -> None:
    for name, child in module.named_children():
        _visit(child, f"{path}.{name}" if path else name, generator, scheme)
    own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    hook = getattr(module, "keyed_init", None)
    if hook is not None:
        _call_hook(hook, own, path, generator)
        return
    if not own:
        return
    rule, covered = _rule(module, scheme)
    unknown = sorted(own.keys() - covered)
    if unknown:
        layer = type(module).__name__
        message = (
            f"must have a rule that initialises it from a generator, but {layer} has none that dfed knows. "
            f"Give {layer} a method `keyed_init(self, generator)` that fills all its own parameters and buffers."
        )
        raise ConfigError([Fault(f"{path}.{name}" if path else name, message) for name in unknown])
    rule(module, generator)


def _call_hook(hook: Rule, own: dict[str, Tensor], path: str, generator: torch.Generator) -> None:
    floats = {name: tensor for name, tensor in own.items() if tensor.is_floating_point()}
    for tensor in floats.values():
        tensor.fill_(math.nan)  # so that a tensor the method forgets is seen
    hook(generator)
    forgotten = [name for name, tensor in floats.items() if tensor.isnan().any()]
    if forgotten:
        message = "must be filled by its module's `keyed_init`, but is not."
        raise ConfigError([Fault(f"{path}.{name}" if path else name, message) for name in forgotten])


def _rule(module: nn.Module, scheme: Scheme) -> tuple[Rule, set[str]]:
    """The rule for a module's class, and the names of the tensors that it fills."""
    conv, linear = _SCHEMES[scheme]
    table: tuple[tuple[tuple[type, ...], Rule, set[str]], ...] = (
        (_CONVS, conv, _WEIGHTED),
        ((nn.Linear,), linear, _WEIGHTED),
        (_NORMS, _norm, _WEIGHTED | _STATISTICS),
        ((nn.Embedding,), _embedding, {"weight"}),
        ((nn.MultiheadAttention,), _attention, _ATTENTION),
    )
    for classes, rule, covered in table:
        if isinstance(module, classes):
            return rule, covered
    return _norm, set()


def _torch_default(module: nn.Linear | nn.Conv2d, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
    if module.bias is not None:
        bound = 1 / math.sqrt(_fan_in(module.weight))
        nn.init.uniform_(module.bias, -bound, bound, generator=generator)


def _fan_in(weight: Tensor) -> int:
    return weight[0].numel()


def _fan_out(module: nn.Conv2d, generator: torch.Generator) -> None:
    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    _zero(module.bias)


def _default_zero_bias(module: nn.Linear, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
    _zero(module.bias)


def _small_normal(module: nn.Linear, generator: torch.Generator) -> None:
    nn.init.normal_(module.weight, 0.0, 0.01, generator=generator)
    _zero(module.bias)


def _patch_projection(module: nn.Conv2d, generator: torch.Generator) -> None:
    nn.init.trunc_normal_(module.weight, std=math.sqrt(1 / _fan_in(module.weight)), generator=generator)
    _zero(module.bias)


def _transformer_linear(module: nn.Linear, generator: torch.Generator) -> None:
    nn.init.xavier_uniform_(module.weight, generator=generator)
    if module.bias is not None:
        nn.init.normal_(module.bias, std=1e-6, generator=generator)


def _norm(module: nn.BatchNorm2d, generator: torch.Generator) -> None:
    module.reset_parameters()  # constants only: draws nothing


def _embedding(module: nn.Embedding, generator: torch.Generator) -> None:
    nn.init.normal_(module.weight, generator=generator)
    if module.padding_idx is not None:
        module.weight[module.padding_idx].zero_()


def _attention(module: nn.MultiheadAttention, generator: torch.Generator) -> None:
    for weight in (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight):
        if weight is not None:
            nn.init.xavier_uniform_(weight, generator=generator)
    for bias in (module.bias_k, module.bias_v):
        if bias is not None:
            nn.init.xavier_normal_(bias, generator=generator)
    _zero(module.in_proj_bias)
    _default_zero_bias(module.out_proj, generator)


def _zero(tensor: Tensor | None) -> None:
    if tensor is not None:
        tensor.zero_()


_SCHEMES: dict[str, tuple[Rule, Rule]] = {  # for convolutions, for linear layers
    "torch": (_torch_default, _torch_default),
    "resnet": (_fan_out, _torch_default),
    "densenet": (_fan_out, _default_zero_bias),
    "vgg": (_fan_out, _small_normal),
    "vit": (_patch_projection, _transformer_linear),
}
