"""Classic local learning, and back-propagation that is fitted to a budget: smaller mini-batches, or parts of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from central_problem import base, problem, trainer
from local_problem import CNN, STORE, TRAINING, Looks, bits, first_state, train

from dfed.blocks.local_blocks import Block
from dfed.central.bp import BP
from dfed.central.config import load_train_config
from dfed.central.costs import prefix_peak, prefix_peaks
from dfed.central.local import ClassicLocal
from dfed.central.neuroflux import NeuroFlux
from dfed.errors import ConfigError
from dfed.models import materialise

torch.set_num_threads(1)

PLAIN = {"channels": [4, 6], "kernel": 3, "hidden": 8}


def posed(budget=None, options=CNN, **training):
    return problem("cnn", options, {**TRAINING, **training}, store=STORE, samples=24, budget_bytes=budget, by_prediction=True)


def test_simultaneous_training_is_neuroflux_in_one_block(tmp_path):
    method = ClassicLocal(posed(), filters=5)
    assert [layer.filters for layer in method.net.layers] == [5, 5, None]
    assert [(block.first, block.stop, block.batch) for block in method.blocks] == [(0, 3, 8)]
    assert method.num_epochs == 2
    other = NeuroFlux(posed(), heads="classic", largest_filters=5, smallest_filters=5)
    assert bits(train(method, tmp_path / "a")) == bits(train(other, tmp_path / "b"))
    assert not (tmp_path / "a").exists()


def test_sequential_training(tmp_path):
    def method(augment="none"):
        return ClassicLocal(posed(augment=augment), order="sequential", filters=5)

    found = method()
    assert [(block.first, block.stop, block.batch) for block in found.blocks] == [(0, 1, 8), (1, 2, 8), (2, 3, 8)]
    assert found.num_epochs == 6
    whole = train(found, tmp_path)
    assert bits(train(method(), tmp_path, stopped=Looks(2, 5, 9, 13))) == bits(whole)
    flipped = train(method("flip"), tmp_path)
    first = first_state(found)
    for number in range(3):
        alone = train(method("flip"), tmp_path, replace(flipped, epoch=2 * number, slots={}), until=2 * number + 1)
        mine = {*found.net.layer_model(number).state_dict()}
        moved = {name for name, value in alone.tensors.items() if not torch.equal(value, flipped.tensors[name])}
        assert moved
        assert moved <= mine
    assert bits(flipped) != bits(whole)  # augmentation is applied for every layer
    assert flipped.tensors.keys() == first.tensors.keys()
    costs = found.costs()
    again = [found._forward_flops(0, number) for number in range(3)]  # each step passes the layers before once more
    assert again[0] == 0 < again[1] < again[2]
    for number, cost in enumerate(costs.values()):
        assert cost.training_flops == found._figures.layer(number).training_flops + again[number]


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_one_batch_for_all(order):
    free = ClassicLocal(posed(batch_size=24), order=order, filters=16)
    most = max(block.peak_bytes for block in free.blocks)
    assert {block.batch for block in free.blocks} == {24}
    half = ClassicLocal(posed(most // 2, batch_size=24), order=order, filters=16)
    batch, = {block.batch for block in half.blocks}
    assert 1 <= batch < 24
    assert max(block.peak_bytes for block in half.blocks) <= most // 2
    peaks = [half._figures.peak_bytes(block.first, block.stop, batch + 1) for block in half.blocks]
    assert max(peaks) > most // 2
    assert half.rate_factor(0) == batch / 24
    least = max(half._figures.peak_bytes(block.first, block.stop, 1) for block in half.blocks)
    with pytest.raises(ConfigError, match=rf"\({least} bytes\), the smallest budget on which this method can train"):
        ClassicLocal(posed(least - 1, batch_size=24), order=order, filters=16)
    assert isinstance(half.blocks[0], Block)


def _naive_step(tensors, x, y, rate):
    """Of the whole network without norms: a step of plain gradient descent in float64."""
    values = {name: value.double().requires_grad_() for name, value in tensors.items()}
    out = x.double()
    for unit in ("conv0", "conv1"):
        out = F.conv2d(out, values[f"{unit}.conv.weight"], values[f"{unit}.conv.bias"], padding=1)
        out = F.max_pool2d(out.clamp(min=0), 2)
    out = (out.flatten(1) @ values["hidden.fc.weight"].T + values["hidden.fc.bias"]).clamp(min=0)
    F.cross_entropy(out @ values["head.fc.weight"].T + values["head.fc.bias"], y).backward()
    return {name: (value - rate * value.grad).detach() for name, value in values.items()}


def test_micro_batches_give_the_gradient_of_the_whole_mini_batch(tmp_path):
    training = {"batch_size": 24, "momentum": 0.0, "weight_decay": 0.0, "epochs": 1, "learning_rate": 0.5}
    whole, parts = (BP(posed(options=PLAIN, **training), micro_batch=size) for size in (None, 7))
    first = first_state(whole)
    x, y = whole.problem.data.batch(torch.arange(24).numpy())
    wanted = _naive_step(first.tensors, x, y, 0.5)
    for method in (whole, parts):
        outcome = method.epoch(first, lambda: False)
        for name, value in outcome.state.tensors.items():
            assert torch.allclose(value.double(), wanted[name], rtol=0, atol=1e-6), name  # of float32, with steps of 0.5
        assert sum(outcome.tally.visits.values()) == 24
    assert parts.epoch(first, lambda: False).tally.loss_sum == pytest.approx(
        whole.epoch(first, lambda: False).tally.loss_sum, rel=1e-6)  # sums of float32 in another order
    same = BP(posed(options=PLAIN, **training), micro_batch=24)
    assert bits(same.epoch(first, lambda: False).state) == bits(whole.epoch(first, lambda: False).state)
    seen = []
    session = parts._session
    session.load(first.tensors, {}, 1.0)
    session.step(x, y, lambda model, part, labels: seen.append(len(part)) or F.cross_entropy(model(part), labels), 7)
    session.unload()
    assert seen == [6, 6, 6, 6]  # as equal as can be


def test_batches_and_micro_batches_that_fit(tmp_path):
    def method(budget=None, **options):
        return BP(posed(budget, batch_size=20), depths=1, **options)

    plain = method()
    full = plain.peak_bytes
    budget = int(0.6 * full)
    auto = method(budget, batch="auto")
    size = auto.problem.settings.batch_size
    assert 1 < size < 20
    assert prefix_peaks(plain, 1).at(size) == auto.peak_bytes <= budget < prefix_peaks(plain, 1).alone(size + 1)
    assert auto.steps_per_epoch == -(-24 // size)
    assert auto.learning_rate_at(0) == pytest.approx(0.05 * size / 20)
    micro = method(budget, micro_batch="auto")
    assert 1 < micro.micro_batch <= size  # all of the mini-batch is there
    assert micro.peak_bytes == prefix_peak(plain, 1, micro.micro_batch) <= budget < prefix_peak(plain, 1, micro.micro_batch + 1)
    assert (micro.steps_per_epoch, micro.rate_share) == (2, 1.0)
    for options in ({"batch": "auto"}, {"micro_batch": "auto"}):
        assert method(full, **options).peak_bytes == method(None, **options).peak_bytes == full
        assert method(full, **options).learning_rate_at(0) == 0.05
        with pytest.raises(ConfigError, match="a step on 1 sample at a time needs most"):
            method(1000, **options)
    with pytest.raises(ConfigError, match=r"`micro_batch` must be null with `batch` 'auto', .*, but is 4"):
        method(budget, batch="auto", micro_batch=4)
    # A bound from outside: what the whole mini-batch takes, and what is kept of the model.
    weights = sum(value.nbytes for value in materialise(plain.build(), torch.Generator()).state_dict().values())
    assert 2 * weights < prefix_peak(plain, 1, 1) < full


def test_budgets_that_decide_bits_are_part_of_the_fingerprint():
    def same(method, *words):
        raw = {**base(), "method": method}
        return load_train_config(None, base=raw).fingerprint() == load_train_config(None, words, raw).fingerprint()

    for method in ({"name": "bp"}, {"name": "bp", "micro_batch": 3}):
        assert same(method, "memory=64MB")
        assert same(method, "training.epochs=9")
    for method in ({"name": "bp", "batch": "auto"}, {"name": "bp", "micro_batch": "auto"}, {"name": "local"}):
        assert not same(method, "memory=64MB")
    assert same({"name": "bp", "batch": "auto"}, "training.epochs=9")
    assert not same({"name": "local"}, "training.epochs=9")


def test_a_whole_training_chooses_its_exit(tmp_path, capsys):
    raw = base(data={"validation_fraction": 0.25}, metrics={"split": "validation"}, training={"epochs": 1})
    raw["method"] = {"name": "local", "order": "sequential", "filters": 4, "exit_tolerance": 0.0}
    part = trainer(raw, tmp_path / "out")
    assert part.train() == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    best = max(figures["accuracy"] for figures in found["variants"].values())
    first = next(name for name, figures in found["variants"].items() if figures["accuracy"] == best)
    assert (found["exit"]["name"], found["exit"]["accuracy"], found["exit"]["test"]) == (first, best, None)
    assert found["epochs"] == 3
    assert found["steps"] == 3 * 5
    assert all(figures["steps"] == 5 for figures in found["variants"].values())
    assert f"chosen: {first} (" in capsys.readouterr().out
