"""Prefixes of a chain that share its last unit: shortcuts against stacked option-A ones, every depth against a naive loop."""

import pytest
import torch
from torch import nn

from dfed.blocks import cut_points, pad_to
from dfed.blocks.prefix import TO_HEAD, PrefixChain, Shortcut, body_stops, subsample_to
from dfed.errors import ConfigError
from dfed.models import Chain, build_chain, materialise
from dfed.models.cifar_resnet import PadShortcut
from dfed.registry import MODELS
from dfed.rng import torch_generator

torch.set_num_threads(1)

CNN = {"channels": [4, 6, 5], "kernel": 3, "hidden": 8, "norm": "batch"}


def build(name, options=None, shape=(3, 16, 16)):
    return build_chain(name, options or {}, input_shape=shape, num_classes=10)


def drawn(*shape, key="x"):
    return torch.randn(*shape, generator=torch_generator(1, key))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (5, 7), (8, 8), (9, 16), (15, 13), (32, 32), (33, 31)])
@pytest.mark.parametrize("added", [[3], [2, 4], [1, 0, 5]])
def test_the_shortcut_is_what_those_of_the_units_left_out_do_one_after_another(size, added):
    x = drawn(2, 3, *size)
    expected = x
    for num_new in added:
        expected = PadShortcut(num_new)(expected)
    found = subsample_to(x, tuple(expected.shape[1:]))
    assert torch.equal(found, expected)
    assert torch.equal(Shortcut(tuple(expected.shape[1:]))(x), expected)
    assert Shortcut(expected.shape[1:]).extra_repr() == f"shape={tuple(expected.shape[1:])}"


def test_other_shortcuts():
    x = drawn(2, 3, 8, 6)
    assert subsample_to(x, (3, 8, 6)) is x
    wider = subsample_to(x, (5, 8, 6))
    assert torch.equal(wider[:, :3], x)
    assert not wider[:, 3:].any()
    one_way = subsample_to(x, (4, 2, 6))  # each direction by itself
    assert torch.equal(one_way[:, :3], x[:, :, ::4])
    for shape in ((2, 4, 3), (4, 3, 3), (4, 8, 5), (7,)):  # fewer channels; no power of two; a vector
        assert torch.equal(subsample_to(x, shape), pad_to(x, shape))
    tokens, vector = drawn(2, 5, 6), drawn(2, 6)
    assert torch.equal(subsample_to(tokens, (5, 8))[..., :6], tokens)
    assert torch.equal(subsample_to(vector, (4,)), pad_to(vector, (4,)))
    assert not list(Shortcut((4,)).state_dict())


def naive_shortcut(x, shape):
    """Pixels and channels one at a time; None where the shapes are not of the option-A kind."""
    if tuple(x.shape[1:]) == shape:
        return x
    if len(shape) == 1 and x.dim() == 4:
        x = x.mean((2, 3))
    elif len(shape) == 3:
        while x.shape[2:] != shape[1:]:
            x = torch.stack([torch.stack([x[:, :, i, j] for j in range(0, x.shape[3], 2)], -1)
                             for i in range(0, x.shape[2], 2)], -2)
    out = torch.zeros(len(x), *shape, dtype=x.dtype)
    out[:, : x.shape[1]] = x
    return out


CASES = [
    ("resnet20", {"width": 4}, (3, 16, 16), 4),
    ("resnet8", {"width": 4}, (3, 15, 9), 4),
    ("resnet18", {"stem": "cifar"}, (3, 8, 8), 4),
    ("cnn", CNN, (1, 8, 8), 4),
    ("mlp", {"hidden": [5, 6, 9]}, (1, 4, 4), 3),
    ("vit_tiny", {"depth": 3, "width": 12, "patch": 8}, (3, 16, 16), 3),
]


@pytest.mark.parametrize(("name", "options", "shape", "depths"), CASES, ids=[case[0] for case in CASES])
def test_every_depth_is_a_naive_loop_over_its_units_and_the_last_one_is_the_chain(name, options, shape, depths):
    chain = build(name, options, shape)
    stops = body_stops(chain, cut_points(chain, depths))
    assert len(stops) == depths
    assert stops[-1] == len(chain) - 1
    prefix = PrefixChain(chain, stops)
    assert prefix.unit_names == (*chain.unit_names[:-1], TO_HEAD, chain.unit_names[-1])
    assert {tensor.device.type for tensor in prefix.state_dict().values()} == {"meta"}
    assert prefix.state_dict().keys() == chain.state_dict().keys()
    whole = materialise(chain.skeleton(), torch_generator(1, "init"))
    x = drawn(3, *shape)
    whole(x)  # gives the norms statistics of their own
    prefix.to_empty(device="cpu").load_state_dict(whole.state_dict())
    for mode in (False, True):
        assert torch.equal(prefix.train(mode)(x), whole.train(mode)(x))
        assert torch.equal(prefix.at_depth(x, depths), whole(x))
    prefix, whole, x = prefix.double().eval(), whole.double().eval(), x.double()
    wanted, names = chain.output_shapes()[chain.unit_names[-2]], chain.unit_names
    linear = [layer for layer in whole.unit(names[-1]).modules() if isinstance(layer, nn.Linear)][-1]
    for depth in range(1, depths + 1):
        reached = x
        for unit in names[: stops[depth - 1]]:
            reached = whole.unit(unit)(reached)
        assert torch.equal(prefix.run_body(x, 0, depth), reached)
        if depth > 1:
            assert torch.equal(prefix.run_body(prefix.run_body(x, 0, depth - 1), depth - 1, depth), reached)
        expected = whole.unit(names[-1])(naive_shortcut(reached, wanted))
        # float64; means over pixels may be summed in another order.
        torch.testing.assert_close(prefix.at_depth(x, depth), expected, rtol=1e-12, atol=1e-12)
        scores, features = prefix.run_head_with_features(reached)
        assert torch.equal(scores, prefix.at_depth(x, depth))
        torch.testing.assert_close(features @ linear.weight.T + linear.bias, expected, rtol=1e-12, atol=1e-12)
        if name in ("resnet18", "resnet20", "resnet8"):
            torch.testing.assert_close(features, naive_shortcut(reached, wanted).mean((2, 3)), rtol=1e-12, atol=1e-12)
    hooks = [module for module in prefix.modules() if module._forward_pre_hooks or module._forward_hooks]
    assert hooks == []  # what watched the linear layer is gone


def test_a_shorter_prefix_has_its_own_units_only_and_other_names_if_told():
    chain = build("resnet8", {"width": 4})
    shorter = PrefixChain(chain, [1, 3], lambda unit: f"own_{unit}")
    assert shorter.unit_names == ("own_stem", "own_layer1_0", "own_layer2_0", TO_HEAD, "own_head")
    own = {name.removeprefix("own_"): tuple(value.shape) for name, value in shorter.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in chain.state_dict().items()}
    assert own == {name: shape for name, shape in shapes.items() if not name.startswith("layer3")}
    assert shorter.prefix_stops == (1, 3)
    assert (shorter.name, shorter.input_shape, shorter.num_classes) == ("resnet8", (3, 16, 16), 10)
    assert chain.unit_names[0] == "stem"
    x = drawn(2, 3, 16, 16)
    materialise(shorter, torch_generator(1, "init")).eval()
    assert shorter.at_depth(x, 1).shape == (2, 10)
    scores, features = shorter.run_head_with_features(shorter.run_body(x, 0, 1))
    assert (scores.shape, features.shape) == ((2, 10), (2, 16))
    assert not features[:, 4:].any()  # channels that the shortcut added


def test_without_a_linear_layer_the_scores_are_the_features():
    head = nn.Sequential(nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    chain = Chain([("first", nn.Conv2d(1, 2, 1)), ("second", nn.Conv2d(2, 4, 3, 2, 1)), ("head", head)],
                  input_shape=(1, 6, 6), num_classes=3, name="own")
    prefix = materialise(PrefixChain(chain, body_stops(chain, (1, 3))), torch_generator(1, "init"))
    scores, features = prefix.run_head_with_features(prefix.run_body(drawn(2, 1, 6, 6), 0, 1))
    assert scores is features
    assert scores.shape == (2, 3)
    # A last unit that is itself the linear layer.
    bare = Chain([("first", nn.Flatten()), ("head", nn.Linear(4, 3))], input_shape=(1, 2, 2), num_classes=3, name="bare")
    prefix = materialise(PrefixChain(bare, [1]), torch_generator(1, "init"))
    x = drawn(2, 1, 2, 2)
    assert torch.equal(prefix.run_head_with_features(prefix.run_body(x, 0, 1))[1], x.flatten(1))


def test_what_is_refused():
    single = Chain([("head", nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))], input_shape=(1, 2, 2), num_classes=3, name="one")
    with pytest.raises(ConfigError, match=r"`model` must have a unit before its last one, but 'one' has one unit in all\."):
        body_stops(single, cut_points(single, 4))
    units = [("flat", nn.Flatten()), ("maps", nn.Unflatten(1, (1, 2, 2))),
             ("head", nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))]
    back = Chain(units, input_shape=(1, 2, 2), num_classes=3, name="back")
    expected = r"`flat` must have an output that a shortcut can bring to .* which takes \(1, 2, 2\), but has \(4,\)\."
    with pytest.raises(ConfigError, match=expected):
        body_stops(back, (1, 3))
    assert body_stops(back, (3,)) == (2,)


@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_has_depths(name):
    chain = build(name, shape=(3, 32, 32))
    for depths in range(1, 7):
        stops = body_stops(chain, cut_points(chain, depths))
        assert list(stops) == sorted(set(stops))
        assert stops[0] >= 1
        assert stops[-1] == len(chain) - 1
        assert len(stops) <= depths
    stops = body_stops(chain, cut_points(chain, 4))
    prefix, before = PrefixChain(chain, stops), torch.empty(2, 3, 32, 32, device="meta")
    for depth in range(1, len(stops) + 1):
        reached = prefix.run_body(before, depth - 1, depth)
        version = reached._version
        scores, features = prefix.run_head_with_features(reached)
        assert (scores.shape, features.dim(), len(features)) == ((2, 10), 2, 2)
        if depth < len(stops):
            prefix.run_body(reached, depth, depth + 1)
        assert reached._version == version  # two passes share it: none may change it in place
        before = reached
