import math

import pytest
import torch

from dfed.comm import wire
from dfed.comm.codecs import Codec
from dfed.errors import WireError
from dfed.rng import torch_generator

NAMES = ["bf16", "fp16", "fp32"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 3, 5, 7), (4, 0, 3)]


def values(shape, scale=1.0):
    return torch.randn(shape, generator=torch_generator(1, "test", len(shape))) * scale


def encoded(codec, value):
    data = torch.full((codec.num_bytes(value.shape),), 0xAB, dtype=torch.uint8)
    codec.encode_into(value, data)
    return data


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_size_and_error_bound(name):
    codec = wire.codec_of(name)
    assert isinstance(codec, Codec)
    assert codec.name == name
    assert wire.codec_of(name) is codec
    for shape in SHAPES:
        for scale in (1e-7, 1e-3, 1.0, 1e3):
            value = values(shape, scale)
            copy, data = value.clone(), encoded(codec, value)
            assert data.numel() == codec.num_bytes(shape) == math.prod(shape) * DTYPES[name].itemsize
            decoded = codec.decode(data, shape)
            assert decoded.dtype == torch.float32
            assert decoded.shape == value.shape
            assert torch.equal(value, copy)
            assert torch.equal(decoded, value.to(DTYPES[name]).to(torch.float32))
            error = (decoded.double() - value.double()).abs()
            assert not (error > codec.max_error(value)).any()
            # What was decoded is representable, so sending it on loses nothing more.
            assert torch.equal(codec.decode(encoded(codec, decoded), shape), decoded)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_error_bound_is_tight_and_holds_at_the_edges(name):
    codec, info = wire.codec_of(name), torch.finfo(DTYPES[name])
    tie = torch.tensor([1 + info.eps / 2])  # half-way between two neighbours: the worst case
    error = (codec.decode(encoded(codec, tie), (1,)) - tie).abs().item()
    assert error == info.eps / 2
    assert error <= codec.max_error(tie) <= error * (1 + info.eps)
    subnormal = torch.linspace(-2 * info.smallest_normal, 2 * info.smallest_normal, 4097)
    back = codec.decode(encoded(codec, subnormal), subnormal.shape)
    assert ((back.double() - subnormal.double()).abs() <= codec.max_error(subnormal)).all()
    largest = torch.tensor([info.max, -info.max])
    assert torch.equal(codec.decode(encoded(codec, largest), (2,)), largest)
    beyond = torch.tensor([torch.finfo(torch.float32).max])
    assert codec.decode(encoded(codec, beyond), (1,)).isinf().all()
    assert codec.max_error(beyond) == math.inf


def test_fp32_is_exact_for_every_kind_of_number():
    codec = wire.codec_of("fp32")
    info = torch.finfo(torch.float32)
    value = torch.tensor([0.0, -0.0, info.max, -info.max, info.tiny, 1e-45, math.inf, -math.inf, math.nan])
    data = encoded(codec, value)
    assert bytes(data.numpy()) == value.numpy().tobytes()
    assert torch.equal(codec.decode(data, value.shape).view(torch.int32), value.view(torch.int32))
    assert codec.max_error(value[:6]) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_stride_does_not_matter_and_wrong_lengths_are_refused(name):
    codec = wire.codec_of(name)
    value = values((6, 8)).T[::2]
    assert not value.is_contiguous()
    assert torch.equal(encoded(codec, value), encoded(codec, value.contiguous()))
    width = codec.num_bytes((2, 3))
    for length in (0, 1, width - 1, width + 1, 2 * width):
        with pytest.raises(WireError, match=rf"{name} data of shape \(2, 3\) must be {width} bytes, but are {length}"):
            codec.decode(torch.zeros(length, dtype=torch.uint8), (2, 3))
        with pytest.raises(WireError, match=f"must be {width} bytes"):
            codec.encode_into(torch.zeros(2, 3), torch.zeros(length, dtype=torch.uint8))
