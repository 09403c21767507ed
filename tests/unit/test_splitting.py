from __future__ import annotations

import pytest

from dfed.blocks import Splitting
from dfed.models import build_chain

BLOCKS = {"early": ("stem", "block0"), "late": ("block1",), "head": ("pool", "head")}


def test_a_splitting_knows_its_blocks():
    splitting = Splitting(BLOCKS)
    assert splitting.names == ("early", "late", "head")
    assert splitting.blocks == BLOCKS
    assert splitting.block_of("stem.conv.weight") == "early"
    assert splitting.block_of("block0.norm.running_mean") == "early"
    assert splitting.block_of("head.fc.bias") == "head"
    assert splitting.block_of("pool") == "head"
    with pytest.raises(KeyError, match="tail"):
        splitting.block_of("tail.weight")


def test_the_finest_splitting_of_a_chain():
    chain = build_chain("cnn", {"channels": [2], "hidden": 4}, input_shape=(1, 8, 8), num_classes=3)
    splitting = Splitting.by_unit(chain.unit_names)
    assert splitting.names == tuple(chain.unit_names)
    assert all(units == (name,) for name, units in splitting.blocks.items())
    assert all(splitting.block_of(name) == name.partition(".")[0] for name in chain.state_dict())


def test_no_unit_stands_in_two_blocks():
    with pytest.raises(AssertionError, match="twice"):
        Splitting({"a": ("x", "y"), "b": ("y",)})
    with pytest.raises(AssertionError, match="twice"):
        Splitting({"a": ("x", "x")})


def test_a_splitting_keeps_nothing_of_the_mapping_it_was_given():
    blocks = dict(BLOCKS)
    splitting = Splitting(blocks)
    blocks.clear()
    assert splitting.names == ("early", "late", "head")
