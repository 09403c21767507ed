"""The cache: written once, shared, repaired, and clear about a folder that cannot be written."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dfed.data.cache import cache_folder, cached, fingerprint, lock
from dfed.errors import DataError

PROGRAM = """
import os, sys, time
import numpy as np
from dfed.data.cache import cached

def build(create):
    with open(sys.argv[2], "a") as log:
        log.write(f"{os.getpid()}\\n")
    array = create("squares", (1000,), np.int64)
    for i in range(1000):
        array[i] = i * i
        if i % 100 == 0:
            time.sleep(0.02)  # long enough for the others to arrive meanwhile

arrays = cached("shared", {"size": 1000}, build, cache=sys.argv[1])
assert (arrays["squares"] == np.arange(1000) ** 2).all()
"""


def _build(calls):
    def build(create):
        calls.append(1)
        create("x", (4, 3), np.uint8)[:] = np.arange(12).reshape(4, 3)
        create("y", (4,), np.int64)[:] = 7

    return build


def _entries(folder):
    return sorted(p.name for p in Path(folder).iterdir() if not p.name.endswith(".lock"))


def test_built_once_and_opened_as_read_only_maps(tmp_path):
    calls = []
    for _ in range(3):
        arrays = cached("set", {"a": 1}, _build(calls), cache=str(tmp_path / "deep" / "cache"))
    assert len(calls) == 1
    assert isinstance(arrays["x"], np.memmap)
    assert not arrays["x"].flags.writeable
    np.testing.assert_array_equal(arrays["x"], np.arange(12).reshape(4, 3))
    np.testing.assert_array_equal(arrays["y"], [7] * 4)
    for depends, name in (({"a": 2}, "set"), ({"a": 1}, "other")):
        cached(name, depends, _build(calls), cache=str(tmp_path / "deep" / "cache"))
    assert len(calls) == 3
    assert len(_entries(tmp_path / "deep" / "cache")) == 3  # and no temporary folder is left


def test_four_processes_write_one_entry(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    command = [sys.executable, "-c", PROGRAM, str(cache), str(log)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert len(log.read_text().split()) == 1
    assert len(_entries(cache)) == 1


@pytest.mark.parametrize("damage", ["cut", "longer", "gone", "no index", "index", "header"])
def test_damaged_entry_is_rebuilt_with_a_warning(tmp_path, caplog, damage):
    calls = []
    held = cached("set", {}, _build(calls), cache=str(tmp_path))["x"]
    (entry,) = (p for p in tmp_path.iterdir() if p.is_dir())
    file, index = entry / "x.npy", entry / "entry.json"
    if damage == "cut":
        # A new file, as cutting the mapped one would pull the pages from under `held`.
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data[:-1])
    elif damage == "longer":
        file.write_bytes(file.read_bytes() + b"x")
    elif damage == "gone":
        file.unlink()
    elif damage == "no index":
        index.unlink()
    elif damage == "index":
        index.write_text("[3]")
    else:
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(b"\0" * len(data))
    with caplog.at_level(logging.WARNING):
        arrays = cached("set", {}, _build(calls), cache=str(tmp_path))
    assert len(calls) == 2
    assert "damaged" in caplog.text
    assert str(entry) in caplog.text
    np.testing.assert_array_equal(arrays["x"], np.arange(12).reshape(4, 3))
    assert held.shape == (4, 3)
    assert _entries(tmp_path) == [entry.name]


def test_failed_build_leaves_nothing(tmp_path):
    def build(create):
        create("x", (4,), np.uint8)
        raise DataError("'file' must be whole.")

    with pytest.raises(DataError, match="'file' must be whole"):
        cached("set", {}, build, cache=str(tmp_path))
    assert _entries(tmp_path) == []


def test_unwritable_folder_names_itself_and_the_setting(tmp_path):
    (tmp_path / "file").write_text("")
    for use in (lambda c: cached("set", {}, _build([]), cache=c), lambda c: lock(c, "x").__enter__()):
        with pytest.raises(DataError, match=r"`data.cache` must be a folder .*file/cache'") as caught:
            use(str(tmp_path / "file" / "cache"))
        assert isinstance(caught.value.__cause__, OSError)


def test_full_disk_is_an_error_not_a_signal(tmp_path, monkeypatch):
    def full(handle, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"has room, but .*No space left"):
        cached("set", {}, _build([]), cache=str(tmp_path))
    assert _entries(tmp_path) == []


def test_folder_is_the_setting_then_the_variable_then_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("DFED_CACHE", "/scratch/dfed")
    assert cache_folder("~/mine") == Path("/home/someone/mine")
    assert cache_folder(None) == Path("/scratch/dfed")
    monkeypatch.delenv("DFED_CACHE")
    assert cache_folder(None) == Path("/home/someone/.cache/dfed")


def test_fingerprint_follows_size_and_time(tmp_path):
    file = tmp_path / "a"
    file.write_text("one")
    first = fingerprint([file])
    assert fingerprint([file]) == first
    os.utime(file, ns=(1, 1))
    second = fingerprint([file])
    file.write_text("three")
    os.utime(file, ns=(1, 1))
    assert len({str(first), str(second), str(fingerprint([file]))}) == 3
    with pytest.raises(DataError, match=r"'.*gone' must be a file that can be read"):
        fingerprint([tmp_path / "gone"])
