import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfed.blocks import Splitting
from dfed.client import ClientSettings, Forms
from dfed.memory import PROBE_BATCH, NotProportional, at_most, measure, predict_course, predict_lines, predict_peak
from dfed.models import build_chain
from dfed.plan import Plan
from dfed.planner import Costs
from dfed.strategies import Problem
from dfed.strategies.fedavg import FedAvg

KIB = 1024


def block(kib):
    return torch.empty(kib * KIB // 4)


def nothing():
    return None


def one_after_another(_):
    first = block(100)
    del first
    second = block(60)
    third = block(30)
    del second
    return third


def overlapping(_):
    first, second = block(100), block(60)
    del first
    third = block(50)
    return second, third


def in_place(_):
    value = block(100)
    for _ in range(5):
        value.add_(1).mul_(2)
    value[3:7] = 0
    return value


def out_of_place(_):
    value = block(100)
    for _ in range(5):
        value = value + 1  # the old one lives until the new one is there
    return value


def views(_):
    value = block(100)
    kept = value.view(10, -1)[3].t()  # keeps all 100 KiB
    del value
    other = block(10)
    return kept, other


def copies(_):
    value = block(100)
    kept = value.view(10, -1)[3].clone()
    del value
    return kept, block(95)


def dtypes(_):
    return torch.empty(KIB, dtype=torch.float64), torch.empty(KIB, dtype=torch.uint8), torch.empty(KIB, dtype=torch.bool)


def saved_for_backward(_):
    # 25 KiB each: x, x·x (saved by the second product), and the product.
    x = block(25).requires_grad_()
    y = x * x
    z = y * y
    del y  # the graph holds it
    return z


CASES = [
    (one_after_another, 100), (overlapping, 160), (in_place, 100), (out_of_place, 200), (views, 110), (copies, 110),
    (dtypes, 8 + 1 + 1), (saved_for_backward, 75), (lambda _: None, 0), (lambda _: torch.empty(0), 0),
]


@pytest.mark.parametrize(("work", "kib"), CASES)
def test_lifetimes_by_hand(work, kib):
    assert predict_peak(nothing, work) == kib * KIB


@pytest.mark.parametrize(("size", "kernel", "dilation", "trained", "beside"), [
    (4, 3, 1, True, 0), (3, 3, 1, True, 0), (2, 3, 1, True, 2.5), (1, 3, 1, True, 2.5), (4, 3, 2, True, 2.5),
    (5, 3, 2, True, 0), (1, 1, 1, True, 0), (2, 3, 1, False, 0),
])
def test_the_gradient_of_weights_on_small_maps_takes_more(size, kernel, dilation, trained, beside):
    def prepare():
        x = torch.empty(2, 32, size, size, requires_grad=True)
        return x, torch.empty(64, 32, kernel, kernel, requires_grad=trained)

    def work(given):
        padding = dilation * (kernel // 2)
        torch.nn.functional.conv2d(*given, padding=padding, dilation=dilation).sum().backward()

    weights, map_bytes = 4 * 64 * 32 * kernel**2, 4 * 2 * size**2
    # The gradients of weights and input; of the output nothing but the sum's own, which is expanded.
    held = weights * trained + 32 * map_bytes
    peak = predict_peak(prepare, work)
    assert held + beside * weights <= peak <= held + beside * weights + 2 * 64 * map_bytes + 64
    many = (PROBE_BATCH, 32, size, size)
    lines = predict_lines(lambda: prepare()[1], lambda w: work((torch.empty(many, requires_grad=True), w)))
    fixed = max(level.fixed for level in lines)
    assert fixed >= (1 + beside) * weights * trained
    assert fixed <= (1 + beside) * weights * trained + 64


def test_what_was_there_before_is_not_counted():
    assert predict_peak(lambda: block(1000), lambda given: given + 1) == 1000 * KIB
    assert predict_peak(lambda: block(1000), lambda given: given.add_(1)) == 0
    assert predict_peak(lambda: block(1000), lambda given: given.view(10, -1)[2]) == 0
    assert predict_peak(lambda: [block(1000)], lambda given: (given[0].mul_(2), block(7))) == 7 * KIB

    def let_go(given):
        given.pop()  # memory that was there before does not pay for what is new
        return block(30)

    assert predict_peak(lambda: [block(1000)], let_go) == 30 * KIB
    # Tensors inside a module, where no container shows them.
    model = nn.Linear(256, 256, bias=False)

    def prepare():
        made = nn.Linear(256, 256, bias=False)
        made.weight.requires_grad_(False)
        return made

    assert predict_peak(prepare, lambda made: made.weight.mul_(0.5)) == 0
    assert model.weight.device.type == "cpu"


def test_a_training_step_by_hand():
    rows, inputs, outputs = 64, 256, 128

    def prepare():
        return nn.Linear(inputs, outputs, bias=False), torch.empty(rows, inputs)

    def work(given):
        model, x = given
        y = model(x)
        y.backward(torch.ones_like(y))
        model.weight.grad.mul_(0.1)

    # Output and its gradient, then the weight's gradient beside them.
    assert predict_peak(prepare, work) == 4 * (2 * rows * outputs + inputs * outputs)


def test_values_and_repetition_do_not_matter():
    def work(scale):
        def body(x):
            hidden = F.relu(x * scale)
            return F.cross_entropy(hidden, torch.zeros(len(hidden), dtype=torch.int64))

        return body

    starts = (lambda: torch.zeros(32, 100), lambda: torch.full((32, 100), 1e30))
    peaks = {predict_peak(start, work(scale)) for start in starts for scale in (1.0, -5.0)}
    assert len(peaks) == 1
    for _ in range(3):
        assert predict_peak(nothing, overlapping) == 160 * KIB
    with pytest.raises(ZeroDivisionError):
        predict_peak(nothing, lambda _: 1 / 0)
    assert predict_peak(nothing, overlapping) == 160 * KIB  # an exception leaves nothing behind
    assert torch.empty(1).device.type == "cpu"
    assert type(torch.empty(1)) is torch.Tensor  # no mode is left on


def test_planning_a_huge_training_allocates_next_to_nothing():
    chain = build_chain("resnet50", {}, input_shape=(3, 224, 224), num_classes=1000)
    shapes = {name: tuple(t.shape) for name, t in chain.state_dict().items() if t.is_floating_point()}
    splitting = Splitting.by_unit(chain.unit_names)
    settings = ClientSettings(batch_size=128, momentum=0.9)
    problem = Problem(chain=chain, splitting=splitting, phases=settings.phases, num_clients=1, seed=0)
    strategy = FedAvg(problem)
    costs = Costs(strategy, settings, Forms(strategy, splitting, shapes), torch.device("cpu"))
    plan = Plan(client=0, hold=splitting.names, train=splitting.names, phases=settings.phases)
    gc.collect()
    before = measure.resident_bytes()
    counted = measure.reset_peak_resident()
    peak = costs.peak_bytes(plan)
    highest = measure.peak_resident_bytes() if counted else measure.resident_bytes()
    # Activations of ResNet-50 take some 80 MiB a sample (11 million outputs of convolutions, as many of the norms).
    assert 8 * 2**30 < peak < 16 * 2**30
    # The fake tensors, shape rules and code that are loaded for the first time: tens of MiB, not gigabytes.
    assert highest - before < 400 * 2**20


def features(batch):
    return torch.empty(batch, 7)


def with_weights(batch):
    weight = torch.empty(7, 5)
    hidden = features(batch) @ weight
    del weight
    return hidden.relu() + hidden.sum(0).expand_as(hidden)


def pairs(batch):
    x = features(batch)
    gram = x @ x.T
    return gram - gram.mean(0)


def all_sizes_of_types(batch):
    x = features(batch)
    return x > 0, x.to(torch.bfloat16), x.argmax(1), torch.nn.functional.one_hot(torch.zeros(3, dtype=torch.int64), 9)


def course_at(work, batch):
    return predict_course(nothing, lambda _: work(batch))


def with_a_buffer(batch):
    x = features(batch)
    buffer = at_most(x.numel(), 500, torch.empty)  # up to 71 samples
    codes = torch.empty(x.shape, dtype=torch.int8)
    first = buffer.add_(1)[:1]
    del buffer
    noise = torch.empty(3)
    del first, noise
    return at_most(2 * batch, 500, torch.empty), x * 2, codes


@pytest.mark.parametrize("work", [with_weights, pairs, all_sizes_of_types, with_a_buffer])
def test_one_prediction_tells_every_batch_size(work):
    lines = predict_lines(nothing, lambda _: work(PROBE_BATCH))
    for batch in (1, 2, 3, 64, 1000):
        assert [level.at(batch) for level in lines] == course_at(work, batch)
    assert any(level.per_sample for level in lines)


def two_buffers(batch):
    return [at_most(size * batch, 500, torch.empty) for size in (7, 5)]


def buffers_of_two_sizes(batch):
    at_most(batch, 500, torch.empty)
    return at_most(batch, 600, torch.empty)


def a_buffer_for_two_samples_more(batch):
    return at_most(batch + 2, 500, torch.empty)


def a_buffer_for_pairs(batch):
    return at_most(batch * batch, 500, torch.empty)


def a_buffer_that_grows(batch):
    return at_most(batch, 500, torch.empty).resize_(1000)


def in_pieces(batch):
    return [features(batch)[start:start + 32].clone() for start in range(0, batch, 32)]


def one_by_one(batch):
    return [row * 2 for row in features(batch)]


def in_eight_parts(batch):
    return torch.empty(batch // 8, 7)


def with_two_more(batch):
    return torch.cat([features(batch), torch.empty(2, 7)])


def all_pairs_once(batch):
    return torch.pdist(features(batch))


def asks_all_the_time(batch):
    """Torch ends the process where a question for the device, as each `ones_like` asks it, is answered with an exception."""
    return [torch.ones_like(torch.empty(3)) for _ in range(3000)]


@pytest.mark.parametrize("work", [
    two_buffers, buffers_of_two_sizes, a_buffer_for_two_samples_more, a_buffer_for_pairs, a_buffer_that_grows, in_pieces,
    one_by_one, in_eight_parts, with_two_more, all_pairs_once, asks_all_the_time,
])
def test_what_is_neither_constant_nor_proportional_is_refused_at_once(work, monkeypatch):
    """In time, and in memory: a batch of millions is not gone through sample by sample."""
    monkeypatch.setattr("dfed.memory.probe._MOST_OPERATORS", 2000)
    with pytest.raises(NotProportional):
        predict_lines(nothing, lambda _: work(PROBE_BATCH))


def test_a_buffer_has_the_smaller_of_two_sizes():
    assert [at_most(size, 5, torch.empty).numel() for size in (0, 4, 5, 6, 10**9)] == [0, 4, 5, 5, 5]
    # One that does not depend on the batch, in a prediction for all of them.
    assert [level.at(3) for level in predict_lines(nothing, lambda _: at_most(4, 5, torch.empty))] == [16]
