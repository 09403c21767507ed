"""Small trainings on one device that the tests of ``dfed.central`` share."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dfed.central.bp import BP
from dfed.central.config import load_train_config
from dfed.central.method import Outcome, Problem
from dfed.central.prepared import prepare
from dfed.central.settings import EpochSettings
from dfed.central.state import Tally
from dfed.central.trainer import Trainer
from dfed.data import ArrayDataset
from dfed.memory import malloc
from dfed.models import build_chain
from dfed.planner import Store
from dfed.report.folder import Folder
from dfed.run import StopFlag

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "seed": 5,
    "method": {"name": "flextrain", "depths": 2},
    "model": {"name": "cnn", "channels": [4, 6], "kernel": 3, "hidden": 8, "norm": "batch", "dropout": [0.2, 0.0]},
    "data": {"dataset": "synthetic", "shape": [1, 8, 8], "classes": 3, "samples": 44, "test_samples": 30},
    "training": {"epochs": 3, "batch_size": 8, "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.01, "augment": "flip"},
}

_FRESH = "DFED_TEST_IN_A_FRESH_PROCESS"


def under_a_cap(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test of a hard cap in a process of its own: what the tests before it allocated and freed would count as room, and
    a hard cap changes the settings of the allocator for good."""
    @functools.wraps(test)
    def outside(*arguments: Any, **keywords: Any) -> None:
        if os.environ.get(_FRESH):
            test(*arguments, **keywords)
            return
        where = f"{inspect.getfile(test)}::{test.__name__}"
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", where], capture_output=True,
                              text=True, timeout=300, env={**os.environ, _FRESH: "1"}, check=False)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
        assert "1 passed" in done.stdout

    return pytest.mark.skipif(not sys.platform.startswith("linux") or not malloc.is_glibc(),
                              reason="a hard cap on a CPU needs Linux with glibc")(outside)


def base(**changes: Any) -> dict[str, Any]:
    """The smallest config, with groups updated."""
    raw = copy.deepcopy(BASE)
    for name, value in changes.items():
        known = raw.get(name)
        raw[name] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    return raw


def problem(model: str, options: dict[str, Any], training: dict[str, Any] | None = None, *, shape=(3, 8, 8), classes=4,
            samples=24, store: Store | None = None, **rest: Any) -> Problem:
    """A problem of random images."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(samples, *shape, generator=generator).numpy()
    labels = torch.randint(classes, (samples,), generator=generator).numpy()
    chain = build_chain(model, options, input_shape=shape, num_classes=classes)
    settings = EpochSettings.model_validate({"batch_size": 8, **(training or {})})
    return Problem(chain=chain, data=ArrayDataset(images, labels, num_classes=classes), settings=settings, seed=1, device=CPU,
                   store=store or Store(None), **rest)


class OwnLoop(BP):
    """A method with a loop of its own: two epochs, in each of which one tensor grows by 1."""

    def __init__(self, problem: Problem, *, tensor: str = "head.fc2.bias"):
        super().__init__(problem, depths=1)
        self.tensor = tensor

    @property
    def num_epochs(self) -> int:
        return 2

    def epoch(self, state, stopped) -> Outcome:
        tally = Tally(loss_sum=3.0)
        tally.add("depth 1", 4)
        tensors = {**state.tensors, self.tensor: state.tensors[self.tensor] + 1}
        return Outcome(state=dataclasses.replace(state, epoch=state.epoch + 1, tensors=tensors), tally=tally)


class StopAfter(StopFlag):
    """Set when it was looked at so often."""

    def __init__(self, looks: int):
        self._looks = looks

    @property
    def is_set(self) -> bool:
        self._looks -= 1
        return self._looks < 0

    @is_set.setter
    def is_set(self, value: bool) -> None:
        if value:
            self._looks = 0


def trainer(raw: dict[str, Any], path, *, state=None, stop: StopFlag | None = None) -> Trainer:
    """Ready to train in ``path``."""
    config, folder = load_train_config(None, base=raw), Folder(path)
    prepared = prepare(config, CPU)
    folder.create(config)
    return Trainer(prepared, folder, state=state, stop=stop or StopFlag())
