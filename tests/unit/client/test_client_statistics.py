"""Norm statistics that are worked out anew from training samples."""

import math

import numpy as np
import pytest
import torch
from client_problem import CLASSES, CNN, CPU, Small, data
from torch import nn

from dfed import rng
from dfed.client import Evaluator
from dfed.client.statistics import STATISTICS_RANGE, norm_statistics, statistics_names
from dfed.comm.partial_sums import PartialSums, weight_scale
from dfed.data.dataset import ArrayDataset
from dfed.errors import UpdateRejected

DROPPING = {**CNN, "dropout": [0.5, 0.5]}


@pytest.fixture(scope="module")
def samples():
    x, y = data(67, seed=5)
    return ArrayDataset(x.numpy(), y.numpy().astype(np.int64), num_classes=CLASSES)


def norms_of(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def mean_of(found):
    return {name: torch.stack([each[name].double() for each in found]).mean(0) for name in found[0]}


@pytest.mark.parametrize(("model", "options", "shape"), [("cnn", DROPPING, (1, 8, 8)), ("resnet8", {"width": 4}, (3, 8, 8))])
def test_against_torchs_own_average(model, options, shape):
    small = Small(model, options, shape=shape)
    x, _ = data(30, shape=shape, seed=3)
    batches = [x[:8], x[8:16], x[16:]]
    mine, torchs = small.model(), small.model()
    torchs.eval()
    for norm in norms_of(torchs).values():
        norm.reset_running_stats()
        norm.momentum = None  # the mean over the mini-batches
        norm.train()
    with torch.no_grad():
        for batch in batches:
            torchs(batch)
    found = list(norm_statistics(mine, batches))
    assert len(found) == 3
    assert {name: tuple(value.shape) for name, value in found[0].items()} == statistics_names(mine)
    assert len(found[0]) == 2 * len(norms_of(mine))
    for name, value in mean_of(found).items():
        # torch averages three float32 numbers of order 1 step by step.
        torch.testing.assert_close(value.float(), torchs.get_buffer(name), rtol=1e-5, atol=1e-6)
    # The first norm once more, in float64: mean and unbiased variance of what goes into it.
    first = next(iter(norms_of(mine)))
    unit, _, _ = first.partition(".")
    with torch.no_grad():
        flat = mine.unit(unit).conv(batches[1]).double().transpose(0, 1).flatten(1)
    # float32 sums of 512 numbers of order 1.
    torch.testing.assert_close(found[1][f"{first}.running_mean"].double(), flat.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][f"{first}.running_var"].double(), flat.var(1, unbiased=True), rtol=1e-5, atol=1e-6)


def test_the_model_is_as_it_was():
    small = Small(options=DROPPING)
    model = small.model()  # no generator: dropout in training would be refused
    momenta = [0.3, None]
    for norm, momentum in zip(norms_of(model).values(), momenta, strict=True):
        norm.momentum = momentum
    x, _ = data(16)
    steps = norm_statistics(model, [x[:8], x[8:]])
    first = next(steps)
    kept = {name: value.clone() for name, value in first.items()}
    assert [module.training for module in norms_of(model).values()] == [True, True]
    next(steps)
    assert all(torch.equal(first[name], kept[name]) for name in kept)  # copies: the next mini-batch does not change them
    assert list(steps) == []
    assert [norm.momentum for norm in norms_of(model).values()] == momenta
    assert not any(module.training for module in model.modules())
    assert not any(value.requires_grad for value in first.values())
    with pytest.raises(RuntimeError):
        list(norm_statistics(model, [x[:8], torch.zeros(8, 3, 2, 2)]))
    assert [norm.momentum for norm in norms_of(model).values()] == momenta
    assert not any(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, small.values[name])
    # What the model had of statistics plays no part.
    other = small.model()
    for norm in norms_of(other).values():
        norm.running_mean.fill_(7.0)
        norm.running_var.fill_(9.0)
    assert all(torch.equal(value, kept[name]) for name, value in next(norm_statistics(other, [x[:8]])).items())


def evaluator_of(small, dataset, batch_size):
    return Evaluator(small.strategy, small.forms, dataset, dataset, batch_size=batch_size, device=CPU, seed=4)


def worked_out(evaluator, plan, values, size):
    """The sums of so many ranks, added in the order of the ranks."""
    parts = []
    for rank in range(size):
        parts.append(PartialSums(evaluator.statistics_shapes(plan)))
        evaluator.add_statistics(plan, values, rank, size, parts[-1])
    total = parts[0].flat.clone()
    for part in parts[1:]:
        total += part.flat
    return total, parts[0].shapes


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_shards_add_up_to_the_same_bits(samples, rate):
    small = Small(options=DROPPING, strategy="heterofl", statistics_samples=0)
    evaluator, plan = evaluator_of(small, samples, 8), small.strategy.plan_at(rate)
    before = {name: value.clone() for name, value in small.values.items()}
    reference, shapes = worked_out(evaluator, plan, small.values, 1)
    for size in (2, 3, 5, 12):
        assert torch.equal(worked_out(evaluator, plan, small.values, size)[0], reference)
    assert all(torch.equal(small.values[name], before[name]) for name in before)
    assert evaluator.num_statistics_batches() == 8  # of 67 samples; three are left over
    # Without the code under test: a keyed order, eight mini-batches, their mean.
    order = rng.Permutation(67, 4, "statistics").take(np.arange(64))
    x = samples.batch(order)[0]
    sub = small.strategy.sub_model(plan)
    model = sub.chain.skeleton().to_empty(device="cpu")
    model.load_state_dict({name: region.view(small.values[name]) for name, region in sub.regions.items()}, strict=False)
    naive = mean_of(list(norm_statistics(model, x.split(8))))
    start, scale = 0, 8 * weight_scale(8)
    assert shapes == {name: tuple(value.shape) for name, value in naive.items()}
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        # Rounded to a grid of 2^-32 and added exactly.
        torch.testing.assert_close((reference[start:stop] / scale).reshape(shape), naive[name], rtol=1e-8, atol=1e-9)
        start = stop
    assert start == len(reference)


@pytest.mark.parametrize(("wanted", "batch_size", "batches"), [(20, 8, 2), (0, 100, 1), (1000, 8, 8), (5, 8, 1), (16, 8, 2)])
def test_whole_mini_batches_unless_there_is_none(samples, wanted, batch_size, batches):
    small = Small(strategy="heterofl", statistics_samples=wanted)
    evaluator, plan, seen = evaluator_of(small, samples, batch_size), small.strategy.plan_at(1.0), []
    assert evaluator.num_statistics_batches() == batches
    skeleton = evaluator._skeleton(plan)
    handle = skeleton.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    worked_out(evaluator, plan, small.values, 1)
    handle.remove()
    assert seen == [min(batch_size, wanted or 67, 67)] * batches


def test_models_that_diverge_are_refused(samples):
    small = Small(strategy="heterofl", statistics_samples=16)
    evaluator, plan = evaluator_of(small, samples, 8), small.strategy.plan_at(1.0)
    for factor, reason in ((math.nan, "non_finite"), (math.inf, "non_finite"), (STATISTICS_RANGE, "out_of_range")):
        values = {**small.values, "conv0.conv.weight": small.values["conv0.conv.weight"] * factor}
        with pytest.raises(UpdateRejected) as caught:
            worked_out(evaluator, plan, values, 1)
        assert caught.value.reason == reason
        assert {tensor.device.type for tensor in evaluator._skeleton(plan).model.state_dict().values()} == {"meta"}
    assert torch.isfinite(worked_out(evaluator, plan, small.values, 1)[0]).all()  # the next one is not affected


def test_models_without_running_statistics(samples):
    for norm in ("none", "group"):
        small = Small(options={**CNN, "norm": norm}, strategy="heterofl")
        assert evaluator_of(small, samples, 8).statistics_shapes(small.strategy.plan_at(1.0)) == {}
