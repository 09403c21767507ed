"""The batch that a measurement takes."""

from __future__ import annotations

import pytest
import torch

from dfed.client import ClientSettings
from dfed.errors import ConfigError
from dfed.models import build_chain
from dfed.planner import chain_costs, room, with_batch

CPU = torch.device("cpu")


def test_free_memory_is_the_least_that_machine_and_groups_leave(tmp_path, monkeypatch):
    meminfo, own, groups = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "groups"
    monkeypatch.setattr(room, "_MEMINFO", meminfo)
    monkeypatch.setattr(room, "_OWN_GROUP", own)
    monkeypatch.setattr(room, "_GROUPS", groups)
    assert room.free_bytes(CPU) is None
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:    7000 kB\n")
    assert room.free_bytes(CPU) == 7000 * 1024
    own.write_text("1:cpu:/\n0::/outer/inner\n")
    assert room.free_bytes(CPU) == 7000 * 1024
    for folder, limit, used, cached in (("outer", "5000000", 3000000, 500000), ("outer/inner", "max", 10, 0)):
        (groups / folder).mkdir(parents=True)
        (groups / folder / "memory.max").write_text(f"{limit}\n")
        (groups / folder / "memory.current").write_text(f"{used}\n")
        (groups / folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    assert room.free_bytes(CPU) == 5000000 - 3000000 + 500000
    (groups / "outer" / "memory.current").write_text("6000000")
    assert room.free_bytes(CPU) == 0


def test_the_batch_is_the_configured_one_if_half_of_the_memory_holds_it(monkeypatch):
    chain = build_chain("mlp", {"hidden": [64]}, input_shape=(256,), num_classes=4)

    def batch(free, batch_size):
        monkeypatch.setattr(room, "free_bytes", lambda device: free)
        return room.measurable_batch(chain, ClientSettings(batch_size=batch_size), CPU)

    costs, plan = chain_costs(chain, ClientSettings(batch_size=100), CPU)
    needed = costs.budget_bytes(plan)
    assert batch(None, 2**30) == 2**30
    assert batch(2 * needed, 100) == 100
    assert batch(2 * needed, 99) == 99
    assert batch(2 * needed - 2, 100) == 64
    assert batch(2 * needed, 2**30) in (64, 128)
    with pytest.raises(ConfigError, match="`--measure` must go with a model that takes at most half"):
        batch(2 * costs.budget_bytes(with_batch(plan, 1)) - 2, 100)
