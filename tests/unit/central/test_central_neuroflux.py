"""NeuroFlux: local gradients, boundaries, peaks; what a budget makes of it; and whole trainings."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from central_problem import StopAfter, base, trainer, under_a_cap
from local_problem import CNN, bits, first_state, neuroflux, train

from dfed.blocks.local_blocks import Block
from dfed.central.config import load_train_config
from dfed.central.local_step import local_step
from dfed.central.state import latest_state
from dfed.errors import ConfigError, TrainingFailed
from dfed.memory import predict_course
from dfed.models import materialise

torch.set_num_threads(1)
MODELS = [("cnn", CNN, ((0, 1, 7), (1, 3, 5))), ("resnet8", {"width": 4}, ((0, 2, 7), (2, 3, 5), (3, 4, 9))),
          ("vit_tiny", {"depth": 3, "width": 12, "heads": 2}, ((0, 1, 6), (1, 3, 5)))]


@pytest.mark.parametrize(("model", "options", "blocks"), MODELS, ids=lambda value: value if isinstance(value, str) else "")
def test_cached_and_recomputed_training_give_the_same_bits(tmp_path, model, options, blocks):
    method = neuroflux(model, options, blocks=blocks)
    first = first_state(method)
    cached = train(method, tmp_path / "cached")
    again = train(neuroflux(model, options, blocks=blocks, cache="none"), tmp_path / "none")
    assert bits(cached) == bits(again)
    assert not (tmp_path / "none").exists()
    halves = train(neuroflux(model, options, blocks=blocks, cache="fp16"), tmp_path / "halves")
    start = method.net.layers[method.blocks[1].first].start
    for name, value in halves.tensors.items():  # the first block is trained on images
        unit = name.partition(".")[0]
        in_first = unit in method.problem.chain.unit_names[:start] or unit == "local1"
        assert not in_first or torch.equal(value, cached.tensors[name])
        assert torch.allclose(value, cached.tensors[name], rtol=0, atol=0.1)  # half precision has 11 bits; steps add up
    assert bits(halves) != bits(cached)
    assert cached.tensors.keys() == first.tensors.keys()
    moved = {name for name, value in cached.tensors.items() if not torch.equal(value, first.tensors[name])}
    assert {name.partition(".")[0] for name in moved} == {name.partition(".")[0] for name in first.tensors}
    for name, make in method.variants().items():  # and all exits can be run
        scores = materialise(make(), torch.Generator()).eval()(torch.zeros(2, 3, 8, 8))
        assert scores.shape == (2, 4), name
    assert list(method.variants())[-1] == method.variant_after(method.num_epochs - 1)


def _naive_gradients(x, y, weights, head):
    """Of a convolution with ReLU and pooling, and a head of a convolution with ReLU, 2 × 2 fields and a linear layer."""
    wanted = [value.double().requires_grad_() for value in (*weights, *head)]
    weight, bias, conv, conv_bias, fc, fc_bias = wanted
    out = F.max_pool2d(F.conv2d(x.double(), weight, bias, padding=1).clamp(min=0), 2)
    hidden = F.conv2d(out, conv, conv_bias, padding=1).clamp(min=0)
    count, filters, height, width = hidden.shape
    fields = hidden.reshape(count, filters, 2, height // 2, 2, width // 2).mean(dim=(3, 5))
    scores = fields.flatten(1) @ fc.T + fc_bias
    chances = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
    (-chances[torch.arange(count), y].log().mean()).backward()
    return [value.grad for value in wanted], out.detach()


def test_local_gradients_are_those_of_a_naive_implementation(tmp_path):
    options = {"channels": [4, 6], "kernel": 3, "hidden": 8}
    training = {"momentum": 0.0, "weight_decay": 0.0, "batch_size": 24, "learning_rate": 0.5}
    method = neuroflux("cnn", options, training, blocks=((0, 3, 24),))
    first = first_state(method)
    after = train(method, tmp_path, first, until=1).tensors
    order = torch.randperm(24, generator=torch.Generator())  # a sum over all samples does not depend on it but in the last bits
    x, y = method.problem.data.batch(order.numpy())
    for unit, head in (("conv0", "local1"), ("conv1", "local2")):
        names = [f"{unit}.conv.weight", f"{unit}.conv.bias", *(f"{head}.{name}" for name in (
            "conv.weight", "conv.bias", "fc.weight", "fc.bias"))]
        values = [first.tensors[name] for name in names]
        gradients, x = _naive_gradients(x, y, values[:2], values[2:])
        for name, value, gradient in zip(names, values, gradients, strict=True):
            step = (value - after[name]).double() / 0.5
            assert gradient.abs().max() > 1e-4
            # float32 has 24 bits, and what is left after the difference of two weights is fewer by as much as they are larger
            assert torch.allclose(step, gradient, rtol=1e-4, atol=1e-6), name
    # The last layer is trained by the chain's own classifier.
    hidden, classes = ([first.tensors[f"{name}.fc.{part}"].double().requires_grad_() for part in ("weight", "bias")]
                       for name in ("hidden", "head"))
    out = (x.flatten(1) @ hidden[0].T + hidden[1]).clamp(min=0)
    F.cross_entropy(out @ classes[0].T + classes[1], y).backward()
    for name, values in (("hidden", hidden), ("head", classes)):
        for part, value in zip(("weight", "bias"), values, strict=True):
            step = (first.tensors[f"{name}.fc.{part}"] - after[f"{name}.fc.{part}"]).double() / 0.5
            assert torch.allclose(step, value.grad, rtol=1e-4, atol=1e-6), name  # as above


def test_nothing_crosses_a_boundary_and_what_is_not_trained_stays(tmp_path):
    method = neuroflux(blocks=((0, 2, 7), (2, 3, 5)))
    first = first_state(method)
    one = train(method, tmp_path / "a", until=1)
    behind = ("conv1", "local2", "hidden", "head")
    shifted = {name: value + 0.1 if name.startswith(behind) and value.is_floating_point() else value
               for name, value in first.tensors.items()}
    other = train(neuroflux(blocks=((0, 2, 7), (2, 3, 5))), tmp_path / "b", replace(first, tensors=shifted), until=1)
    for name, value in one.tensors.items():
        if name.startswith(("conv0", "local1")):
            assert torch.equal(value, other.tensors[name]), name  # whatever the layers behind are
            assert name.endswith(("bias", "mean")) or not torch.equal(value, first.tensors[name])
        if name.startswith(("hidden", "head")):
            assert torch.equal(value, first.tensors[name]), name  # no gradient, no weight decay, no statistics
            assert name not in one.slots
    middle = train(method, tmp_path / "a", one, until=2)
    assert not middle.slots
    last = train(method, tmp_path / "a", middle, until=3)
    for name, value in middle.tensors.items():
        if not name.startswith(("hidden", "head")):
            assert torch.equal(value, last.tensors[name]), name
    assert {name.partition(".")[0] for name in last.slots} == {"hidden", "head"}


def _fits(budget, **settings):
    return neuroflux(blocks=None, problem_of={"budget_bytes": budget, "by_prediction": True, "samples": 64}, training={
        "batch_size": 64}, **settings)


def test_a_peak_is_that_of_the_largest_layer_and_not_the_sum():
    method = _fits(None)
    figures, count = method._figures, 3
    alone = [figures.peak_bytes(layer, layer + 1, 32) for layer in range(count)]
    states = [figures.layer(layer).state_bytes for layer in range(count)]
    together = figures.peak_bytes(0, count, 32)
    assert max(alone) < together <= max(alone) + sum(states)
    assert together < 0.75 * sum(alone)
    tensors = {name: value for name, value in method.first_tensors().items()}
    weights = sum(value.nbytes for value in tensors.values())
    assert weights < sum(states) < 2 * weights + 8 * count  # with momentum, which counters and statistics have not

    # The block as a whole, predicted in one piece.
    sessions = method._sessions

    def work(state):
        for number, session in enumerate(sessions):
            session.load(*state[number], 1.0)
            session.model.set_generator(torch.Generator())
        for _ in range(2):
            x, y = torch.empty(32, 3, 8, 8), torch.zeros(32, dtype=torch.int64)
            for session in sessions:
                _, x = local_step(session, x, y)

    def prepare_it():
        return [figures._trained(session, number) for number, session in enumerate(sessions)]

    whole = max(predict_course(prepare_it, work))
    held = 2 * 32 * 3 * 64 * 4
    assert whole <= together <= 1.1 * whole + held  # a layer's prediction has the labels and its input in it


def test_budgets_decide_batches_and_blocks():
    free = _fits(None)
    assert free.blocks == [Block(0, 0, 3, 64, free._figures.peak_bytes(0, 3, 64))]
    assert _fits(free.blocks[0].peak_bytes).blocks == free.blocks
    for cache in ("fp32", "none"):
        least = max(_fits(None, cache=cache)._figures.peak_bytes(layer, layer + 1, smallest)
                    for layer, smallest in enumerate((1, 1, 1)))
        tight = _fits(least, cache=cache)
        assert min(block.batch for block in tight.blocks) == 1
        assert all(block.peak_bytes <= least for block in tight.blocks)
        with pytest.raises(ConfigError) as caught:
            _fits(least - 1, cache=cache)
        fault = caught.value.faults[0]
        assert fault.field == "memory.budget"
        assert f"({least} bytes), the smallest budget on which this method can train this model" in fault.message
        assert "training unit '" in fault.message
        assert "' on 1 sample at a time needs most." in fault.message
    medium = _fits(free.blocks[0].peak_bytes // 2, rho=0.2)
    assert len(medium.blocks) > 1
    assert [block.first for block in medium.blocks[1:]] == [block.stop for block in medium.blocks[:-1]]
    for block in medium.blocks:
        assert medium.problem.fits(block.peak_bytes)
        assert medium.rate_factor(2 * block.index) == block.batch / 64
        assert medium.learning_rate_at(2 * block.index) == pytest.approx(0.05 * block.batch / 64)
        assert medium.variant_after(2 * block.index + 1) == f"exit {block.stop}"
    assert medium.num_epochs == 2 * len(medium.blocks)
    assert sum(cost.share for cost in medium.costs().values()) == pytest.approx(1)
    headings, rows = medium.table()
    assert headings[:4] == ("block", "units", "filters", "batch")
    assert rows[0][1].startswith("conv0")
    assert rows[-1][-1] == "–"
    # A batch of 1 has one value a channel where maps are of one pixel.
    norms = neuroflux("cnn", {**CNN, "channels": [4, 4, 4]}, blocks=None)
    assert [norms._figures.smallest(layer) for layer in range(4)] == [1, 1, 2, 1]


def test_the_schedule_begins_anew_with_each_block():
    method = neuroflux(training={"epochs": 3, "schedule": {"name": "step", "milestones": [2], "factor": 0.5}})
    assert [method.rate_factor(epoch) for epoch in range(6)] == [7 / 8, 7 / 8, 7 / 16, 5 / 8, 5 / 8, 5 / 16]


LARGE = {"model": {"name": "cnn", "channels": [24, 24], "kernel": 3, "hidden": 8, "norm": "batch"},
         "training": {"epochs": 1, "batch_size": 256, "augment": "none"},
         "data": {"shape": [1, 32, 32], "samples": 300, "test_samples": 40, "validation_fraction": 0.1},
         "metrics": {"split": "validation", "test_at_end": True}, "memory": "36MB"}


@under_a_cap
def test_it_trains_under_a_cap_where_plain_training_runs_out_of_memory(tmp_path, capsys):
    raw = {**base(**LARGE), "method": {"name": "bp", "depths": 1}}
    raw["model"] = LARGE["model"]
    plain = trainer(raw, tmp_path / "bp")
    assert 0.9 * plain._method.peak_bytes - 12 * 2**20 > 36e6  # so it must fail
    with pytest.raises(TrainingFailed, match="out of memory under"):
        plain.train()
    raw["method"] = {"name": "neuroflux", "exit_tolerance": 1.0, "smallest_filters": 4}
    part = trainer(raw, tmp_path / "nf")
    assert len(part._method.blocks) > 1
    assert part.train() == 0
    found = json.loads((tmp_path / "nf" / "summary.json").read_text())
    assert found["finished"]
    assert found["peak_bytes"] < 36e6 + 2**20  # by which the kernel's counters may lag
    assert sorted(path.name for path in (tmp_path / "nf").iterdir()) == [
        "checkpoint", "config.yaml", "metrics.jsonl", "summary.json"]  # and no caches
    chosen = found["exit"]
    first, last = found["variants"]["exit 1"], found["variants"]["exit 3"]
    assert (chosen["name"], chosen["units"]) == ("exit 1", ["conv0"])
    assert (chosen["num_params"], chosen["param_share"]) == (first["num_params"], first["num_params"] / last["num_params"])
    assert (chosen["accuracy"], chosen["test"]) == (first["accuracy"], first["test"])
    assert chosen["forward_flops"] == first["forward_flops"] < last["forward_flops"]
    assert min(chosen["samples_per_s"], chosen["full_samples_per_s"]) > 0
    assert last["num_params"] == found["num_params"]
    blocks, samples = part._method.blocks, found["num_samples"]
    visits = {name: samples for name in found["variants"]}  # each layer has seen each sample as often as in plain training
    passes = sum(part._method._forward_flops(block.first, block.stop) for block in blocks[:-1])
    assert found["training_flops"] == pytest.approx(samples * passes + sum(
        figures["training_flops"] * visits[name] for name, figures in found["variants"].items()))
    rows = [json.loads(line) for line in (tmp_path / "nf" / "metrics.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == [f"exit {block.stop}" for block in blocks]
    assert [row["learning_rate"] for row in rows] == [0.05 * block.batch / 256 for block in blocks]
    out = capsys.readouterr().out
    assert "filters" in out
    assert "chosen: exit 1 (" in out
    config = load_train_config(None, base=raw)
    # Blocks follow from the budget, and epochs belong to blocks: both decide the bits.
    assert config.fingerprint() != load_train_config(None, ["memory=37MB"], raw).fingerprint()
    assert config.fingerprint() != load_train_config(None, ["training.epochs=2"], raw).fingerprint()


def test_a_whole_training_is_interrupted_and_gone_on_with(tmp_path, caplog):
    raw = base(training={"epochs": 2, "batch_size": 16}, data={"shape": [1, 48, 48]})
    raw["method"] = {"name": "neuroflux", "smallest_filters": 2, "rho": 0.1}
    raw["memory"] = {"enforce": "predicted", "budget": 1_200_000}
    whole = trainer(raw, tmp_path / "whole")
    assert len(whole._method.blocks) > 1
    assert whole.train() == 0
    state, seen = None, []
    for looks in (4, 11, 12, 13, 200):
        part = trainer(raw, tmp_path / "parts", state=state, stop=StopAfter(looks))
        status = part.train()
        state = latest_state(tmp_path / "parts" / "checkpoint", load_train_config(None, base=raw).fingerprint())
        assert status == (0 if looks == 200 else 143)
        seen.append((state.epoch, state.step))
        if status and state.epoch > 2:
            assert list((tmp_path / "parts" / "cache").glob("*.data"))  # it is of use for going on
    assert seen == sorted(seen)
    assert any(step for _, step in seen)
    assert bits(state) == bits(whole.state)
    assert caplog.text.count("applied to the first block only") == 6
    assert not (tmp_path / "parts" / "cache").exists()
    found, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "parts"))
    assert found["params_sha256"] == other["params_sha256"]
    assert found["steps"] == other["steps"]
    assert "exit" not in found
