"""Messages: a JSON header that describes itself, and one flat body of bytes.

Nothing is pickled. A body is a row of encoded tensors, each aligned to 64 bytes; the header's ``entries`` say of each its
name, block, codec, shape, offset and length. Everything is checked against the body's real length before it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfed import rng
from dfed.comm.codecs import codec_of
from dfed.errors import WireError

__all__ = [
    "ALIGNMENT",
    "Buffer",
    "Entry",
    "Message",
    "codec_key",
    "codec_of",
    "decode",
    "decode_all",
    "decode_header",
    "encode",
    "encode_header",
    "layout",
]

ALIGNMENT = 64
MAX_HEADER_BYTES = 1 << 28
_MAX_DIMENSIONS = 16
_MAX_NUMBER = 1 << 48


@dataclass(frozen=True)
class Entry:
    """Where one tensor stands in a body, and how it is encoded."""

    name: str
    block: str
    codec: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def to_json(self) -> list[Any]:
        """The entry as a JSON list, in the order of the fields."""
        return [self.name, self.block, self.codec, list(self.shape), self.offset, self.num_bytes]


@dataclass(frozen=True)
class Message:
    """A header's free part and the tensors' places, with the body that holds them.

    Attributes:
        kind: What the message is, e.g. ``"round"``.
        meta: JSON values.
        entries: One per tensor.
        body: uint8, flat.
    """

    kind: str
    meta: Mapping[str, Any]
    entries: tuple[Entry, ...]
    body: Tensor

    def header(self) -> dict[str, Any]:
        """The header as JSON values."""
        return {
            "kind": self.kind,
            "meta": self.meta,
            "entries": [entry.to_json() for entry in self.entries],
            "body_bytes": self.body.numel(),
        }


class Buffer:
    """Keeps the memory of a message's body from one message to the next, which overwrites the one before.

    Args:
        pinned: Whether the memory is page-locked, for copies to and from a GPU.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._body = torch.empty(0, dtype=torch.uint8)

    def of(self, num_bytes: int) -> Tensor:
        """A uint8 tensor of this length, whose contents are not defined."""
        if self._body.numel() < num_bytes:
            self._body = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        return self._body[:num_bytes]


def layout(tensors: Iterable[tuple[str, str, str, tuple[int, ...]]]) -> tuple[tuple[Entry, ...], int]:
    """Places in one body for tensors given as (name, block, codec, shape). Returns the entries and the body's length."""
    entries, offset = [], 0
    for name, block, codec, shape in tensors:
        num_bytes = codec_of(codec).num_bytes(shape)
        entries.append(Entry(name, block, codec, tuple(shape), offset, num_bytes))
        offset += -(-num_bytes // ALIGNMENT) * ALIGNMENT
    return tuple(entries), offset


def encode(
    kind: str, meta: Mapping[str, Any], entries: Iterable[Entry], tensors: Mapping[str, Tensor] | Callable[[Entry], Tensor],
    body: Tensor, *, seed: int = 0,
) -> Message:
    """Encode ``tensors`` into ``body`` (uint8, as long as :func:`layout` said), which the message then refers to.

    Args:
        entries: In the order of their offsets.
        tensors: By name; or what gives each entry's, as it is encoded.
        seed: The run's; codecs that draw do so by it, the round, the client and the tensor's name.
    """
    entries, filled = tuple(entries), 0
    value_of = tensors if callable(tensors) else lambda entry: tensors[entry.name]
    for entry in entries:
        body[filled:entry.offset] = 0  # what lies between tensors crosses too
        filled = entry.offset + entry.num_bytes
        codec_of(entry.codec).encode_into(value_of(entry), _part(body, entry), codec_key(entry, seed, kind, meta))
    body[filled:] = 0
    return Message(kind, meta, entries, body)


def codec_key(entry: Entry, seed: int, kind: str, meta: Mapping[str, Any]) -> int:
    """What a codec draws by, for one tensor of one message; the same on both sides, and another for each message."""
    if not codec_of(entry.codec).is_keyed:
        return 0
    return rng.key(seed, "codec", kind, str(meta.get("round")), str(meta.get("client")), entry.name)


def decode(message: Message, *, seed: int = 0) -> dict[str, Tensor]:
    """The message's tensors by name, float32, where each is there in one codec; they may share memory with the body.

    Raises:
        WireError: If an entry does not fit its codec or the body, or a tensor is there in two codecs.
    """
    values = decode_all(message, seed=seed)
    if len({name for name, _ in values}) != len(values):
        raise WireError(f"message '{message.kind}' must hold each tensor once, but holds one in several codecs.")
    return {name: value for (name, _), value in values.items()}


def decode_all(message: Message, *, seed: int = 0) -> dict[tuple[str, str], Tensor]:
    """The message's tensors by name and codec, float32; they may share memory with the body.

    Raises:
        WireError: If an entry does not fit its codec or the body.
    """
    return {
        (entry.name, entry.codec): codec_of(entry.codec).decode(
            _part(message.body, entry), entry.shape, codec_key(entry, seed, message.kind, message.meta)
        )
        for entry in message.entries
    }


def _part(body: Tensor, entry: Entry) -> Tensor:
    return body[entry.offset:entry.offset + entry.num_bytes]


def encode_header(header: Mapping[str, Any]) -> Tensor:
    """A header as a flat uint8 tensor of UTF-8 JSON."""
    return torch.frombuffer(bytearray(json.dumps(header, separators=(",", ":")).encode()), dtype=torch.uint8)


def decode_header(data: Tensor) -> dict[str, Any]:
    """The header in ``data`` (uint8, flat), with ``entries`` as :class:`Entry` objects, all checked.

    Raises:
        WireError: If it is no JSON, a field is missing or of the wrong type, or an entry's place, size, shape or codec is
            impossible.
    """
    try:
        header = json.loads(bytes(data.numpy()).decode())
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or a number of too many digits
        raise WireError(f"a header must be JSON, but is not: {error}.") from error
    if not isinstance(header, dict):
        raise WireError("a header must be a JSON object, but is none.")
    for field, kind in (("kind", str), ("meta", dict), ("entries", list), ("body_bytes", int)):
        if not isinstance(header.get(field), kind) or isinstance(header[field], bool):
            raise WireError(f"header field `{field}` must be a {kind.__name__}, but is {header.get(field)!r:.80}.")
    if header["body_bytes"] < 0:
        raise WireError(f"header field `body_bytes` must be at least 0, but is {header['body_bytes']}.")
    header["entries"] = tuple(_entry(value, header["body_bytes"]) for value in header["entries"])
    if len({(entry.name, entry.codec) for entry in header["entries"]}) != len(header["entries"]):
        raise WireError("a header must name each tensor once for each codec, but names one twice.")
    return header


def _entry(value: Any, body_bytes: int) -> Entry:
    if not isinstance(value, list) or len(value) != 6 or not all(isinstance(text, str) for text in value[:3]):
        raise WireError(f"a header's entry must have 6 fields, the first three text, but is {value!r:.80}.")
    name, block, codec, shape, offset, num_bytes = value
    numbers = [*(shape if isinstance(shape, list) else [None]), offset, num_bytes]
    # Strides are products of sizes, also in a tensor that has no entries because one of its sizes is 0.
    if (not all(type(number) is int and 0 <= number < _MAX_NUMBER for number in numbers) or len(shape) > _MAX_DIMENSIONS
            or math.prod(max(1, size) for size in shape) >= _MAX_NUMBER):
        raise WireError(f"tensor '{name}' of block '{block}' must have a shape and a place of whole numbers, but has "
                        f"{shape!r:.80}, {offset!r:.40}, {num_bytes!r:.40}.")
    if offset % ALIGNMENT or offset + num_bytes > body_bytes:
        raise WireError(f"tensor '{name}' of block '{block}' must lie inside the body ({body_bytes} bytes), aligned to "
                        f"{ALIGNMENT}, but lies at {offset} … {offset + num_bytes}.")
    expected = codec_of(codec).num_bytes(shape)
    if num_bytes != expected:
        raise WireError(f"tensor '{name}' of block '{block}' must take {expected} bytes as {codec}, but takes {num_bytes}.")
    return Entry(name, block, codec, tuple(shape), offset, num_bytes)
