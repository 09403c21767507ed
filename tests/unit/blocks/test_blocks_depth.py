"""Depths of a chain: where they end, their classifiers, exits on the way, and shortcuts past what is left out."""

import pytest
import torch
import torch.nn.functional as F

from dfed.blocks import ExitChain, check_names, classifier, cut_points, pad_to, paddable
from dfed.errors import ConfigError
from dfed.models import Chain, build_chain, materialise
from dfed.registry import MODELS
from dfed.rng import torch_generator

torch.set_num_threads(1)


def build(name, options=None, shape=(3, 32, 32)):
    return build_chain(name, options or {}, input_shape=shape, num_classes=10)


@pytest.mark.parametrize(("name", "options", "num_depths", "ends"), [
    ("resnet18", {}, 4, ["layer1_1", "layer2_1", "layer3_1"]),  # its stages of one shape, the stem with the first
    ("resnet20", {}, 3, ["layer1_2", "layer2_2"]),
    ("densenet40", {}, 3, ["block1_11", "block2_11"]),  # of one height and width; each layer has other channels
    ("resnet20", {}, 4, ["layer1_0", "layer2_0", "layer2_2"]),  # three stages: 10 units in 2, 3, 2, 3
    ("vit_tiny", {}, 4, ["block0", "block2", "block3"]),  # the embedding is no depth of its own
    ("cnn", {}, 4, ["conv0", "conv1"]),  # too few units
    ("mlp", {"hidden": []}, 4, []),
    ("mlp", {}, 1, []),
])
def test_where_depths_end(name, options, num_depths, ends):
    chain = build(name, options)
    stops = cut_points(chain, num_depths)
    assert [chain.unit_names[stop - 1] for stop in stops[:-1]] == ends
    assert stops[-1] == len(chain)


def test_depths_of_every_model_are_in_order_and_spare_the_classifier():
    for name in MODELS:
        chain = build(name)
        for num_depths in range(1, 7):
            stops = cut_points(chain, num_depths)
            assert list(stops) == sorted(set(stops))
            assert stops[0] >= 1
            assert stops[-1] == len(chain)
            assert len(stops) <= num_depths
            assert all(stop <= len(chain) - 2 for stop in stops[:-1])
            for stop in stops[:-1]:
                module = classifier(chain, stop)
                assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}


def test_depths_by_name():
    chain = build("resnet8")
    assert cut_points(chain, 4, ["stem", "layer2_0"]) == (1, 3, 5)
    assert cut_points(chain, 4, []) == (5,)
    for wrong in (["layer2_0", "stem"], ["stem", "stem"], ["nobody"], ["head"], ["layer3_0"]):  # the last two: the full model
        with pytest.raises(ConfigError, match=r"`cuts` must name units of 'resnet8' .* stem, layer1_0, layer2_0; but is"):
            cut_points(chain, 4, wrong)
    with pytest.raises(ConfigError, match="it has none"):
        cut_points(build("mlp", {"hidden": [3]}), 2, ["hidden0"])


@pytest.mark.parametrize(("name", "options", "stop"), [
    ("resnet8", {"width": 4}, 3), ("vit_tiny", {"depth": 2, "width": 12}, 2), ("mlp", {"hidden": [7, 5]}, 1),
])
def test_a_classifier_by_hand(name, options, stop):
    chain = materialise(build(name, options), torch_generator(0, "init")).eval()
    shape = chain.output_shapes()[chain.unit_names[stop - 1]]
    module = Chain([("own", classifier(chain, stop))], input_shape=shape, num_classes=10, name="own")
    materialise(module, torch_generator(1, "init")).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch_generator(2, "noise")))
        x = chain.run(torch.randn(3, 3, 32, 32, generator=torch_generator(3, "x")), 0, stop)
        own = module.state_dict()
        weight, bias = own["own.fc.weight"].double(), own["own.fc.bias"].double()
        features = x.double()
        if features.dim() == 4:
            features = features.mean((2, 3))
        if features.dim() == 3:
            scale, shift = own["own.ln.weight"].double(), own["own.ln.bias"].double()
            features = F.layer_norm(features[:, 0], features.shape[2:], scale, shift, 1e-6)
        # float32 against float64: sums of at most 1024 terms of order 1.
        torch.testing.assert_close(module(x).double(), features @ weight.T + bias, rtol=1e-4, atol=1e-5)


def test_feature_maps_of_volumes_have_no_classifier():
    chain = Chain([("volume", torch.nn.Conv3d(1, 2, 1)), ("flat", torch.nn.Flatten()), ("head", torch.nn.Linear(16, 2))],
                  input_shape=(1, 2, 2, 2), num_classes=2, name="volumes")
    with pytest.raises(ConfigError, match=r"`volume` must have feature maps, tokens or a vector"):
        classifier(chain, 1)
    with pytest.raises(ConfigError, match="no unit called volume or run"):
        check_names(chain, ["exit1", "volume", "run"])
    check_names(chain, ["exit1"])


def with_exits(chain, stop, places):
    exits = [(f"exit{place}", place, classifier(chain, place)) for place in places]
    model = materialise(ExitChain(chain, stop, exits), torch_generator(5, "init"))
    return model, exits


@pytest.mark.parametrize("stop", [3, 5])
def test_exits_are_those_of_the_prefixes(stop):
    chain = build("resnet8", {"width": 4})
    model, exits = with_exits(chain, stop, [1, 3])
    assert set(dict(model.named_children())) == {*chain.unit_names[:stop], "exit1", "exit3"}
    assert {tensor.device.type for _, _, module in exits for tensor in module.state_dict().values()} == {"meta"}  # copied
    x = torch.randn(4, 3, 32, 32, generator=torch_generator(3, "x"))
    model.eval()
    with torch.no_grad():
        expected = [model.exit1(model.run(x, 0, 1)), model.exit3(model.run(x, 0, 3))]
        if stop == len(chain):
            expected.append(model.run(x))
        # The mean of three, added in another order: a few units in the last place.
        torch.testing.assert_close(model(x), sum(expected) / len(expected), rtol=1e-6, atol=1e-6)
        alone = ExitChain(chain, 3, [("exit3", 3, model.exit3)])
        values = model.state_dict()
        alone.load_state_dict({name: values[name] for name in alone.state_dict()}, assign=True)
        torch.testing.assert_close(alone.eval()(x), expected[1], rtol=0, atol=0)
    model.train()
    scores = model(x)
    assert isinstance(scores, list)
    assert len(scores) == len(expected)
    assert all(each.shape == (4, 10) for each in scores)


def test_activation_checkpointing_changes_no_bit_and_holds_less():
    chain = build("vit_tiny", {"depth": 4, "width": 24, "dropout": 0.2})
    x = torch.randn(4, 3, 32, 32, generator=torch_generator(3, "x"))
    gradients, kept = [], []
    for recompute in (False, True):
        model, _ = with_exits(chain, 5, [2, 4, 5])
        model.recompute = recompute
        model.set_generator(torch_generator(0, "layers"))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # noqa: B023
            loss = sum(each.square().sum() for each in model.train()(x))
        loss.backward()
        kept.append(sum(sizes))
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize(("here", "there"), [
    ((4, 8, 8), (10, 2, 2)), ((4, 9, 9), (6, 4, 4)), ((5, 4, 4), (2, 4, 4)), ((3, 4, 4), (7,)), ((9, 4, 4), (3,)),
    ((6,), (9,)), ((9,), (3,)), ((5, 4), (5, 7)), ((5, 8), (5, 4)), ((2, 3, 3), (2, 3, 3)),
])
def test_the_shortcut_by_hand(here, there):
    assert paddable(here, there)
    x = torch.randn(3, *here, generator=torch_generator(3, "x"), dtype=torch.float64)
    got = pad_to(x, there)
    assert got.shape == (3, *there)
    expected = x
    if len(here) == 3:
        expected = x.mean((2, 3)) if len(there) == 1 else F.adaptive_avg_pool2d(x, there[1:])
    expected = expected.movedim(2, 1) if len(here) == 2 else expected  # (batch, what is padded, ...)
    size = there[-1] if len(here) == 2 else there[0]
    if expected.shape[1] > size:
        group = expected.shape[1] / size  # each of the new ones is the mean of those that it touches
        bounds = [(int(i * group), -int(-(i + 1) * group // 1)) for i in range(size)]
        expected = torch.stack([expected[:, a:b].mean(1) for a, b in bounds], 1)
    got = got.movedim(2, 1) if len(here) == 2 else got
    torch.testing.assert_close(got[:, : expected.shape[1]], expected, rtol=1e-12, atol=1e-12)  # float64, sums of a few terms
    assert not got[:, expected.shape[1] :].any()


def test_what_cannot_be_padded():
    for here, there in (((4,), (4, 2, 2)), ((5, 4), (6, 4)), ((5, 4), (4,)), ((3, 4, 4), (5, 4))):
        assert not paddable(here, there)
        with pytest.raises(AssertionError, match="cannot be padded"):
            pad_to(torch.zeros(1, *here), there)
