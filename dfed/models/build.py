"""Building a model by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dfed.errors import ConfigError, Fault
from dfed.models.chain import Chain
from dfed.registry import MODELS
from dfed.settings import settings_of

__all__ = ["build_chain"]

_GIVEN = ("input_shape", "num_classes")


def build_chain(name: str, options: Mapping[str, Any], *, input_shape: tuple[int, ...], num_classes: int) -> Chain:
    """Build a model on the meta device: nothing is allocated, and no random number is drawn.

    Args:
        name: A name of ``dfed.registry.MODELS``, or ``package.module:function``. A function of one's own has the
            keyword-only parameters ``input_shape``, ``num_classes`` and its options, and returns a :class:`Chain`, or
            an ``nn.Sequential`` whose children become the units.
        options: Options of the model, by name.
        input_shape: Shape of one sample, e.g. (channels, height, width).
        num_classes: Number of classes.

    Returns:
        A chain whose tensors are on the meta device; see :func:`materialise`.

    Raises:
        UnknownName: If there is no such model.
        pydantic.ValidationError: If an option is unknown or has a wrong value (a ValueError).
        ConfigError: If the model cannot be built for this shape, or is no chain.
    """
    shape = tuple(input_shape)
    if not shape or min(shape) < 1:
        raise ConfigError([Fault("input_shape", f"must be one or more sizes of at least 1, but is {shape}.")])
    if num_classes < 1:
        raise ConfigError([Fault("num_classes", f"must be at least 1, but is {num_classes}.")])
    builder = MODELS.get(name)
    _check_builder(name, builder)
    settings = settings_of(builder, given=_GIVEN)(**options)
    chosen = {field: getattr(settings, field) for field in type(settings).model_fields}
    with torch.device("meta"):
        built = builder(input_shape=shape, num_classes=num_classes, **chosen)
    chain = _as_chain(name, built, shape, num_classes)
    last = chain.output_shapes()[chain.unit_names[-1]]
    if last != (num_classes,):
        message = f"must return one number per class, ({num_classes},), for each sample, but returns {last}."
        raise ConfigError([Fault(f"model {name}", message)])
    return chain


def _check_builder(name: str, builder: Callable[..., Any]) -> None:
    parameters = inspect.signature(builder).parameters if callable(builder) else {}
    missing = [given for given in _GIVEN if given not in parameters]
    if missing:
        message = f"must be a function with the keyword-only parameters {' and '.join(_GIVEN)}, "
        message += f"but has no {' and no '.join(missing)}."
        raise ConfigError([Fault(f"model {name}", message)])


def _as_chain(name: str, built: object, input_shape: tuple[int, ...], num_classes: int) -> Chain:
    if isinstance(built, Chain):
        if built.input_shape != input_shape:
            message = f"must be built for input_shape {input_shape}, but is built for {built.input_shape}."
            raise ConfigError([Fault(f"model {name}", message)])
        return built
    if isinstance(built, nn.Sequential):
        units = list(built._modules.items())  # named_children() would drop a module that is there twice
        return Chain(units, input_shape=input_shape, num_classes=num_classes, name=name)  # type: ignore[arg-type]
    message = (
        f"must return a Chain or an nn.Sequential with named children, but returns a {type(built).__name__}. Cut it "
        "into steps that run one after another, and return dfed.models.Chain([('stem', …), ('block0', …), "
        "('head', …)], input_shape=input_shape, num_classes=num_classes, name='…')."
    )
    raise ConfigError([Fault(f"model {name}", message)])
