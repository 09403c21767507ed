"""Chains: their units, the faults they refuse, models of one's own, first values."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dfed.models
from dfed.errors import ConfigError
from dfed.models import Chain, build_chain, materialise
from dfed.models.layers import Dropout
from dfed.registry import UnknownName
from dfed.rng import torch_generator

torch.set_num_threads(1)


def small_chain(**layers: nn.Module) -> Chain:
    units = [("stem", nn.Conv2d(3, 4, 3)), ("norm", nn.BatchNorm2d(4)), *layers.items()]
    units.append(("head", nn.Sequential(OrderedDict(flatten=nn.Flatten(), fc=nn.Linear(4 * 6 * 6, 5)))))
    return Chain(units, input_shape=(3, 8, 8), num_classes=5, name="small")


def own_chain(*, input_shape: tuple[int, ...], num_classes: int, width: int = 3) -> Chain:
    units = [("body", nn.Linear(input_shape[0], width)), ("head", nn.Linear(width, num_classes))]
    return Chain(units, input_shape=input_shape, num_classes=num_classes, name="own")


def own_sequential(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    layers = OrderedDict(body=nn.Linear(input_shape[0], 3), drop=nn.Dropout(0.5), head=nn.Linear(3, num_classes))
    return nn.Sequential(layers)


def own_linear(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Linear(input_shape[0], num_classes)


def own_other_shape(*, input_shape: tuple[int, ...], num_classes: int) -> Chain:
    return own_chain(input_shape=(input_shape[0] + 1,), num_classes=num_classes)


def own_other_classes(*, input_shape: tuple[int, ...], num_classes: int) -> Chain:
    return own_chain(input_shape=input_shape, num_classes=num_classes + 1)


def own_without_shape(*, num_classes: int) -> Chain:
    return own_chain(input_shape=(1,), num_classes=num_classes)


class Scaled(nn.Module):
    """A module with a parameter that no rule of dfed covers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class KeyedScaled(Scaled):
    """The same with an initialiser of its own."""

    def keyed_init(self, generator: torch.Generator) -> None:
        self.scale.uniform_(1, 2, generator=generator)


class ForgetfulScaled(Scaled):
    """The same with an initialiser that forgets half."""

    def keyed_init(self, generator: torch.Generator) -> None:
        self.scale[:2].fill_(1)


def test_package_exports():
    assert sorted(dfed.models.__all__) == ["Chain", "build_chain", "convolutions_in_parts", "materialise"]


def test_units_names_and_runs():
    chain = materialise(small_chain(), torch_generator(0, "init"))
    assert chain.unit_names == ("stem", "norm", "head")
    assert len(chain) == 3
    assert chain.unit("norm") is chain.norm
    assert [*chain.state_dict()] == [
        *("stem.weight", "stem.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"),
        *("norm.num_batches_tracked", "head.fc.weight", "head.fc.bias"),
    ]
    assert [chain.unit_of(name) for name in ("stem.weight", "norm.running_mean", "head.fc.bias")] == [*chain.unit_names]

    chain.eval()
    x = torch.randn(2, 3, 8, 8, generator=torch_generator(0, "x"))
    y = chain(x)
    assert y.shape == (2, 5)
    for cut in (0, 1, 2, 3, "stem", "norm", "head"):
        assert torch.equal(chain.run(chain.run(x, stop=cut), start=cut), y)
    assert torch.equal(chain.run(x, "stem", "norm"), chain.stem(x))
    assert chain.run(x, 1, 1) is x

    for wrong in ("stm", "", "fc"):
        with pytest.raises(UnknownName, match="unit must be one of stem, norm, head, but is"):
            chain.run(x, start=wrong)
    with pytest.raises(UnknownName, match="Did you mean 'stem'"):
        chain.unit("stm")
    with pytest.raises(UnknownName, match="but is 'fc'"):
        chain.unit_of("fc.weight")
    with pytest.raises(UnknownName, match="at least 0 and at most 3, but is 4"):
        chain.run(x, stop=4)
    with pytest.raises(ValueError, match="must not come after `stop`"):
        chain.run(x, "head", "stem")


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([], "at least one unit"),
        ([("a", nn.ReLU()), ("a", nn.ReLU())], "distinct names, but 'a' is there twice"),
        ([("a.b", nn.ReLU())], "have no dot, but is 'a.b'"),
        ([("", nn.ReLU())], "not empty"),
        ([("run", nn.ReLU())], "must not be called 'run'"),
        ([("name", nn.ReLU())], "must not be called 'name'"),
        ([("a", torch.relu)], "`a` must be an nn.Module, but is a builtin"),
        ([("a", nn.Sequential(nn.RReLU()))], "`a.0` must draw from a generator handed to it, but RReLU draws"),
        ([("a", nn.AlphaDropout(0.1))], "but AlphaDropout draws"),
        ([("a", nn.FractionalMaxPool2d(2, 2))], "but FractionalMaxPool2d draws"),
        ([("a", nn.MultiheadAttention(4, 2, dropout=0.25))], "`a.dropout` must be 0, for MultiheadAttention.*is 0.25"),
        ([("a", nn.LSTM(4, 4, 2, dropout=0.5))], "`a.dropout` must be 0, for LSTM"),
        ([("a", type("MyDropout", (nn.Dropout,), {})(0.5))], "but MyDropout draws"),
    ],
)
def test_wrong_units_are_refused(units, message):
    with pytest.raises(ConfigError, match=message):
        Chain(units, input_shape=(4,), num_classes=2, name="wrong")


def test_shared_modules_and_tensors_are_refused():
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="`b` must be a module of its own, but is the one of unit 'a'"):
        Chain([("a", layer), ("b", layer)], input_shape=(4,), num_classes=4, name="shared")
    other.weight = layer.weight
    with pytest.raises(ConfigError, match=r"`b.weight` must be a tensor of its own, but is the same as `a.weight`"):
        Chain([("a", layer), ("b", other)], input_shape=(4,), num_classes=4, name="tied")


def test_output_shapes_change_nothing():
    chain = materialise(small_chain(drop=nn.Dropout(0.5)), torch_generator(0, "init"))
    chain.norm.eval()  # a mixed state must survive
    before = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    modes = [module.training for module in chain.modules()]
    shapes = chain.output_shapes()
    assert shapes == {"stem": (4, 6, 6), "norm": (4, 6, 6), "drop": (4, 6, 6), "head": (5,)}
    assert [module.training for module in chain.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in chain.state_dict().items())
    shapes.clear()
    assert len(chain.output_shapes()) == 4  # the cache is not the caller's

    chain = Chain([("a", nn.Linear(4, 3)), ("b", nn.Linear(4, 2))], input_shape=(4,), num_classes=2, name="misfit")
    with pytest.raises(ConfigError, match=r"`input_shape` must suit model 'misfit'.*unit 'b' cannot take .*\(3,\)"):
        chain.output_shapes()
    chain = Chain([("a", nn.LSTM(4, 3))], input_shape=(4,), num_classes=2, name="pair")
    with pytest.raises(ConfigError, match="`a` must return one tensor, but returns a tuple"):
        chain.output_shapes()
    half = Chain([("a", nn.Linear(4, 3))], input_shape=(4,), num_classes=3, name="half").to(torch.bfloat16)
    assert half.output_shapes() == {"a": (3,)}


def test_skeleton_has_no_storage_and_is_its_own():
    chain = materialise(small_chain(drop=nn.Dropout(0.5)), torch_generator(0, "init"))
    chain.stem.requires_grad_(False)
    chain.norm.eval()
    chain.set_generator(torch_generator(0, "dropout"))
    skeleton = chain.skeleton()
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    assert not any(tensor.is_meta for tensor in chain.state_dict().values())
    assert [*skeleton.state_dict()] == [*chain.state_dict()]
    assert [p.requires_grad for p in skeleton.parameters()] == [p.requires_grad for p in chain.parameters()]
    assert (skeleton.norm.training, skeleton.stem.training) == (False, True)
    assert skeleton.drop is not chain.drop
    assert skeleton.drop.generator is None
    assert chain.drop.generator is not None
    assert copy.deepcopy(chain).drop.generator is None
    skeleton.load_state_dict(chain.state_dict(), assign=True)
    x = torch.randn(2, 3, 8, 8, generator=torch_generator(0, "x"))
    assert torch.equal(skeleton.eval()(x), chain.eval()(x))


def test_training_forward_without_storage():
    chain = small_chain(drop=nn.Dropout(0.5)).to("meta")
    assert chain(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = small_chain(drop=nn.Dropout(0.5))
        fake.set_generator(torch_generator(0, "dropout"))
        y = fake(torch.empty(2, 3, 8, 8))
        y.sum().backward()
    assert y.shape == (2, 5)
    assert fake.stem.weight.grad.shape == (4, 3, 3, 3)


def test_own_models():
    chain = build_chain(f"{__name__}:own_chain", {"width": 7}, input_shape=(4,), num_classes=2)
    assert chain.output_shapes() == {"body": (7,), "head": (2,)}
    assert all(tensor.is_meta for tensor in chain.state_dict().values())
    chain = build_chain(f"{__name__}:own_sequential", {}, input_shape=(4,), num_classes=2)
    assert chain.unit_names == ("body", "drop", "head")
    assert isinstance(chain.unit("drop"), Dropout)
    assert materialise(chain, torch_generator(0, "init")).eval()(torch.zeros(1, 4)).shape == (1, 2)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("own_linear", "must return a Chain or an nn.Sequential .* but returns a Linear. .*dfed.models.Chain"),
        ("own_other_shape", r"must be built for input_shape \(4,\), but is built for \(5,\)"),
        ("own_other_classes", r"must return one number per class, \(2,\), for each sample, but returns \(3,\)"),
        ("own_without_shape", "keyword-only parameters input_shape and num_classes, but has no input_shape"),
    ],
)
def test_wrong_own_models(function, message):
    with pytest.raises(ConfigError, match=message):
        build_chain(f"{__name__}:{function}", {}, input_shape=(4,), num_classes=2)


def test_build_chain_refuses_what_is_wrong():
    with pytest.raises(UnknownName, match="Did you mean 'resnet20'"):
        build_chain("resnet2", {}, input_shape=(3, 32, 32), num_classes=10)
    with pytest.raises(UnknownName, match="can be imported"):
        build_chain(f"{__name__}:absent", {}, input_shape=(4,), num_classes=2)
    with pytest.raises(ValidationError, match="widht"):
        build_chain("resnet20", {"widht": 8}, input_shape=(3, 32, 32), num_classes=10)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        build_chain("resnet20", {"width": 0}, input_shape=(3, 32, 32), num_classes=10)
    with pytest.raises(ConfigError, match=r"`input_shape` must be .* but is \(3, 0, 32\)"):
        build_chain("mlp", {}, input_shape=(3, 0, 32), num_classes=10)
    with pytest.raises(ConfigError, match="`num_classes` must be at least 1, but is 0"):
        build_chain("mlp", {}, input_shape=(4,), num_classes=0)
    with pytest.raises(ConfigError, match="unit 'transition2' cannot take an input of shape"):
        build_chain("densenet40", {}, input_shape=(3, 3, 3), num_classes=10)
    for name in ("cnn", "resnet18", "vit_tiny", "vgg11_bn", "mobilenet_v2", "densenet40", "resnet8"):
        with pytest.raises(ConfigError, match=r"must be \(channels, height, width\), but is \(28, 28\)"):
            build_chain(name, {}, input_shape=(28, 28), num_classes=10)


def test_first_values_cover_everything_or_say_what_not():
    with pytest.raises(ConfigError, match=r"`scaled.scale` must have a rule .* Scaled has none .*keyed_init"):
        materialise(small_chain(scaled=Scaled()), torch_generator(0, "init"))
    with pytest.raises(ConfigError, match=r"`scaled.scale` must be filled"):
        materialise(small_chain(scaled=ForgetfulScaled()), torch_generator(0, "init"))
    chain = materialise(small_chain(scaled=KeyedScaled()), torch_generator(0, "init"))
    assert ((chain.scaled.scale >= 1) & (chain.scaled.scale <= 2)).all()
    widened = nn.Linear(4, 4)
    widened.register_buffer("extra", torch.zeros(1))
    chain = Chain([("a", widened)], input_shape=(4,), num_classes=4, name="widened")
    with pytest.raises(ConfigError, match=r"`a.extra` must have a rule"):
        materialise(chain, torch_generator(0, "init"))


def test_materialise_is_keyed_and_repeatable():
    chain = small_chain()
    first = {name: t.clone() for name, t in materialise(chain, torch_generator(0, "init")).state_dict().items()}
    with torch.no_grad():
        for tensor in chain.state_dict().values():
            tensor.fill_(7)  # old values must leave no trace
    chain.stem.requires_grad_(False)
    assert materialise(chain, torch_generator(0, "init")) is chain
    assert all(torch.equal(first[name], tensor) for name, tensor in chain.state_dict().items())
    assert [p.requires_grad for p in chain.parameters()] == [False, False, True, True, True, True]
    other = materialise(small_chain(), torch_generator(1, "init")).state_dict()
    differ = {name for name in first if not torch.equal(first[name], other[name])}
    assert differ == {"stem.weight", "stem.bias", "head.fc.weight", "head.fc.bias"}
    with pytest.raises(AssertionError, match="on the CPU"):
        materialise(chain, type("Elsewhere", (), {"device": torch.device("meta")})())
