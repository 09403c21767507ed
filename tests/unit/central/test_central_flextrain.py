"""FlexTrain on one device: against a naive implementation in float64, and to the bit where nothing may move."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.nn.functional as F
from central_problem import CPU, problem

from dfed.central.bp import BP
from dfed.central.flextrain import CentralFlexTrain
from dfed.errors import ConfigError
from dfed.fleet import Fleet, FleetSettings
from dfed.models import build_chain
from dfed.planner import Store
from dfed.rng import torch_generator

torch.set_num_threads(1)

RESNET = {"width": 4}
DEPTH_OF = [2, 1, 3, 2, 1, 4, 1, 3]  # a later depth's parameters meet the optimiser later than an earlier one's


class Naive:
    """ResNet-8 and FlexTrain's step on it, one operation after another, with SGD written out. Float64."""

    def __init__(self, tensors, beta, rate, momentum, decay):
        self.values = {name: value.clone() for name, value in tensors.items()}
        self.beta, self.rate, self.momentum, self.decay, self.velocity = beta, rate, momentum, decay, {}

    def norm(self, x, name, records):
        mean = x.mean(dim=(0, 2, 3))
        spread = (x - mean[None, :, None, None]).square().mean(dim=(0, 2, 3))
        if records:
            count = x.numel() / x.shape[1]
            for what, new in (("running_mean", mean), ("running_var", spread * count / (count - 1))):
                self.values[f"{name}.{what}"] = 0.9 * self.values[f"{name}.{what}"] + 0.1 * new.detach()
            self.values[f"{name}.num_batches_tracked"] = self.values[f"{name}.num_batches_tracked"] + 1
        x = (x - mean[None, :, None, None]) / (spread + 1e-5).sqrt()[None, :, None, None]
        return x * self.weights[f"{name}.weight"][None, :, None, None] + self.weights[f"{name}.bias"][None, :, None, None]

    def shortcut(self, x, stride, channels):
        x = x[:, :, ::stride, ::stride]
        return torch.cat([x, x.new_zeros(len(x), channels - x.shape[1], *x.shape[2:])], 1)

    def features(self, x, depth, records_up_to):
        """The pooled features behind the first ``depth`` units, the others the identity."""
        for unit in range(depth):
            records = unit < records_up_to
            if unit == 0:
                out = F.conv2d(x, self.weights["stem.conv.weight"], padding=1)
                x = self.norm(out, "stem.norm", records).relu()
                continue
            name, stride, channels = f"layer{unit}_0", 1 if unit == 1 else 2, 4 * 2 ** (unit - 1)
            out = F.conv2d(x, self.weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = self.norm(out, f"{name}.bn1", records).relu()
            out = self.norm(F.conv2d(out, self.weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2", records)
            x = (out + self.shortcut(x, stride, channels)).relu()
        for unit in range(max(depth, 2), 4):  # the identity of the blocks that are left out
            x = self.shortcut(x, 2, 4 * 2 ** (unit - 1))
        return x.mean(dim=(2, 3))

    def step(self, x, y, depth):
        parameters = {name: value for name, value in self.values.items() if "running" not in name and "num_" not in name}
        self.weights = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        features = self.features(x, depth, depth)
        scores = features @ self.weights["head.fc.weight"].T + self.weights["head.fc.bias"]
        loss = -(scores - scores.exp().sum(dim=1, keepdim=True).log())[torch.arange(len(y)), y].mean()
        if depth < 4:
            teacher = self.features(x, depth + 1, 0).detach()
            loss = loss + self.beta * ((features - teacher) ** 2).sum() / features.numel()
        names = list(self.weights)
        slopes = torch.autograd.grad(loss, [self.weights[name] for name in names], allow_unused=True)
        for name, slope in zip(names, slopes, strict=True):
            if slope is None:
                continue
            slope = slope + self.decay * self.values[name]
            self.velocity[name] = self.momentum * self.velocity[name] + slope if name in self.velocity else slope
            self.values[name] = self.values[name] - self.rate * self.velocity[name]
        return loss.detach()


def test_steps_at_all_depths_against_a_naive_implementation():
    setting = problem("resnet8", RESNET, {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01})
    setting.chain.double()
    method = CentralFlexTrain(setting, depths=4, beta=0.5)
    assert method.stops == (1, 2, 3, 4)
    generator = torch_generator(1, "naive")
    first = {name: value.double() if value.is_floating_point() else value for name, value in method.first_tensors().items()}
    naive, session = Naive(first, 0.5, 0.1, 0.9, 0.01), method.new_session(CPU)
    session.load(first, {}, 1.0)
    for depth in DEPTH_OF:
        x, y = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64), torch.randint(4, (8,), generator=generator)
        # Rounding of float64 through eight steps of batch norm; an error in any term is above 1e-3.
        torch.testing.assert_close(session.step(x, y, method.loss_at(depth)), naive.step(x, y, depth), rtol=1e-9, atol=1e-12)
    tensors, slots = session.take()
    assert tensors.keys() == naive.values.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(value, naive.values[name], rtol=1e-8, atol=1e-10)
    assert slots.keys() == naive.velocity.keys()
    for name, kept in slots.items():
        torch.testing.assert_close(kept["momentum_buffer"], naive.velocity[name], rtol=1e-8, atol=1e-10)


def copied(session):
    tensors, slots = session.take()
    return ({name: value.clone() for name, value in tensors.items()},
            {(name, slot): value.clone() for name, kept in slots.items() for slot, value in kept.items()})


@pytest.mark.parametrize(("model", "options", "training"), [
    ("resnet8", RESNET, {"momentum": 0.9, "weight_decay": 0.01}),
    ("resnet8", RESNET, {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "clip_norm": 1.0}),
    ("resnet8", {**RESNET, "norm": "group"}, {"momentum": 0.9, "nesterov": True, "activation_checkpointing": True}),
    ("vit_tiny", {"depth": 3, "width": 12, "patch": 4, "dropout": 0.1}, {"momentum": 0.9, "weight_decay": 0.01}),
    ("vit_tiny", {"depth": 3, "width": 12, "patch": 4, "dropout": 0.1},
     {"optimizer": "adamw", "weight_decay": 0.1, "precision": "bf16"}),
])
def test_blocks_beyond_the_depth_do_not_move(model, options, training):
    method = CentralFlexTrain(problem(model, options, {"learning_rate": 0.05, **training}), depths=3)
    session, generator = method.new_session(CPU), torch_generator(1, "still")
    session.load(method.first_tensors(), {}, 1.0)

    def steps(*depths):
        for depth in depths:
            session.model.set_generator(torch_generator(1, "layers", depth))
            x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)
            assert session.step(x, y, method.loss_at(depth)).isfinite()

    steps(3, 3, 2)
    head = session.model.unit_names[-1]
    for depth in (1, 2):
        inside = {*session.model.unit_names[: method.stops[depth - 1]], head}
        before, slots_before = copied(session)
        steps(depth, depth)
        after, slots_after = copied(session)
        assert slots_before.keys() == slots_after.keys()
        still = {name for name in before if torch.equal(before[name], after[name])}
        beyond = {name for name in before if session.model.unit_of(name) not in inside}
        assert beyond
        assert beyond <= still
        weights = {name for name in before if name.endswith("weight") and name not in beyond}
        assert not weights & still  # what is inside did move
        if options.get("norm") != "group" and model == "resnet8":
            assert after["stem.norm.num_batches_tracked"] == before["stem.norm.num_batches_tracked"] + 2
        for (name, slot), value in slots_before.items():
            assert torch.equal(value, slots_after[name, slot]) == (name in beyond), (name, slot)


def test_the_teacher_takes_the_statistics_of_the_mini_batch_and_draws_nothing():
    options = {"channels": [4, 6], "kernel": 3, "hidden": 8, "norm": "batch", "dropout": [0.3, 0.3]}
    losses, ends = {}, {}
    for beta in (0.0, 0.7):
        method = CentralFlexTrain(problem("cnn", options, shape=(1, 8, 8)), depths=2, beta=beta)
        session = method.new_session(CPU)
        session.load(method.first_tensors(), {}, 1.0)
        generator = torch_generator(1, "layers")
        session.model.set_generator(generator)
        x, y = torch.randn(8, 1, 8, 8, generator=torch_generator(1, "x")), torch.arange(8) % 4
        losses[beta] = session.step(x, y, method.loss_at(1))
        ends[beta] = generator.get_state()
        assert all(module.training for module in session.model.modules())
    assert losses[0.7] > losses[0.0]
    assert torch.equal(ends[0.0], ends[0.7])  # dropout of the student alone


def test_the_prefix_is_passed_once():
    method = CentralFlexTrain(problem("resnet8", RESNET), depths=3)
    session = method.new_session(CPU)
    session.load(method.first_tensors(), {}, 1.0)
    calls = collections.Counter()
    for name in session.model.unit_names:
        session.model.unit(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    session.step(torch.randn(4, 3, 8, 8, generator=torch_generator(1, "x")), torch.arange(4), method.loss_at(2))
    assert calls == {"stem": 1, "layer1_0": 1, "layer2_0": 1, "layer3_0": 1, "to_head": 2, "head": 2}


def test_depths_are_drawn_by_their_shares():
    method = CentralFlexTrain(problem("resnet8", RESNET), depths=4, shares=[2, 0, 1, 0])
    assert method.shares == [2 / 3, 0, 1 / 3, 0]
    assert method.deepest == 3
    assert [method.teacher_of(depth) for depth in (1, 3)] == [3, None]  # the next that is ever trained
    drawn = collections.Counter(method.depth_of(step) for step in range(3000))
    assert drawn.keys() == {1, 3}
    assert abs(drawn[1] - 2000) < 130  # five standard deviations of 26
    again = CentralFlexTrain(problem("resnet8", RESNET), depths=4, shares=[2, 0, 1, 0])
    assert [again.depth_of(step) for step in range(50)] == [method.depth_of(step) for step in range(50)]
    assert list(method.variants()) == ["depth 1", "depth 2", "depth 3"]
    assert not any(name.startswith("layer3") for name in method.first_tensors())
    assert CentralFlexTrain(problem("resnet8", RESNET), beta=0.0).teacher_of(1) is None
    assert {CentralFlexTrain(problem("resnet8", RESNET), depths=1).depth_of(step) for step in range(9)} == {1}


def test_shares_of_a_fleet():
    def fleet(*budgets):
        tiers = [{"name": f"t{number}", "count": count, "memory": budget} for number, (budget, count) in enumerate(budgets)]
        settings = FleetSettings.model_validate({"clients": sum(count for _, count in budgets), "tiers": tiers})
        return Fleet.from_settings(settings, seed=0, full_peak_bytes=lambda: 0)

    options, shared = {"batch_size": 64}, {"shape": (3, 32, 32), "store": Store(None)}
    setting = problem("resnet8", {"width": 8}, options, **shared, by_prediction=True,
                      fleet=fleet((None, 3), ("4MB", 2), ("1MiB", 7)))
    method = CentralFlexTrain(setting, depths=3)
    alone = [BP(problem("resnet8", {"width": 8}, options, **shared, samples=64), depths=3, depth=depth)
             for depth in (1, 2)]
    peaks = [method.peak_bytes for method in alone]  # little less than what teaching a smaller depth takes
    assert 2**20 < 4_000_000 < peaks[0] < peaks[1]  # so only those without a limit are left
    assert method.shares == [0, 0, 1]
    between = (peaks[0] + peaks[1]) // 2
    setting = problem("resnet8", {"width": 8}, options, **shared, by_prediction=True,
                      fleet=fleet((None, 3), (between, 1), ("1MiB", 7)))
    assert CentralFlexTrain(setting, depths=3).shares == [0.25, 0, 0.75]
    assert CentralFlexTrain(setting, depths=3, shares=[1, 1, 2]).shares == [0.25, 0.25, 0.5]
    assert not CentralFlexTrain(setting, depths=3, shares=[1, 1, 2]).heeds_fleet
    with pytest.raises(ConfigError, match="`fleet` must have a device that fits a depth of this model"):
        CentralFlexTrain(problem("resnet8", {"width": 8}, options, **shared, fleet=fleet(("1MiB", 7))), depths=3)


@pytest.mark.parametrize(("options", "text"), [
    ({"shares": [0.5, 0.5]}, r"`shares` must be as many as this model has depths \(3\), but are 2"),
    ({"shares": [0.0, 0.0, 0.0]}, r"`shares` must have a sum above 0, but are \[0.0, 0.0, 0.0\]"),
    ({"shares": [1e308, 1e308, 1e308]}, "`shares` must have a sum above 0"),
    ({"cuts": ["layer9"]}, "`cuts` must name units of 'resnet8'"),
])
def test_bad_options(options, text):
    with pytest.raises(ConfigError, match=text):
        CentralFlexTrain(problem("resnet8", RESNET), **{"depths": 3, **options})


def test_back_propagation_is_plain_training_of_the_chain():
    training = {"learning_rate": 0.1, "momentum": 0.9}
    method = BP(problem("resnet8", RESNET, training), depths=3)
    tensors, session = method.first_tensors(), method.new_session(CPU)
    session.load(tensors, {}, 1.0)
    plain = build_chain("resnet8", RESNET, input_shape=(3, 8, 8), num_classes=4).to_empty(device="cpu")
    plain.load_state_dict(tensors)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, fused=True)
    generator = torch_generator(1, "plain")
    for _ in range(3):
        x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
        session.step(x, y, method.loss_at(3))
    found = session.take()[0]
    assert all(torch.equal(found[name], value) for name, value in plain.state_dict().items())
    assert [method.share_of(depth) for depth in (1, 2, 3)] == [0, 0, 1]


def test_an_independent_model_of_a_depth():
    method = BP(problem("resnet8", RESNET), depths=3, depth=2)
    assert list(method.variants()) == ["depth 1", "depth 2"]
    model = method.build()
    assert model.unit_names == ("stem", "layer1_0", "layer2_0", "to_head", "head")
    whole = BP(problem("resnet8", RESNET), depths=3).first_tensors()
    assert all(torch.equal(value, whole[name]) for name, value in method.first_tensors().items())  # all start alike
    with pytest.raises(ConfigError, match="`depth` must be at most 3, the number of depths of this model, but is 4"):
        BP(problem("resnet8", RESNET), depths=3, depth=4)


def test_costs_of_a_depth():
    setting = problem("resnet8", RESNET, {"momentum": 0.9, "batch_size": 16})
    flex, plain = CentralFlexTrain(setting, depths=3).costs(), BP(setting, depths=3).costs()
    sizes = [sum(p.numel() for p in BP(setting, depths=3, depth=depth).build().parameters()) for depth in (1, 2, 3)]
    assert [cost.num_params for cost in flex.values()] == sizes
    for name, whole in plain.items():
        own = flex[name]
        assert own.forward_flops == whole.forward_flops
        # Stem: no gradient of the input. Besides that a backward pass costs twice the forward pass.
        assert 2 < whole.training_flops / whole.forward_flops < 3
        assert (own.training_flops > whole.training_flops) == (name != "depth 3")  # the teacher's pass
        assert own.int8_flops == 0
    beyond = [flex[f"depth {depth}"].training_flops - plain[f"depth {depth}"].training_flops for depth in (1, 2)]
    forward = [cost.forward_flops for cost in plain.values()]
    head = 2 * 16 * 4  # the classifier's, for the teacher too
    assert beyond == [forward[1] - forward[0] + head, forward[2] - forward[1] + head]
    assert plain["depth 3"].num_bytes == 4 * sum(
        value.numel() for value in setting.chain.state_dict().values() if value.is_floating_point())
    peaks = [cost.peak_bytes for cost in flex.values()]
    assert peaks == sorted(peaks)
    state = sum(p.numel() for p in setting.chain.parameters()) * 2 * 4  # parameters and momentum are there at every depth
    assert peaks[0] > state
    assert CentralFlexTrain(setting, depths=3).peak_bytes == peaks[-1]
