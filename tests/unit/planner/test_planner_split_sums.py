"""Peaks added up from records of units, against predictions of whole stages; the search, against every splitting."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

from dfed.client import ClientSettings
from dfed.models import Chain, build_chain
from dfed.planner import Store, stage_peaks
from dfed.planner.split import _passable, _Search, splitting_at
from dfed.planner.stage_costs import StageCosts

torch.set_num_threads(1)

Cuts = tuple[int, ...]
WIDTHS = (1, 2, 3, 5, 13, 31, 64, 127)


def all_cuts(body: int) -> list[Cuts]:
    """Where the blocks of every splitting begin, and last the unit that goes with the block before it."""
    return [(0, *middle, body) for count in range(body) for middle in itertools.combinations(range(1, body), count)]


RESNET, VIT = ("resnet8", {"width": 4}, (3, 8, 8)), ("vit_tiny", {"depth": 2, "width": 16, "heads": 2}, (3, 16, 16))
CNN = ("cnn", {"channels": [4, 8], "hidden": 20, "dropout": [0.2, 0.5]}, (1, 12, 12))
CASES = [
    (*RESNET, {"batch_size": 4, "precision": "bf16", "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (*RESNET, {"batch_size": 3, "optimizer": "adam", "clip_norm": 1.0}),
    ("resnet8", {"width": 16}, (3, 4, 4), {"batch_size": 4, "momentum": 0.9}),  # maps smaller than kernels
    (*VIT, {"batch_size": 8, "momentum": 0.9}),
    (*VIT, {"batch_size": 4, "activation_checkpointing": True, "steps": 1, "optimizer": "adamw"}),
    (*CNN, {"batch_size": 4, "activation_checkpointing": True}), (*CNN, {"batch_size": 64, "precision": "bf16"}),
    ("mlp", {"hidden": [30, 50, 7]}, (4, 5), {"batch_size": 8, "steps": 1, "momentum": 0.9}),
]


@pytest.mark.parametrize(("name", "options", "shape", "settings"), CASES)
def test_sums_are_the_predictions_to_the_byte(name, options, shape, settings):
    chain, settings = build_chain(name, options, input_shape=shape, num_classes=10), ClientSettings(**settings)
    tail = name != "cnn"
    costs, body = StageCosts(chain, settings, tail=tail), len(chain) - 1
    for cuts in {(0, 1, body), (0, *range(1, body + 1))}:
        peaks, full = stage_peaks(chain, splitting_at(chain, cuts), settings, tail=tail)
        assert costs.peaks(cuts) == peaks, cuts
        assert costs.peaks((0, body)) == (full,)


def random_unit(draw: random.Random, there: int, size: int) -> tuple[list[nn.Module], int, int]:
    """Layers on feature maps of ``there`` channels and ``size`` pixels a side; channels and size behind them."""
    here, stride = draw.choice(WIDTHS), draw.choice((1, 1, 2)) if size > 3 else 1
    kernel = draw.choice((1, 3))
    plain = nn.Conv2d(there, here, kernel, stride, padding=kernel // 2, bias=draw.random() < 0.5)
    kind = draw.randrange(8)
    if kind == 0:
        return [plain, nn.BatchNorm2d(here), nn.ReLU(inplace=True)], here, -(-size // stride)
    if kind == 1:
        return [nn.BatchNorm2d(there), nn.ReLU(inplace=True), plain], here, -(-size // stride)
    if kind == 2:
        return [plain, nn.GELU()], here, -(-size // stride)
    if kind == 3 and size > 3:
        return [nn.MaxPool2d(2)], there, size // 2
    if kind == 4:
        return [nn.ReLU()], there, size
    if kind == 5 and size < 10:
        return [nn.ConvTranspose2d(there, here, 2, stride=2)], here, size * 2
    if kind == 6:
        return [nn.Conv2d(there, there, 3, padding=1, groups=there), nn.ReLU6(inplace=True)], there, size
    return [plain], here, -(-size // stride)


def random_chain(draw: random.Random, num_units: int) -> Chain:
    size = side = draw.choice((6, 8, 9))
    channels, units = 3, []
    for number in range(num_units):
        layers, channels, side = random_unit(draw, channels, side)
        units.append((f"u{number}", nn.Sequential(*layers)))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    return Chain([*units, ("head", head)], input_shape=(3, size, size), num_classes=10, name="random").skeleton()


def random_settings(draw: random.Random) -> ClientSettings:
    optimizer = draw.choice(({}, {"momentum": 0.9}, {"optimizer": "adam"}))
    return ClientSettings(batch_size=draw.choice((2, 8, 64)), **optimizer)


@pytest.mark.parametrize("seed", range(3))
def test_every_stage_of_a_random_chain(seed):
    draw = random.Random(seed)
    chain, settings, tail = random_chain(draw, 3), random_settings(draw), draw.random() < 0.5
    costs, store = StageCosts(chain, settings, tail=tail), Store(None)
    for cuts in all_cuts(3):
        assert costs.peaks(cuts) == stage_peaks(chain, splitting_at(chain, cuts), settings, tail=tail, store=store)[0], cuts


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_the_best_of_all_splittings(seed):
    draw = random.Random(100 + seed)
    body = draw.choice((5, 6, 7))
    chain, settings, tail = random_chain(draw, body), random_settings(draw), draw.random() < 0.5
    costs = StageCosts(chain, settings, tail=tail)
    largest = {cuts: max(costs.peaks(cuts)) for cuts in all_cuts(body)}
    for number in (None, *range(2, body + 1)):
        allowed = {cuts: peak for cuts, peak in largest.items() if number in (None, len(cuts) - 1)}
        best = min(allowed.values())
        found = _Search(chain, settings, number, tail, Store(None), _passable(chain))._best_by_sums(costs)
        assert allowed[found] == best, (number, found)
        assert len(found) == min(len(cuts) for cuts, peak in allowed.items() if peak == best)
