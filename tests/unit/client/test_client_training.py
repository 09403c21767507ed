import pytest
import torch
import torch.nn.functional as F
from client_problem import CPU, Small, data
from torch import nn

from dfed import rng
from dfed.client import ClientSettings, Skeleton, run_plan
from dfed.plan import Phase

SETTINGS = {
    "sgd": {"learning_rate": 0.05},
    "momentum": {"learning_rate": 0.05, "momentum": 0.9},
    "nesterov": {"learning_rate": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "decay": {"learning_rate": 0.05, "weight_decay": 0.1},
    "clip": {"learning_rate": 0.05, "momentum": 0.5, "clip_norm": 0.05},
    "no clip": {"learning_rate": 0.05, "clip_norm": 1e6},
    "adam": {"optimizer": "adam", "learning_rate": 0.01, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "betas": [0.8, 0.99], "epsilon": 1e-5},
}


def batches_of(x, y):
    """Mini-batches in order; a phase with epochs starts over, one with steps cycles."""

    def batches(phase):
        pieces = list(zip(x.split(phase.batch_size), y.split(phase.batch_size), strict=True))
        count = phase.epochs * len(pieces) if phase.epochs is not None else phase.steps
        for step in range(count):
            xb, yb = pieces[step % len(pieces)]
            yield xb.clone(), yb.clone()

    return batches


def train(small, settings, phases, factor=1.0, skeleton=None, **options):
    x, y = data()
    skeleton = skeleton or Skeleton(small.strategy.build(small.plan()))
    plan = small.plan(phases=phases)
    result = run_plan(small.strategy, plan, skeleton, small.values, small.forms.of(plan).regions, batches_of(x, y), settings,
                      rate_factor=factor, device=CPU, generator=rng.torch_generator(3, "layers"), **options)
    update = {name: value.clone() for name, value in result.update.items()}
    skeleton.unload()
    return result, update


def plain(small, settings, phases, factor, fused):
    """Local training written out once more, with nothing but torch."""
    x, y = data()
    model = small.model()
    model.set_generator(rng.torch_generator(3, "layers"))
    rate = settings.learning_rate * factor
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=settings.momentum, nesterov=settings.nesterov,
                                    weight_decay=settings.weight_decay, fused=fused, foreach=False)
    else:
        family = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
        optimizer = family(model.parameters(), lr=rate, betas=tuple(settings.betas), eps=settings.epsilon,
                           weight_decay=settings.weight_decay, fused=fused, foreach=False)
    losses, visits, steps = 0.0, 0, 0
    for phase in phases:
        for xb, yb in batches_of(x, y)(phase):
            loss = F.cross_entropy(model(xb), yb)
            model.zero_grad()
            loss.backward()
            if settings.clip_norm is not None:
                norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
                for p in model.parameters():
                    p.grad.mul_((settings.clip_norm / (norm + 1e-6)).clamp(max=1.0))
            optimizer.step()
            losses, visits, steps = losses + loss.item() * len(yb), visits + len(yb), steps + 1
    return {name: value.detach() for name, value in model.state_dict().items() if name in small.shapes}, losses, visits, steps


@pytest.mark.parametrize("name", SETTINGS)
def test_run_plan_is_the_plain_loop(name):
    settings = ClientSettings(**SETTINGS[name])
    phases = (Phase(batch_size=8, epochs=2), Phase(batch_size=5, steps=3))
    options = {"channels": [4, 6], "kernel": 3, "hidden": 16, "norm": "batch", "dropout": [0.25, 0.5]}
    small = Small(options=options)
    before = {key: value.clone() for key, value in small.values.items()}
    result, update = train(small, settings, phases, factor=0.5)
    reference, losses, visits, steps = plain(small, settings, phases, 0.5, fused=True)
    assert update.keys() == reference.keys() == small.shapes.keys()
    for key, value in reference.items():
        assert torch.equal(update[key], value), key  # to the bit
        assert torch.equal(small.values[key], before[key])  # what came down stays as it is
        assert not torch.equal(value, before[key])  # it was trained, norm statistics included
    assert (result.num_visits, result.num_steps) == (visits, steps) == (2 * 20 + 3 * 5, 2 * 3 + 3)
    # Nine losses of order 1, summed in float32 instead of float64.
    assert float(result.loss_sum) == pytest.approx(losses, rel=1e-6)
    unfused, *_ = plain(small, settings, phases, 0.5, fused=False)
    for key, value in unfused.items():
        # Fused kernels contract products and sums; nine steps of relative errors of 1e-7 on values of order 1, which
        # Adam's division by small √v may amplify.
        torch.testing.assert_close(update[key], value, rtol=1e-4, atol=2e-5)


def test_the_squares_are_of_the_mini_batches_losses():
    small, phases = Small(), (Phase(batch_size=8, epochs=2), Phase(batch_size=5, steps=3))
    losses = []

    class Notes(type(small.strategy)):
        def loss(self, model, x, y, phase):
            value = super().loss(model, x, y, phase)
            losses.append((len(y), value.item()))
            return value

    small.strategy.__class__ = Notes
    result, _ = train(small, ClientSettings(learning_rate=0.05), phases)
    assert len(losses) == 9
    # Nine squares of order 1, summed in float32 instead of float64.
    assert float(result.loss_square_sum) == pytest.approx(sum(size * value**2 for size, value in losses), rel=1e-6)


def test_clipping_holds_the_norm_and_the_factor_scales_the_rate():
    small = Small()
    one = (Phase(batch_size=20, steps=1),)
    moved = {}
    for clip, factor in ((0.01, 1.0), (0.01, 0.5), (None, 1.0)):
        _, update = train(small, ClientSettings(learning_rate=1.0, clip_norm=clip), one, factor)
        steps = [update[name] - small.values[name] for name, _ in small.chain.named_parameters()]
        moved[clip, factor] = float(torch.cat([step.reshape(-1) for step in steps]).double().norm())
    # Subtracting in float32 loses 1e-7 of values of order 1, in some 1000 entries: 2e-6 in all.
    assert moved[0.01, 1.0] == pytest.approx(0.01, abs=1e-5)
    assert moved[0.01, 0.5] == pytest.approx(0.005, abs=1e-5)
    assert moved[None, 1.0] > 0.1


def test_skeleton_load_and_unload():
    small = Small("resnet8", {"width": 4}, shape=(3, 8, 8))
    skeleton = Skeleton(small.chain.skeleton())
    model = skeleton.model
    model.get_parameter("stem.conv.weight").requires_grad_(False)
    skeleton = Skeleton(model)
    for _ in range(2):
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
        skeleton.load(small.values, CPU)
        for name, value in model.state_dict(keep_vars=True).items():
            assert value.device.type == "cpu"
            if name not in small.values:
                assert value.dtype == torch.int64
                assert int(value) == 0
                continue
            assert torch.equal(value, small.values[name])
            assert value.data_ptr() != small.values[name].data_ptr()
            assert value.untyped_storage().nbytes() == value.numel() * 4  # storage of its own
        assert len(list(model.parameters())) == len(list(small.chain.parameters()))
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, nn.Parameter)
            assert parameter.requires_grad == (name != "stem.conv.weight")
        model(torch.zeros(2, 3, 8, 8)).sum().backward()  # changes statistics and counters, makes gradients
        model.anchor = torch.zeros(3)
        assert skeleton.unload()
        assert not hasattr(model, "anchor")
        assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(KeyError, match=r"head\.fc\.bias"):
        skeleton.load({name: value for name, value in small.values.items() if name != "head.fc.bias"}, CPU)
    skeleton.unload()
    with pytest.raises(AssertionError, match=r"head\.fc\.bias: \(9,\) is not \(4,\)"):
        skeleton.load({**small.values, "head.fc.bias": torch.zeros(9)}, CPU)


@pytest.mark.parametrize("change", [
    lambda model: model.add_module("private", nn.Linear(2, 2)),
    lambda model: model.register_forward_hook(lambda *arguments: None),
    lambda model: setattr(model.unit("head"), "note", 1),
    lambda model: model.unit("head").register_buffer("mask", torch.ones(2)),
    lambda model: setattr(model, "head", nn.Linear(2, 2)),
])
def test_a_skeleton_that_a_strategy_built_on_serves_nobody_else(change):
    skeleton = Skeleton(Small().chain.skeleton())
    assert skeleton.unload()
    change(skeleton.model)
    assert not skeleton.unload()


def test_a_used_skeleton_trains_the_next_client_to_the_same_bits():
    small = Small()
    settings, phases = ClientSettings(momentum=0.9), (Phase(batch_size=8, epochs=1),)
    skeleton = Skeleton(small.strategy.build(small.plan()))
    _, first = train(small, settings, phases, skeleton=skeleton)
    count = []

    def break_off():
        count.append(1)
        if len(count) == 2:
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        train(small, settings, phases, skeleton=skeleton, after_batch=break_off)
    skeleton.unload()
    _, second = train(small, settings, phases, skeleton=skeleton, after_batch=lambda: None)
    assert all(torch.equal(first[name], second[name]) for name in small.shapes)


def test_norms_without_a_trained_parameter_are_frozen_also_inside_a_unit_that_is_trained():
    """In a phase that names what it trains: a residual unit of which the last layer is trained."""
    small = Small("resnet8", {"width": 4}, shape=(3, 8, 8))
    x, y = data(shape=(3, 8, 8))
    names = small.splitting.names
    unit, rest = names[1], names[2:]
    for train, frozen in (((unit, *rest), {"stem.norm", f"{unit}.bn1"}), (None, set())):
        model = small.strategy.build(small.plan())
        norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in rest or name.startswith((f"{unit}.conv2", f"{unit}.bn2")))
        plan, modes, skeleton = small.plan(phases=(Phase(batch_size=8, epochs=1, train=train),)), [], Skeleton(model)
        run_plan(small.strategy, plan, skeleton, small.values, small.forms.of(plan).regions, batches_of(x, y), ClientSettings(),
                 rate_factor=1.0, device=CPU, generator=None,
                 after_batch=lambda model=model, modes=modes: modes.append({n for n, m in model.named_modules() if m.training}))
        assert norms >= frozen
        assert all(norms - seen == frozen for seen in modes)
        assert len(modes) == 3
        state = model.state_dict()
        kept = {name for name in norms if torch.equal(state[f"{name}.running_mean"], small.values[f"{name}.running_mean"])}
        assert kept == frozen
        assert all(module.training for module in model.modules())  # as it was, for the next client


def test_only_trained_blocks_go_up():
    small = Small()
    plan = small.plan(train=("hidden", "head"))
    x, y = data()
    skeleton = Skeleton(small.strategy.build(plan))
    result = run_plan(small.strategy, plan, skeleton, small.values, small.forms.of(plan).regions, batches_of(x, y),
                      ClientSettings(), rate_factor=1.0, device=CPU, generator=None)
    wanted = {name for name in small.shapes if small.splitting.block_of(name) in ("hidden", "head")}
    assert set(result.update) == wanted == {entry.name for entry in small.forms.of(plan).up}
    assert all(not value.requires_grad for value in result.update.values())
