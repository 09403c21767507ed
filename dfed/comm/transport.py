"""Transport: how messages and sums cross between ranks. The only users of ``torch.distributed`` live in this package.

Rank 0 is the server; every other rank is a client rank. With one process, rank 0 is both, and :class:`Local` takes the
place of the process group: the same program, the same calls.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dfed.comm import wire
from dfed.comm.liveness import Liveness
from dfed.comm.wire import Message
from dfed.errors import RankLost, WireError

__all__ = ["Local", "ProcessGroup", "Transport"]

_MAGIC = 0x64666564
_MAX_BODY_BYTES = 1 << 48
_SERVER = 0


class Transport(ABC):
    """What a round needs of the network.

    Attributes:
        rank, size: Of this process, and the number of processes.
        device: Where tensors must lie for the collectives.
        fabric_bytes: Bytes that this rank handed to collectives, times the ranks that they went to or came from; on the
            server it is the round's whole traffic, since every transfer has the server at one end.
    """

    rank: int
    size: int
    device: torch.device
    fabric_bytes: int = 0

    @property
    def is_server(self) -> bool:
        """Whether this rank is the server."""
        return self.rank == _SERVER

    @property
    def is_client(self) -> bool:
        """Whether this rank plays clients: every rank but the server, and the only rank of one."""
        return self.size == 1 or not self.is_server

    @property
    def client_ranks(self) -> tuple[int, ...]:
        """The ranks that play clients."""
        return (0,) if self.size == 1 else tuple(range(1, self.size))

    @abstractmethod
    def broadcast(self, message: Message | None) -> Message:
        """Server → all (collective). The server passes the message, the others None. Bodies arrive on the CPU.

        What arrives is good until the next broadcast, which may write over it.
        """

    @abstractmethod
    def reduce(self, value: Tensor) -> None:
        """All → server (collective): sum ``value`` (flat, same shape and dtype on every rank) into the server's, in place.

        On other ranks ``value`` is undefined afterwards.
        """

    @abstractmethod
    def gather(self, meta: dict[str, Any]) -> list[dict[str, Any]] | None:
        """All → server (collective): JSON values of every rank, by rank; None on the others."""

    @abstractmethod
    def send(self, message: Message) -> None:
        """This rank → server, point to point. The server takes it with :meth:`receive`."""

    @abstractmethod
    def receive(self, source: int) -> Message:
        """On the server: the next message of rank ``source``."""

    def abandoned(self) -> bool:
        """Whether another rank has given the job up, or is gone. Cheap enough for after every step, not for all."""
        return False

    @abstractmethod
    def close(self, error: BaseException | None = None) -> None:
        """Leave the process group; ``error`` is what ended this rank's part, if it did not end in good order."""


class Local(Transport):
    """One process: the server is the only client rank, nothing crosses anything."""

    def __init__(self) -> None:
        self.rank, self.size, self.device = 0, 1, torch.device("cpu")
        self._queue: list[Message] = []

    def broadcast(self, message: Message | None) -> Message:
        assert message is not None, "the only rank is the server"
        return replace(message, meta=json.loads(json.dumps(message.meta)))  # what the other ranks would see

    def reduce(self, value: Tensor) -> None:
        pass

    def gather(self, meta: dict[str, Any]) -> list[dict[str, Any]] | None:
        return [meta]

    def send(self, message: Message) -> None:
        self._queue.append(message)

    def receive(self, source: int) -> Message:
        assert source == 0, "there is no other rank"
        return self._queue.pop(0)

    def close(self, error: BaseException | None = None) -> None:
        pass


class ProcessGroup(Transport):
    """Several processes over a ``torch.distributed`` process group.

    Args:
        device: Where the backend wants its tensors: the CPU for Gloo, this rank's GPU for NCCL.
        pinned: Whether messages arrive in page-locked memory: where clients train on a GPU.
        liveness: Finds out who died when a collective fails.
    """

    def __init__(self, device: torch.device, liveness: Liveness, *, pinned: bool = False):
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        self._liveness = liveness
        self._round: Any = None
        self._body = wire.Buffer(pinned=pinned)

    def broadcast(self, message: Message | None) -> Message:
        prefix = torch.zeros(3, dtype=torch.int64)
        header = wire.encode_header(message.header()) if message is not None else None
        if message is not None and header is not None:
            prefix = torch.tensor([_MAGIC, header.numel(), message.body.numel()])
            self._round = message.meta.get("round", self._round)
        self._broadcast(prefix)
        magic, header_bytes, body_bytes = (int(number) for number in prefix)
        self._check_prefix(magic, header_bytes, body_bytes, source=_SERVER)
        header = header if header is not None else torch.empty(header_bytes, dtype=torch.uint8)
        body = message.body if message is not None else self._body.of(body_bytes)
        self._broadcast(header)
        if body_bytes:
            self._broadcast(body)
        return message if message is not None else self._assemble(header, body, source=_SERVER)

    def reduce(self, value: Tensor) -> None:
        staged = value.to(self.device)
        with self._guard("reduce"):
            dist.reduce(staged, dst=_SERVER, op=dist.ReduceOp.SUM)
        if self.is_server and staged is not value:
            value.copy_(staged)
        self._count(value, everyone=True)

    def gather(self, meta: dict[str, Any]) -> list[dict[str, Any]] | None:
        mine = wire.encode_header({"kind": "gather", "meta": meta, "entries": [], "body_bytes": 0})
        length = torch.tensor([mine.numel()], device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        with self._guard("all_gather"):
            dist.all_gather(lengths, length)
        self._count(length, everyone=True)
        longest = max(int(number) for number in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[:mine.numel()] = mine.to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.is_server else None
        with self._guard("gather"):
            dist.gather(padded, parts, dst=_SERVER)
        self._count(padded, everyone=True)
        if parts is None:
            return None
        texts = [part[:int(number)].cpu() for part, number in zip(parts, lengths, strict=True)]
        return [self._header(text, source)["meta"] for source, text in enumerate(texts)]

    def send(self, message: Message) -> None:
        header = wire.encode_header(message.header())
        prefix = torch.tensor([_MAGIC, header.numel(), message.body.numel()])
        for part in (prefix, header, message.body):
            if part.numel():
                with self._guard("send"):
                    dist.send(part.to(self.device), dst=_SERVER)
                self._count(part, everyone=False)

    def receive(self, source: int) -> Message:
        prefix = self._receive(torch.zeros(3, dtype=torch.int64), source)
        magic, header_bytes, body_bytes = (int(number) for number in prefix)
        self._check_prefix(magic, header_bytes, body_bytes, source)
        header = self._receive(torch.empty(header_bytes, dtype=torch.uint8), source)
        body = self._receive(torch.empty(body_bytes, dtype=torch.uint8), source)
        return self._assemble(header, body, source)

    def abandoned(self) -> bool:
        return self._liveness.abandoned()

    def close(self, error: BaseException | None = None) -> None:
        self._liveness.leave(error)
        dist.destroy_process_group()

    def _receive(self, value: Tensor, source: int) -> Tensor:
        if not value.numel():
            return value
        staged = value.to(self.device)
        with self._guard(f"receive from rank {source}"):
            dist.recv(staged, src=source)
        self._count(value, everyone=False)
        return staged.cpu()

    def _broadcast(self, value: Tensor) -> None:
        staged = value.to(self.device)
        with self._guard("broadcast"):
            dist.broadcast(staged, src=_SERVER)
        if staged is not value and not self.is_server:
            value.copy_(staged)
        self._count(value, everyone=True)

    def _count(self, value: Tensor, *, everyone: bool) -> None:
        copies = self.size - 1 if everyone and self.is_server else 1
        self.fabric_bytes += value.numel() * value.element_size() * copies

    def _check_prefix(self, magic: int, header_bytes: int, body_bytes: int, source: int) -> None:
        if magic != _MAGIC or not 0 < header_bytes <= wire.MAX_HEADER_BYTES or not 0 <= body_bytes <= _MAX_BODY_BYTES:
            raise WireError(f"rank {self.rank} got a message from rank {source} that does not begin as one "
                            f"(round {self._round}): {magic:#x}, {header_bytes}, {body_bytes}.")

    def _header(self, data: Tensor, source: int) -> dict[str, Any]:
        try:
            return wire.decode_header(data)
        except WireError as error:
            raise WireError(f"rank {self.rank}, message from rank {source}, round {self._round}: {error}") from error

    def _assemble(self, header: Tensor, body: Tensor, source: int) -> Message:
        fields = self._header(header, source)
        self._round = fields["meta"].get("round", self._round)
        if fields["body_bytes"] != body.numel():
            raise WireError(f"rank {self.rank}, message from rank {source}, round {self._round}: the body must be "
                            f"{fields['body_bytes']} bytes, but is {body.numel()}.")
        return Message(fields["kind"], fields["meta"], fields["entries"], body)

    @contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        """Turn a failed collective into an error that names the ranks that died."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            lost = self._liveness.find_lost()
            names = "; ".join(f"rank {rank} {how}" for rank, how in lost.items()) or "no rank could be shown to be lost"
            raise RankLost(f"rank {self.rank} could not complete '{what}' in round {self._round}: {names}. "
                           f"torch.distributed said: {error}", list(lost)) from error
