"""Width sub-models of every model: what they keep, and that they compute what the full model computes without the rest."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import Bottleneck
from torchvision.models.vision_transformer import EncoderBlock

from dfed import rng
from dfed.blocks.width import inside, narrow, prefix, random_channels, scale_activations, window
from dfed.blocks.width_rules import SelectShortcut
from dfed.errors import ConfigError
from dfed.models import Chain, build_chain
from dfed.models.cifar_resnet import PadShortcut
from dfed.models.vit import VitEmbed, VitHead
from dfed.region import WHOLE
from dfed.registry import MODELS

torch.set_num_threads(1)
CLASSES = 5
SMALL, LARGE = (3, 8, 8), (3, 32, 32)
OWN_CNN = {"channels": [6, 10], "kernel": 3, "hidden": 24}
MODELS_AND_OPTIONS = [
    ("cnn", OWN_CNN, SMALL), ("cnn", {**OWN_CNN, "norm": "batch"}, SMALL), ("cnn", {**OWN_CNN, "norm": "group"}, SMALL),
    ("cnn", {**OWN_CNN, "padding": "valid", "pool": "last", "dropout": [0.25, 0.5]}, SMALL),
    ("mlp", {"hidden": [20, 12]}, (1, 4, 4)), ("mlp", {"hidden": []}, (1, 4, 4)),
    ("vit_tiny", {"depth": 2, "width": 24, "dropout": 0.1}, SMALL), ("vit_tiny", {"depth": 1, "width": 32, "heads": 8}, SMALL),
    *((name, {"norm": norm}, SMALL) for norm in ("batch", "group") for name in (
        "resnet8", "resnet20", "resnet56", "resnet18", "resnet34", "resnet50", "densenet40", "mobilenet_v2",
    )),
    *((name, {"norm": norm}, LARGE) for norm in ("batch", "group") for name in ("vgg11_bn", "vgg16_bn", "vgg19_bn")),
]
PICKERS = {
    "prefix": prefix,
    "window": window(7),  # wraps around in groups whose kept channels reach beyond the end
    "random": random_channels(lambda name: rng.numpy_generator(1, "channels", name)),
}


def made(name, options, shape):
    return build_chain(name, options, input_shape=shape, num_classes=CLASSES)


def first_values(chain, dtype=torch.float32):
    """Values of a fitting size for every tensor, none of them 0; a few numbers over and over, as only their places matter."""
    base = torch.randn(10007, generator=rng.torch_generator(1, "values"), dtype=torch.float64)
    base = torch.where(base.abs() < 0.01, 0.5, base)
    found = {}
    for number, (name, tensor) in enumerate(chain.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        count = tensor.numel()
        value = base.roll(number * 31).repeat(-(-count // len(base)))[:count].reshape(tensor.shape)
        fan = tensor[0].numel() if tensor.ndim > 1 else 25
        found[name] = (value.abs() + 0.5 if name.endswith("running_var") else value / fan**0.5).to(dtype)
    return found


def filled(chain, values, dtype=torch.float32):
    """The chain with these values, made without any of the code under test."""
    chain = chain.skeleton().to_empty(device="cpu").to(dtype)
    for name in chain.load_state_dict(values, strict=False).missing_keys:
        chain.get_buffer(name).zero_()
    chain.set_generator(rng.torch_generator(2, "dropout"))
    return chain


def inputs(shape, count=4, dtype=torch.float32):
    generator = rng.torch_generator(3, "inputs")
    x = torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.arange(count) % CLASSES


def step(chain, x, y):
    """Scores of a training step and the gradients, by name."""
    chain.zero_grad()
    scores = chain(x)
    F.cross_entropy(scores, y).backward()
    return scores.detach(), {name: parameter.grad for name, parameter in chain.named_parameters()}


def test_every_model_is_here():
    assert {name for name, _, _ in MODELS_AND_OPTIONS} == set(MODELS)


@pytest.mark.parametrize(("name", "options", "shape"), MODELS_AND_OPTIONS)
def test_parts_of_every_model(name, options, shape):
    chain = made(name, options, shape)
    before = str(chain)
    dear = options.get("norm") == "group" and len(chain.state_dict()) > 60  # the same with the other norm is run
    values = chain.state_dict() if dear else first_values(chain)
    values = {name: value for name, value in values.items() if value.is_floating_point()}
    for number, (rate, pick) in enumerate([(1.0, "window"), (0.5, "prefix"), (1 / 16, "random"), (0.3, "window")]):
        sub = narrow(chain, rate, PICKERS[pick])
        assert str(chain) == before
        assert sub.regions.keys() == values.keys()
        shapes = {name: tuple(tensor.shape) for name, tensor in sub.chain.state_dict().items() if name in values}
        assert shapes == {name: region.shape(values[name].shape) for name, region in sub.regions.items()}
        if rate == 1:
            assert set(sub.regions.values()) == {WHOLE}
            assert str(sub.chain) == before  # same layers with the same settings, in the same order
            continue
        for module in sub.chain.modules():
            if isinstance(module, nn.GroupNorm):
                assert module.num_channels % module.num_groups == 0
            if isinstance(module, nn.MultiheadAttention):
                assert module.embed_dim == module.num_heads * module.head_dim == module.in_proj_weight.shape[1]
                assert module.num_heads == options.get("heads", 3)
        if dear:
            assert sub.chain.output_shapes()["head"] == (CLASSES,)  # on the meta device
            continue
        parts = {name: region.view(values[name]).clone() for name, region in sub.regions.items()}
        for tensor, part in parts.items() if number == 3 else ():
            if values[tensor].numel() > 300_000:
                continue
            back = torch.zeros_like(values[tensor])
            sub.regions[tensor].put_(back, part)
            assert torch.equal(back, torch.where(back != 0, values[tensor], 0.0))
            assert int(torch.count_nonzero(back)) == part.numel()
        if rate > 0.1 and (len(values) > 60 or rate == 0.5):
            continue  # what follows is dear for the large ones, and the same layers are run at the other widths
        small = filled(sub.chain, parts)
        scores, gradients = step(small, *inputs(shape, 2))
        assert scores.shape == (2, CLASSES)
        assert torch.isfinite(scores).all()
        assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize(("name", "options", "shape"), [
    *(entry for entry in MODELS_AND_OPTIONS if entry[0] in ("cnn", "mlp", "vit_tiny", "resnet8", "mobilenet_v2", "densenet40")),
    ("resnet18", {}, SMALL),
])
def test_at_rate_1_it_is_the_model_to_the_bit(name, options, shape):
    chain = made(name, options, shape)
    values, (x, y) = first_values(chain), inputs(shape)
    full, same = (filled(model, values) for model in (chain, narrow(chain, 1.0, PICKERS["random"]).chain))
    (scores, gradients), (other_scores, other_gradients) = step(full, x, y), step(same, x, y)
    assert torch.equal(scores, other_scores)
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)
    assert torch.equal(full.eval()(x), same.eval()(x))


def test_torchvisions_classifier_on_paper():
    chain = made("vgg11_bn", {"classifier": "torchvision"}, LARGE)
    for rate in (0.5, 0.3):
        sub = narrow(chain, rate, PICKERS["window"])
        kept = -(-512 * rate // 1)
        head = sub.chain.unit("head")
        assert (head.fc0.in_features, head.fc0.out_features) == (49 * kept, -(-4096 * rate // 1))
        assert head.fc.weight.shape == (CLASSES, head.fc1.out_features)
        assert sub.chain.output_shapes()["head"] == (CLASSES,)  # on the meta device
        pixels = sub.axes["head.fc0.weight"][1].reshape(-1, 49)
        assert np.array_equal(pixels // 49, np.repeat(sub.axes["conv5_1.conv.weight"][0][:, None], 49, axis=1))


def own(*units, shape=SMALL):
    return Chain(list(units), input_shape=shape, num_classes=CLASSES, name="own").skeleton()


def conv(num_inputs, num_outputs, kernel=3, **options):
    return nn.Sequential(nn.Conv2d(num_inputs, num_outputs, kernel, padding=kernel // 2, **options),
                         nn.BatchNorm2d(num_outputs), nn.ReLU(inplace=True))


def tail(num_features):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(num_features, CLASSES))


def bottlenecks():
    shortcut = nn.Sequential(nn.Conv2d(12, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    blocks = [("first", Bottleneck(12, 3)), ("second", Bottleneck(12, 4, 2, shortcut))]
    return own(("stem", conv(3, 12)), *blocks, ("head", tail(16)))


def grouped():
    """Groups of two channels, with twice as many outputs; flattened maps through a norm and two linear layers."""
    flat = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.BatchNorm1d(256), nn.Linear(256, 10), nn.ReLU(), nn.BatchNorm1d(10))
    units = [("stem", conv(3, 8)), ("pairs", conv(8, 16, groups=4)), ("flat", flat)]
    return own(*units, ("head", nn.Sequential(nn.Linear(10, CLASSES))))


ALONE = [
    *((name, options, SMALL) for name, options in [
        ("cnn", OWN_CNN), ("cnn", {**OWN_CNN, "norm": "batch"}), ("cnn", {**OWN_CNN, "padding": "valid", "pool": "last"}),
        ("resnet8", {"width": 6}), ("resnet20", {"width": 4}), ("resnet18", {}), ("densenet40", {}),
        ("mobilenet_v2", {"dropout": 0.0}),
    ]),
    ("mlp", {"hidden": [20, 12]}, (1, 4, 4)), ("vgg11_bn", {}, LARGE), (bottlenecks, {}, SMALL), (grouped, {}, SMALL),
]


def with_the_others_dead(values, sub):
    """Values of the full model in which channels outside the sub-model are exactly 0 behind every layer.

    That takes weights and biases of what puts them out, and scale and shift of norms. What the other channels would feed into
    is left at its values: a sub-model that follows the wrong inputs does not get the same scores.
    """
    found = {}
    for name, value in values.items():
        axes = sub.axes.get(name, (None,))
        outside = torch.ones(len(value), dtype=torch.bool)
        outside[slice(None) if axes[0] is None else torch.from_numpy(axes[0])] = False
        found[name] = value.clone()
        if not name.endswith(("running_mean", "running_var")):
            found[name][outside] = 0
    return found


def cut_shortcuts(full, sub):
    """Where windows of two stages do not lie inside one another, option A passes channels on that the sub-model has not."""
    for path, module in full.named_modules():
        if isinstance(module, PadShortcut):
            kept = torch.from_numpy(sub.axes[path.replace("downsample", "conv2.weight")][0])
            module.register_forward_hook(
                lambda module, args, out, kept=kept: out * torch.zeros(out.shape[1], 1, 1).index_fill_(0, kept, 1.0)
            )


@pytest.mark.parametrize(("name", "options", "shape"), ALONE)
def test_without_the_other_channels_the_full_model_computes_the_same(name, options, shape):
    # Not for group norm, layer norm and attention: they take means over channels, and the dead ones would count.
    chain = name() if callable(name) else made(name, options, shape)
    values, (x, y) = first_values(chain, torch.float64), inputs(shape, dtype=torch.float64)
    rates = [(0.5, "prefix"), (0.5, "window"), (0.7, "random")]
    for rate, pick in rates[1:2] if len(values) > 60 else rates:
        pick = "prefix" if name is grouped else pick  # other channels would not be whole groups
        sub = narrow(chain, rate, PICKERS[pick])
        parts = {tensor: region.view(values[tensor]).clone() for tensor, region in sub.regions.items()}
        small = filled(sub.chain, parts, torch.float64)
        full = filled(chain, with_the_others_dead(values, sub), torch.float64)
        cut_shortcuts(full, sub)
        (scores, gradients), (other, others) = step(full, x, y), step(small, x, y)
        # float64 has 1e-16; sums in another order, through up to 40 norms over few values, which divide by small deviations.
        torch.testing.assert_close(other, scores, rtol=1e-8, atol=1e-10)
        for tensor, gradient in others.items():
            torch.testing.assert_close(gradient, sub.regions[tensor].view(gradients[tensor]), rtol=1e-7, atol=1e-9, msg=tensor)
        for tensor, statistic in small.state_dict().items():
            if "running" in tensor:
                whole = sub.regions[tensor].view(full.get_buffer(tensor))
                torch.testing.assert_close(statistic, whole, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(small.eval()(x), full.eval()(x), rtol=1e-8, atol=1e-10)


def test_narrower_models_lie_inside_wider_ones():
    for name, options, shape in (("cnn", {**OWN_CNN, "norm": "batch"}, SMALL), ("densenet40", {}, SMALL),
                                 ("vit_tiny", {"depth": 1, "width": 24}, SMALL), ("resnet8", {}, SMALL)):
        chain = made(name, options, shape)
        numbers = {tensor: torch.arange(value.numel()).reshape(value.shape) for tensor, value in first_values(chain).items()}
        outer, inner = narrow(chain, 0.6), narrow(chain, 0.3)
        for tensor, region in inside(inner, outer).items():
            within = outer.regions[tensor].view(numbers[tensor])
            assert torch.equal(region.view(within), inner.regions[tensor].view(numbers[tensor]))


def test_classes_that_a_client_lacks():
    chain = made("cnn", {**OWN_CNN, "norm": "batch"}, SMALL)
    values, (x, _) = first_values(chain), inputs(SMALL)
    sub = narrow(chain, 1.0, classes=np.array([0, 3, 4]))
    assert {name for name, region in sub.regions.items() if region != WHOLE} == {"head.fc.weight", "head.fc.bias"}
    parts = {name: region.view(value) for name, value in values.items() for region in [sub.regions[name]]}
    assert torch.equal(parts["head.fc.weight"], values["head.fc.weight"][[0, 3, 4]])
    assert sub.chain.num_classes == 3
    scores = filled(sub.chain, parts).eval()(x)
    # A product with three columns instead of five may be summed in another order: float32 has 6e-8.
    torch.testing.assert_close(scores, filled(chain, values).eval()(x)[:, [0, 3, 4]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), [
    ("cnn", {**OWN_CNN, "norm": "batch"}), ("resnet8", {}), ("mlp", {"hidden": [9, 7]}),
])
def test_scaler_divides_behind_each_layer_but_the_last(name, options):
    chain = made(name, options, SMALL)
    values, (x, y) = first_values(chain, torch.float64), inputs(SMALL, dtype=torch.float64)
    plain, scaled, naive = (filled(chain, values, torch.float64) for _ in range(3))
    scale_activations(scaled, 0.25)
    layers = [module for module in naive.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer in layers[:-1]:
        forward = layer.forward
        layer.forward = lambda x, forward=forward: forward(x) / 0.25
    (scores, gradients), (others, other_gradients) = step(scaled, x, y), step(naive, x, y)
    assert torch.equal(scores, others)  # division by a power of two is exact
    assert all(torch.equal(gradients[tensor], other_gradients[tensor]) for tensor in gradients)
    assert not torch.equal(scores, plain(x))
    scaled.load_state_dict(values, strict=False)
    assert torch.equal(scaled.eval()(x), filled(chain, values, torch.float64).eval()(x))
    untouched = filled(chain, values, torch.float64)
    scale_activations(untouched, 1)
    assert not any(module._forward_hooks for module in untouched.modules())


def test_option_a_shortcuts_between_windows():
    x = torch.randn(2, 3, 5, 5, generator=rng.torch_generator(4, "x"), dtype=torch.float64, requires_grad=True)
    sources = [-1, -1, 2, 0, 1, -1, 2]
    out = SelectShortcut(sources)(x)
    picked = x[:, :, ::2, ::2]
    naive = torch.stack([picked[:, source] if source >= 0 else torch.zeros_like(picked[:, 0]) for source in sources], dim=1)
    assert torch.equal(out, naive)
    assert torch.equal(SelectShortcut([0, 1, 2, -1])(x), PadShortcut(1)(x))
    weights = torch.randn(out.shape, generator=rng.torch_generator(5, "w"), dtype=torch.float64)
    assert torch.equal(*(torch.autograd.grad((y * weights).sum(), x)[0] for y in (out, naive)))


def test_attention_with_other_numbers_of_heads_in_one_stream():
    chain = own(("embed", VitEmbed(3, 4, 4, 12, 0.0)), ("two", EncoderBlock(2, 12, 24, 0.0, 0.0)),
                ("three", EncoderBlock(3, 12, 24, 0.0, 0.0)), ("head", VitHead(12, CLASSES)))
    for rate in (0.3, 0.5, 0.6):
        sub = narrow(chain, rate, PICKERS["window"])
        width = 6 if rate < 0.6 else 12  # a multiple of both
        assert sub.chain.unit("head").fc.in_features == width
        for unit, heads in (("two", 2), ("three", 3)):
            attention = sub.chain.unit(unit).self_attention
            assert (attention.embed_dim, attention.num_heads, attention.head_dim) == (width, heads, width // heads)
            rows = sub.axes.get(f"{unit}.self_attention.in_proj_weight", [np.arange(36)])[0].reshape(3, heads, -1)
            assert (rows % (12 // heads) == rows[0, 0] % (12 // heads)).all()  # the same dimensions of every head
            assert (rows // (12 // heads) == np.arange(3 * heads).reshape(3, heads, 1)).all()
        values = first_values(chain)
        parts = {name: region.view(values[name]) for name, region in sub.regions.items()}
        assert torch.isfinite(step(filled(sub.chain, parts), *inputs(SMALL))[0]).all()


class OwnConv(nn.Conv2d):
    """May do anything."""


@pytest.mark.parametrize(("units", "field", "why"), [
    ([("a", conv(3, 8)), ("b", nn.Sequential(nn.PReLU())), ("c", tail(8))], "b.0", "a layer of class PReLU"),
    ([("a", nn.Sequential(OwnConv(3, 8, 1))), ("c", tail(8))], "a.0", "a layer of class OwnConv"),
    ([("a", conv(3, 6)), ("b", conv(6, 6, groups=2)), ("c", tail(6))], None, None),  # whole groups are left at ½
    ([("a", conv(3, 10)), ("b", conv(10, 10, groups=5)), ("c", tail(10))], "b.0", "groups of 2 channels, of which some"),
    ([("a", conv(3, 8)), ("b", nn.Sequential(nn.LayerNorm([8, 8, 8]))), ("c", tail(8))], "b.0", r"works on \(8, 8, 8\)"),
    ([("a", nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Unflatten(1, (4, 32)), nn.GroupNorm(2, 4))),
      ("c", nn.Sequential(nn.Flatten(), nn.Linear(128, CLASSES)))], "a.2", "Unflatten"),
    ([("a", nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.GroupNorm(4, 128))),
      ("c", nn.Sequential(nn.Linear(128, CLASSES)))], "a.2", "works on 128 features, not on the 2 channels alone"),
    ([("a", conv(3, 8)), ("b", nn.Sequential(nn.Conv2d(8, CLASSES, 8))), ("c", nn.Sequential(nn.Flatten()))], "c", "tied both"),
    ([("a", nn.Sequential(nn.Flatten(2), nn.Linear(64, 8))), ("c", nn.Sequential(nn.Flatten(), nn.Linear(24, CLASSES)))], "a.0",
     "flattens other dimensions"),
])
def test_refusals_name_the_layer_and_the_reason(units, field, why):
    chain = own(*units)
    assert chain.output_shapes()[units[-1][0]] == (CLASSES,)
    if field is None:
        narrow(chain, 0.5)
        return
    with pytest.raises(ConfigError, match=why) as caught:
        narrow(chain, 0.5)
    assert [fault.field for fault in caught.value.faults] == [field]


def test_the_example_of_a_layer_of_ones_own(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "own_parts.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^### Layers that can be narrowed\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)
    (text,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (tmp_path / "own_narrow.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("own_narrow")
    chain = made("own_narrow:small", {"width": 6}, SMALL)
    values, (x, y) = first_values(chain, torch.float64), inputs(SMALL, dtype=torch.float64)
    for rate, pick in ((0.5, "prefix"), (0.5, "window"), (0.3, "random")):
        sub = narrow(chain, rate, PICKERS[pick])
        parts = {name: region.view(values[name]).clone() for name, region in sub.regions.items()}
        assert parts["block.scale"].shape == (-(-6 * rate // 1),)
        full = filled(chain, with_the_others_dead(values, sub), torch.float64)
        # As above: sums in another order.
        scores = step(filled(sub.chain, parts, torch.float64), x, y)[0]
        torch.testing.assert_close(scores, step(full, x, y)[0], rtol=1e-9, atol=1e-12)
