"""Activation checkpointing: the same bits as without it, from fewer activations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfed.client import ClientSettings
from dfed.errors import DfedError
from dfed.memory import predict_levels
from dfed.models import Chain, build_chain, materialise
from dfed.models.layers import Dropout
from dfed.models.recompute import recomputed
from dfed.planner import chain_costs
from dfed.rng import torch_generator

torch.set_num_threads(1)

CPU = torch.device("cpu")
MODELS = [
    ("cnn", {"channels": [4, 8], "kernel": 3, "hidden": 16, "dropout": [0.25, 0.5], "norm": "batch"}, 8),
    ("vit_tiny", {"depth": 2, "width": 24, "dropout": 0.1}, 8),
    ("resnet8", {"width": 4}, 8),
    ("densenet40", {}, 8),
    ("mobilenet_v2", {}, 8),
]


class Mixed(nn.Module):
    """Norms of several kinds and two draws in one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.batch = nn.BatchNorm2d(6, momentum=None)  # a plain average over the batches seen
        self.drop = Dropout(0.3)
        # Three samples: the mean of three equal numbers may be off by a bit, so a second update shows, even one of weight 0.
        self.instance = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        self.still = nn.BatchNorm2d(6)
        self.again = Dropout(0.3)

    def train(self, mode: bool = True) -> Mixed:
        super().train(mode)
        self.still.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.instance(self.drop(self.batch(self.conv(x))))
        return self.again(F.relu(self.still(x)))


def mixed_chain() -> Chain:
    head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, 10))
    return Chain([("mixed", Mixed()), ("norm", nn.BatchNorm2d(6)), ("head", head)],
                 input_shape=(3, 8, 8), num_classes=10, name="mixed")


def train(chain: Chain, recompute: bool, *, steps: int = 2, batch: int = 3, precision: torch.dtype | None = None) -> dict:
    """Train; everything that could tell the two ways apart, by name."""
    materialise(chain, torch_generator(0, "init"))
    generator = torch_generator(0, "layers")
    chain.set_generator(generator)
    chain.train()
    chain.recompute = recompute
    optimizer = torch.optim.SGD(chain.parameters(), lr=0.05, momentum=0.9)
    x = torch.randn(batch, *chain.input_shape, generator=torch_generator(0, "x"))
    y = torch.arange(batch) % chain.num_classes
    seen = {}
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            loss = F.cross_entropy(chain(x), y)
        seen[f"generator {step}, forward"] = generator.get_state()
        loss.backward()
        optimizer.step()
        seen[f"loss {step}"] = loss.detach()
        seen[f"generator {step}"] = generator.get_state()
        for name, parameter in chain.named_parameters():
            seen[f"gradient {step} {name}"] = parameter.grad.clone()
        for name, tensor in chain.state_dict().items():
            seen[f"state {step} {name}"] = tensor.clone()
    return seen


def assert_same_bits(plain: dict, other: dict) -> None:
    assert plain.keys() == other.keys()
    assert all(value.isfinite().all() for value in plain.values())
    assert [name for name in plain if not torch.equal(plain[name], other[name])] == []


@pytest.mark.parametrize(("name", "options", "size"), MODELS, ids=lambda value: value if isinstance(value, str) else "")
def test_training_gives_the_same_bits(name, options, size):
    plain, other = (
        train(build_chain(name, options, input_shape=(3, size, size), num_classes=10), recompute) for recompute in (False, True)
    )
    assert_same_bits(plain, other)
    state = torch_generator(0, "layers").get_state()
    draws = name in ("cnn", "vit_tiny", "mobilenet_v2")
    assert torch.equal(plain["generator 0"], state) != draws
    assert any("running_mean" in key for key in plain) == (name != "vit_tiny")
    counts = [value.item() for key, value in other.items() if key.startswith("state 1") and key.endswith("num_batches_tracked")]
    assert counts == [2] * len(counts)


def test_norms_and_draws_of_every_kind_give_the_same_bits():
    plain, other = train(mixed_chain(), False, steps=3), train(mixed_chain(), True, steps=3)
    assert_same_bits(plain, other)
    assert plain["state 2 mixed.batch.num_batches_tracked"] == 3
    assert plain["state 2 mixed.still.num_batches_tracked"] == 0
    assert not torch.equal(plain["state 2 mixed.instance.running_mean"], plain["state 1 mixed.instance.running_mean"])


def test_bf16_gives_the_same_bits():
    chains = [build_chain("resnet8", {"width": 4}, input_shape=(3, 8, 8), num_classes=10) for _ in range(2)]
    plain, other = (train(chain, recompute, precision=torch.bfloat16) for chain, recompute in zip(chains, (False, True),
                                                                                                strict=True))
    assert_same_bits(plain, other)


def test_a_second_backward_pass_gives_the_same_gradients_and_changes_nothing_else():
    chain = materialise(mixed_chain(), torch_generator(0, "init")).train()
    generator = torch_generator(0, "layers")
    chain.set_generator(generator)
    chain.recompute = True
    loss = chain(torch.randn(3, 3, 8, 8, generator=torch_generator(0, "x"))).square().sum()
    buffers = {name: buffer.clone() for name, buffer in chain.named_buffers()}
    draws = generator.get_state()
    parameters = list(chain.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in first)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in chain.named_buffers())
    assert torch.equal(generator.get_state(), draws)


class Fails(nn.Module):
    """Passes its input on as often as it is told to."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.times -= 1
        if self.times < 0:
            raise MemoryError("no more")
        return x.sigmoid()


def test_a_second_pass_that_fails_leaves_statistics_and_draws_as_they_were():
    unit = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Dropout(0.5), Fails(1)).train()
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.fill_(0.5)
    generator = torch_generator(0, "layers")
    unit[2].generator = generator
    out = recomputed(unit, torch.rand(2, 3, 4, 4, generator=torch_generator(0, "x")))
    buffers = [buffer.clone() for buffer in unit.buffers()]
    draws = generator.get_state()
    with pytest.raises(MemoryError, match="no more"):
        out.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(buffers, unit.buffers(), strict=True))
    assert buffers[2] == 1
    assert torch.equal(generator.get_state(), draws)
    assert unit[1].momentum == 0.1


def forward_calls(chain: Chain) -> Counter:
    """How often each unit is called; a second pass ends as soon as it has what it is for, so calls count, not returns."""
    calls: Counter = Counter()
    for name in chain.unit_names:
        chain.unit(name).register_forward_pre_hook(lambda _module, _input, name=name: calls.update([name]))
    return calls


def ready(chain: Chain) -> Chain:
    materialise(chain, torch_generator(0, "init")).train()
    chain.set_generator(torch_generator(0, "layers"))
    chain.recompute = True
    return chain


def test_what_is_computed_again():
    shape = (3, 8, 8)
    chain = ready(build_chain("resnet8", {"width": 4}, input_shape=shape, num_classes=10))
    names = chain.unit_names
    assert names == ("stem", "layer1_0", "layer2_0", "layer3_0", "head")
    calls, x = forward_calls(chain), torch.rand(2, *shape)

    def counted(work) -> list[int]:
        calls.clear()
        work()
        return [calls[name] for name in names]

    # The last unit's backward pass follows at once, so its activations are not dropped.
    assert counted(lambda: chain(x).sum().backward()) == [2, 2, 2, 2, 1]
    assert counted(lambda: chain.run(x, stop="layer2_0").sum().backward()) == [2, 2, 0, 0, 0]
    chain.requires_grad_(False)
    assert counted(lambda: chain(x)) == [1] * 5
    # With a gradient for its input alone, a frozen unit keeps activations like any other.
    assert counted(lambda: chain(x.clone().requires_grad_()).sum().backward()) == [2, 2, 2, 2, 1]
    chain.unit("layer2_0").requires_grad_(True)
    assert counted(lambda: chain(x).sum().backward()) == [1, 1, 2, 2, 1]
    with torch.no_grad():
        assert counted(lambda: chain(x)) == [1] * 5
    chain.eval()
    assert counted(lambda: chain(x).sum().backward()) == [1] * 5
    chain.train()
    chain.recompute = False
    assert counted(lambda: chain(x).sum().backward()) == [1] * 5


UNITS, WIDTH, ROWS = 4, 16, 8


def tanh_chain() -> Chain:
    units = [(f"u{i}", nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()))
             for i in range(UNITS)]
    return Chain(units, input_shape=(WIDTH,), num_classes=WIDTH, name="tanh")


@pytest.mark.parametrize(("recompute", "trained", "grad", "tensors"), [
    # Each unit keeps the results of both tanh; the linear layers keep what they take, which is the result before.
    (False, UNITS, True, 2 * UNITS),
    (False, 1, True, 1 + 2),
    # Of each unit only what it takes (the chain's own input is not counted), and the last one keeps its two.
    (True, UNITS, True, UNITS - 1 + 2),
    (True, 2, True, 2 + 2),
    (True, 1, True, 1 + 2),
    # No gradient is asked for: nothing is kept but the result.
    (True, 0, True, 1),
    (True, UNITS, False, 1),
    (False, UNITS, False, 1),
])
def test_what_is_kept_by_hand(recompute, trained, grad, tensors):
    def prepare() -> tuple[Chain, torch.Tensor]:
        chain = tanh_chain().train().requires_grad_(False)
        for name in chain.unit_names[UNITS - trained:]:
            chain.unit(name).requires_grad_(True)
        chain.recompute = recompute
        return chain, torch.empty(ROWS, WIDTH)

    def work(given):
        chain, x = given
        with torch.set_grad_enabled(grad):
            out = chain(x)
        yield
        assert out.requires_grad == (grad and trained > 0)

    level, = predict_levels(prepare, work)
    assert level == tensors * 4 * ROWS * WIDTH


@pytest.mark.parametrize(("name", "options"), [("resnet20", {"width": 4}), ("vit_tiny", {"depth": 4, "width": 24})])
def test_the_peak_is_lower(name, options):
    # Activations make most of these peaks, and of a block's six tensors or more one stays. What is left: the inputs of nine
    # (four) blocks, and all of one block.
    chain = build_chain(name, options, input_shape=(3, 16, 16), num_classes=10)
    peaks = []
    for checkpointing in (False, True):
        costs, plan = chain_costs(chain, ClientSettings(batch_size=32, activation_checkpointing=checkpointing), CPU)
        peaks.append(costs.peak_bytes_at(plan))
    assert peaks[1] < 0.6 * peaks[0]


def test_a_unit_that_changes_its_input_is_refused():
    chain = Chain([("a", nn.Linear(4, 4)), ("b", nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(4, 4))),
                   ("head", nn.Linear(4, 2))], input_shape=(4,), num_classes=2, name="in_place")
    materialise(chain, torch_generator(0, "init")).train()
    x = torch.rand(3, 4)
    chain(x).sum().backward()
    chain.recompute = True
    with pytest.raises(DfedError, match=r"(?s)changes it in place: Sequential.*LeakyReLU.*activation_checkpointing"):
        chain(x)
    with torch.no_grad():
        assert chain(x).shape == (3, 2)
