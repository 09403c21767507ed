"""nHSIC against its definition, in float64 with explicit centring matrices."""

import math

import numpy as np
import pytest
import torch

from dfed import rng
from dfed.blocks.hsic import SIGMA, centred_kernel, nhsic


def naive_kernel(x, sigma=SIGMA):
    x = x.reshape(len(x), -1).astype(np.float64)
    return np.array([[math.exp(-((a - b) ** 2).sum() / (2 * sigma**2 * x.shape[1])) for b in x] for a in x])


def naive_hsic(first, second):
    m = len(first)
    h = np.eye(m) - np.ones((m, m)) / m
    return np.trace(first @ h @ second @ h) / m**2


def naive(x, y):
    first, second = naive_kernel(x), naive_kernel(y)
    return naive_hsic(first, second) / math.sqrt(naive_hsic(first, first) * naive_hsic(second, second))


@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_the_definition_says(seed):
    generator = rng.torch_generator(seed, "test hsic")
    m = (2, 7, 64)[seed]
    x = torch.randn(m, 3, 8, 8, generator=generator) + 2.0  # a mean that does not matter to distances
    z = torch.randn(m, 5, 4, 4, generator=generator) * 3 + x[:, :1, ::2, ::2]
    labels = torch.nn.functional.one_hot(torch.arange(m) % 3, 3).float()
    for first, second in ((x, z), (x, labels), (z, labels), (x, x)):
        found = nhsic(centred_kernel(first), centred_kernel(second))
        assert found.dtype == torch.float32
        # Kernels are near 1 and differ in the second digit; float32 leaves four digits of these differences, or more.
        assert float(found) == pytest.approx(naive(first.numpy(), second.numpy()), rel=2e-4, abs=2e-5)
        # The same products, added in another order.
        assert nhsic(centred_kernel(second), centred_kernel(first)) == pytest.approx(float(found), rel=1e-5)
    assert float(nhsic(centred_kernel(z), centred_kernel(z))) == pytest.approx(1, abs=1e-5)
    h = np.eye(m) - np.ones((m, m)) / m
    # Rounding of float32 in entries near 1.
    np.testing.assert_allclose(centred_kernel(z).numpy(), h @ naive_kernel(z.numpy()) @ h, atol=2e-6)


def test_gradients_are_those_of_finite_differences():
    generator = rng.torch_generator(5, "test hsic")
    x, z = torch.randn(6, 4, generator=generator), torch.randn(6, 3, generator=generator)
    z.requires_grad_(True)
    nhsic(centred_kernel(x), centred_kernel(z)).backward()
    step = 1e-4
    for place in ((0, 0), (2, 1), (5, 2)):
        values = []
        for sign in (1, -1):
            moved = z.detach().double().numpy().copy()
            moved[place] += sign * step
            values.append(naive(x.numpy(), moved))
        # float32 kernels: three digits of a gradient of order 0.1.
        assert float(z.grad[place]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=5e-3, abs=2e-4)


def test_batches_without_spread_say_nothing():
    for batch in (torch.ones(1, 4), torch.ones(5, 4), torch.zeros(3, 2)):
        z = torch.randn(len(batch), 3, generator=rng.torch_generator(1, "test hsic")).requires_grad_(True)
        found = nhsic(centred_kernel(batch), centred_kernel(z))
        assert float(found.detach()) == pytest.approx(0, abs=1e-4)
        found.backward()
        assert torch.isfinite(z.grad).all()


def test_half_precision_inputs_are_taken_in_float32():
    x = torch.randn(8, 16, generator=rng.torch_generator(2, "test hsic")).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        kernel = centred_kernel(x)
        found = nhsic(kernel, kernel)
    assert kernel.dtype == found.dtype == torch.float32
    assert torch.equal(kernel, centred_kernel(x.float()))
