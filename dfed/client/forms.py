"""The wire form of a plan: which tensors cross, in which part and codec, and what they weigh in bytes.

Bytes are those of the messages as they are encoded: the prefix and JSON header with the padding that aligns tensors
(``header``), and the encoded entries (``values``, and where the codec has them ``scales``, ``indices`` and ``mask``).

Error feedback (Seide et al. 2014; Karimireddy et al. 2019): what a codec left out of a client's change is kept by the client
and added to its change the next time that it sends this tensor.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dfed.blocks import Splitting
from dfed.comm import wire
from dfed.comm.wire import Entry, Message
from dfed.errors import ConfigError, Fault, UpdateRejected, WireError
from dfed.plan import Plan
from dfed.region import Region
from dfed.strategies import Strategy

__all__ = ["DEFAULT_CODEC", "PREFIX_BYTES", "Form", "Forms", "nothing"]

PREFIX_BYTES = 24
"""Magic number, header length and body length, int64 each, before every message."""

DEFAULT_CODEC = "fp32"
"""The codec of a block that a plan does not name."""


_NONE: Mapping[str, Tensor] = {}
_MOST_FORMS = 256  # of channels drawn for one client and round, a form of a large model takes hundreds of KiB


@dataclass(frozen=True)
class Form:
    """The messages of all plans of one shape.

    Attributes:
        regions: The part of each global tensor that the client holds, by name.
        down, up: Places of the tensors in the body of a payload and of an update.
        down_body_bytes, up_body_bytes: Lengths of those bodies.
        seed: The run's, by which codecs draw.
    """

    regions: Mapping[str, Region]
    down: tuple[Entry, ...]
    up: tuple[Entry, ...]
    down_body_bytes: int
    up_body_bytes: int
    seed: int
    _lengths: dict[tuple[str, int, int], int] = field(default_factory=dict)

    def down_bytes(self, round_index: int, client: int) -> dict[str, int]:
        """Bytes of this client's payload, by part."""
        return self._bytes("payload", self.down, self.down_body_bytes, round_index, client)

    def up_bytes(self, round_index: int, client: int) -> dict[str, int]:
        """Bytes of this client's update, by part."""
        return self._bytes("update", self.up, self.up_body_bytes, round_index, client)

    def received(self, values: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
        """The client's payload: its parts of what was broadcast, which is given by name and codec; float32."""
        return {entry.name: self.regions[entry.name].view(values[entry.name, entry.codec]) for entry in self.down}

    def encode_update(
        self, round_index: int, client: int, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor],
        errors: Mapping[str, Tensor] = _NONE,
    ) -> Message:
        """The update of one client as a message with a body of its own.

        Args:
            tensors: What the strategy sends up, by name; float32, as the wire has them.
            base: What the client :meth:`received`: some codecs are for the change against it.
            errors: What earlier updates left out, by name, to be made up for.
        """
        body = torch.zeros(self.up_body_bytes, dtype=torch.uint8)
        given = {entry.name: _to_encode(entry, tensors, base, errors) for entry in self.up}
        return wire.encode("update", _meta(round_index, client), self.up, given, body, seed=self.seed)

    def decode_update(self, message: Message, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values that the server takes from an update: what :meth:`through_codecs` gives, to the bit.

        Raises:
            WireError: If the message is malformed.
        """
        decoded = wire.decode(message, seed=self.seed)
        return {entry.name: _decoded(entry, decoded[entry.name], base) for entry in self.up}

    def check_update(self, message: Message, round_index: int, client: int, rank: int) -> None:
        """Refuse a message that is not the update of this client in this round.

        Raises:
            WireError: Naming round, client and rank.
        """
        if message.kind != "update" or dict(message.meta) != _meta(round_index, client) or message.entries != self.up:
            raise WireError(f"rank {rank} must send the update of client {client} in round {round_index}, but sent "
                            f"'{message.kind}' {dict(message.meta)} with {len(message.entries)} tensors.")

    def through_codecs(
        self, round_index: int, client: int, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor],
        errors: Mapping[str, Tensor] = _NONE,
    ) -> dict[str, Tensor]:
        """What the server would decode from the update, without the message; the tensors themselves where exact.

        Arguments as for :meth:`encode_update`.
        """
        meta, arrives = _meta(round_index, client), {}
        for entry in self.up:
            if entry.codec == DEFAULT_CODEC:
                arrives[entry.name] = _to_encode(entry, tensors, base, errors)
                continue
            key = wire.codec_key(entry, self.seed, "update", meta)
            codec, data = wire.codec_of(entry.codec), torch.empty(entry.num_bytes, dtype=torch.uint8)
            codec.encode_into(_to_encode(entry, tensors, base, errors), data, key)
            arrives[entry.name] = _decoded(entry, codec.decode(data, entry.shape, key), base)
        return arrives

    def left_out(self, tensors: Mapping[str, Tensor], arrives: Mapping[str, Tensor],
                 errors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the server lacks of the update, by name, for those codecs that leave something of the change out.

        Args:
            tensors, errors: As given to the encoding.
            arrives: What the server gets.
        """
        names = [entry.name for entry in self.up if wire.codec_of(entry.codec).takes_feedback]
        return {name: tensors[name] - arrives[name] + errors.get(name, 0.0) for name in names}

    @cached_property
    def down_blocks(self) -> dict[str, dict[str, int]]:
        """Bytes of the payload's tensors by block and part, header apart."""
        return _by_block(self.down)

    @cached_property
    def up_blocks(self) -> dict[str, dict[str, int]]:
        """As :attr:`down_blocks`, of the update."""
        return _by_block(self.up)

    @cached_property
    def _parts(self) -> dict[str, dict[str, int]]:
        return {"payload": _total(self.down_blocks), "update": _total(self.up_blocks)}

    def _bytes(self, kind: str, entries: tuple[Entry, ...], body_bytes: int, round_index: int, client: int) -> dict[str, int]:
        parts = self._parts[kind]
        key = (kind, len(str(round_index)), len(str(client)))
        if key not in self._lengths:
            message = Message(kind, _meta(round_index, client), entries, torch.empty(body_bytes, dtype=torch.uint8,
                                                                                     device="meta"))
            self._lengths[key] = wire.encode_header(message.header()).numel()
        return {"header": PREFIX_BYTES + self._lengths[key] + body_bytes - sum(parts.values()), **parts}


def nothing(round_index: int, client: int) -> Message:
    """Stands for the update of a client that has none."""
    return Message("nothing", _meta(round_index, client), (), torch.empty(0, dtype=torch.uint8))


def _meta(round_index: int, client: int) -> dict[str, int]:
    return {"round": round_index, "client": client}


def _by_block(entries: tuple[Entry, ...]) -> dict[str, dict[str, int]]:
    blocks: dict[str, dict[str, int]] = {}
    for entry in entries:
        block = blocks.setdefault(entry.block, {})
        for part, size in wire.codec_of(entry.codec).parts(entry.shape).items():
            block[part] = block.get(part, 0) + size
    return blocks


def _total(blocks: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    total = {"values": 0}
    for block in blocks.values():
        for part, size in block.items():
            total[part] = total.get(part, 0) + size
    return total


def _to_encode(entry: Entry, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], errors: Mapping[str, Tensor]) -> Tensor:
    """The value, or its change, with what was left out before, where the codec is for that.

    Raises:
        UpdateRejected: If it is not finite and the codec cannot say so.
    """
    value = tensors[entry.name]
    if value.dtype != torch.float32 or tuple(value.shape) != entry.shape:
        raise TypeError(f"a strategy must upload '{entry.name}' as float32 of shape {entry.shape}, but uploads {value.dtype} "
                        f"of shape {tuple(value.shape)}.")
    if entry.codec != DEFAULT_CODEC and not bool(torch.isfinite(value).all()):
        raise UpdateRejected("non_finite", f"tensor '{entry.name}' must be finite, but has entries that are not.")
    if not wire.codec_of(entry.codec).of_change:
        return value
    change = value - base[entry.name]
    return change + errors[entry.name] if entry.name in errors and wire.codec_of(entry.codec).takes_feedback else change


def _decoded(entry: Entry, value: Tensor, base: Mapping[str, Tensor]) -> Tensor:
    return value + base[entry.name] if wire.codec_of(entry.codec).of_change else value


class Forms:
    """The form of each plan, made once per shape of plan.

    Args:
        shapes: Of the global tensors, by name.
        down, up: Codecs of blocks for which a plan names none.
    """

    def __init__(self, strategy: Strategy, splitting: Splitting, shapes: Mapping[str, tuple[int, ...]], *,
                 down: str = DEFAULT_CODEC, up: str = DEFAULT_CODEC):
        self._strategy, self._splitting, self._shapes = strategy, splitting, shapes
        self._codecs = {"down": down, "up": up}
        self._known: OrderedDict[str, Form] = OrderedDict()

    def of(self, plan: Plan) -> Form:
        """The form of this plan's messages."""
        key = plan.shape_key()
        if key not in self._known:
            self._known[key] = self._make(plan)
            while len(self._known) > _MOST_FORMS:  # windows that move have other forms each round
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _make(self, plan: Plan) -> Form:
        held = {name: shape for name, shape in self._shapes.items() if self._splitting.block_of(name) in plan.hold}
        regions = {name: self._strategy.region(name, shape, plan) for name, shape in held.items()}
        parts = {name: regions[name].shape(shape) for name, shape in held.items()}
        down, down_body_bytes = self._layout(parts, plan.down, self._codecs["down"])
        sent = {}
        for name, shape in parts.items():
            probe = self._strategy.upload(name, torch.empty(shape, device="meta"), regions[name], plan)
            if probe is not None and tuple(probe.shape) != shape:
                message = (f"must upload of each tensor the part that its client holds, but uploads '{name}' of shape "
                           f"{tuple(probe.shape)} instead of {shape}.")
                raise ConfigError([Fault("strategy", message)])
            if probe is not None:
                sent[name] = shape
        up, up_body_bytes = self._layout(sent, plan.up, self._codecs["up"])
        return Form(regions, down, up, down_body_bytes, up_body_bytes, self._strategy.problem.seed)

    def _layout(
        self, shapes: Mapping[str, tuple[int, ...]], codecs: Mapping[str, str], default: str
    ) -> tuple[tuple[Entry, ...], int]:
        tensors = []
        for name, shape in shapes.items():
            block = self._splitting.block_of(name)
            codec = codecs.get(block, default)
            if len(shape) < 2 and wire.codec_of(codec).for_matrices:
                codec = DEFAULT_CODEC
            tensors.append((name, block, codec, shape))
        return wire.layout(tensors)
