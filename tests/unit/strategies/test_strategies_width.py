"""The methods on width: which part each client trains, what is computed on it, and how the parts come together."""

import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from dfed import rng
from dfed.blocks import Splitting
from dfed.blocks.width import narrow
from dfed.client import ClientSettings, Forms, Skeleton, run_plan
from dfed.comm.partial_sums import PartialSums, value_range, weight_scale
from dfed.errors import ConfigError
from dfed.fleet import DeviceProfile
from dfed.memory import predict_course
from dfed.models import Chain, build_chain, materialise
from dfed.plan import Phase, Plan
from dfed.planner import Costs
from dfed.region import WHOLE, Index, Segments, Slices
from dfed.registry import STRATEGIES
from dfed.server import Contribution, aggregate
from dfed.server.optimizers import sgd
from dfed.settings import settings_of
from dfed.state import ServerState
from dfed.strategies import Candidate, Problem
from dfed.strategies.feddropout import FedDropout
from dfed.strategies.fedrolex import FedRolex
from dfed.strategies.heterofl import HeteroFL, masked_loss

torch.set_num_threads(1)
CPU, CLASSES, SHAPE = torch.device("cpu"), 4, (2, 6, 6)
PHASES = (Phase(batch_size=8, epochs=1),)
CNN = {"channels": [4, 6], "kernel": 3, "hidden": 10}
WIDTHS = ["allsmall", "feddropout", "fedrolex", "fjord", "heterofl"]
ROLLING = ["feddropout", "fedrolex"]


def made(strategy, model="cnn", options=CNN, *, shape=SHAPE, budgets=(), fits=None, **settings):
    chain = build_chain(model, options, input_shape=shape, num_classes=CLASSES)
    more = {} if fits is None else {"fits": fits}
    problem = Problem(chain=chain, splitting=Splitting.by_unit(chain.unit_names), phases=PHASES, num_clients=9, seed=1,
                      budgets=budgets, **more)
    return STRATEGIES.get(strategy)(problem, **settings)


class Fits:
    """A planner to which plans fit up to a rate."""

    def __init__(self, most):
        self.most, self.asked = most, []

    def best(self, plans):
        for plan in plans:
            self.asked.append(plan.options["rate"])
            if plan.options["rate"] <= self.most:
                return plan
        return None


def candidate(most=1.0, *, client=3, round_index=2, counts=None):
    profile = DeviceProfile(tier="t", budget_bytes=1000, flops=1e9, up=1e6, down=1e6, watts=1.0, radio_watts=1.0,
                            availability=1.0, dropout=0.0)
    return Candidate(client, round_index, 50, profile, Fits(most), lambda: None if counts is None else np.array(counts))


STATE = ServerState(round_index=2, params={})


def shapes_of(strategy):
    state = strategy.problem.chain.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}


def regions_of(strategy, plan):
    return {name: strategy.region(name, shape, plan) for name, shape in shapes_of(strategy).items()}


def first_params(strategy):
    chain = materialise(strategy.problem.chain.skeleton(), rng.torch_generator(1, "init"))
    return {name: chain.state_dict()[name].clone() for name in shapes_of(strategy)}


def data(count=24, classes=range(CLASSES), dtype=torch.float32, shape=SHAPE):
    generator = rng.torch_generator(2, "data")
    x = torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.tensor([list(classes)[i % len(classes)] for i in range(count)])


@pytest.mark.parametrize("name", WIDTHS)
def test_the_widest_that_fits(name):
    strategy = made(name, rates=[0.25, 1.0, 0.5])
    for most, rate in ((1.0, 1.0), (0.7, 0.5), (0.25, 0.25), (0.1, None)):
        asking = candidate(most)
        plan = strategy.plan(STATE, asking)
        if name == "allsmall":
            assert asking.planner.asked == [1.0]
            assert plan is None if most < 1 else plan.options == {"rate": 1.0}
            continue
        assert asking.planner.asked == [each for each in (1.0, 0.5, 0.25) if each > most or each == rate]
        if rate is None:
            assert plan is None
            continue
        assert (plan.client, plan.options) == (3, {"rate": rate})
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        assert regions_of(strategy, Plan.from_json(json.loads(json.dumps(plan.to_json())))) == regions_of(strategy, plan)
        assert {tensor.device.type for tensor in strategy.build(plan).state_dict().values()} == {"meta"}
    assert set(strategy.variants(STATE)) == (set() if name == "allsmall" else {"width 1", "width 0.5", "width 0.25"})
    assert strategy.evaluated(STATE).options == {"rate": 1.0}


def test_details_change_the_form_but_not_the_cost():
    keys, shapes = set(), set()
    for name, client, round_index, counts in itertools.product(ROLLING, (1, 2), (0, 5), (None, [3, 0, 1, 0])):
        plan = made(name).plan(STATE, candidate(0.5, client=client, round_index=round_index, counts=counts))
        assert plan.details
        assert plan.without_details().details == {}
        keys.add(plan.cost_key())
        keys.add(plan.without_details().cost_key())
        shapes.add(plan.shape_key())
    assert len(keys) == 1
    assert len(shapes) == 2 * 2 + 4 * 2  # FedRolex has one window for all clients of a round


def test_allsmall_trains_what_the_smallest_budget_holds():
    def fits(plan, budget):
        return budget is None or 1000 * plan.options["rate"] <= budget

    for smallest, rate in ((300, 0.25), (250, 0.25), (249, 0.125), (1000, 1.0), (10, 0.0625), (None, 1.0)):
        budgets = ((smallest, 2), (5000, 1), (None, 1)) if smallest else ((None, 4),)
        strategy = made("allsmall", budgets=budgets, fits=fits)
        assert strategy.evaluated(STATE).options == {"rate": rate}
        asking = candidate(1.0, client=7)  # its own budget would do for all of the model
        assert strategy.plan(STATE, asking) == strategy.plan_at(rate, 7)
        assert asking.planner.asked == [rate]
        assert strategy.plan(STATE, candidate(rate / 2)) is None
        sub = narrow(strategy.problem.chain, rate)
        assert regions_of(strategy, strategy.evaluated(STATE)) == sub.regions
        assert strategy.upload("conv0.norm.running_mean", torch.zeros(1), WHOLE, strategy.evaluated(STATE)) is not None
        assert strategy.statistics_samples is None
    assert made("allsmall").evaluated(STATE).options == {"rate": 1.0}


def test_fedrolex_covers_all_channels_equally_often():
    strategy = made("fedrolex", rates=[1.0, 0.5])
    cycle = math.lcm(4, 6, 10)
    counts = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes_of(strategy).items()}
    windows = {size: [{(j + step) % size for step in range(size // 2)} for j in range(cycle)] for size in (4, 6, 10)}
    plans = [strategy.plan(STATE, candidate(0.5, round_index=j, client=j % 3)) for j in range(cycle)]
    for plan in plans:
        for name, region in regions_of(strategy, plan).items():
            region.add_(counts[name], 1)
    pixels = 6 // 2 // 2
    axes = {  # sizes of the groups along outputs and inputs, and how many inputs a channel has
        "conv0.conv.weight": (4, None, 1), "conv0.conv.bias": (4, None, 1), "conv1.conv.weight": (6, 4, 1),
        "conv1.conv.bias": (6, None, 1), "hidden.fc.weight": (10, 6, pixels**2), "hidden.fc.bias": (10, None, 1),
        "head.fc.weight": (None, 10, 1), "head.fc.bias": (None, None, 1),
    }
    assert counts.keys() == axes.keys()
    for name, (outputs, inputs, times) in axes.items():
        naive = np.zeros(counts[name].shape, dtype=np.int64)
        for place in np.ndindex(*naive.shape):
            out, into = place[0], place[1] // times if naive.ndim > 1 else 0
            naive[place] = sum(
                (outputs is None or out in windows[outputs][j]) and (inputs is None or into in windows[inputs][j])
                for j in range(cycle)
            )
        assert np.array_equal(counts[name].numpy(), naive), name
        for axis in range(min(2, naive.ndim)):
            assert len(set(np.moveaxis(naive, axis, 0).reshape(naive.shape[axis], -1).sum(axis=1))) == 1
    assert plans[0].details == {"start": 0}
    assert strategy.plan(STATE, candidate(1.0)).details == {}
    assert regions_of(strategy, strategy.plan_at(0.5)) == regions_of(made("heterofl"), strategy.plan_at(0.5))


def test_federated_dropout_draws_by_round_and_client():
    strategy = made("feddropout")
    plans = {key: strategy.plan(STATE, candidate(0.5, round_index=key[0], client=key[1])) for key in [(0, 0), (0, 1), (1, 0)]}
    found = {key: regions_of(strategy, plan) for key, plan in plans.items()}
    assert len({tuple(regions.values()) for regions in found.values()}) == 3
    again = regions_of(made("feddropout"), plans[0, 1])
    assert again == found[0, 1]  # another rank, another process: the plan says it all
    frequencies = {size: np.zeros(size) for size in (4, 6, 10)}
    draws = 900
    for draw in range(draws):
        pick = strategy.picker(0.5, {"draw": [draw // 30, draw % 30]})
        for size, counted in frequencies.items():
            chosen = pick(f"group{size}", size, size // 2)
            assert np.array_equal(chosen, np.unique(chosen))
            counted[chosen] += 1
    for counted in frequencies.values():
        # Binomial with p = ½: the deviation is √900 / 2 = 15, and none of 20 channels is five of them off by chance (1e-5).
        assert np.abs(counted - draws / 2).max() < 75
    assert strategy.plan(STATE, candidate(1.0)).details == {}


@pytest.mark.parametrize(("model", "options"), [("cnn", CNN), ("resnet8", {}), ("densenet40", {})])
def test_prefixes_are_nested(model, options):
    strategy = made("heterofl", model, options, shape=(3, 8, 8))
    covered = {name: torch.ones(shape, dtype=torch.int64) for name, shape in shapes_of(strategy).items()}
    for level, rate in enumerate([0.5, 0.25, 0.125, 0.0625], start=1):
        for name, region in regions_of(strategy, strategy.plan_at(rate)).items():
            region.add_(covered[name], 1)
            assert (region.view(covered[name]) == level + 1).all()  # an entry of a narrow one is in all wider ones


def test_masked_loss_against_a_naive_one():
    generator = rng.torch_generator(1, "scores")
    classes, y = [0, 2, 5], torch.tensor([0, 2, 5, 5, 0, 2, 2])
    scores = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    naive = 0.0
    for row, label in zip(scores.detach().tolist(), y.tolist(), strict=True):
        logits = [row[classes.index(k)] if k in classes else 0.0 for k in range(7)]
        naive += math.log(sum(math.exp(value) for value in logits)) - logits[label]
    loss = masked_loss(scores, y, classes, 7)
    assert loss.item() == pytest.approx(naive / 7, rel=1e-13)  # float64
    loss.backward()
    mass = torch.cat([scores.detach(), torch.zeros(7, 4, dtype=torch.float64)], dim=1).softmax(1)[:, :3]
    hits = torch.tensor([[float(k == label) for k in classes] for label in y.tolist()], dtype=torch.float64)
    torch.testing.assert_close(scores.grad, (mass - hits) / 7, rtol=1e-12, atol=1e-15)
    full = torch.randn(7, 7, generator=generator)
    assert torch.equal(masked_loss(full, y, None, 7), F.cross_entropy(full, y))
    assert masked_loss(full.bfloat16(), y, None, 7).dtype == torch.float32


def trained(strategy, plan, params, classes=range(CLASSES)):
    regions, (x, y) = regions_of(strategy, plan), data(classes=classes)
    values = {name: region.view(params[name]) for name, region in regions.items()}
    skeleton = Skeleton(strategy.build(plan))
    result = run_plan(strategy, plan, skeleton, values, regions, lambda phase: zip(x.split(8), y.split(8), strict=True),
                      ClientSettings(learning_rate=0.1, momentum=0.9), rate_factor=1.0, device=CPU, generator=None)
    update = {name: value.clone() for name, value in result.update.items()}
    skeleton.unload()
    return update, {name: regions[name] for name in update}


def merged(strategy, params, clients, order=None, ranks=1):
    """The model after updates (weight, values, regions), folded in some order on so many ranks."""
    scale = weight_scale(sum(weight for weight, _, _ in clients))
    ranges = {name: value_range(value) for name, value in params.items()}
    parts = [PartialSums(shapes_of(strategy)) for _ in range(ranks)]
    for place, number in enumerate(order or range(len(clients))):
        weight, update, regions = clients[number]
        parts[place % ranks].add(update, regions, weight * scale, ranges)
    for part in parts[1:]:
        parts[0].flat.add_(part.flat)
    contributions = [Contribution(weight, regions) for weight, _, regions in clients]
    state = ServerState(round_index=0, params=params)
    return aggregate(state, parts[0], contributions, scale, sgd(), set()).params


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_heterofl_at_full_width_is_fedavg(norm):
    hetero, plain = (made(name, options={**CNN, "norm": norm}) for name in ("heterofl", "fedavg"))
    params, results = first_params(plain), {}
    for strategy in (hetero, plain):
        updates = []
        for client, weight in ((0, 7), (1, 3)):
            plan = strategy.plan(STATE, candidate(client=client, counts=[2, 3, 4, 1]))
            assert plan.details == {}
            updates.append((weight, *trained(strategy, plan, params)))
        results[strategy] = (updates, merged(strategy, params, updates))
    parameters = [name for name, _ in plain.problem.chain.named_parameters()]
    assert results[hetero][0][0][1].keys() == set(parameters)  # running statistics stay with the clients
    for name in parameters:
        for (_, mine, _), (_, other, _) in zip(results[hetero][0], results[plain][0], strict=True):
            assert torch.equal(mine[name], other[name])
            assert not torch.equal(mine[name], params[name])
        assert torch.equal(results[hetero][1][name], results[plain][1][name])
    for name in params.keys() - set(parameters):
        assert torch.equal(results[hetero][1][name], params[name])
        assert not torch.equal(results[plain][1][name], params[name])


def test_a_client_that_lacks_classes_holds_their_rows_only():
    strategy, params = made("heterofl"), None
    plan = strategy.plan(STATE, candidate(0.5, counts=[0, 5, 0, 2]))
    assert plan.details == {"classes": [1, 3]}
    params = first_params(strategy)
    update, regions = trained(strategy, plan, params, classes=[1, 3])
    assert update["head.fc.weight"].shape == (2, 5)
    model = strategy.build(plan)
    assert model.get_parameter("head.fc.bias").shape == (2,)
    new = merged(strategy, params, [(4, update, regions)])
    untouched = new["head.fc.weight"].view(torch.int32) == params["head.fc.weight"].view(torch.int32)
    assert untouched[[0, 2]].all()
    assert untouched[:, 5:].all()
    assert not untouched[[1, 3], :5].all(dim=1).any()
    for counts in (None, [1, 1, 1, 1], [0, 0, 0, 0]):
        assert strategy.plan(STATE, candidate(0.5, counts=counts)).details == {}
    assert made("heterofl", mask_classes=False).plan(STATE, candidate(0.5, counts=[0, 5, 0, 2])).details == {}


def grid_of(strategy, plan, name, shape):
    axes = strategy.sub_model(plan).axes.get(name, ())
    axes = [np.arange(size) if axis is None else axis for axis, size in zip(axes, shape, strict=False)]
    return np.ix_(*axes, *(np.arange(size) for size in shape[len(axes):]))


@pytest.mark.parametrize("name", ["heterofl", *ROLLING])
def test_mixed_widths_come_together_per_entry(name):
    strategy = made(name, options={"channels": [4, 12], "kernel": 3, "hidden": 40, "norm": "batch"})
    params = first_params(strategy)
    rates = [0.5, 0.25, 0.5, 0.125, 0.25] if name == "heterofl" else [0.5, 0.25, 0.5, 0.125, 0.3]
    strategy.rates = sorted(set(rates), reverse=True)
    clients, grids, kinds = [], [], set()
    for number, rate in enumerate(rates):
        plan = strategy.plan(STATE, candidate(rate, client=number, round_index=3, counts=[1, number % 2, 1, 1]))
        regions = regions_of(strategy, plan)
        kinds |= {type(region) for region in regions.values()}
        generator = rng.torch_generator(number, "update")
        values = {key: torch.randn(region.shape(params[key].shape), generator=generator) for key, region in regions.items()}
        clients.append((number + 2, values, regions))
        grids.append({key: grid_of(strategy, plan, key, tuple(params[key].shape)) for key in params})
    assert kinds >= {"heterofl": {Slices}, "fedrolex": {Slices, Segments}, "feddropout": {Segments, Index}}[name]
    new = merged(strategy, params, clients)
    uncovered = 0
    for key, old in params.items():
        top, bottom = np.zeros(old.shape), np.zeros(old.shape)
        for (weight, values, _), grid in zip(clients, grids, strict=True):
            top[grid[key]] += weight * values[key].double().numpy()
            bottom[grid[key]] += weight
        covered = torch.from_numpy(bottom > 0)
        naive = torch.from_numpy(top / np.maximum(bottom, 1))
        # Exact sums on a grid of 2^-38, divided, then one rounding to float32 (6e-8).
        torch.testing.assert_close(new[key][covered].double(), naive[covered], rtol=1e-7, atol=1e-10)
        assert torch.equal(new[key][~covered].view(torch.int32), old[~covered].view(torch.int32))
        uncovered += int((~covered).sum())
    assert uncovered > 0
    for order, ranks in (((4, 2, 0, 1, 3), 1), ((1, 0, 4, 3, 2), 2), ((3, 4, 1, 2, 0), 3), (range(5), 5)):
        other = merged(strategy, params, clients, list(order), ranks)
        assert all(torch.equal(other[key].view(torch.int32), new[key].view(torch.int32)) for key in params)


def doubled(chain, values):
    chain = chain.skeleton().to_empty(device="cpu").double()
    for name in chain.load_state_dict(values, strict=False).missing_keys:
        chain.get_buffer(name).zero_()
    return chain.train()


FJORD = [
    ("cnn", {**CNN, "norm": "batch"}), ("cnn", {**CNN, "norm": "group"}), ("resnet8", {"width": 4}),
    ("vit_tiny", {"depth": 1, "width": 24, "patch": 3}),
]


@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize(("model", "options"), FJORD)
def test_fjord_trains_the_width_that_is_drawn(model, options, alpha):
    strategy = made("fjord", model, options, distillation=alpha)
    params = {name: value.double() for name, value in first_params(strategy).items()}
    generator = rng.torch_generator(5, "head")  # the transformer's head starts at 0, where no width would matter
    params = {name: torch.randn(value.shape, generator=generator).double() * 0.3 if value.abs().max() == 0 else value
              for name, value in params.items()}
    for name, value in params.items():
        assert value.abs().max() > 0 or "running" in name
    x, y = data(6, dtype=torch.float64)
    for rate, recompute in ((1.0, False), (0.5, True)):
        plan = strategy.plan_at(rate)
        regions, rates = regions_of(strategy, plan), [each for each in sorted(strategy.rates) if each <= rate]
        outer = {name: region.view(params[name]).clone() for name, region in regions.items()}
        assert strategy.num_draws(plan) == len(rates) - (alpha is not None)
        for k in range(strategy.num_draws(plan)):
            built = strategy.build(plan)
            narrower, full = built.narrower, doubled(built, outer)
            full.narrower, full.draw, full.recompute = narrower, lambda n, k=k: k, recompute
            strategy.receive(full, {}, plan)
            loss = strategy.loss(full, x, y, plan.phases[0])
            loss.backward()
            drawn = strategy.plan_at(rates[k])
            small = doubled(narrow(strategy.problem.chain, rates[k]).chain,
                            {name: region.view(params[name]).clone() for name, region in regions_of(strategy, drawn).items()})
            widest = doubled(narrow(strategy.problem.chain, rate).chain, outer)
            scores = small(x)
            naive = F.cross_entropy(scores, y)
            if alpha is not None:
                teacher = widest(x)
                p = teacher.detach().softmax(1)
                taught = (p * (p.log() - scores.log_softmax(1))).sum() / len(x)
                naive = F.cross_entropy(teacher, y) + alpha * taught + (1 - alpha) * naive
            naive.backward()
            assert loss.item() == pytest.approx(naive.item(), rel=1e-12)  # float64, sums in another order
            for name, parameter in full.named_parameters():
                wanted = torch.zeros(strategy.problem.chain.get_parameter(name).shape, dtype=torch.float64)
                strategy.region(name, tuple(wanted.shape), drawn).add_(wanted, small.get_parameter(name).grad)
                if alpha is not None:
                    regions[name].add_(wanted, widest.get_parameter(name).grad)
                # As above; norms over few values divide by small deviations.
                torch.testing.assert_close(parameter.grad, regions[name].view(wanted), rtol=1e-8, atol=1e-12)
                if alpha is None:
                    inside = torch.zeros_like(wanted)
                    strategy.region(name, tuple(wanted.shape), drawn).add_(inside, 1.0)
                    assert (parameter.grad[regions[name].view(inside) == 0] == 0).all()
    assert strategy.num_draws(strategy.plan_at(0.0625)) == 1


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_fjord_leaves_nothing_behind(alpha):
    strategy = made("fjord", options={**CNN, "norm": "batch"}, distillation=alpha)
    params, plan, (x, y) = first_params(strategy), strategy.plan_at(1.0), data()
    skeleton, seen = Skeleton(strategy.build(plan)), []
    for _ in range(2):
        turns = itertools.count()

        def note(seen=seen):
            for parameter in skeleton.model.parameters():
                tensors = [tensor for tensor in (parameter, parameter.grad) if tensor is not None]
                seen.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)

        result = run_plan(strategy, plan, skeleton, params, regions_of(strategy, plan),
                          lambda phase: zip(x.split(4), y.split(4), strict=True), ClientSettings(momentum=0.9),
                          rate_factor=1.0, device=CPU, generator=None, after_batch=note,
                          draw=lambda n, turns=turns: next(turns) % n)
        assert len(result.update) == len(list(skeleton.model.parameters()))
        del result
        assert skeleton.unload()
        assert seen
        assert all(reference.expired() for reference in seen)
        assert all(tensor.is_meta for inner, _ in skeleton.model.narrower for tensor in inner.state_dict().values())


@pytest.mark.parametrize(("model", "options", "alpha"), [
    ("cnn", {**CNN, "channels": [16, 16]}, None), ("cnn", {**CNN, "channels": [16, 16]}, 0.5),
    ("cnn", {**CNN, "hidden": 2048}, None), ("mlp", {"hidden": [256, 256]}, None),
])
def test_the_predicted_peak_does_for_every_draw(model, options, alpha):
    strategy = made("fjord", model, options, shape=(3, 16, 16), distillation=alpha, rates=[1.0, 0.8, 0.5, 0.1])
    settings = ClientSettings(batch_size=8, momentum=0.9)
    costs = Costs(strategy, settings, Forms(strategy, strategy.splitting, shapes_of(strategy)), CPU)
    for rate in (1.0, 0.8):
        plan = strategy.plan_at(rate)
        peaks = []
        for k in range(strategy.num_draws(plan)):
            skeleton = Skeleton(strategy.build(plan))
            train = functools.partial(costs._train, plan, skeleton, None, draw=lambda n, k=k: k)
            peaks.append(max(predict_course(functools.partial(costs._payload, plan), train)))
        assert len(set(peaks)) > 1 or alpha is not None
        assert costs.peak_bytes_at(plan) >= max(peaks)


def test_grouped_convolutions_that_a_window_would_cut_are_refused_at_once():
    grouped = [("stem", nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4))),
               ("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)))]
    with torch.device("meta"):
        chain = Chain(grouped, input_shape=(1, 8, 8), num_classes=CLASSES, name="grouped")
    this = Problem(chain=chain, splitting=Splitting.by_unit(chain.unit_names), phases=(Phase(batch_size=4, epochs=1),),
                   num_clients=3, seed=1)
    HeteroFL(this, rates=[1.0, 0.5, 0.25])  # whole groups
    for make in (FedRolex, FedDropout):
        with pytest.raises(ConfigError, match="groups of 2 channels") as caught:
            make(this, rates=[1.0, 0.5])
        assert [fault.field for fault in caught.value.faults] == ["stem.1"]


@pytest.mark.parametrize("name", ["heterofl", "fedrolex", "feddropout", "fjord"])
def test_one_sample_makes_no_statistics(name):
    model = settings_of(STRATEGIES.get(name), ("problem",))
    assert [model(statistics_samples=number).statistics_samples for number in (0, 2)] == [0, 2]
    for number in (1, -1):
        with pytest.raises(ValueError, match="statistics_samples"):
            model(statistics_samples=number)
