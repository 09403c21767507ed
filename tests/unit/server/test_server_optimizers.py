from __future__ import annotations

import numpy as np
import pytest
import torch

from dfed.registry import SERVER_OPTIMIZERS
from dfed.rng import torch_generator
from dfed.server.optimizers import adam, momentum, sgd, yogi
from dfed.settings import settings_of

NAMES = sorted(SERVER_OPTIMIZERS)
STEPS = 20
# 20 steps of a few float32 operations each, on values of order 1: errors of some 1e-7 a step; where √v + τ is small the
# adaptive ones multiply that by η/τ = 100 at worst.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


def sequence(shape=(4, 3), steps=STEPS):
    generator = torch_generator(5, "test")
    return [torch.randn(shape, generator=generator) for _ in range(steps + 1)]


def naive(name, x, deltas, eta=0.1, b1=0.9, b2=0.99, tau=1e-3):
    """Entry by entry in float64, from the paper; ``deltas(x, t)`` gives the pseudo-gradient."""
    x, m, v = x.astype(np.float64).copy(), np.zeros(x.shape), np.full(x.shape, tau * tau)
    for t in range(STEPS):
        delta = deltas(x, t)
        for i in np.ndindex(x.shape):
            d = delta[i]
            if name == "sgd":
                x[i] += eta * d
            elif name == "momentum":
                m[i] = b1 * m[i] + d
                x[i] += eta * m[i]
            else:
                m[i] = b1 * m[i] + (1 - b1) * d
                v[i] = b2 * v[i] + (1 - b2) * d * d if name == "adam" else (
                    v[i] - (1 - b2) * d * d * np.sign(v[i] - d * d))
                x[i] += eta * m[i] / (np.sqrt(v[i]) + tau)
    return x, {"m": m, "v": v}


def rated(name):
    return SERVER_OPTIMIZERS.get(name)(learning_rate=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_follows_the_paper_in_float64(name):
    old, *means = sequence()
    optimizer, x = rated(name), old
    slots = optimizer.init("w", old)
    for mean in means:
        x, slots = optimizer.step("w", x, mean, slots)
        assert x.dtype == torch.float32
        assert all(value.dtype == torch.float32 and value.shape == x.shape for value in slots.values())
    reference, state = naive(name, old.numpy(), lambda x, t: means[t].numpy().astype(np.float64) - x)
    np.testing.assert_allclose(x.numpy(), reference, **TOLERANCE)
    assert (np.abs(reference - old.numpy()) > 1e-2).all()  # it went somewhere
    assert sorted(slots) == {"sgd": [], "momentum": ["m"]}.get(name, ["m", "v"])
    for slot, value in slots.items():
        np.testing.assert_allclose(value.numpy(), state[slot], **TOLERANCE)


def test_starting_slots():
    tensor = torch.ones(2, 3)
    assert sgd().init("w", tensor) == {}
    assert torch.equal(momentum().init("w", tensor)["m"], torch.zeros(2, 3))
    for factory in (adam, yogi):
        slots = factory(tau=0.5).init("w", tensor)
        assert torch.equal(slots["m"], torch.zeros(2, 3))
        assert torch.equal(slots["v"], torch.full((2, 3), 0.25))


def test_sgd_at_rate_one_is_the_mean_to_the_bit():
    old, mean, *_ = sequence((1000,), 2)
    mean[:3] = torch.tensor([-0.0, 1e-30, 1e30])
    old[:3] = torch.tensor([1.0, 1.0, 1.0])
    new, slots = sgd().step("w", old, mean, {})
    assert torch.equal(new.view(torch.int32), mean.view(torch.int32))
    assert new.data_ptr() != mean.data_ptr()
    assert slots == {}
    assert not torch.equal(old + (mean - old), mean)  # the formula itself would not do


@pytest.mark.parametrize("name", NAMES)
def test_uncovered_entries_and_their_slots_stay(name):
    old, warm, mean = sequence(steps=2)
    optimizer = rated(name)
    x, slots = optimizer.step("w", old, warm, optimizer.init("w", old))
    covered = torch.arange(12).reshape(4, 3) % 2 == 0
    holes = torch.where(covered, mean, torch.nan)
    inputs = [x, holes, covered, *slots.values()]
    before = [value.clone() for value in inputs]
    new, new_slots = optimizer.step("w", x, holes, slots, covered=covered)
    full, full_slots = optimizer.step("w", x, mean, slots)
    assert torch.equal(new, torch.where(covered, full, x))
    assert new_slots.keys() == slots.keys()
    for slot, value in new_slots.items():
        assert torch.equal(value, torch.where(covered, full_slots[slot], slots[slot]))
    for value, copy in zip(inputs, before, strict=True):
        assert torch.equal(value.nan_to_num(), copy.nan_to_num())  # nothing is changed in place
    results = [new, full, *new_slots.values(), *full_slots.values()]
    assert not {r.data_ptr() for r in results} & {value.data_ptr() for value in inputs}
    everything, _ = optimizer.step("w", x, mean, slots, covered=torch.ones_like(covered))
    assert torch.equal(everything, full)
    nothing, kept = optimizer.step("w", x, mean, slots, covered=torch.zeros_like(covered))
    assert torch.equal(nothing, x)
    assert all(torch.equal(kept[slot], slots[slot]) for slot in slots)


def test_momentum_is_torchs_sgd_with_momentum():
    old, *means = sequence()
    parameter = torch.nn.Parameter(old.clone())
    reference = torch.optim.SGD([parameter], lr=0.3, momentum=0.8)
    optimizer, x = momentum(learning_rate=0.3, momentum=0.8), old
    slots = optimizer.init("w", old)
    for mean in means:
        parameter.grad = parameter.detach() - mean
        reference.step()
        x, slots = optimizer.step("w", x, mean, slots)
    torch.testing.assert_close(x, parameter.detach(), **TOLERANCE)


def test_adam_is_torchs_adam_once_its_bias_correction_is_undone():
    # torch steps by lr/c1 · m / (√v/√c2 + eps), c = 1 − βᵗ; lr = η c1/√c2 and eps = τ/√c2 give η m / (√v + τ).
    old, *means = sequence()
    eta, beta1, beta2, tau = 0.1, 0.9, 0.99, 1e-3
    parameter = torch.nn.Parameter(old.clone())
    reference = torch.optim.Adam([parameter], betas=(beta1, beta2))
    reference.state[parameter] = {
        "step": torch.tensor(0.0), "exp_avg": torch.zeros_like(old), "exp_avg_sq": torch.full_like(old, tau**2)
    }
    optimizer, x = adam(learning_rate=eta, beta1=beta1, beta2=beta2, tau=tau), old
    slots = optimizer.init("w", old)
    for t, mean in enumerate(means, start=1):
        root = (1 - beta2**t) ** 0.5
        reference.param_groups[0].update(lr=eta * (1 - beta1**t) / root, eps=tau / root)
        parameter.grad = parameter.detach() - mean
        reference.step()
        x, slots = optimizer.step("w", x, mean, slots)
    torch.testing.assert_close(x, parameter.detach(), **TOLERANCE)


def test_settings_and_programming_errors():
    assert settings_of(adam)().model_dump() == {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}
    assert settings_of(yogi)().model_dump() == settings_of(adam)().model_dump()
    assert settings_of(sgd)().model_dump() == {"learning_rate": 1.0}
    assert settings_of(momentum)().model_dump() == {"learning_rate": 1.0, "momentum": 0.9}
    for factory, bad in ((sgd, {"learning_rate": 0.0}), (momentum, {"momentum": 1.0}), (adam, {"beta2": -0.1}),
                         (yogi, {"tau": 0.0}), (adam, {"learning_rate": float("inf")})):
        with pytest.raises(ValueError, match=next(iter(bad))):
            settings_of(factory)(**bad)
    with pytest.raises(AssertionError, match="floating point"):
        sgd().step("n", torch.tensor(1), torch.tensor(2), {})
    with pytest.raises(AssertionError, match="differ in kind"):
        sgd().step("n", torch.ones(2), torch.ones(3), {})
    with pytest.raises(AssertionError, match="mask of its shape"):
        sgd().step("n", torch.ones(2), torch.ones(2), {}, covered=torch.ones(2))
