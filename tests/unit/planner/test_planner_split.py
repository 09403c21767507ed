"""Splittings against every other splitting of the same chain, each stage predicted by itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dfed.blocks import Splitting, stage
from dfed.client import ClientSettings
from dfed.errors import ConfigError
from dfed.models import Chain, build_chain
from dfed.planner import Split, Store, chain_costs, split_chain, stage_peaks
from dfed.planner import split as split_module
from dfed.planner.split import splitting_at
from dfed.planner.stage_costs import StageCosts
from dfed.planner.unit_courses import NoSum

torch.set_num_threads(1)

CPU = torch.device("cpu")
Cuts = tuple[int, ...]


def all_cuts(chain: Chain) -> list[Cuts]:
    """Where the blocks of every splitting begin, and last the unit that goes with the block before it."""
    body = len(chain) - 1
    return [(0, *middle, body) for count in range(body) for middle in itertools.combinations(range(1, body), count)]


def stage_peak(chain: Chain, cuts: Cuts, settings: ClientSettings, tail: bool, store: Store) -> int:
    """Of the stage whose block begins at ``cuts[0]``: what is cut before that does not matter, so it is one block here."""
    splitting = splitting_at(chain, cuts if cuts[0] == 0 else (0, *cuts))
    costs, plan = chain_costs(stage(chain, splitting, 0 if cuts[0] == 0 else 1, tail=tail), settings, CPU, store)
    return costs.peak_bytes_at(plan)


def assert_best(chain: Chain, settings: ClientSettings, tail: bool, numbers: tuple[int | None, ...]) -> dict[int | None, Split]:
    """No splitting needs less than the chosen one, of all and of those into so many blocks."""
    store = Store(None)
    ends = {cuts[start:] for cuts in all_cuts(chain) for start in range(len(cuts) - 1)}
    one = {cuts: stage_peak(chain, cuts, settings, tail, store) for cuts in ends}
    peaks = {cuts: tuple(one[cuts[start:]] for start in range(len(cuts) - 1)) for cuts in all_cuts(chain)}
    largest = {cuts: max(stages) for cuts, stages in peaks.items()}
    full = one[0, len(chain) - 1]
    chosen = {}
    for number in numbers:
        split = split_chain(chain, settings, num_blocks=number, tail=tail, store=store)
        allowed = {cuts: peak for cuts, peak in largest.items() if number in (None, len(cuts) - 1)}
        best = min(allowed.values())
        assert max(split.peak_bytes) == best, (number, [cuts for cuts, peak in allowed.items() if peak == best], split)
        assert len(split.splitting.names) == min(len(cuts) - 1 for cuts, peak in allowed.items() if peak == best)
        blocks = list(split.splitting.blocks.items())
        cuts = (*(chain.index_of(units[0]) for _, units in blocks), len(chain) - 1)
        assert [name for name, _ in blocks] == [f"b{i}" for i in range(len(blocks))]
        assert tuple(unit for _, units in blocks for unit in units) == chain.unit_names
        assert (split.peak_bytes, split.full_peak_bytes) == (peaks[cuts], full)
        assert split.reduction == 1 - max(split.peak_bytes) / full
        chosen[number] = split
    return chosen


RESNET = [
    ({"batch_size": 16}, True), ({"batch_size": 2, "momentum": 0.9}, False), ({"batch_size": 16, "optimizer": "adam"}, True),
    ({"batch_size": 16, "activation_checkpointing": True}, False),
]


@pytest.mark.parametrize(("settings", "tail"), RESNET, ids=str)
def test_no_splitting_of_a_residual_network_needs_less(settings, tail):
    chain = build_chain("resnet8", {}, input_shape=(3, 16, 16), num_classes=10)
    before = {name: (tensor.requires_grad, tensor.device) for name, tensor in chain.state_dict(keep_vars=True).items()}
    chosen = assert_best(chain, ClientSettings(**settings), tail, (None, 1, 2, 3))
    assert {name: (t.requires_grad, t.device) for name, t in chain.state_dict(keep_vars=True).items()} == before
    assert chosen[1].splitting.blocks == {"b0": chain.unit_names}
    assert chosen[1].reduction == 0
    assert chosen[None].reduction > 0.15


def conv(channels: int, there: int, *, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(channels, there, 3, padding=1, bias=False), nn.BatchNorm2d(there), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.MaxPool2d(2)) if pool else nn.Sequential(*layers)


def chain_of(*units: nn.Module, shape: tuple[int, ...] = (3, 16, 16)) -> Chain:
    named = [(f"u{i}", unit) for i, unit in enumerate(units[:-1])]
    return Chain([*named, ("head", units[-1])], input_shape=shape, num_classes=10, name="own").skeleton()


def classifier(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def like_vgg() -> Chain:
    return chain_of(conv(3, 8), conv(8, 8, pool=True), conv(8, 16), conv(16, 32, pool=True), conv(32, 32), classifier(32))


def narrow_and_wide() -> Chain:
    """Blocks of very different sizes, up and down, that are cheaper than what stands in for them."""
    return chain_of(nn.Conv2d(3, 64, 1), nn.Sequential(nn.Conv2d(64, 2, 1), nn.ReLU()), nn.ConvTranspose2d(2, 4, 2, stride=2),
                    nn.Conv2d(4, 96, 2, stride=2), conv(96, 4), classifier(4), shape=(3, 8, 8))


def bare_layers() -> Chain:
    """As of an ``nn.Sequential``: units without parameters, some in place; behind a frozen unit pooling keeps nothing."""
    return chain_of(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3, padding=1),
                    nn.MaxPool2d(2), nn.Sequential(nn.Flatten(), nn.Linear(128, 10)))


def wide_before_a_vector() -> Chain:
    """What stands in for the last blocks begins with an average, which does not hold its input."""
    last = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU())
    return chain_of(conv(3, 8, pool=True), nn.Conv2d(8, 128, 1), conv(128, 8),
                    nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)), last, nn.Linear(256, 10),
                    shape=(3, 8, 8))


def many_tokens() -> Chain:
    """More tokens than entries in each."""
    return build_chain("vit_tiny", {"depth": 2, "width": 4, "heads": 1, "patch": 2}, input_shape=(3, 16, 16), num_classes=10)


OWN = [
    (like_vgg, {"batch_size": 8, "momentum": 0.9}, True), (narrow_and_wide, {"batch_size": 4, "optimizer": "adam"}, False),
    (bare_layers, {"batch_size": 8}, False), (wide_before_a_vector, {"batch_size": 64}, True),
    (many_tokens, {"batch_size": 1, "momentum": 0.9}, False),
]


@pytest.mark.parametrize(("make", "settings", "tail"), OWN, ids=lambda value: getattr(value, "__name__", str(value)))
def test_no_splitting_of_an_own_chain_needs_less(make: Callable[[], Chain], settings, tail):
    chain = make()
    assert_best(chain, ClientSettings(**settings), tail, (None, 2, len(chain) - 2))


class Sum(nn.Module):
    """Its gradient is one value for many entries, so a unit before it gets less than sums take for granted."""

    def forward(self, x):
        return x.sum((2, 3))


class Pool(nn.Module):
    """Fewer tokens."""

    def forward(self, x):
        return nn.functional.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2)


class Tokens(nn.Module):
    """Pixels as tokens."""

    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


class Mean(nn.Module):
    """Over tokens."""

    def forward(self, x):
        return x.mean(1)


def by_predictions(monkeypatch) -> list[int]:
    """Counts the searches that predict every stage."""
    used, search = [], split_module._Search._best_by_predictions
    monkeypatch.setattr(split_module._Search, "_best_by_predictions", lambda self: used.append(1) or search(self))
    return used


def test_a_chain_whose_units_do_not_add_up(monkeypatch):
    used = by_predictions(monkeypatch)
    chain = chain_of(conv(3, 8), nn.Conv2d(8, 40, 1), nn.Conv2d(40, 5, 1), Sum(), nn.Linear(5, 10), shape=(3, 8, 8))
    with pytest.raises(NoSum, match="Sum: the gradient of its input is not as large as the input"):
        StageCosts(chain, ClientSettings(batch_size=8), tail=True)
    assert_best(chain, ClientSettings(batch_size=8), True, (None, 2))
    assert used == [1, 1]


def test_sums_that_are_not_what_is_predicted_are_not_taken(monkeypatch):
    used, chain, settings = by_predictions(monkeypatch), like_vgg(), ClientSettings(batch_size=8)
    expected = split_chain(chain, settings)
    assert used == []
    monkeypatch.setattr(StageCosts, "peaks", lambda self, cuts: ())
    found = split_chain(chain, settings)
    assert used == [1]
    assert (max(found.peak_bytes), len(found.peak_bytes)) == (max(expected.peak_bytes), len(expected.peak_bytes))


def pooled_tokens() -> Chain:
    return chain_of(nn.Sequential(nn.Conv2d(3, 16, 4, 4), Tokens()), nn.Linear(16, 16), Pool(), nn.Linear(16, 16),
                    nn.Sequential(Mean(), nn.Linear(16, 10)))


def test_no_block_changes_tokens_unless_it_is_the_first():
    chain, settings = pooled_tokens(), ClientSettings(batch_size=8)
    splits = [split_chain(chain, settings, num_blocks=number) for number in (1, 2, None)]
    for split in splits:
        assert next(units for units in split.splitting.blocks.values() if "u2" in units)[0] == "u0"
    assert list(splits[1].splitting.blocks.values()) == [("u0", "u1", "u2"), ("u3", "head")]
    with pytest.raises(ConfigError, match=r"one of 1, 2, for 'own' .* layers can stand in for all blocks, but is 3\."):
        split_chain(chain, settings, num_blocks=3)


def test_a_vector_chain():
    chain = build_chain("mlp", {"hidden": [50, 100, 30, 40]}, input_shape=(8, 8), num_classes=10)
    assert_best(chain, ClientSettings(batch_size=16), False, (None, 2))


def test_how_many_blocks_there_may_be():
    chain = build_chain("resnet8", {"width": 4}, input_shape=(3, 8, 8), num_classes=10)
    settings = ClientSettings(batch_size=4)
    for number in (0, 5, -1):
        message = rf"`num_blocks` must be at least 1 and at most 4, .*'resnet8'.*, but is {number}\."
        with pytest.raises(ConfigError, match=message):
            split_chain(chain, settings, num_blocks=number)
    split = split_chain(chain, settings, num_blocks=4)
    assert list(split.splitting.blocks.values()) == [("stem",), ("layer1_0",), ("layer2_0",), ("layer3_0", "head")]
    alone = build_chain("mlp", {"hidden": []}, input_shape=(4,), num_classes=3)
    for number in (None, 1):
        assert split_chain(alone, settings, num_blocks=number).splitting.blocks == {"b0": ("head",)}
    with pytest.raises(ConfigError, match="at most 1"):
        split_chain(alone, settings, num_blocks=2)


def test_a_splitting_at_cuts():
    chain = build_chain("resnet8", {"width": 4}, input_shape=(3, 8, 8), num_classes=10)
    assert splitting_at(chain, (0, 4)).blocks == {"b0": chain.unit_names}
    assert splitting_at(chain, (0, 1, 3, 4)).blocks == {
        "b0": ("stem",), "b1": ("layer1_0", "layer2_0"), "b2": ("layer3_0", "head"),
    }


def test_predictions_are_kept(tmp_path):
    chain = build_chain("cnn", {"channels": [4, 8], "hidden": 10}, input_shape=(1, 8, 8), num_classes=10)
    settings = ClientSettings(batch_size=4)
    first = split_chain(chain, settings, store=Store(tmp_path))
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = split_chain(chain, settings, store=Store(tmp_path))
    assert (again.splitting.blocks, again.peak_bytes) == (first.splitting.blocks, first.peak_bytes)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert len(files) > 3  # the cuts, full training, and at least two stages
    whole, plan = chain_costs(chain, settings, CPU)
    assert first.full_peak_bytes == whole.peak_bytes_at(plan)


@pytest.mark.slow
def test_resnet18_against_the_split_of_the_papers():
    # By the stages of the network, as NeuLite and others cut it by hand; and what a search found, less a hundredth.
    chain = build_chain("resnet18", {}, input_shape=(3, 32, 32), num_classes=10)
    settings, store = ClientSettings(batch_size=64, momentum=0.9), Store(None)
    hand = Splitting({
        "b0": ("stem", "layer1_0", "layer1_1"), "b1": ("layer2_0", "layer2_1"), "b2": ("layer3_0", "layer3_1"),
        "b3": ("layer4_0", "layer4_1", "head"),
    })
    by_hand, full = stage_peaks(chain, hand, settings, store=store)
    four = split_chain(chain, settings, num_blocks=4, store=store)
    free = split_chain(chain, settings, store=store)
    assert len(four.splitting.names) == 4
    assert max(free.peak_bytes) <= max(four.peak_bytes) <= max(by_hand)
    assert four.full_peak_bytes == free.full_peak_bytes == full
    assert four.reduction >= 0.55
    assert free.reduction >= 0.58
