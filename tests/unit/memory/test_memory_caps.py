import contextlib
import resource
import sys

import pytest
import torch
from torch import nn

from dfed.errors import ConfigError
from dfed.memory import MemorySettings, is_out_of_memory, make_cap, malloc, measure
from dfed.memory.caps import CudaCap, Uncapped

CPU = torch.device("cpu")
MIB = 2**20


def raised(make):
    try:
        make()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def chained(outer, inner, *, explicit):
    def make():
        try:
            raise inner
        except type(inner) as error:
            if explicit:
                raise outer from error
            raise outer  # noqa: B904 - the case without a cause

    return raised(make)


def test_what_counts_as_out_of_memory():
    # The real thing: torch is asked for more than any address space has.
    assert is_out_of_memory(raised(lambda: torch.empty(2**45)))
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("std::bad_alloc"),
                  RuntimeError("could not create a primitive"), OSError(12, "Cannot allocate memory"),
                  RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive")):
        assert is_out_of_memory(error)
        assert is_out_of_memory(chained(ValueError("x"), error, explicit=True))
        assert is_out_of_memory(chained(ValueError("x"), error, explicit=False))
    for error in (ValueError("out of memory"), RuntimeError("shapes do not match"), KeyError("x"), OSError(2, "no file"),
                  KeyboardInterrupt(), chained(ValueError("x"), KeyError("y"), explicit=True)):
        assert not is_out_of_memory(error)
    loop = RuntimeError("a")
    loop.__cause__ = RuntimeError("b")
    loop.__cause__.__cause__ = loop
    assert not is_out_of_memory(loop)


def test_a_hard_cap_is_refused_where_there_is_none(monkeypatch):
    roomy = []
    monkeypatch.setattr(malloc, "tight", lambda: pytest.fail("must not be touched"))
    monkeypatch.setattr(malloc, "roomy", lambda: roomy.append(1))
    for platform in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", platform)
        said = rf"`memory\.enforce` must be 'predicted' or 'off' on this system \({platform}, cpu\)"
        with pytest.raises(ConfigError, match=said):
            make_cap(MemorySettings(), CPU, has_budgets=True)
        for cap in (make_cap(MemorySettings(enforce="off"), CPU, has_budgets=True),
                    make_cap(MemorySettings(), CPU, has_budgets=False)):
            assert type(cap) is Uncapped
            with cap.guard(1) as meter:
                assert torch.ones(1000).sum() == 1000
            assert meter.peak_bytes is None  # there is no measurement here
    assert len(roomy) == 4
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(malloc, "tight", lambda: False)  # Linux with another C library
    with pytest.raises(ConfigError, match=r"`memory\.enforce` must be 'predicted' or 'off' on this system \(linux, cpu\)"):
        make_cap(MemorySettings(), CPU, has_budgets=True)
    assert isinstance(make_cap(MemorySettings(), torch.device("cuda", 0), has_budgets=True), CudaCap)
    with pytest.raises(ValueError, match="enforce"):
        MemorySettings(enforce="soft")


def test_without_enforcement_there_is_no_cap():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    cap = Uncapped(CPU)
    for error in (None, KeyError("x")):
        with contextlib.suppress(KeyError), cap.guard(MIB) as meter:
            assert resource.getrlimit(resource.RLIMIT_DATA) == before
            kept = torch.ones(4 * MIB)
            if error is not None:
                raise error
        if meter.peak_bytes is not None:
            # What this process's allocator kept from other tests is anybody's guess: figures are checked in fresh processes.
            assert meter.peak_bytes >= 0
        del kept
    with cap.guard(None, measure_peak=False) as meter:
        pass
    assert meter.peak_bytes is None


def test_measurements():
    malloc.trim()  # or what other tests left resident would serve the request below
    data, resident = measure.data_segment_bytes(), measure.resident_bytes()
    assert data % 1024 == resident % 1024 == 0
    assert measure.reset_peak_resident() in (True, False)
    kept = torch.ones(16 * MIB)
    assert measure.resident_bytes() - resident > 48 * MIB
    assert measure.peak_resident_bytes() >= measure.resident_bytes() - 2 * MIB  # the counters' lag
    assert kept[0] == 1


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda.is_available() is false")


@pytest.fixture
def gpu():
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)
    yield device
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    torch.cuda.empty_cache()


def gpu_training(device, model, x):
    for parameter in model.parameters():
        parameter.grad = None
    model.to(device)(x.to(device)).square().mean().backward()
    return [parameter.grad.cpu() for parameter in model.parameters()]


@pytest.mark.gpu
@needs_gpu
def test_gpu_cap_passes_fails_and_recovers(gpu):
    cap = make_cap(MemorySettings(), gpu, has_budgets=True)
    off = make_cap(MemorySettings(enforce="off"), gpu, has_budgets=True)
    start = torch.cuda.memory_allocated(gpu)
    for _ in range(6):
        with cap.guard(96 * MIB) as meter:
            kept = torch.ones(16 * MIB, device=gpu)  # 64 MiB
        assert meter.peak_bytes == 64 * MIB  # whole segments: exact
        del kept
        for budget in (32 * MIB, 4096, 0):
            with pytest.raises(torch.OutOfMemoryError) as caught, cap.guard(budget):
                torch.ones(16 * MIB, device=gpu)
            assert is_out_of_memory(caught.value)
            del caught
        assert torch.cuda.memory_allocated(gpu) == start
    with off.guard(MIB) as meter:
        torch.ones(16 * MIB, device=gpu)
    assert meter.peak_bytes == 64 * MIB
    with pytest.raises(KeyError), cap.guard(32 * MIB):
        raise KeyError("x")
    torch.ones(64 * MIB, device=gpu)  # the cap is lifted


@pytest.mark.gpu
@needs_gpu
def test_gpu_training_after_an_oom_gives_the_same_bits(gpu):
    cap = make_cap(MemorySettings(), gpu, has_budgets=True)
    model = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 8))
    x = torch.linspace(-1, 1, 256 * 2048).view(256, 2048)
    reference = gpu_training(gpu, model, x)
    model.cpu()
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError), cap.guard(20 * MIB):
            gpu_training(gpu, model, x)
        model.cpu()
        with cap.guard(400 * MIB) as meter:
            again = gpu_training(gpu, model, x)
        model.cpu()
        assert all(torch.equal(a, b) for a, b in zip(reference, again, strict=True))
        # Weights and gradients of 16 MiB each are there at once; cuBLAS takes up to 64 MiB to work in.
        assert 32 * MIB <= meter.peak_bytes <= 32 * MIB + 80 * MIB
