"""The codecs that round or leave out: sizes, error bounds, what is drawn, and what a damaged message does."""

import math
import random

import numpy as np
import pytest
import torch

from dfed.comm import Message, wire
from dfed.comm.codecs import codec_of, places, spec_of
from dfed.errors import WireError
from dfed.registry import CODECS
from dfed.rng import torch_generator

SPECS = [
    "int8", "int8(axis=tensor)", "int8_affine", "int8_affine(axis=tensor)", "int4", "int4(axis=tensor)", "qsgd",
    "qsgd(bits=4,bucket=16)", "top_k", "top_k(density=0.3)", "top_k(density=0.1,values=int8)", "top_k(density=1.0)",
    "random_k", "random_k(density=0.3,unbiased=true)", "random_k(density=0.2,values=fp16)", "bitmask(density=1.0)",
]
# The last two are larger than the pieces in which codecs work, in one row and in many.
SHAPES = [(), (0,), (1,), (7,), (3, 5), (4, 0, 3), (2, 3, 5, 7), (1, 70_001), (300, 257)]


def values(shape, scale=1.0, key=1):
    return torch.randn(shape, generator=torch_generator(key, "test", len(shape))) * scale


def encoded(codec, value, key=5):
    data = torch.full((codec.num_bytes(value.shape),), 0xAB, dtype=torch.uint8)
    codec.encode_into(value, data, key)
    return data


@pytest.mark.parametrize("spec", SPECS)
def test_round_trip_size_and_error_bound(spec):
    codec = codec_of(spec)
    assert codec is codec_of(spec)
    assert codec.name == spec
    for shape in SHAPES:
        for scale in (0.0, 1e-38, 1e-30, 1e-3, 1.0, 1e30):
            value = values(shape, scale)
            copy, data = value.clone(), encoded(codec, value)
            assert torch.equal(value, copy)
            assert torch.equal(data, encoded(codec, value))  # every byte is written, and the same each time
            decoded = codec.decode(data, shape, 5)
            assert decoded.dtype == torch.float32
            assert decoded.shape == value.shape
            error = (decoded.double() - value.double()).abs()
            assert not (error > codec.max_error(value)).any(), (shape, scale)
    strided = values((6, 40)).T[::2]
    assert torch.equal(encoded(codec, strided), encoded(codec, strided.contiguous()))
    width = codec.num_bytes((20, 3))
    for length in {0, 1, width - 1, width + 1} - {width}:
        with pytest.raises(WireError, match=rf"must be {width} bytes, but are {length}"):
            codec.decode(torch.zeros(length, dtype=torch.uint8), (20, 3))
        with pytest.raises(WireError, match=f"must be {width} bytes"):
            codec.encode_into(torch.zeros(20, 3), torch.zeros(length, dtype=torch.uint8))


@pytest.mark.parametrize("spec", [*SPECS, "fp32", "fp16"])
def test_parts_add_up_to_the_size(spec):
    codec = codec_of(spec)
    for shape in SHAPES:
        parts = codec.parts(shape)
        assert sum(parts.values()) == codec.num_bytes(shape)
        assert all(size >= 0 for size in parts.values())
        assert parts.keys() <= {"values", "scales", "indices", "mask"}
        expected = {"top_k": "indices", "bitmask": "mask", "int8": "scales", "int8_affine": "scales", "qsgd": "scales"}
        assert parts.keys() >= {expected.get(spec.partition("(")[0], "values")}
    indices = codec_of("top_k(density=0.1)").num_bytes((10, 100)) - 400
    assert codec_of("top_k(density=0.1,values=int8)").parts((10, 100)) == {"values": 100, "scales": 4, "indices": indices}
    assert codec_of("bitmask(density=0.25)").parts((8, 8)) == {"values": 64, "mask": 8}


def test_sizes_by_hand():
    shape = (64, 3, 3, 3)  # 1728 entries, 64 channels
    sizes = {
        "int8": 4 * 64 + 1728, "int8(axis=tensor)": 4 + 1728, "int8_affine": 8 * 64 + 1728, "int4": 4 * 64 + 864,
        "qsgd": 4 * 4 + 1728, "qsgd(bits=4)": 4 * 4 + 864, "random_k(density=0.5)": 4 * 864,
        "bitmask(density=0.5)": 4 * 864 + 216, "top_k(density=0.5)": 4 * 864 + 216,
        # 18 entries; Elias-Fano: 6 low bits each (14 bytes), and 18 + 27 + 1 high bits (6 bytes).
        "top_k": 4 * 18 + 14 + 6,
    }
    assert {spec: codec_of(spec).num_bytes(shape) for spec in sizes} == sizes
    assert codec_of("int4(axis=tensor)").num_bytes((3, 3)) == 4 + 5


@pytest.mark.parametrize(("spec", "levels"), [("int8", 127), ("int4", 7)])
def test_integers_against_plain_float64(spec, levels):
    value = values((9, 4, 5)) * torch.logspace(-3, 3, 9).view(9, 1, 1)
    decoded = codec_of(spec).decode(encoded(codec_of(spec), value), value.shape)
    for row, out in zip(value.double().numpy(), decoded.numpy(), strict=True):
        step = np.abs(row).max() / levels
        # Ties apart, which float32 may see otherwise, the nearest multiple; to float32's rounding of step and product.
        np.testing.assert_allclose(out, np.round(row / step) * step, rtol=2e-6, atol=1e-9)
    affine = codec_of("int8_affine").decode(encoded(codec_of("int8_affine"), value.abs()), value.shape)
    for row, out in zip(value.abs().double().numpy(), affine.numpy(), strict=True):
        step = (row.max() - row.min()) / 255
        np.testing.assert_allclose(out, np.round((row - row.min()) / step) * step + row.min(), rtol=2e-5, atol=step * 1e-3)


def test_stochastic_rounding_is_unbiased_and_keyed():
    value = values((4, 64))
    codec = codec_of("qsgd(bits=4,bucket=64)")
    draws = torch.stack([codec.decode(encoded(codec, value, key), value.shape) for key in range(2000)]).double()
    step = value.abs().amax(dim=1, keepdim=True).double() / 7
    # The mean of 2000 draws, each off by less than a step: 5 standard errors, of at most step / 2 each, over 256 entries.
    assert ((draws.mean(dim=0) - value.double()).abs() < 5 * step / 2 / math.sqrt(2000)).all()
    assert len({draw.numpy().tobytes() for draw in draws}) == 2000


@pytest.mark.parametrize("density", [0.001, 0.01, 0.3, 0.9])
def test_top_k_takes_the_largest_and_of_equals_the_first(density):
    codec = codec_of(f"top_k(density={density})")
    for value in (values((50, 211)), values((3, 11)).round(), torch.zeros(5, 9), values((70_000, 1)).round(decimals=1)):
        flat, kept = value.reshape(-1).numpy(), math.ceil(density * value.numel())
        order = np.lexsort((np.arange(flat.size), -np.abs(flat)))[:kept]
        expected = np.zeros_like(flat)
        expected[order] = flat[order]
        assert np.array_equal(codec.decode(encoded(codec, value), value.shape).reshape(-1).numpy(), expected)


def test_random_k_needs_the_key_and_is_unbiased():
    value = values((40, 25))
    codec = codec_of("random_k(density=0.1,unbiased=true)")
    data = encoded(codec, value, 3)
    mine, other = codec.decode(data, value.shape, 3), codec.decode(data, value.shape, 4)
    assert int((mine != 0).sum()) == 100
    assert torch.equal(mine[mine != 0], value[mine != 0] * 10)
    assert not torch.equal(mine != 0, other != 0)
    mean = torch.stack([codec.decode(encoded(codec, value, key), value.shape, key) for key in range(4000)]).double().mean(dim=0)
    # Each entry is 10 x with probability 0.1: standard deviation 3 |x|; 5 standard errors.
    assert ((mean - value.double()).abs() <= 5 * 3 * value.double().abs() / math.sqrt(4000)).all()


def test_bitmask_is_exact_and_refuses_what_is_too_dense():
    value = values((30, 77)) * (torch.rand(30, 77, generator=torch_generator(2, "mask")) < 0.2)
    codec = codec_of("bitmask(density=0.25)")
    assert torch.equal(codec.decode(encoded(codec, value), value.shape), value)
    with pytest.raises(WireError, match=r"must have at most 578 entries that are not zero, but has 2310 of 2310"):
        encoded(codec, torch.ones(30, 77))


def test_places_against_numpy():
    generator = np.random.default_rng(4)
    for total in (1, 2, 9, 64, 1000, 40_000):
        for kept in {0, 1, total // 300, total // 40, total // 3, total - 1, total} & set(range(total + 1)):
            chosen = np.sort(generator.choice(total, kept, replace=False))
            data = places.encode(chosen, total)
            assert data.nbytes == places.num_bytes(total, kept) <= (total + 7) // 8
            assert np.array_equal(places.decode(data, total, kept), chosen)


def test_names_and_options():
    for name in CODECS:
        assert codec_of(name).name == name
    assert spec_of("top_k", {"values": "int8", "density": 0.01}) == "top_k(density=0.01,values=int8)"
    assert spec_of("random_k", {"unbiased": True}) == "random_k(unbiased=true)"
    assert spec_of("int8", {}) == "int8"
    for spec in ("", "int9", "os:system", "top_k(density=2)", "top_k(density=0)", "top_k(size=3)", "int8(axis=row)",
                 "qsgd(bits=5)", "int8()", "int8(axis)", "int8(axis=tensor", "INT8", "x" * 500, "top_k(density=nan)"):
        with pytest.raises(WireError, match="codec"):
            codec_of(spec)


def test_ten_thousand_damaged_messages():
    """A damaged body is refused, or decodes to tensors of the right shape: no crash, no wrong size."""
    draw, shapes = random.Random(6), {f"t{i}": shape for i, shape in enumerate([(3, 5), (40, 30), (2, 3, 5, 7), (1, 300)])}
    refused = accepted = 0
    for spec in [*SPECS, "fp32", "bf16"]:
        entries, length = wire.layout((name, "b", spec, shape) for name, shape in shapes.items())
        given = {name: values(shape) for name, shape in shapes.items()}
        meta = {"round": 3, "client": 8}
        good = wire.encode("update", meta, entries, given, torch.zeros(length, dtype=torch.uint8), seed=9)
        for _ in range(10_000 // (len(SPECS) + 2) + 1):
            body = good.body.clone()
            for _ in range(draw.choice([1, 2, 30])):
                body[draw.randrange(length)] = draw.randrange(256)
            if draw.random() < 0.2:
                body = body[:draw.randrange(length)]
            try:
                decoded = wire.decode(Message("update", meta, entries, body), seed=9)
            except WireError:
                refused += 1
                continue
            accepted += 1
            assert {name: tuple(value.shape) for name, value in decoded.items()} == shapes
    assert refused > 1500
    assert accepted > 1500
