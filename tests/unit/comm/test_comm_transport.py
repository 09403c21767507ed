import pytest
import torch

from dfed.comm import BackendSettings, Local, Message, join, launched_size, local_rank
from dfed.comm.process_group import _choose_backend, choose_device
from dfed.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def message(kind):
    return Message(kind, {"x": 1}, (), torch.arange(3, dtype=torch.uint8))


def test_local_is_server_and_client_in_one():
    transport = Local()
    assert (transport.rank, transport.size, transport.client_ranks) == (0, 1, (0,))
    assert transport.is_server
    assert transport.is_client
    assert transport.device == torch.device("cpu")
    first, second = message("a"), message("b")
    assert transport.broadcast(first) == first
    value = torch.tensor([1.5, -2.0], dtype=torch.float64)
    transport.reduce(value)
    assert value.tolist() == [1.5, -2.0]
    assert transport.gather({"a": [1, None]}) == [{"a": [1, None]}]
    transport.send(first)
    transport.send(second)
    assert transport.receive(0) is first  # in the order of sending
    assert transport.receive(0) is second
    assert transport.fabric_bytes == 0
    assert not transport.abandoned()
    transport.close()
    with pytest.raises(AssertionError, match="the only rank is the server"):
        transport.broadcast(None)
    with pytest.raises(AssertionError, match="no other rank"):
        transport.receive(1)


def test_one_process_joins_nothing(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (launched_size(), local_rank()) == (1, 0)
    link = join(BackendSettings(), CPU)
    assert isinstance(link.transport, Local)
    assert (link.device, link.backend, link.reason) == (
        torch.device("cpu"), "local", "one process needs no process group"
    )
    assert not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (launched_size(), local_rank()) == (1, 3)
    assert isinstance(join(BackendSettings(name="gloo"), CPU).transport, Local)


def test_a_gpu_that_is_not_there_is_a_fault(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"`backend\.device` must be 'auto' or 'cpu' .* but is 'cuda'"):
        choose_device(BackendSettings(device="cuda"))
    assert choose_device(BackendSettings()) == choose_device(BackendSettings(device="cpu")) == CPU


APART, SHARED, NO_GPU = ["cuda n 1", "cuda n 2", "cuda m 3"], ["cuda n 1", "cuda n 1"], ["cpu n", "cpu n"]
MIXED = ["cuda n 1", "cpu m"]


@pytest.mark.parametrize(("name", "places", "has_nccl", "backend", "reason"), [
    ("auto", APART, True, "nccl", "a GPU of its own"),
    ("auto", APART, False, "gloo", "no NCCL"),
    ("auto", SHARED, True, "gloo", "share a GPU"),
    ("auto", NO_GPU, True, "gloo", "on the CPU"),
    ("auto", MIXED, True, "gloo", "some ranks"),
    ("gloo", APART, True, "gloo", "asks for it"),
    ("gloo", NO_GPU, True, "gloo", "asks for it"),
    ("nccl", APART, True, "nccl", "asks for it"),
])
def test_backend_choice(monkeypatch, name, places, has_nccl, backend, reason):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has_nccl)
    chosen, why = _choose_backend(BackendSettings(name=name), places)
    assert chosen == backend
    assert reason in why


@pytest.mark.parametrize("places", [SHARED, NO_GPU, MIXED])
def test_nccl_is_refused_without_a_gpu_for_each_rank(places):
    with pytest.raises(ConfigError, match=r"`backend\.name` must be 'auto' or 'gloo' .* but is 'nccl'"):
        _choose_backend(BackendSettings(name="nccl"), places)


def test_backend_settings():
    assert BackendSettings().model_dump() == {"name": "auto", "device": "auto", "timeout_s": 600.0, "threads": 1}
    for bad in ({"name": "mpi"}, {"timeout_s": 0.0}, {"threads": 0}, {"device": "tpu"}, {"port": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            BackendSettings(**bad)
