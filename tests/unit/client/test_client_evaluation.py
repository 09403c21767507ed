import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from client_problem import CLASSES, CPU, Small, data

from dfed.client import Evaluation, Evaluator, combine
from dfed.data.dataset import ArrayDataset


@pytest.fixture(scope="module")
def held_out():
    x, y = data(67, seed=5)
    return ArrayDataset(x.numpy(), y.numpy().astype(np.int64), num_classes=CLASSES)


def evaluator_of(small, dataset, batch_size):
    return Evaluator(small.strategy, small.forms, dataset, dataset, batch_size=batch_size, device=CPU, seed=1)


def same(first, second):
    return (
        (first.loss, first.accuracy) == (second.loss, second.accuracy)
        and np.array_equal(first.correct, second.correct)
        and np.array_equal(first.count, second.count)
    )


def test_shards_combine_to_the_same_bits(held_out):
    small = Small()
    evaluator = evaluator_of(small, held_out, 8)
    reference = combine([evaluator.run(small.plan(), small.values, 0, 1)])
    for size in (1, 2, 3, 5, 9, 12):
        shards = [evaluator.run(small.plan(), small.values, rank, size) for rank in range(size)]
        shards = json.loads(json.dumps(shards))  # as they cross the ranks
        assert same(combine(shards), reference)
        assert same(combine(shards[::-1]), reference)
    # Against a model made without the code under test, all samples at once.
    model = small.model().eval()
    x, y = held_out.batch(np.arange(67))
    with torch.no_grad():
        logits = model(x)
    right = (logits.argmax(1) == y).numpy()
    assert reference.accuracy == right.mean()
    # Sums of 67 losses of order 1 in float32, in another order: some 1e-6.
    assert reference.loss == pytest.approx(F.cross_entropy(logits.double(), y).item(), rel=1e-5)
    assert reference.count.tolist() == np.bincount(y, minlength=CLASSES).tolist()
    assert reference.correct.tolist() == np.bincount(y[torch.from_numpy(right)], minlength=CLASSES).tolist()
    assert reference.count.dtype == np.int64


def test_values_are_left_alone_and_storage_is_given_back(held_out):
    small = Small()
    before = {name: value.clone() for name, value in small.values.items()}
    evaluator = evaluator_of(small, held_out, 16)
    first = combine([evaluator.run(small.plan(), small.values, 0, 1)])
    assert {tensor.device.type for tensor in evaluator._skeleton(small.plan()).model.state_dict().values()} == {"meta"}
    assert all(torch.equal(small.values[name], before[name]) for name in before)  # norm statistics, too
    assert same(combine([evaluator.run(small.plan(), small.values, 0, 1)]), first)
    with pytest.raises(KeyError):
        evaluator.run(small.plan(), {}, 0, 1)
    assert {tensor.device.type for tensor in evaluator._skeleton(small.plan()).model.state_dict().values()} == {"meta"}
    # A model that blew up is a figure, not an error.
    broken = {name: torch.full_like(value, math.nan) for name, value in small.values.items()}
    shards = json.loads(json.dumps([evaluator.run(small.plan(), broken, 0, 1)]))
    assert math.isnan(combine(shards).loss)


def test_missing_and_doubled_batches_are_noticed(held_out):
    small = Small()
    evaluator = evaluator_of(small, held_out, 32)
    shards = [evaluator.run(small.plan(), small.values, rank, 2) for rank in range(2)]
    assert [batch[0] for batch in shards[1]] == [1]
    for bad in ([shards[0], shards[0]], [shards[0]], [*shards, shards[1]]):
        with pytest.raises(AssertionError, match="missing or was done twice"):
            combine(bad)
    assert evaluator.run(small.plan(), small.values, 4, 5) == []  # more ranks than mini-batches


def test_accuracy_on_a_mix_of_classes():
    evaluation = Evaluation(1.0, 13 / 30, np.array([8, 0, 5, 0]), np.array([10, 10, 10, 0]))
    assert evaluation.accuracy_on(None) == 13 / 30
    assert evaluation.accuracy_on(np.array([1, 0, 0, 0])) == 0.8
    for mix in ([3, 5, 1, 0], [30, 50, 10, 0], [0.3, 0.5, 0.1, 0.0], [3, 5, 1, 99]):  # any scale; class 3 cannot be judged
        naive = sum(weight * right / 10 for weight, right in zip(mix[:3], (8, 0, 5), strict=True)) / sum(mix[:3])
        assert evaluation.accuracy_on(np.array(mix)) == pytest.approx(naive, rel=1e-14)
    assert evaluation.accuracy_on(np.array([1, 1, 1, 1])) == pytest.approx(evaluation.accuracy)
    assert math.isnan(evaluation.accuracy_on(np.array([0, 0, 0, 4])))
