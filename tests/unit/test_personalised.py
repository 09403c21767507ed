"""Accuracy on clients' own class mixes, and what aggregation does to it: by hand, and client by client."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dfed import personalised
from dfed.client import Evaluation, Trial, sample_of
from dfed.data.dataset import ArrayDataset
from dfed.data.partitions import EqualPartition, TablePartition
from dfed.personalised import PersonalisedAccuracy, effectiveness
from dfed.plan import Phase, Plan
from dfed.rng import Permutation


def table(*clients, num_classes=4):
    """A partition in which client i has samples of these classes."""
    labels = np.concatenate([np.array(classes, dtype=np.int64) for classes in clients])
    return TablePartition(np.arange(len(labels)), np.array([len(classes) for classes in clients]), labels, num_classes)


def evaluation(correct, count):
    correct, count = np.array(correct), np.array(count)
    return Evaluation(loss=1.0, accuracy=correct.sum() / count.sum(), correct=correct, count=count)


def test_the_mean_over_clients_by_hand(monkeypatch):
    partition = table([0, 0, 0, 1], [1, 3], [3, 3], [2])
    found = evaluation([8, 5, 3, 0], [10, 10, 10, 0])  # nothing held out of class 3
    mine = PersonalisedAccuracy(partition)
    # 3/4 · 0.8 + 1/4 · 0.5; class 1 alone; nothing; class 2.
    assert mine.of(found) == pytest.approx((0.725 + 0.5 + 0.3) / 3, rel=1e-15)
    one_by_one = [found.accuracy_on(partition.label_counts([client])) for client in range(4)]
    assert mine.of(found) == pytest.approx(np.nanmean(one_by_one), rel=1e-15)
    # Another set of samples has other classes.
    whole = evaluation([8, 5, 3, 10], [10] * 4)
    assert mine.of(whole) == pytest.approx((0.725 + 0.75 + 1.0 + 0.3) / 4, rel=1e-15)
    monkeypatch.setattr(partition, "label_counts", lambda clients: pytest.fail("worked out once"))
    assert mine.of(evaluation([1, 1, 1, 0], [2, 2, 2, 0])) == pytest.approx(0.5, rel=1e-15)
    assert mine.of(whole) is not None


def test_where_there_is_no_figure(monkeypatch):
    found = evaluation([1, 1, 1, 1], [2, 2, 2, 2])
    assert PersonalisedAccuracy(EqualPartition(3, 9, Permutation(9, 0, "x"))).of(found) is None  # without regard to labels
    assert PersonalisedAccuracy(table([3], [3])).of(evaluation([1, 1, 1, 0], [2, 2, 2, 0])) is None
    partition = table(*[[0]] * 5)
    assert PersonalisedAccuracy(partition).of(found) == 0.5
    monkeypatch.setattr(personalised, "_MOST_CLIENTS", 4)
    monkeypatch.setattr(partition, "label_counts", lambda clients: pytest.fail("a fleet of a million is not walked"))
    assert PersonalisedAccuracy(partition).of(found) is None
    assert personalised._MOST_CLIENTS == 4


def plan(*hold, variant=None):
    return Plan(client=0, hold=hold, train=hold, phases=(Phase(batch_size=1, epochs=1),), options={"variant": variant})


def test_effectiveness_by_hand():
    partition = table([0, 0, 1, 1], [1, 1], [0], [3], [0], [0])
    strategy = SimpleNamespace(variant_of=lambda plan: plan.options["variant"])
    job = SimpleNamespace(partition=partition, strategy=strategy)
    after = evaluation([5, 10, 0, 0], [10, 10, 10, 0])
    full = plan("a", "b")
    completed = {
        0: (full, {"own_correct": [10, 0, 0, 0]}),  # 0.5, then 0.75
        1: (plan("a", variant="depth 1"), {"own_correct": [0, 8, 0, 0]}),  # 0.8, then 1: a model of its own
        2: (plan("a"), {"own_correct": [10, 10, 10, 0]}),  # neither a variant nor the whole
        3: (full, {"own_correct": [1, 1, 1, 0]}),  # of its only class there is nothing
        4: (full, {"own_correct": None}),
        5: (plan("a", "b", "exit"), {"own_correct": [9, 0, 0, 0]}),  # 0.9, then 0.5: holds more than the whole
    }
    found = effectiveness(job, full, completed, after)
    assert found == {"mean": pytest.approx((0.25 + 0.2 - 0.4) / 3), "clients": 3, "left_out": 3,
                     "before": pytest.approx(2.2 / 3), "after": pytest.approx(2.25 / 3)}
    job.partition = EqualPartition(6, 6, Permutation(6, 0, "x"))  # mixes are expected to be those of the whole set
    assert effectiveness(job, full, {0: completed[0]}, after)["before"] == 10 / 30
    assert effectiveness(job, full, {}, after) == {"mean": None, "clients": 0, "left_out": 0, "before": None, "after": None}


class Odd(nn.Module):
    """Gives what it is told, and remembers in which mode it was."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.modes = answer, []

    def forward(self, x):
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        return self.answer(x)


def test_models_that_can_be_tried_and_others():
    images = torch.arange(7, dtype=torch.float32).numpy().reshape(7, 1, 1, 1)
    labels = np.array([0, 1, 2, 0, 1, 2, 0])
    dataset = ArrayDataset(images, labels, num_classes=3)
    trial = Trial(dataset, 3, torch.device("cpu"), is_due=bool)

    def first_class(x):
        return torch.tensor([1.0, 0.0, 0.0]).expand(len(x), 3)

    model = Odd(first_class).train()
    assert trial.correct(model) == [3, 0, 0]
    assert model.modes == [(False, True)] * 3
    assert not model.training
    # A narrower head would be right by accident where a mini-batch lacks the last class.
    others = [lambda x: first_class(x)[:, :2], lambda x: [first_class(x)] * 2, lambda x: first_class(x)[:1], lambda x: x / "x"]
    assert [trial.correct(Odd(other)) for other in others] == [None] * 4
    few = sample_of(dataset, 4, seed=3)
    same = sample_of(dataset, 4, seed=3)
    assert few.num_samples == 4
    assert torch.equal(few.batch(np.arange(4))[0], same.batch(np.arange(4))[0])
    drawn = {tuple(sample_of(dataset, 4, seed=seed).batch(np.arange(4))[0].flatten().tolist()) for seed in range(10)}
    assert len(drawn) > 1
    assert all(len(set(each)) == 4 for each in drawn)
    assert sample_of(dataset, 500, seed=3).num_samples == 7
