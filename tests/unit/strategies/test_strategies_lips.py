import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from depth_problem import CLASSES, CNN, SHAPE, Small, data

from dfed import rng
from dfed.blocks import Splitting, inner_matrices, top_mask
from dfed.comm import wire
from dfed.errors import ConfigError
from dfed.models import build_chain, materialise
from dfed.plan import Phase, Plan
from dfed.region import WHOLE
from dfed.state import ServerState
from dfed.strategies import Problem, Strategy
from dfed.strategies.fedavg import FedAvg
from dfed.strategies.lips import Lips
from dfed.strategies.wrapper import Wrapper

INNER = ["conv1.conv.weight", "conv2.conv.weight"]  # of the small network, whose first convolution is conv0
DENSITY = 0.4


def small(strategy="fedavg", *, rounds=20, settings=None, **lips):
    return Small(strategy, wrap={"lips": {"density": DENSITY, "period": 2, **lips}}, rounds=rounds, **(settings or {}))


def at(problem, round_index, **tensors):
    return ServerState(round_index=round_index, params=problem.values, **tensors)


def plan_at(problem, round_index, state=None):
    return problem.strategy.plan(state or at(problem, round_index), problem.candidate(round_index=round_index))


def started(problem, plan, client_state=None):
    """The model from which the client starts, by name; loaded without the code under test."""
    model = problem.model(plan, torch.float32)
    problem.strategy.receive(model, client_state if client_state is not None else {}, plan)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def kept_naively(score, count):
    """The places of the ``count`` largest entries, of equal ones the first; in Python's own order."""
    flat = np.asarray(score, dtype=np.float64).ravel()
    places = sorted(range(flat.size), key=lambda place: (-flat[place], place))[:count]
    mask = np.zeros(flat.size, dtype=bool)
    mask[places] = True
    return mask.reshape(np.shape(score))


def test_a_mask_keeps_exactly_the_largest_and_of_equal_ones_the_first():
    generator = rng.torch_generator(1, "scores")
    for shape in [(7,), (3, 4), (5, 2, 3, 3)]:
        for score in (torch.randint(-2, 3, shape, generator=generator).float(), torch.randn(shape, generator=generator),
                      torch.zeros(shape)):
            for kept in range(score.numel() + 1):
                assert (top_mask(score, kept).numpy() == kept_naively(score, kept)).all(), (score, kept)


@pytest.mark.parametrize(("model", "options", "shape", "expected"), [
    ("cnn", CNN, SHAPE, INNER),
    ("mlp", {"hidden": [5, 6, 7]}, (1, 4, 4), ["hidden1.fc.weight", "hidden2.fc.weight"]),
    ("resnet8", {"width": 4}, (3, 32, 32),
     [f"layer{stage}_0.conv{i}.weight" for stage in (1, 2, 3) for i in (1, 2)]),
])
def test_what_may_be_masked(model, options, shape, expected):
    chain = build_chain(model, options, input_shape=shape, num_classes=CLASSES)
    assert [name for name in inner_matrices(chain) if "downsample" not in name and "shortcut" not in name] == expected


def test_of_transformers_and_vgg_too():
    vit = build_chain("vit_tiny", {}, input_shape=(3, 32, 32), num_classes=CLASSES)
    names = inner_matrices(vit)
    first, last = vit.unit_names[0], vit.unit_names[-1]
    assert names
    assert all(vit.get_parameter(name).dim() == 2 and vit.unit_of(name) not in (first, last) for name in names)
    attentions = sum(isinstance(module, torch.nn.MultiheadAttention) for module in vit.modules())
    assert sum("in_proj_weight" in name for name in names) == attentions > 0
    vgg = build_chain("vgg11_bn", {}, input_shape=(3, 32, 32), num_classes=CLASSES)
    convolutions = [name for name, value in vgg.named_parameters() if value.dim() == 4]
    assert list(inner_matrices(vgg)) == convolutions[1:]  # not the linear layers


def test_density_follows_the_schedule():
    strategy = small(rounds=20).strategy
    expected = {t: 1.0 if t == 0 or t % 2 else min(1.0, DENSITY + (1 - DENSITY) * t / 20) for t in range(30)}
    assert {t: strategy.density_at(t) for t in expected} == pytest.approx(expected, abs=1e-12)
    assert small(rounds=20, period=3, density=0.3).strategy.density_at(6) == pytest.approx(0.3 + 0.7 * 6 / 20, abs=1e-12)
    assert small(rounds=20).strategy.note(ServerState(round_index=3, params={}))["density"] == pytest.approx(0.46, abs=1e-12)
    given = Lips(FedAvg(strategy.problem), rounds=100).density_at(5)
    assert given == pytest.approx(0.5 + 0.5 * 5 / 100, abs=1e-12)


def test_clients_start_from_what_their_own_gradient_keeps():
    problem, (x, y) = small(), data()
    plan = plan_at(problem, 0)
    result, _ = problem.train(plan, x, y)
    assert sorted(result.client_state) == [f"lips/{name}" for name in INNER]
    # The gradient that is kept is that of the last step: here the second of two, by torch alone.
    model = problem.model(problem.strategy.full_plan(), torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(plan.phases[0].steps or plan.phases[0].epochs):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for name in INNER:
        torch.testing.assert_close(result.client_state[f"lips/{name}"], model.get_parameter(name).grad, rtol=1e-5, atol=1e-7)
    assert (started(problem, plan)[INNER[0]] == problem.values[INNER[0]]).all()
    sparse = plan_at(problem, 2)
    density = DENSITY + (1 - DENSITY) * 2 / 20
    assert (sparse.options, sparse.details) == ({}, {"lips": {"density": pytest.approx(density), "round": 2}})
    assert Plan.from_json(json.loads(json.dumps(sparse.to_json()))) == sparse
    state = dict(result.client_state)
    model = started(problem, sparse, state)
    assert not state  # used up: it does not take the client's memory while it trains
    for name, value in problem.values.items():
        if name in INNER:
            score = (result.client_state[f"lips/{name}"].double() * value.double()).abs()
            mask = torch.from_numpy(kept_naively(score, int(density * value.numel())))
            assert (model[name] == torch.where(mask, value, 0.0)).all()
            assert int((model[name] != 0).sum()) == int(density * value.numel())
        else:
            assert (model[name] == value).all(), name
    assert (started(problem, sparse)[INNER[0]] == problem.values[INNER[0]]).all()  # who has no gradient starts from all of it
    again, _ = problem.train(sparse, x, y, client_state=dict(result.client_state))
    assert sorted(again.client_state) == sorted(result.client_state)
    assert (again.update[INNER[0]] != 0).float().mean() > 0.95  # what was dropped grows


@pytest.mark.parametrize("score", ["magnitude", "low", "random"])
def test_other_scores(score):
    problem = small(score=score)
    assert not problem.strategy.keeps_state
    plan = plan_at(problem, 4)
    model, again = started(problem, plan), started(problem, plan)
    other = started(problem, plan.for_client(1))
    for name in INNER:
        value = problem.values[name]
        count = int((DENSITY + (1 - DENSITY) * 4 / 20) * value.numel())
        mask = model[name] != 0
        assert int(mask.sum()) == count
        assert (model[name][mask] == value[mask]).all()
        assert (again[name] == model[name]).all()
        if score == "random":
            assert (mask != (other[name] != 0)).any()
            assert ((model[name] == 0) == (started(problem, plan_at(problem, 2))[name] == 0)).float().mean() < 0.95
        else:
            naive = kept_naively(value.abs() if score == "magnitude" else -value.abs(), count)
            assert (mask.numpy() == naive).all()


def test_what_is_dropped_can_take_its_first_value():
    problem = small(score="magnitude", fill="initial")
    first = materialise(problem.chain.skeleton(), rng.torch_generator(problem.strategy.problem.seed, "init")).state_dict()
    problem.values = {name: value + 1 for name, value in problem.values.items()}  # as if it had been trained
    plan = plan_at(problem, 2)
    model = started(problem, plan)
    for name in INNER:
        value, kept = problem.values[name], kept_naively(problem.values[name].abs(), int(0.46 * first[name].numel()))
        assert (model[name] == torch.where(torch.from_numpy(kept), value, first[name])).all()
        assert (model[name] != value).any()


def test_controls_change_the_norm_as_masks_would():
    norms = {}
    for control in ("none", "noise", "shrink"):
        problem = small(score="magnitude", control=control)
        model = started(problem, plan_at(problem, 2))
        for name in INNER:
            value = problem.values[name].double()
            norms[control, name] = float((model[name].double() - value).norm()), float(model[name].double().norm())
            if control != "none":
                assert (model[name] != 0).all()
        assert (model["conv0.conv.weight"] == problem.values["conv0.conv.weight"]).all()
    for name in INNER:
        # float32 norms of a few hundred entries.
        assert norms["noise", name][0] == pytest.approx(norms["none", name][0], rel=1e-4)
        assert norms["shrink", name][1] == pytest.approx(norms["none", name][1], rel=1e-4)
        assert norms["shrink", name][0] < norms["none", name][0]


@pytest.mark.parametrize("score", ["gradient", "magnitude"])
def test_a_shared_mask_makes_the_download_sparse(score):
    problem = small(score=score, masks="shared")
    strategy, before = problem.strategy, at(problem, 1)
    assert not strategy.keeps_state
    moved = {name: value + 0.01 * torch.arange(value.numel()).view(value.shape) for name, value in problem.values.items()}
    state = strategy.advance(before, ServerState(round_index=2, params=moved), {})
    assert sorted(state.tensors) == ([f"lips/{name}" for name in INNER] if score == "gradient" else [])
    plan = plan_at(problem, 2, state)
    codec = "bitmask(density=0.46)"
    assert plan.down == {"conv1": codec, "conv2": codec}
    assert plan_at(problem, 1).down == plan_at(problem, 0).down == {}
    form = problem.forms.of(plan)
    for entry in form.down:
        sent = strategy.sent(state, entry.name, entry.codec)
        if entry.name not in INNER:
            assert sent is moved[entry.name]
            continue
        assert entry.codec == codec
        change = (moved[entry.name] - problem.values[entry.name]).double()
        scores = (change * moved[entry.name].double()).abs() if score == "gradient" else moved[entry.name].abs()
        mask = torch.from_numpy(kept_naively(scores, int(0.46 * change.numel())))
        assert (sent == torch.where(mask, moved[entry.name], 0.0)).all()
        assert (strategy.sent(state, entry.name, "fp32") == moved[entry.name]).all()  # to who does not train it
        # What crosses is what was masked, to the bit.
        entries, length = wire.layout([(entry.name, entry.block, codec, tuple(sent.shape))])
        message = wire.encode("round", {}, entries, lambda entry, sent=sent: sent, torch.zeros(length, dtype=torch.uint8))
        assert (wire.decode(message)[entry.name] == sent).all()
    dense = sum(problem.forms.of(plan_at(problem, 1)).down_bytes(1, 0).values())
    assert sum(form.down_bytes(2, 0).values()) < dense
    later = strategy.advance(state, ServerState(round_index=3, params=moved, tensors=state.tensors), {})
    assert not later.tensors
    assert (started(problem, plan)[INNER[0]] == problem.values[INNER[0]]).all()  # masked before it was sent, not here


@pytest.mark.parametrize(("inner", "settings"), [("neulite", {"blocks": 2}), ("cocofl", {}), ("fedprox", {"mu": 0.1})])
def test_only_what_the_client_trains_is_masked(inner, settings):
    options = {"channels": [4, 6, 5, 6, 4], "kernel": 3, "hidden": 8, "norm": "batch", "pool": "last"}
    for masks in ("client", "shared"):
        problem = small(inner, score="magnitude", masks=masks, settings={**settings, "options": options})
        state = problem.strategy.init(problem.values)
        seen = set()
        for round_index in (0, 1, 2, 4, 6):
            now = ServerState(round_index=round_index, params=state.params, facts=state.facts, tensors=state.tensors)
            plan = problem.strategy.plan(now, problem.candidate(round_index=round_index))
            sparse = round_index not in (0, 1)
            if masks == "client":
                model = started(problem, plan) if inner != "cocofl" else {}
                changed = {name for name in model if name in problem.values and (model[name] != problem.values[name]).any()}
            else:
                changed = {entry.name for entry in problem.forms.of(plan).down if entry.codec.startswith("bitmask")}
            assert all(name in problem.strategy.eligible for name in changed)
            assert changed <= {entry.name for entry in problem.forms.of(plan).up}
            assert sparse or not changed
            seen |= changed
            x, y = data()
            problem.train(plan, x, y)  # whatever the strategy makes of it
        assert seen or (inner, masks) == ("cocofl", "client")


def test_norms_may_stay_with_the_client():
    problem, (x, y) = small(norms="local", masks="shared"), data()
    plan = plan_at(problem, 1)
    result, _ = problem.train(plan, x, y)
    norms = {f"conv{i}.norm.{name}" for i in range(3) for name in ("weight", "bias", "running_mean", "running_var")}
    assert {name.removeprefix("lips/") for name in result.client_state} == norms
    own = {name: value + 1 for name, value in result.client_state.items()}
    begun = started(problem, plan, dict(own))
    for name, value in problem.values.items():
        assert (begun[name] == (own[f"lips/{name}"] if name in norms else value)).all()
    assert norms <= result.update.keys()


def test_predictions_know_of_masks():
    """A sparse round's plan is predicted as one that starts with a gradient and a mask: never less than plain training."""
    problem, plain = small(), Small("fedavg")
    plan = plan_at(problem, 2)
    predicted = problem.costs.peak_bytes(plan)
    assert predicted >= plain.costs.peak_bytes(plain.strategy.full_plan())
    assert problem.costs.peak_bytes(plan_at(problem, 1)) == predicted
    assert plan_at(problem, 1).cost_key() == plan.cost_key()
    assert problem.strategy.plan(at(problem, 2), problem.candidate(10, round_index=2)) == plan  # fedavg asks nobody
    asking = small("exclusivefl")
    assert asking.strategy.plan(at(asking, 2), asking.candidate(10)) is None
    known = {plan_at(asking, 2).cost_key(): 10**9}
    assert asking.strategy.plan(at(asking, 2), asking.candidate(10**9, infeasible=known)) is None


@pytest.mark.parametrize(("strategy", "model", "lips", "field"), [
    ("fedavg", "cnn", {"masks": "shared", "fill": "initial"}, "fill"),
    ("fedavg", "cnn", {"masks": "shared", "control": "noise"}, "control"),
    ("fedavg", "cnn", {"control": "shrink", "fill": "initial"}, "fill"),
    ("heterofl", "cnn", {}, "score"),
    ("heterofl", "cnn", {"score": "magnitude", "norms": "local"}, "norms"),
    ("fedavg", "mlp", {}, "wrap.lips"),
])
def test_what_does_not_go_together_is_refused(strategy, model, lips, field):
    with pytest.raises(ConfigError) as refused:
        Small(strategy, model, {"hidden": [4]} if model == "mlp" else None, wrap={"lips": lips})
    assert [fault.field for fault in refused.value.faults] == [field]
    assert "but is" in str(refused.value) or field == "wrap.lips"


def test_a_wrapper_leaves_nothing_to_the_defaults():
    methods = {name for name, value in vars(Strategy).items() if callable(value) and not name.startswith("_")} | {"parts"}
    assert methods <= vars(Wrapper).keys()


class Odd(FedAvg):
    """Answers what no default does."""

    keeps_state, heeds_evaluation, statistics_samples = True, 3, 7

    def variants(self, state):
        return {"odd": self.full_plan(state.round_index)}

    def num_draws(self, plan):
        return 5

    def training_key(self):
        return ["odd"]

    def upload(self, name, value, region, plan):
        return None


def test_what_a_wrapper_does_not_write_is_answered_by_what_it_wraps():
    chain = build_chain("cnn", CNN, input_shape=SHAPE, num_classes=CLASSES)
    inner = Odd(Problem(chain=chain, splitting=Splitting.by_unit(chain.unit_names), phases=(Phase(batch_size=4, epochs=1),),
                        num_clients=3, seed=1))
    outer, state = Wrapper(inner), ServerState(round_index=2, params={"w": torch.ones(2)})
    assert outer.parts == (outer, inner)
    assert (outer.keeps_state, outer.heeds_evaluation, outer.statistics_samples) == (True, 3, 7)
    assert outer.variants(state) == {"odd": inner.full_plan(2)}
    plan = outer.full_plan(1)
    assert (outer.num_draws(plan), outer.training_key(), outer.variant_of(plan)) == (5, ["odd"], None)
    assert outer.upload("w", torch.ones(2), WHOLE, plan) is None
    assert outer.sent(state, "w", "fp32") is state.params["w"]
