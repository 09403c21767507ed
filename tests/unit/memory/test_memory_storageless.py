"""Operators on tensors without storage against real ones, and against torch's own mode for such tensors."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import convert_frame
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dfed
from dfed.blocks import Splitting
from dfed.client import ClientSettings, Forms
from dfed.memory import predict, predict_course, storageless
from dfed.memory.storageless import StoragelessMode, run
from dfed.models import build_chain
from dfed.plan import Plan
from dfed.planner import Costs, Store
from dfed.strategies import Problem
from dfed.strategies.fedavg import FedAvg


class Every(TorchDispatchMode):
    """Runs all operators by :func:`run`."""

    def __init__(self, fakes):
        super().__init__()
        self._fakes = fakes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is storageless.ASKS_DEVICE:
            return args[0].device
        return run(func, args, kwargs or {}, self._fakes)[0]


@contextmanager
def modes():
    with StoragelessMode() as fakes, Every(fakes):
        yield


MAKE = {
    "matrix": lambda: [torch.ones(4, 6)],
    "turned": lambda: [torch.ones(6, 4).t()],
    "part": lambda: [torch.ones(8, 6)[2:6]],
    "images": lambda: [torch.ones(2, 4, 6, 6)],
    "pixels": lambda: [torch.ones(2, 4, 6, 6).to(memory_format=torch.channels_last)],
    "two": lambda: [torch.ones(4, 6), torch.ones(6)],
    "half": lambda: [torch.ones(4, 6), torch.ones(6, dtype=torch.float64)],
    "whole": lambda: [torch.ones(4, 6, dtype=torch.int64), torch.ones(4, 1)],
    "turned and not": lambda: [torch.ones(4, 6), torch.ones(6, 4).t()],
    "halves of one": lambda: [*torch.ones(8, 6).chunk(2)],
    "products": lambda: [torch.ones(4, 6), torch.ones(6, 5)],
    "many products": lambda: [torch.ones(3, 4, 6), torch.ones(3, 6, 5)],
    "linear": lambda: [torch.ones(4, 6), torch.ones(5, 6), torch.ones(5)],
    "scores": lambda: [torch.ones(4, 6), torch.zeros(4, dtype=torch.int64)],
    "empty": lambda: [torch.ones(0, 6), torch.ones(6)],
    "scalar": lambda: [torch.ones(4, 6), torch.tensor(2.0)],
}

ONE = ("matrix", "turned", "part", "images", "pixels")
BOTH = ("two", "half", "whole", "turned and not", "halves of one", "empty", "scalar")
OF_ONE = [
    lambda x: x.reshape(-1), lambda x: x.flatten(1).view(2, -1), lambda x: x.transpose(0, 1), lambda x: x.unsqueeze(1),
    lambda x: x[1:, ::2], lambda x: x.select(0, 1), lambda x: x[:, :1].expand_as(x), lambda x: x.detach(),
    lambda x: x.clone(), lambda x: x.contiguous(), lambda x: x.sum(), lambda x: x.sum(1, keepdim=True),
    lambda x: x.mean((0, 1)), lambda x: x.mean(), lambda x: x.relu(), lambda x: x.relu_(),
    lambda x: x.exp().sqrt().neg().abs(), lambda x: x.round().clamp(0, 1), lambda x: x.clamp_(0, 1).round_(), lambda x: x * 2,
    lambda x: x.double() / 3, lambda x: x.to(torch.int32) + 1, lambda x: x.to(torch.int32) * 1.5, lambda x: x > 0,
    lambda x: x ** 2, lambda x: 1 - x, lambda x: x.chunk(2, 1), lambda x: x.log_softmax(1), lambda x: x.add_(1).mul_(3),
    lambda x: torch.cat([x, x]), lambda x: torch.stack([x, x.clone()]), lambda x: x.unbind(1), lambda x: x.view(torch.int32),
    lambda x: x.amax(1), lambda x: torch.where(x > 0, x, 0.0), lambda x: torch.empty_like(x).copy_(x),
    lambda x: x.new_zeros(3, 2), lambda x: x.max(1), lambda x: x.topk(2, 1),
    lambda x: x.permute(*range(1, x.ndim), 0).contiguous(), lambda x: x.unsqueeze(0).squeeze(0), lambda x: (x, x.detach()),
    lambda x: x.lerp_(torch.ones_like(x), 0.5), lambda x: x.zero_(), lambda x: F.dropout(x, 0.5), lambda x: x.sort(1),
    lambda x: torch.ops.aten.add.Scalar(x, 2.0), lambda x: torch.ops.aten.sub.Scalar(x, 1, 2),
    lambda x: torch.empty(3, 4), lambda x: torch.zeros(2, dtype=torch.int64), lambda x: torch.full((2, 3), 7),
]
OF_TWO = [
    lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x * y, lambda x, y: x / y, lambda x, y: y + x,
    lambda x, y: x.to(torch.float64).add_(y), lambda x, y: torch.where(x > 0, x, y), lambda x, y: x.sub(y, alpha=2),
    lambda x, y: x.copy_(y), lambda x, y: torch.addcmul(x.double(), x.double(), y.double(), value=0.5),
    lambda x, y: x.sub_(y), lambda x, y: x.div_(y), lambda x, y: x.double().addcmul_(x.double(), y.double()),
]
WORK = {
    **{name: OF_ONE for name in ONE}, **{name: OF_TWO for name in BOTH},
    "products": [lambda x, y: x @ y, lambda x, y: torch.mm(x, y)],
    "many products": [lambda x, y: x @ y, lambda x, y: torch.bmm(x, y)],
    "linear": [lambda x, w, b: F.linear(x, w, b), lambda x, w, b: F.linear(x, w), lambda x, w, b: torch.addmm(b, x, w.t())],
    "scores": [lambda x, y: F.cross_entropy(x, y), lambda x, y: F.nll_loss(x, y, reduction="none"),
               lambda x, y: F.cross_entropy(x, y, reduction="sum")],
}
CASES = [(name, number) for name, works in WORK.items() for number in range(len(works))]


def layout(given, out):
    """All that memory depends on: shapes, strides, types, and which results lie in which arguments, or each other."""
    tensors = [leaf for leaf in (*given, *tree_leaves(out)) if isinstance(leaf, torch.Tensor)]
    storages = [tensor.untyped_storage()._cdata for tensor in tensors]
    same = [next(place for place, other in enumerate(tensors) if other is tensor) for tensor in tensors]
    others = [leaf for leaf in tree_leaves(out) if not isinstance(leaf, torch.Tensor)]
    return others, same, [
        (tuple(t.shape), t.stride(), t.storage_offset(), t.dtype, t.device.type, t.untyped_storage().nbytes(),
         storages.index(at))
        for t, at in zip(tensors, storages, strict=True)
    ]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_as_with_real_tensors_the_first_time_and_again(name, number):
    work = WORK[name][number]
    given = MAKE[name]()
    try:
        expected = layout(given, work(*given))
    except RuntimeError:
        expected = "refused"
    for _ in range(2):
        with modes():
            given = MAKE[name]()
            try:
                found = layout(given, work(*given))
            except (RuntimeError, ValueError):  # torch's mode may say what is wrong in Python
                found = "refused"
        assert found == expected


@pytest.mark.parametrize(("name", "number"), [(name, number) for name, number in CASES if name in ONE + BOTH])
def test_gradients_as_with_real_tensors(name, number):
    def gradients():
        given = [value.requires_grad_() if value.is_floating_point() else value for value in MAKE[name]()]
        try:
            out = WORK[name][number](*(value * 1 for value in given))
        except (RuntimeError, ValueError):
            return "refused"
        sums = [leaf.sum() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if sums:
            sum(sums).backward()
        return [None if value.grad is None else layout([], value.grad) for value in given]

    expected = gradients()
    for _ in range(2):
        with modes():
            assert gradients() == expected


def test_what_a_call_is_known_by():
    with modes():
        whole, kinds = torch.ones(3, dtype=torch.int64), [torch.int64, torch.float32, torch.int64, torch.int64]
        assert [(whole * factor).dtype for factor in (2, 2.0, True, 2)] == kinds
        assert [torch.empty(2, dtype=kind).dtype for kind in (torch.int8, torch.float64)] == [torch.int8, torch.float64]
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            assert torch.empty(2).dtype == torch.float64
        finally:
            torch.set_default_dtype(before)
        assert torch.empty(2).dtype == before
        # Arguments that lie in one storage, and such that do not.
        row, other = torch.ones(4, 2), torch.ones(4, 2)
        for first, second in ((row[:2], row[2:]), (row[:2], other[2:]), (other[:2], other[2:])):
            assert first.add_(second) is first
            assert first.expand_as(second).untyped_storage()._cdata == first.untyped_storage()._cdata


def test_numbers_that_are_known_stay_known():
    with modes():
        assert torch.tensor(3.0).item() == 3.0
        assert (torch.tensor(3.0) * torch.tensor(2.0)).item() == 6.0
        with pytest.raises(DataDependentOutputException):
            torch.empty(1).item()
        # A copy of one that is known is known, and one that was written over by another is not.
        number = torch.tensor(0.0)
        number.copy_(torch.tensor(3.0))
        assert number.item() == 3.0
        pair = torch.tensor([1.0, 2.0])
        pair[0].copy_(torch.rand(()))
        for overwritten in (number.copy_(torch.rand(())), pair[0]):
            with pytest.raises(DataDependentOutputException):
                overwritten.item()


def of_torchs_own_mode(monkeypatch, work):
    with monkeypatch.context() as patch:
        patch.setattr(predict, "run", lambda func, args, kwargs, fakes: (func(*args, **kwargs), None))
        return predict_course(lambda: None, work)


def zeros_without_storage(_):
    """As forward-mode differentiation makes them."""
    x = torch._efficientzerotensor((3,))
    return x * torch.ones(3), torch.zeros(3) * torch.ones(3), x.clone()


def negatives(_):
    x = torch._neg_view(torch.ones(3))
    return x * 2, x.clone(), torch.ones(3) * 2


@pytest.mark.parametrize("work", [zeros_without_storage, negatives])
def test_tensors_that_are_more_than_their_layout(work, monkeypatch):
    expected = of_torchs_own_mode(monkeypatch, work)
    assert [predict_course(lambda: None, work) for _ in range(3)] == [expected] * 3


def test_a_model_that_is_compiled(monkeypatch, capfd):
    """The compiler keeps out of the modes: it would compile them, and begin anew with each new operator."""
    def work(_):
        model = torch.compile(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), backend="eager")
        model(torch.ones(5, 4)).sum().backward()

    expected = of_torchs_own_mode(monkeypatch, work)
    converted = []
    convert = convert_frame.ConvertFrameAssert.__call__

    def seen(self, frame, *rest, **named):
        converted.append(frame.f_code.co_filename)
        return convert(self, frame, *rest, **named)

    monkeypatch.setattr(convert_frame.ConvertFrameAssert, "__call__", seen)
    for _ in range(3):
        assert predict_course(lambda: None, work) == expected
    assert not [name for name in converted if Path(dfed.__file__).parent in Path(name).parents]
    assert "recompile" not in capfd.readouterr().err


@pytest.mark.parametrize("wrong", [
    lambda: torch.ones(2, 3) @ torch.ones(2, 3), lambda: torch.ones(2, 3).view(7), lambda: torch.ones(3) + torch.ones(4),
    lambda: torch.ones(2, 3).copy_(torch.ones(4)), lambda: torch._efficientzerotensor((3,)).copy_(torch.ones(3)),
    lambda: F.linear(torch.ones(2, 3), torch.ones(4, 5)),
])
def test_what_is_wrong_is_wrong_each_time(wrong):
    for _ in range(2):
        with modes(), pytest.raises(RuntimeError):
            wrong()


def test_tensors_bear_all_that_torch_gives_them():
    """They are made without torch's constructor."""
    with modes():
        made = [torch.ones(2, 3) * 2 for _ in range(3)]
    with FakeTensorMode(allow_non_fake_inputs=False):
        own = torch.ones(2, 3) * 2
    for tensor in made:
        assert type(tensor) is FakeTensor
        assert vars(tensor).keys() == vars(own).keys()
        assert all(vars(tensor)[name] == value for name, value in vars(own).items() if name != "fake_mode")
        assert torch._C._dispatch_keys(tensor) == torch._C._dispatch_keys(own)
        with pytest.raises(RuntimeError, match="data pointer"):
            tensor.data_ptr()


MODELS = [
    ("cnn", {}, (1, 12, 12)), ("resnet8", {"width": 4}, (3, 16, 16)),
    ("vit_tiny", {"depth": 2, "width": 24, "heads": 3}, (1, 28, 28)),
]
LOCAL = [{"momentum": 0.9, "clip_norm": 1.0}, {"optimizer": "adam", "precision": "bf16"}, {"activation_checkpointing": True}]


@pytest.mark.parametrize("local", LOCAL, ids=str)
@pytest.mark.parametrize(("name", "options", "shape"), MODELS)
def test_courses_of_training_are_those_under_torchs_own_mode(name, options, shape, local, monkeypatch):
    chain = build_chain(name, options, input_shape=shape, num_classes=5)
    settings = ClientSettings(batch_size=6, **local)
    problem = Problem(chain=chain, splitting=Splitting.by_unit(chain.unit_names), phases=settings.phases, num_clients=1, seed=0)
    strategy = FedAvg(problem)
    shapes = {k: tuple(v.shape) for k, v in chain.state_dict().items() if v.is_floating_point()}
    forms = Forms(strategy, problem.splitting, shapes)
    costs = Costs(strategy, settings, forms, torch.device("cpu"), store=Store(None))
    plan: Plan = strategy.full_plan()
    seen = []
    monkeypatch.setattr(predict, "run", lambda func, args, kwargs, fakes: (seen.append(func), (func(*args, **kwargs), None))[1])
    expected = costs._course(plan)
    assert seen
    monkeypatch.undo()
    assert costs._course(plan) == expected
    assert costs._course(plan) == expected  # now that all is known


def test_calls_are_forgotten_when_they_are_too_many(monkeypatch):
    monkeypatch.setattr(storageless, "MOST_KNOWN", 5)
    monkeypatch.setattr(storageless, "_known", {})
    for size in range(1, 30):
        assert predict_course(lambda: None, lambda _, size=size: torch.empty(size) * 2) == [4 * size, 8 * size]
        assert len(storageless._known) <= 5


def test_layers_with_state_as_with_real_tensors():
    def train():
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                              nn.Flatten(), nn.Linear(64, 5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.ones(2, 3, 8, 8)), torch.zeros(2, dtype=torch.int64)).backward()
            optimizer.step()
        slots = [slot["momentum_buffer"] for slot in optimizer.state.values()]
        return layout([], [*model.state_dict().values(), *(p.grad for p in model.parameters()), *slots])

    expected = train()
    for _ in range(2):
        with modes():
            assert train() == expected
