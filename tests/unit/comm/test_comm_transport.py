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
    assert transport.broadcast(first) is first
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


APART, SHARED, NO_GPU = ["n cuda:0", "n cuda:1", "m cuda:0"], ["n cuda:0", "n cuda:0"], ["n cpu", "n cpu"]


@pytest.mark.parametrize(("name", "device", "places", "backend", "reason"), [
    ("auto", GPU, APART, "nccl", "a GPU of its own"),
    ("auto", GPU, SHARED, "gloo", "share a GPU"),
    ("auto", CPU, NO_GPU, "gloo", "on the CPU"),
    ("gloo", GPU, APART, "gloo", "asks for it"),
    ("gloo", CPU, NO_GPU, "gloo", "asks for it"),
    ("nccl", GPU, APART, "nccl", "asks for it"),
])
def test_backend_choice(monkeypatch, name, device, places, backend, reason):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    chosen, why = _choose_backend(BackendSettings(name=name), device, places)
    assert chosen == backend
    assert reason in why


@pytest.mark.parametrize(("device", "places"), [(GPU, SHARED), (CPU, NO_GPU), (CPU, ["n cpu", "m cpu"])])
def test_nccl_is_refused_without_a_gpu_for_each_rank(device, places):
    with pytest.raises(ConfigError, match=r"`backend\.name` must be 'auto' or 'gloo' .* but is 'nccl'"):
        _choose_backend(BackendSettings(name="nccl"), device, places)


def test_backend_settings():
    assert BackendSettings().model_dump() == {"name": "auto", "device": "auto", "timeout_s": 600.0, "threads": 1}
    for bad in ({"name": "mpi"}, {"timeout_s": 0.0}, {"threads": 0}, {"device": "tpu"}, {"port": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            BackendSettings(**bad)
