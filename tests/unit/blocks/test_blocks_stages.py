"""Parts of chains: what they compute, what is trained in them, and what stands in for the blocks that are not there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfed.blocks import Splitting, cut, output_module, stage, tail_parameters, train_only
from dfed.errors import ConfigError
from dfed.models import Chain, build_chain, materialise
from dfed.registry import MODELS, UnknownName
from dfed.rng import torch_generator

torch.set_num_threads(1)

SMALL_VIT = {"depth": 3, "width": 24}


def build(name: str, options: dict, shape: tuple[int, ...]) -> Chain:
    return build_chain(name, options, input_shape=shape, num_classes=10)


def filled(chain: Chain, key: int = 0) -> Chain:
    """First values, and some noise on top: heads that start at 0 would pass no gradient on."""
    materialise(chain, torch_generator(key, "init"))
    noise = torch_generator(key, "noise")
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.05)
    chain.set_generator(torch_generator(key, "layers"))
    return chain


def with_values_of(part: Chain, whole: Chain) -> Chain:
    """``part`` with the values of ``whole`` wherever the names are the same."""
    filled(part, key=1)
    values = whole.state_dict()
    part.load_state_dict({name: values.get(name, own) for name, own in part.state_dict().items()})
    return part


def splitting_of(chain: Chain, *cuts: int | str) -> Splitting:
    """Blocks ``b0`` … that begin at the chain's start and at these units."""
    starts = [0, *(chain.index_of(unit) for unit in cuts)]
    ends = [*starts[1:], len(chain)]
    return Splitting({f"b{i}": chain.unit_names[a:b] for i, (a, b) in enumerate(zip(starts, ends, strict=True))})


CUTS = [
    ("resnet8", {"width": 4}, (3, 12, 12)), ("cnn", {"channels": [4, 6], "norm": "batch", "hidden": 9}, (1, 12, 12)),
    ("vit_tiny", SMALL_VIT, (3, 8, 8)), ("mlp", {"hidden": [20, 30, 15]}, (2, 5, 5)),
]


@pytest.mark.parametrize(("name", "options", "shape"), CUTS, ids=[case[0] for case in CUTS])
def test_a_part_computes_what_the_units_compute(name, options, shape):
    chain = filled(build(name, options, shape))
    chain.unit(chain.unit_names[1]).requires_grad_(False)
    shapes, names = {**chain.output_shapes()}, chain.unit_names
    before = {key: (value.clone(), value.requires_grad) for key, value in chain.state_dict(keep_vars=True).items()}
    for first, last in [(0, len(chain)), (0, 2), (1, len(chain)), (1, 3), (len(chain) - 1, len(chain)), (2, 3)]:
        part = cut(chain, names[first], last)
        assert part.unit_names == names[first:last]
        assert all(tensor.is_meta for tensor in part.state_dict().values())
        assert list(part.state_dict()) == [key for key in before if key.partition(".")[0] in names[first:last]]
        for key, parameter in part.named_parameters():
            assert parameter.requires_grad == before[key][1]
        shape_before = shape if first == 0 else shapes[names[first - 1]]
        assert part.input_shape == shape_before
        assert part.output_shapes() == {unit: shapes[unit] for unit in names[first:last]}
        assert part.num_classes == 10
        x = torch.randn(3, *shape_before, generator=torch_generator(0, "x"))
        with_values_of(part, chain)
        for train in (False, True):
            with torch.no_grad():
                assert torch.equal(part.train(train)(x.clone()), chain.train(train).run(x.clone(), first, last))
        changed = {key: value for key, value in part.state_dict().items() if not torch.equal(value, chain.state_dict()[key])}
        assert not changed  # running statistics went along
        chain.load_state_dict({key: value for key, (value, _) in before.items()})
    assert all(value.requires_grad == before[key][1] for key, value in chain.state_dict(keep_vars=True).items())


def test_a_part_with_other_units_at_its_end():
    chain = build("resnet8", {"width": 4}, (3, 12, 12))
    end = [("pool", nn.AdaptiveAvgPool2d(1)), ("scores", nn.Sequential(nn.Flatten(), nn.Linear(8, 10)))]
    part = cut(chain, stop="layer3_0", end=end)
    assert part.unit_names == ("stem", "layer1_0", "layer2_0", "pool", "scores")
    assert part.output_shapes()["scores"] == (10,)
    assert cut(chain, end=[("more", nn.Identity())]).unit_names == (*chain.unit_names, "more")
    assert part.init_scheme == chain.init_scheme
    assert part.name == chain.name


def test_parts_that_cannot_be():
    chain = build("resnet8", {"width": 4}, (3, 12, 12))
    for first, last in [("layer2_0", "layer2_0"), ("layer2_0", "stem")]:
        with pytest.raises(ConfigError, match="at least one unit"):
            cut(chain, first, last)
    with pytest.raises(ConfigError, match="'stem' is there twice"):
        cut(chain, stop=1, end=[("stem", nn.Identity())])
    with pytest.raises(UnknownName, match="layer2_0"):
        cut(chain, "layer2_1")


TAILS = [
    ("resnet18", {}, "layer2_0", ["conv2.weight", "bn2.weight", "bn2.bias"]),  # and never the shortcut
    ("resnet18", {}, "stem", ["conv.weight", "norm.weight", "norm.bias"]),
    ("resnet18", {"norm": "group"}, "layer1_1", ["conv2.weight", "bn2.weight", "bn2.bias"]),
    ("resnet50", {}, "layer1_0", ["conv3.weight", "bn3.weight", "bn3.bias"]),
    ("resnet8", {}, "layer2_0", ["conv2.weight", "bn2.weight", "bn2.bias"]),
    ("vgg11_bn", {}, "conv2_0", ["conv.weight", "conv.bias", "norm.weight", "norm.bias"]),
    ("mobilenet_v2", {}, "block3", ["conv.2.weight", "conv.3.weight", "conv.3.bias"]),
    ("mobilenet_v2", {}, "block0", ["conv.1.weight", "conv.2.weight", "conv.2.bias"]),
    ("mobilenet_v2", {}, "last", ["0.weight", "1.weight", "1.bias"]),
    ("densenet40", {}, "block1_3", ["conv.weight"]),  # the norm comes before it
    ("densenet40", {}, "transition1", ["conv.weight"]),
    ("vit_tiny", SMALL_VIT, "block1", ["mlp.3.weight", "mlp.3.bias"]),
    ("vit_tiny", SMALL_VIT, "embed", ["conv_proj.weight", "conv_proj.bias"]),
    ("cnn", {}, "conv0", ["conv.weight", "conv.bias"]),
    ("cnn", {"norm": "group"}, "conv1", ["conv.weight", "norm.weight", "norm.bias"]),
    ("cnn", {}, "hidden", ["fc.weight", "fc.bias"]),
    ("mlp", {}, "hidden0", ["fc.weight", "fc.bias"]),
]


@pytest.mark.parametrize(("name", "options", "unit", "expected"), TAILS, ids=[f"{case[0]} {case[2]}" for case in TAILS])
def test_the_tail_of_a_unit(name, options, unit, expected):
    chain = build(name, options, (3, 32, 32))
    assert tail_parameters(chain, unit) == tuple(f"{unit}.{rest}" for rest in expected)
    assert {f"{unit}.{rest}" for rest in expected} <= dict(chain.named_parameters()).keys()


def test_tails_of_bare_units():
    chain = Chain([("conv", nn.Conv2d(3, 4, 1)), ("relu", nn.ReLU()), ("norm", nn.BatchNorm2d(4)),
                   ("head", nn.Sequential(nn.Flatten(), nn.Linear(4 * 16, 10)))],
                  input_shape=(3, 4, 4), num_classes=10, name="bare")
    assert tail_parameters(chain, "conv") == ("conv.weight", "conv.bias")
    assert tail_parameters(chain, "relu") == ()
    assert tail_parameters(chain, "norm") == ()  # no convolution, no linear layer
    with pytest.raises(UnknownName, match="conv"):
        tail_parameters(chain, "conf")
    model = stage(chain, splitting_of(chain, "norm"), 1)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "norm.weight", "norm.bias", "head.1.weight", "head.1.bias",
    }


def test_what_is_trained():
    chain = build("resnet8", {}, (3, 12, 12))
    train_only(chain, ["layer2_0"], ["stem.conv.weight"])
    assert {name for name, p in chain.named_parameters() if p.requires_grad} == {
        "stem.conv.weight", *(name for name, _ in chain.named_parameters() if name.startswith("layer2_0.")),
    }
    train_only(chain, ["head"])
    assert {name for name, p in chain.named_parameters() if p.requires_grad} == {"head.fc.weight", "head.fc.bias"}
    with pytest.raises(UnknownName, match="layer2_0"):
        train_only(chain, ["layer2_1"])


def shapes_of(name: str) -> list[tuple[int, ...]]:
    if name.startswith("vgg"):
        return [(3, 32, 32), (3, 35, 50)]
    return [(1, 28, 28), (3, 32, 32)] if name == "vit_tiny" else [(1, 28, 28), (3, 35, 22)]


SHAPES = [(name, shape) for name in MODELS for shape in shapes_of(name)]


@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=str)
def test_output_modules_of_every_model(name, shape):
    chain = build(name, SMALL_VIT if name == "vit_tiny" else {}, shape)
    shapes, body = chain.output_shapes(), len(chain) - 1
    cuts = {(body // 2,), (body // 4, body // 2, 3 * body // 4), (1, body), tuple(range(1, min(5, body)))}
    for starts in {tuple(dict.fromkeys(start for start in places if start)) for places in cuts}:
        blocks = list(splitting_of(chain, *starts).blocks.values())
        for index in {0, len(blocks) // 2 - 1, len(blocks) - 2}:
            module = output_module(chain, blocks[index:])
            assert all(tensor.is_meta for tensor in module.state_dict().values())
            assert all(parameter.requires_grad for parameter in module.parameters())
            x = torch.empty(2, *shapes[blocks[index][-1]], device="meta")
            children = dict(module.eval().named_children())
            later = [[unit for unit in units if unit != "head"] for units in blocks[index + 1:]]
            later = [units for units in later if units]
            assert len(children) == len(later) + 1
            for units, step in zip(later, children.values(), strict=False):
                channels = x.shape[1]
                x = step(x)
                assert tuple(x.shape[1:]) == shapes[units[-1]]
                entries = sum(parameter.numel() for parameter in step.parameters())
                there = shapes[units[-1]]
                if len(there) == 3:
                    assert entries == 9 * channels * there[0]
                elif len(there) == 1:
                    assert entries == channels * there[0]
                else:  # attention 4 w², MLP 2 w²; biases 4 + 2, two norms of 2 vectors
                    assert entries == 6 * there[1] ** 2 + 10 * there[1]
            head = children["head"]
            assert head(x).shape == (2, 10)
            assert list(head.state_dict()) == [key.partition(".")[2] for key in chain.state_dict() if key.startswith("head.")]


def test_strides_of_output_modules():
    chain = build("resnet18", {}, (3, 35, 22))  # 35 × 22, 18 × 11, 9 × 6, 5 × 3
    blocks = list(splitting_of(chain, "layer1_1", "layer2_0", "layer4_0").blocks.values())
    module = output_module(chain, blocks)
    assert [(step.stride, step.kernel_size, step.padding, step.bias) for step in list(module)[:-1]] == [
        ((1, 1), (3, 3), (1, 1), None), ((4, 4), (3, 3), (1, 1), None), ((2, 2), (3, 3), (1, 1), None),
    ]
    # No stride leads from 7 to 5 or from 8 to 3 pixels: the rest is averaged.
    odd = Chain([("a", nn.Conv2d(3, 4, 1)), ("b", nn.Conv2d(4, 6, 3)), ("c", nn.AdaptiveAvgPool2d((3, 5))),
                 ("head", nn.Sequential(nn.Flatten(), nn.Linear(90, 10)))], input_shape=(3, 8, 7), num_classes=10, name="odd")
    module = output_module(odd, [("a",), ("b", "c"), ("head",)])
    assert module(torch.empty(2, 4, 8, 7, device="meta")).shape == (2, 10)
    assert module.step0(torch.empty(2, 4, 8, 7, device="meta")).shape == (2, 6, 3, 5)


class Shorter(nn.Module):
    """Half of the tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, ::2]


def test_tokens_must_keep_their_shape():
    chain = Chain([("a", nn.Linear(4, 4)), ("b", Shorter()), ("head", nn.Sequential(nn.Flatten(), nn.Linear(12, 10)))],
                  input_shape=(6, 4), num_classes=10, name="shorter")
    with pytest.raises(ConfigError, match=r"`b` must keep the shape of its tokens.*\(6, 4\) into \(3, 4\)"):
        stage(chain, splitting_of(chain, "b"), 0)


STEPS = [  # model, options, shape, cuts, index, parameters of the unit before that are trained along
    ("mlp", {"hidden": [20, 30, 15]}, (2, 5, 5), ("hidden1", "hidden2"), 1),
    ("cnn", {"channels": [4, 6, 8], "kernel": 3, "hidden": 9, "norm": "batch", "dropout": [0.2, 0.2]}, (1, 12, 12),
     ("conv1", "hidden"), 1),
    ("resnet8", {"width": 4}, (3, 12, 12), ("layer2_0", "layer3_0"), 1),
    ("resnet18", {}, (3, 8, 8), ("layer2_0", "layer2_1", "layer4_0"), 2),
    ("vgg11_bn", {}, (3, 32, 32), ("conv3_0", "conv4_0"), 1),
    ("densenet40", {}, (3, 8, 8), ("block1_4", "transition1", "block3_2"), 1),
    ("mobilenet_v2", {}, (3, 16, 16), ("block2", "block5", "block12"), 1),
    ("vit_tiny", SMALL_VIT, (3, 8, 8), ("block1", "block2"), 1),
]


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(("name", "options", "shape", "cuts", "index"), STEPS, ids=[case[0] for case in STEPS])
def test_one_step_of_a_stage_changes_what_is_trained_and_nothing_else(name, options, shape, cuts, index, tail):
    chain = filled(build(name, options, shape))
    splitting = splitting_of(chain, *cuts)
    block = splitting.names[index]
    model = with_values_of(stage(chain, splitting, index, tail=tail), chain).train()
    before_block = chain.unit_names[chain.index_of(cuts[index - 1]) - 1]
    expected = set(tail_parameters(chain, before_block)) if tail else set()
    own = {*splitting.blocks[block], f"output_{block}"}
    expected |= {key for key, _ in model.named_parameters() if key.partition(".")[0] in own}
    assert model.unit_names == (*chain.unit_names[:chain.index_of(cuts[index])], f"output_{block}")
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == expected
    shared = chain.state_dict()
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    assert all(torch.equal(value, shared[key]) for key, value in before.items() if not key.startswith("output_"))

    x = torch.randn(4, *shape, generator=torch_generator(0, "x"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(model(x), torch.arange(4)).backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert {key for key, parameter in after.items() if parameter.grad is not None} == expected
    # All moved, but that a bias may have a gradient of 0: one before a batch norm has.
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert moved <= expected
    assert {key for key in expected - moved if not key.endswith("bias")} == set()
    assert bool(moved & set(tail_parameters(chain, before_block))) == tail


@pytest.mark.parametrize(("name", "options", "shape", "cuts"), [case[:4] for case in STEPS if case[0] != "vgg11_bn"],
                         ids=[case[0] for case in STEPS if case[0] != "vgg11_bn"])
def test_first_and_last_stage(name, options, shape, cuts):
    chain = filled(build(name, options, shape))
    splitting = splitting_of(chain, *cuts)
    first = stage(chain, splitting, 0)
    assert first.unit_names == (*splitting.blocks["b0"], "output_b0")
    assert all(parameter.requires_grad for parameter in first.parameters())
    last = with_values_of(stage(chain, splitting, len(cuts)), chain)
    assert last.unit_names == chain.unit_names
    assert list(last.state_dict()) == list(chain.state_dict())
    x = torch.randn(4, *shape, generator=torch_generator(0, "x"))
    for train in (False, True):
        for model in (chain, last):
            model.set_generator(torch_generator(0, "layers"))
        with torch.no_grad():
            assert torch.equal(last.train(train)(x), chain.train(train)(x))
    block = splitting.blocks[f"b{len(cuts)}"]
    tail = tail_parameters(chain, chain.unit_names[chain.index_of(cuts[-1]) - 1])
    trained = {key for key, parameter in last.named_parameters() if parameter.requires_grad}
    assert trained == {*tail, *(key for key, _ in chain.named_parameters() if key.partition(".")[0] in block)}
    only = stage(chain, splitting_of(chain), 0)
    assert only.unit_names == chain.unit_names
    assert all(parameter.requires_grad for parameter in only.parameters())
