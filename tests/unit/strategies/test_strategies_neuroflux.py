"""NeuroFlux in a fleet: local losses by hand, what features hold, blocks and mini-batches by the budgets, and a whole run."""

from __future__ import annotations

import collections
import itertools
import json
import logging
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from depth_problem import CLASSES, CPU, SHAPE, Small, data

from dfed import rng
from dfed.blocks import cut
from dfed.blocks.local_blocks import join_layers
from dfed.checkpoint import latest
from dfed.client.features import ClientFeatures, pass_through
from dfed.client.home import ClientHome
from dfed.comm import join
from dfed.config import load_config
from dfed.data import client_batches
from dfed.data.dataset import ArrayDataset
from dfed.data.row_file import RowFile
from dfed.errors import CheckpointError, ConfigError, FeaturesLost
from dfed.leader import Leader
from dfed.plan import Plan
from dfed.planner.costs import with_batch
from dfed.planner.flops import forward_flops
from dfed.report.folder import RunFolder
from dfed.run import StopFlag, assemble, prepare
from dfed.state import ServerState
from dfed.strategies import PASS, Feed

DEEP = {"channels": [8, 8, 8], "kernel": 3, "hidden": 8, "norm": "batch"}
WIDE = (1, 16, 16)


def fleet(budgets, like=None, **settings):
    """Of its four layers the first wants most memory by far. ``like``: has the costs of the same plans already."""
    found = Small("neuroflux", "cnn", DEEP, shape=WIDE, client={"batch_size": 16, "momentum": 0.9}, budgets=budgets,
                  smallest_filters=4, **settings)
    found.costs = found.costs if like is None else like.costs
    return found


@pytest.fixture(scope="module")
def free():
    """Without budgets."""
    return fleet(())


@pytest.mark.parametrize(("model", "options", "shape"), [
    ("cnn", None, SHAPE), ("cnn", {**DEEP, "norm": "none"}, SHAPE), ("vit_tiny", {"depth": 3, "width": 12}, (3, 8, 8))])
def test_each_layer_follows_its_own_loss(model, options, shape):
    small = Small("neuroflux", model, options, shape=shape, client={"learning_rate": 0.05}, smallest_filters=3)
    strategy, (x, y) = small.strategy, data(shape=shape)
    first, stop = 0, len(strategy.net.layers)
    plan = strategy.plan_at(first, stop)
    plan = replace(plan, phases=tuple(replace(phase, rate=0.25) for phase in plan.phases))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    values = {name: value.double() for name, value in small.values.items()}
    result, trained = small.train(plan, x, y, values=values, dtype=torch.float64)
    assert set(result.update) == set(small.values)

    chain, heads = small.model(strategy.full_plan()).train(), dict(small.model(plan).named_children())
    total, here = 0.0, x.double()
    for layer in strategy.net.layers:
        units = chain.unit_names[layer.start:layer.stop]
        head = heads[layer.head] if layer.head not in chain.unit_names else chain.unit(layer.head)
        modules = [*(chain.unit(name) for name in units), head.train()]
        out = here
        for unit in modules[:-1]:
            out = unit(out)
        loss = F.cross_entropy(head(out), y)
        names = [f"{place}.{name}" for place, unit in zip([*units, layer.head], modules, strict=True)
                 for name, _ in unit.named_parameters()]
        parameters = [value for unit in modules for value in unit.parameters()]
        gradients = torch.autograd.grad(loss, parameters)
        for name, gradient in zip(names, gradients, strict=True):
            expected = values[name] - 0.05 * 0.25 * gradient
            # The same operations in float64, in another order at most.
            torch.testing.assert_close(result.update[name], expected, rtol=1e-9, atol=1e-12)
        here, total = out.detach(), total + loss.item()
    # The sum over mini-batches is kept in float32.
    assert float(result.loss_sum) == pytest.approx(len(y) * total, rel=1e-6)
    if model == "cnn" and options is None:  # statistics of norms are those of one pass
        torch.testing.assert_close(result.update["conv1.norm.running_mean"], chain.get_buffer("conv1.norm.running_mean"))
    with torch.no_grad():
        assert trained.eval()(x.double()).shape == (len(y), CLASSES)


def samples(count=11, shape=SHAPE):
    images, labels = data(count, shape)
    return ArrayDataset(images.numpy(), labels.numpy(), num_classes=CLASSES)


def test_features_are_what_the_units_before_make_in_evaluation_mode(tmp_path):
    small, whole, steps = Small("neuroflux", smallest_filters=3), samples(20), []
    chain, home, indices = small.chain, ClientHome(tmp_path), np.array([3, 0, 19, 7, 8, 11, 2])
    reference = small.model(small.strategy.full_plan()).eval()
    shapes = chain.output_shapes()
    first = Feed(shape=shapes["conv0"], version=4, units=("conv0",), source_shape=SHAPE)
    second = Feed(shape=shapes["conv2"], version=9, units=("conv1", "conv2"), source_shape=shapes["conv0"], source=4)
    there = Feed(shape=shapes["conv2"], version=9)
    for feed, size in ((first, 3), (second, 7)):
        features = ClientFeatures(chain, feed, home, 5, whole, indices)
        features.check()
        pass_through(features, small.values, size, "fp32", CPU, lambda: steps.append(1))
        assert all(parameter.is_meta for unit in features.units for parameter in unit.model.parameters())
    assert len(steps) == 3 + 1
    images, labels = whole.batch(indices)
    with torch.no_grad():
        expected = {4: reference.run(images.double(), 0, 1), 9: reference.run(images.double(), 0, 3)}
    for feed, features in ((first, expected[4]), (there, expected[9])):
        mine = ClientFeatures(chain, feed, home, 5, whole, indices).dataset
        found, their_labels = mine.batch(np.arange(7))
        # float32 against float64, through at most three units of values of size 1.
        torch.testing.assert_close(found.double(), features, rtol=1e-4, atol=1e-5)
        assert torch.equal(their_labels, labels)
        # Mini-batches come in the order in which the samples would.
        drawn = client_batches(mine, np.arange(7), batch_size=3, epochs=2, generator=rng.torch_generator(1, "b"), at_once=False)
        plain = client_batches(whole, indices, batch_size=3, epochs=2, generator=rng.torch_generator(1, "b"))
        for (x, y), (image, label) in zip(drawn, plain, strict=True):
            places = [int((images == one).flatten(1).all(1).nonzero()) for one in image]
            assert torch.equal(x, found[places])
            assert torch.equal(y, label)


def test_features_that_are_gone_damaged_or_anothers_are_refused(tmp_path):
    small, home, indices = Small("neuroflux", smallest_filters=3), ClientHome(tmp_path), np.arange(6)
    shape = small.chain.output_shapes()["conv0"]
    make, there = Feed(shape=shape, version=4, units=("conv0",), source_shape=SHAPE), Feed(shape=shape, version=4)

    def features(feed, client=5, count=6):
        return ClientFeatures(small.chain, feed, home, client, samples(), indices[:count])

    with pytest.raises(FeaturesLost, match=r"client 5 must have the features .* round 4 .*000005/000004.json cannot be"):
        features(there).check()
    pass_through(features(make), small.values, 4, "fp32", CPU, lambda: None)
    features(there).check()
    path = home.features_path(5, 4)
    written, other = path.read_bytes(), home.features_path(6, 4)
    other.parent.mkdir()
    other.write_bytes(written)
    other.with_suffix(".json").write_bytes(path.with_suffix(".json").read_bytes())
    with pytest.raises(FeaturesLost, match=r"client 6 .*000006/000004.json is another's"):
        features(there, client=6).check()
    with pytest.raises(FeaturesLost, match="is another's"):
        features(there, count=5).check()
    again = Feed(shape=shape, version=7, units=("conv1",), source_shape=shape, source=4)
    changed = bytes([written[0] ^ 1]) + written[1:]
    for damaged, reason in ((written[:-1], f"has {len(written) - 1} bytes instead of {len(written)}"), (changed, "differs")):
        path.write_bytes(damaged)
        for feed in (there, again):
            with pytest.raises(FeaturesLost, match=rf"client 5 must have the features .*000005/000004.features.* {reason}"):
                features(feed).check()
    path.write_bytes(written)
    path.with_suffix(".json").write_text("[]")
    with pytest.raises(FeaturesLost, match=r"client 5 .*000004.json is damaged"):
        features(there).check()

    def abandoned():
        raise RuntimeError("another rank is gone")

    with pytest.raises(RuntimeError, match="another rank is gone"):
        pass_through(features(replace(make, version=8)), small.values, 4, "fp32", CPU, abandoned)
    assert not home.features_path(5, 8).exists()
    (tmp_path / "000009").write_text("a file stands where the folder should be")
    with pytest.raises(CheckpointError, match="cannot write the features of client 9"):
        pass_through(features(make, client=9), small.values, 4, "fp32", CPU, lambda: None)


def test_features_stay_as_long_as_a_state_needs_them(tmp_path):
    home = ClientHome(tmp_path)
    for version in (1, 4, 6, 9):
        home.save(5, version, {})
    for version in (3, 6, 8, 20):
        home.features_path(5, version).write_bytes(b"x")
        home.features_path(5, version).with_suffix(".json").write_bytes(b"x")
    home.features_path(5, 8).with_suffix(".partial").write_bytes(b"x")
    home.prune([{5: 4, 6: 1}, {5: 9}])
    kept = ["000003.features", "000003.json", "000004.safetensors", "000008.features", "000008.json", "000009.safetensors"]
    assert sorted(path.name for path in (tmp_path / "000005").iterdir()) == kept
    home.prune([{5: 9}])
    assert sorted(path.name for path in (tmp_path / "000005").iterdir()) == kept[3:]


@pytest.mark.parametrize("rho", [0.0, 3.0])
def test_blocks_and_mini_batches_go_by_the_budgets(free, rho):
    def needs(first, stop, batch):
        return free.costs.budget_bytes(free.strategy.plan_at(first, stop, batch=batch))

    weakest = needs(0, 1, 4)
    budgets = ((needs(1, 2, 2), 1), (weakest, 2), (needs(0, 4, 11), 1), (None, 1))  # the first holds no first layer
    small = fleet(budgets, free, rho=rho, block_rounds=2)
    strategy = small.strategy
    state = strategy.init(small.values)
    wanted = join_layers([2] * 4, needs, lambda size: size <= weakest, 16, rho)
    assert state.facts["blocks"] == [[block.first, block.stop] for block in wanted]
    assert len(wanted) == (3 if rho == 0 else 1)
    state = replace(state, facts={**state.facts, "starts": [0, 2, 4][:len(wanted)]})
    first, stop = state.facts["blocks"][-1]
    found = []
    for budget, _ in budgets:
        plan = strategy.plan(replace(state, clients={3: 5}), small.candidate(budget))
        if plan is None:
            assert rho != 0
            assert budget < needs(first, stop, 2)
            continue
        batch = plan.phases[-1].batch_size
        assert plan.phases[-1].rate == batch / 16
        assert small.costs.fits(plan, budget)
        assert batch == 16 or not small.costs.fits(with_batch(plan, batch + 1), budget)
        assert plan.train == plan.hold == strategy.plan_at(first, stop).hold
        found.append(batch)
    assert found == sorted(found)
    assert found[-1] == 16
    assert len(found) == (3 if rho else 4)  # whoever cannot hold the first layer can hold the last block
    if rho == 0:
        _who_passes_what(small, state, weakest)


def _who_passes_what(small, state, budget):
    """Clients that were last there in no block, in one before, and in this one."""
    strategy, names = small.strategy, small.chain.unit_names
    assert names == ("conv0", "conv1", "conv2", "hidden", "head")
    plans = {seen: strategy.plan(replace(state, clients={} if seen is None else {3: seen}), small.candidate(budget))
             for seen in (None, 1, 2, 3, 4)}
    feeds = {seen: strategy.feed(plan) for seen, plan in plans.items()}
    shapes = {"images": WIDE, **small.chain.output_shapes()}
    for seen, (units, source, before) in {None: (names[:2], None, "images"), 1: (names[:2], None, "images"),
                                          2: (names[1:2], 2, "conv0"), 3: (names[1:2], 2, "conv0")}.items():
        assert feeds[seen] == Feed(shape=shapes["conv1"], version=4, units=units, source_shape=shapes[before], source=source)
        made, rest = plans[seen].phases
        assert (made.objective, made.epochs, rest.objective) == (PASS, 1, "cross_entropy")
        assert plans[seen].hold == (*units, *plans[4].hold)
        # The pass takes no more than the budget, though the first units would at this block's mini-batch.
        assert small.costs.fits(plans[seen], budget)
        larger = replace(plans[seen], phases=(replace(made, batch_size=2 * made.batch_size), rest))
        assert made.batch_size == rest.batch_size or not small.costs.fits(larger, budget)
        down, up = small.costs.message_bytes(plans[seen])
        assert down > small.costs.message_bytes(plans[4])[0]
        assert up == small.costs.message_bytes(plans[4])[1]
    assert plans[None].phases[0].batch_size < plans[None].phases[1].batch_size
    assert feeds[4] == Feed(shape=shapes["conv1"], version=4, source_shape=shapes["conv1"], source=4)
    assert len(plans[4].phases) == 1
    # A pass is counted once for each sample, whatever is done for how long afterwards.
    forward = forward_flops(cut(small.chain, stop=2), WIDE)
    for count in (1, 20, 33):
        more = small.costs.flops(plans[None], count) - small.costs.flops(plans[4], count)
        assert more == pytest.approx(count * forward, rel=1e-12)
    assert strategy.plan(state, small.candidate(budget, infeasible={})) is not None
    stages = [strategy.feed(strategy.plan_at(*bounds)) for bounds in state.facts["blocks"]]
    assert [feed and feed.shape for feed in stages] == [None, shapes["conv0"], shapes["conv1"]]


def test_the_peak_is_the_largest_layers_and_not_the_sum(free):
    small = free
    plans = [small.strategy.plan_at(layer, layer + 1) for layer in range(4)]
    alone = [small.costs.peak_bytes(plan) for plan in plans]
    # Weights, gradients and momentum of what a plan trains; statistics of norms are not much.
    states = [3 * sum(4 * value.numel() for name, value in small.values.items() if name.partition(".")[0] in plan.train)
              for plan in plans]
    together = small.costs.peak_bytes(small.strategy.plan_at(0, 4))
    images = 16 * 4 * 3 * 256  # each layer alone has its mini-batch from outside; here the first's stays
    largest = max(peak - state for peak, state in zip(alone, states, strict=True))
    assert max(alone) < together < largest + sum(states) + images < sum(alone)
    full = small.costs.peak_bytes(small.strategy.full_plan())
    assert small.costs.peak_bytes(small.strategy.plan_at(1, 4)) < 0.5 * full


def test_stages_and_exits(free):
    small = fleet(((None, 1),), free, rho=0.0, rounds=7)
    strategy = small.strategy
    state = strategy.init(small.values)
    assert state.facts == {"blocks": [[0, 4]], "block_rounds": 7, "starts": [0], "trained": 0}
    state = replace(state, facts={**state.facts, "blocks": [[0, 1], [1, 3], [3, 4]], "block_rounds": 2})
    sizes = [math.prod(strategy.problem.chain.output_shapes()[name]) for name in ("conv0", "conv1", "conv2")]
    for starts, values in [([0], sizes[0] + sizes[2]), ([0, 2], sizes[0] + sizes[2]), ([0, 2, 4], sizes[2])]:
        now = replace(state, facts={**state.facts, "starts": starts})
        assert strategy.feature_values(now) == values  # what the present block and those to come take
    assert strategy.variants(state) == {}
    senders, seen = [{}, {"conv0": 1}, {}, {"conv1": 2}, {"hidden": 1}, {}, {"hidden": 1}], []
    for done, sent in enumerate(senders, start=1):
        state = strategy.advance(state, replace(state, round_index=done), {"senders": sent})
        seen.append((strategy.note(state)["block"], strategy.note(state)["exit"], list(state.facts["starts"])))
        assert set(strategy.variants(state)) == {f"exit {layer + 1}" for layer in range(state.facts["trained"])}
    assert seen == [(1, "exit 1", [0]), (1, "exit 1", [0, 2]), (2, "exit 1", [0, 2]), (2, "exit 3", [0, 2, 4]),
                    (3, "exit 4", [0, 2, 4]), (3, "exit 4", [0, 2, 4]), (3, "exit 4", [0, 2, 4])]
    assert strategy.evaluated(state) == strategy.full_plan() == strategy.variants(state)["exit 4"]
    x = data(shape=WIDE)[0].double()
    for layer, plan in enumerate(strategy.variants(state).values()):
        exits = small.model(plan).eval()
        chain = small.model(strategy.full_plan()).eval()
        with torch.no_grad():
            features = chain.run(x, 0, layer + 1)
            head = chain.run(features, 4) if layer == 3 else exits.get_submodule(f"local{layer + 1}")(features)
            assert torch.equal(exits(x), head)
    with pytest.raises(ConfigError, match=r"`smallest_filters` must be at most `largest_filters` \(2\), but is 3"):
        Small("neuroflux", smallest_filters=3, largest_filters=2)


def test_tokens():
    """The first unit makes tokens, and belongs to the layer of the second."""
    small = Small("neuroflux", "vit_tiny", {"depth": 3, "width": 12}, shape=(3, 8, 8), client={"batch_size": 4})
    strategy, names = small.strategy, small.chain.unit_names
    state = ServerState(round_index=2, params={}, facts={"blocks": [[0, 1], [1, 3]], "starts": [0, 2]})
    plan = strategy.plan(state, small.candidate())
    assert plan.hold == (*names[:2], *names[2:4], "local2", "head")
    cached = strategy.plan(replace(state, clients={3: 2}), small.candidate())
    assert strategy.feed(cached).shape == (5, 12)
    assert cached.hold == plan.hold[2:]
    assert small.costs.peak_bytes(cached) <= small.costs.peak_bytes(plan)
    # Attention in evaluation mode counts, too.
    assert small.costs.flops(plan, 9) - small.costs.flops(cached, 9) == 9 * forward_flops(cut(small.chain, stop=2), (3, 8, 8))
    x, y = data(4, (5, 12))
    result, _ = small.train(cached, x, y)
    assert {name.partition(".")[0] for name in result.update} == set(cached.train)
    assert any(not torch.equal(value, small.values[name]) for name, value in result.update.items())


def test_phases_have_rates_of_their_own():
    """A new rate is a new optimiser, whose momentum starts at zero; float64."""
    small = Small("fedavg", client={"learning_rate": 0.1, "momentum": 0.9, "steps": 2, "epochs": None})
    plan, (x, y) = small.strategy.full_plan(), data()
    plan = replace(plan, phases=(plan.phases[0], replace(plan.phases[0], rate=0.5)))
    assert small.costs.peak_bytes(plan) == small.costs.peak_bytes(replace(plan, phases=plan.phases[:1] * 2))
    result, _ = small.train(plan, x, y, values={name: value.double() for name, value in small.values.items()},
                            dtype=torch.float64, rate_factor=2.0)
    model = small.model(small.strategy.full_plan()).train()
    for rate in (0.2, 0.1):
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x.double()), y).backward()
            optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(result.update[name], value.detach(), rtol=1e-9, atol=1e-12)  # the same operations


BASE = {
    "seed": 5, "rounds": 6, "cohort": 3,
    "strategy": {"name": "neuroflux", "block_rounds": 2, "rho": 0.0, "smallest_filters": 4},
    "model": {"name": "cnn", **DEEP},
    "data": {"dataset": "synthetic", "shape": [1, 32, 32], "classes": 3, "samples": 170, "test_samples": 30},
    "fleet": {"clients": 5, "tiers": [{"name": "strong", "count": 2, "memory": 0.9},
                                      {"name": "weak", "count": 3, "memory": 0.27}]},
    "client": {"batch_size": 32, "learning_rate": 0.1, "momentum": 0.9, "augment": "flip"},
    "memory": {"enforce": "predicted"}, "checkpoint": {"every": 1, "keep": 1},
    "metrics": {"tensorboard": False, "batch_size": 30},
}


def _run(path, *overrides, resumes=False):
    config = load_config(None, overrides, base=BASE)
    run_folder = RunFolder(path)
    run = assemble(prepare(config, CPU), join(config.backend, CPU), StopFlag(), clients_folder=run_folder.clients)
    run_folder.create(config)
    state = latest(run_folder.checkpoints, config.fingerprint("cpu")) if resumes else None
    assert Leader(run, run_folder, state=state, start=0.0).lead() == 0
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return run, [row for row in rows if row["kind"] == "client"], json.loads((path / "summary.json").read_text())


def test_everybody_trains_a_model_that_fits_nobody(tmp_path, caplog, monkeypatch):
    write, sizes = RowFile.write, []

    def measured(*arguments):
        done = write(*arguments)
        sizes.append(sum(path.stat().st_size for path in (tmp_path / "run" / "clients").rglob("*.features")))
        return done

    monkeypatch.setattr(RowFile, "write", measured)
    with caplog.at_level(logging.WARNING):
        run, clients, summary = _run(tmp_path / "run")
    monkeypatch.setattr(RowFile, "write", write)
    first = run.job.strategy.init(run.planning.first_params(run.config.seed))
    samples = sum(run.job.partition.num_samples(client) for client in range(5))
    assert max(sizes) <= 4 * samples * run.job.strategy.feature_values(first)  # for so much there must be room
    assert caplog.text.count("augmentation ('flip') is applied as long as clients train on their samples themselves") == 1
    full = run.job.plain.peak_bytes(run.job.strategy.full_plan())
    assert all(row["status"] == "completed" and row["predicted_bytes"] <= row["budget_bytes"] < full for row in clients)
    assert {row["client"] for row in clients} == set(range(5))
    assert {row["tier"] for row in clients} == {"strong", "weak"}
    assert set(summary["variants"]) == {"exit 1", "exit 2", "exit 3", "exit 4"}
    assert summary["variants"]["exit 4"]["accuracy"] == summary["accuracy"]
    last_seen, kinds = {}, set()
    for row in clients:
        block, before = row["round"] // 2, last_seen.get(row["client"], -1) // 2
        kinds.add((block, before))
        same = [other["bytes_down"] for other in clients if other["round"] // 2 == block and other["client"] == row["client"]
                and other["round"] > row["round"]]
        assert all(later < row["bytes_down"] for later in same) or block == 0 or before == block
        last_seen[row["client"]] = row["round"]
    # First turns in a block of who was there in the first one, in the one before, and turns that go on.
    assert kinds >= {(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)}
    kept = sorted((tmp_path / "run" / "clients").rglob("*.features"))
    for path, client in itertools.product(kept, range(5)):
        if int(path.parent.name) == client:
            assert int(path.stem) == 2 * (last_seen[client] // 2)  # the newest features and no others
    assert len(kept) == sum(seen >= 2 for seen in last_seen.values())

    # It goes on where it ended, and finds that somebody's features are damaged.
    _, more, _ = _run(tmp_path / "run", "rounds=8", resumes=True)
    assert {row["status"] for row in more} == {"completed"}
    for path in (tmp_path / "run" / "clients").rglob("*.features"):
        path.write_bytes(path.read_bytes()[:-4])
    usage = collections.namedtuple("usage", "free")(9)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(CheckpointError, match=r"for what the clients keep there, but has 9 B"):
            _run(tmp_path / "new")
    _, more, _ = _run(tmp_path / "run", "rounds=12", resumes=True)
    more, told = [row for row in more if row["round"] >= 8], caplog.text
    lost, turns = [row for row in more if row["reason"] == "features_lost"], {}
    for row in more:
        turns.setdefault(row["client"], []).append((row["round"], row["status"]))
    # Each of them fails once, and then makes its features anew, from images: all blocks before come down again.
    assert len(lost) >= 2
    assert len({row["client"] for row in lost}) == len(lost)
    assert all(row["status"] == "completed" for row in more if row not in lost)
    for row in lost:
        assert re.search(rf"client {row['client']} features_lost: .* in round [24] or later, but .* bytes", told)
        (_, first), *others = sorted(turns[row["client"]])
        assert (first, [status for _, status in others]) == ("failed", ["completed"] * len(others))
        again = [other for other in more if other["client"] == row["client"] and other not in lost]
        assert all(other["bytes_down"] > row["bytes_down"] for other in again[:1])


def test_the_run_s_length_counts_where_blocks_follow_it():
    def fingerprint(rounds, length):
        return load_config(None, [f"rounds={rounds}", f"strategy.block_rounds={length}"], base=BASE).fingerprint()

    prints = {(rounds, length): fingerprint(rounds, length) for rounds in (6, 9) for length in (2, "null")}
    assert prints[6, 2] == prints[9, 2]
    assert len(set(prints.values())) == 3
