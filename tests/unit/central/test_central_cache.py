"""Cached activations: what is kept, what an interrupted training finds, and disks that are full."""

from __future__ import annotations

import collections
import logging
import shutil

import numpy as np
import pytest
import torch
from local_problem import Looks, bits, first_state, neuroflux, train

from dfed.central.activation_cache import ActivationCache
from dfed.errors import TrainingFailed

torch.set_num_threads(1)

KINDS = [("fp32", torch.float32), ("fp16", torch.float16)]


def cache(folder, kind="fp32") -> ActivationCache:
    found = ActivationCache(kind)
    found.work_in(folder)
    return found


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_what_is_written_is_read(tmp_path, kind, dtype):
    values = torch.randn(11, 3, 2, generator=torch.Generator().manual_seed(1))
    kept = cache(tmp_path / "cache", kind)
    assert not kept.holds(2, "a")
    assert kept.write(2, "a", 11, values.split(4))
    assert kept.holds(2, "a")
    assert not kept.holds(2, "b")
    assert not kept.holds(1, "a")
    places = [np.array([10, 0, 3]), np.array([3]), np.array([7, 7, 1, 2])]
    for wanted, found in zip(places, kept.batches(2, places, (3, 2)), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, values[wanted].to(dtype).float())
    assert torch.equal(torch.cat(list(kept.in_order(2, 11, 4, (3, 2)))), values.to(dtype).float())
    assert kept.sample_bytes((3, 2)) == 6 * dtype.itemsize
    assert (tmp_path / "cache" / "block_002.data").stat().st_size == 11 * 6 * dtype.itemsize
    stopped = kept.batches(2, places, (3, 2))
    next(stopped)
    stopped.close()  # while the next is being read
    kept.close()
    kept.clear()
    assert not (tmp_path / "cache").exists()
    kept.clear()


def test_what_is_not_whole_is_no_cache(tmp_path):
    folder = tmp_path / "cache"
    kept, values = cache(folder), torch.ones(6, 2)
    assert not kept.write(1, "a", 6, values.split(4)[:1])  # the rest never came
    assert list(folder.iterdir()) == []

    def broken():
        yield values[:4]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        kept.write(1, "a", 6, broken())
    assert list(folder.iterdir()) == []
    assert kept.write(1, "a", 6, [values])
    (folder / "block_001.data").write_bytes(b"short")
    assert not kept.holds(1, "a")
    with pytest.raises(TrainingFailed, match=r"a cache of activations cannot be read: the file is cut short\."):
        list(kept.in_order(1, 6, 6, (2,)))
    (folder / "block_001.json").write_text("[]")
    assert not kept.holds(1, "a")
    (folder / "block_002.partial").write_bytes(b"left by a crash")
    kept.keep_only([1])
    assert sorted(path.name for path in folder.iterdir()) == ["block_001.data", "block_001.json"]
    kept.close()


@pytest.mark.parametrize("stops", [(), (3,), (11, 14, 20), (9, 10, 12)])
def test_interrupted_trainings_go_on_to_the_same_bits(tmp_path, stops):
    method, looks = neuroflux(), Looks(*stops)
    assert [method._feed.num_steps(block) for block in method.blocks] == [4, 5]
    whole = train(neuroflux(), tmp_path / "whole")
    other = train(method, tmp_path / "parts", stopped=looks)
    # 2 · 4 steps of the first block, 5 pieces of its output (more if a pass was stopped), 2 · 5 steps of the second
    passes = sum(8 < stop <= 13 for stop in stops[:1]) + sum(stop in (9, 10) for stop in stops[1:])
    assert looks.count >= 8 + 5 + 10 + passes
    assert bits(other) == bits(whole)
    assert (other.epoch, other.step, other.slots) == (4, 0, {})
    for finished in (False, True):
        method.close(finished)
        assert (tmp_path / "parts").exists() != finished


def test_a_cache_that_is_gone_damaged_or_of_other_units_is_made_again(tmp_path, caplog):
    blocks = ((0, 1, 7), (1, 2, 5), (2, 3, 6))
    whole = train(neuroflux(blocks=blocks), tmp_path / "a")
    middle = train(neuroflux(blocks=blocks), tmp_path / "b", until=5)
    assert middle.slots
    folder = tmp_path / "b"
    assert sorted(path.name for path in folder.iterdir()) == ["block_002.data", "block_002.json"]  # that of block 2 is gone

    def resumed(where):
        method = neuroflux(blocks=blocks)
        return bits(train(method, where, middle))

    before = (folder / "block_002.data").stat().st_mtime_ns
    assert resumed(folder) == bits(whole)
    assert (folder / "block_002.data").stat().st_mtime_ns == before  # it was used
    marker = (folder / "block_002.json").read_text()
    (folder / "block_002.json").unlink()
    (folder / "block_002.partial").write_bytes(b"x")
    (folder / "block_007.data").write_bytes(b"x")
    assert resumed(folder) == bits(whole)
    assert sorted(path.name for path in folder.iterdir()) == ["block_002.data", "block_002.json"]
    assert (folder / "block_002.json").read_text() == marker
    assert (folder / "block_002.data").stat().st_mtime_ns > before  # it was made again
    train(neuroflux(blocks=blocks, training={"learning_rate": 0.01}), folder, until=5)  # which other units fill
    assert (folder / "block_002.json").read_text() != marker
    assert resumed(folder) == bits(whole)
    assert resumed(tmp_path / "elsewhere") == bits(whole)


def test_other_blocks_than_it_began_with_are_refused(tmp_path):
    state = train(neuroflux(), tmp_path, until=1)
    assert state.facts == {"blocks": [[0, 1, 7], [1, 3, 5]]}
    with pytest.raises(TrainingFailed, match=r"the blocks must be those that the training began with \(\[\[0, 1, 7\], \[1, 3"):
        train(neuroflux(blocks=((0, 1, 6), (1, 3, 5))), tmp_path, state)


def test_a_full_disk(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    method = neuroflux(blocks=((0, 1, 7), (1, 2, 5), (2, 3, 6)))
    first, second = (method._feed.cache_bytes(block) for block in method.blocks[1:])
    assert (first, second) == (24 * 4 * 16 * 4, 24 * 6 * 4 * 4)
    need = first + second
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need - 1))
    with pytest.raises(TrainingFailed, match=rf"must have .* free \({need} bytes\) for cached activations, but has"):
        method.work_in(tmp_path / "new", 0)
    method.work_in(tmp_path / "new", 6)  # nothing is left to do
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need))
    state = train(method, tmp_path / "new", until=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, first - 1))  # somebody else has filled it
    with pytest.raises(TrainingFailed, match="for cached activations"):
        method.epoch(state, lambda: False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dfed.data.row_file.os.fsync", full)
    with pytest.raises(TrainingFailed, match=r"cannot be cached in .*: No space left on device; `method.cache` 'none' keeps"):
        method.epoch(state, lambda: False)
    assert list((tmp_path / "new").iterdir()) == []
    assert neuroflux(cache="none")._feed.cache_bytes(method.blocks[1]) == 0


def test_augmentation_with_a_cache_is_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(neuroflux(training={"augment": "flip"}), tmp_path / "a")
        assert caplog.text.count("augmentation ('flip') is applied to the first block only") == 1
        caplog.clear()
        train(neuroflux(training={"augment": "flip"}, cache="none"), tmp_path / "b")
        train(neuroflux(training={"augment": "flip"}, blocks=((0, 3, 8),)), tmp_path / "c")
    assert "augmentation" not in caplog.text
    assert not (tmp_path / "b").exists()
    plain = first_state(neuroflux())
    assert plain.facts == {}


def test_changed_bytes_are_seen_by_the_next_process(tmp_path):
    kept = cache(tmp_path / "cache")
    assert kept.write(1, "a", 6, torch.ones(6, 2).split(4))
    data = tmp_path / "cache" / "block_001.data"
    written = bytearray(data.read_bytes())
    assert cache(tmp_path / "cache").holds(1, "a")
    written[5] ^= 1
    data.write_bytes(written)
    assert kept.holds(1, "a")  # looked at when it was written
    assert not cache(tmp_path / "cache").holds(1, "a")


def test_values_too_large_for_fp16(tmp_path):
    kept, values = cache(tmp_path / "cache", "fp16"), torch.full((4, 2), 7e4)
    with pytest.raises(TrainingFailed, match=r"at most 65504 for `method.cache` 'fp16', but reach 70000: keep them as 'fp32'"):
        kept.write(1, "a", 4, [values])
    assert list((tmp_path / "cache").iterdir()) == []
    assert kept.write(1, "a", 1, [torch.full((1, 2), float("inf"))])  # a model that is lost is said elsewhere


def test_files_of_others_stay(tmp_path):
    (tmp_path / "disk" / "mine").mkdir(parents=True)
    (tmp_path / "disk" / "mine.txt").write_text("mine")
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    kept = cache(tmp_path / "cache")
    assert kept.write(1, "a", 4, [torch.ones(4, 2)])
    kept.clear()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["mine", "mine.txt"]
