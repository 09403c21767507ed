import copy
import json
import random

import pytest
import torch

from dfed.comm import wire
from dfed.comm.wire import ALIGNMENT, Entry, Message
from dfed.errors import WireError
from dfed.rng import torch_generator

SHAPES = {"a.weight": (3, 5), "a.bias": (), "b.weight": (0, 4), "b.bias": (33,), "c.weight": (2, 3, 4)}
CODEC_OF = {"a": "fp32", "b": "fp16", "c": "bf16"}


def block_of(name):
    return name.partition(".")[0]


PLACES = [(name, block_of(name), CODEC_OF[block_of(name)], shape) for name, shape in SHAPES.items()]


def tensors():
    generator = torch_generator(2, "test")
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def message(meta=None):
    entries, length = wire.layout(PLACES)
    body = torch.zeros(length, dtype=torch.uint8)
    return wire.encode("update", meta if meta is not None else {"round": 3, "client": 7}, entries, tensors(), body)


def received(sent):
    """The message as it comes off the wire: from the bytes of header and body alone."""
    header = wire.decode_header(wire.encode_header(sent.header()))
    assert header["body_bytes"] == sent.body.numel()
    return Message(header["kind"], header["meta"], header["entries"], sent.body.clone())


def header_bytes(value):
    text = value if isinstance(value, (bytes, bytearray)) else json.dumps(value).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def test_layout_is_aligned_gapless_and_exact():
    entries, length = wire.layout(PLACES)
    assert [entry.name for entry in entries] == list(SHAPES)
    expected = 0
    for entry in entries:
        assert entry.offset == expected
        assert entry.offset % ALIGNMENT == 0
        assert entry.codec == CODEC_OF[entry.block]
        assert entry.num_bytes == wire.codec_of(entry.codec).num_bytes(SHAPES[entry.name])
        expected = -(-(entry.offset + entry.num_bytes) // ALIGNMENT) * ALIGNMENT
    assert length == expected
    assert wire.layout([]) == ((), 0)


def test_message_survives_the_wire():
    sent = message({"round": 3, "text": "Ω\ud800\"\\", "list": [1, 2.5, None, True], "nested": {"x": -0.1}})
    got = received(sent)
    assert (got.kind, got.meta, got.entries) == (sent.kind, sent.meta, sent.entries)
    decoded = wire.decode(got)
    assert list(decoded) == list(SHAPES)
    dtypes = {"a": torch.float32, "b": torch.float16, "c": torch.bfloat16}
    for name, value in tensors().items():
        assert torch.equal(decoded[name], value.to(dtypes[block_of(name)]).float())
    empty = received(Message("stop", {}, (), torch.empty(0, dtype=torch.uint8)))
    assert (empty.kind, wire.decode(empty)) == ("stop", {})
    twice, length = wire.layout([("x", "x", "fp32", (3,)), ("x", "x", "fp16", (3,))])
    both = received(wire.encode("round", {}, twice, {"x": torch.ones(3)}, torch.zeros(length, dtype=torch.uint8)))
    assert set(wire.decode_all(both)) == {("x", "fp32"), ("x", "fp16")}
    with pytest.raises(WireError, match="once, but holds one in several codecs"):
        wire.decode(both)


def test_a_body_that_is_too_short_is_refused():
    sent = message()
    last = sent.entries[-1]
    assert last.name == "c.weight"
    for length in range(0, last.offset + last.num_bytes, 16):
        with pytest.raises(WireError, match=r"must be .* bytes, but are"):
            wire.decode(Message(sent.kind, sent.meta, sent.entries, sent.body[:length]))


ENTRY = ["a", "a", "fp32", [2], 0, 8]


def with_entry(**changes):
    fields = dict(zip(("name", "block", "codec", "shape", "offset", "num_bytes"), ENTRY, strict=True)) | changes
    return {"kind": "k", "meta": {}, "entries": [list(fields.values())], "body_bytes": 64}


@pytest.mark.parametrize(("header", "text"), [
    (b"", "must be JSON"),
    (b"\xff\xfe", "must be JSON"),
    (b"{", "must be JSON"),
    (b"[]", "must be a JSON object"),
    (b"null", "must be a JSON object"),
    (b'{"kind": "k", "meta": {}, "entries": [], "body_bytes": ' + b"9" * 5000 + b"}", "must be JSON"),
    ({"meta": {}, "entries": [], "body_bytes": 0}, "`kind` must be a str, but is None"),
    ({"kind": "k", "meta": [], "entries": [], "body_bytes": 0}, "`meta` must be a dict"),
    ({"kind": "k", "meta": {}, "entries": {}, "body_bytes": 0}, "`entries` must be a list"),
    ({"kind": "k", "meta": {}, "entries": [], "body_bytes": True}, "`body_bytes` must be a int"),
    ({"kind": "k", "meta": {}, "entries": [], "body_bytes": 1.0}, "`body_bytes` must be a int"),
    ({"kind": "k", "meta": {}, "entries": [], "body_bytes": -1}, "must be at least 0, but is -1"),
    ({"kind": "k", "meta": {}, "entries": [7], "body_bytes": 0}, "must have 6 fields"),
    ({"kind": "k", "meta": {}, "entries": [ENTRY[:5]], "body_bytes": 64}, "must have 6 fields"),
    ({"kind": "k", "meta": {}, "entries": [ENTRY, ENTRY], "body_bytes": 64}, "names one twice"),
    (with_entry(name=1), "first three text"),
    (with_entry(codec="pickle"), "a codec must be one of bf16, .*, but is 'pickle'"),
    (with_entry(codec="os:system"), "a codec must be one of"),
    (with_entry(shape=2), "whole numbers"),
    (with_entry(shape=None), "whole numbers"),
    (with_entry(shape=[2.0]), "whole numbers"),
    (with_entry(shape=[True, True]), "whole numbers"),
    (with_entry(shape=[-2]), "whole numbers"),
    (with_entry(shape=[1] * 17), "whole numbers"),
    (with_entry(shape=[1 << 60]), "whole numbers"),
    (with_entry(offset=-64), "whole numbers"),
    (with_entry(offset=4), "aligned to 64"),
    (with_entry(offset=64), "inside the body"),
    (with_entry(shape=[17], num_bytes=68), "inside the body"),
    (with_entry(num_bytes=4), "must take 8 bytes as fp32, but takes 4"),
    (with_entry(shape=[3]), "must take 12 bytes"),
    (with_entry(shape=[1 << 47] * 16), "whole numbers"),
    (with_entry(shape=[1 << 20], num_bytes=8), "must take 4194304 bytes"),
])
def test_headers_that_are_refused(header, text):
    with pytest.raises(WireError, match=text):
        wire.decode_header(header_bytes(header))


def test_deep_nesting_and_empty_shapes_are_at_worst_a_wire_error():
    # Between what the JSON parser and what repr() can nest there may be a gap; every depth around it is tried.
    for depth in [*range(300, 1100, 3), 5000, 200_000]:
        nest = b"[" * depth + b"]" * depth
        for text in (b'{"kind": "k", "meta": {}, "entries": [' + nest + b'], "body_bytes": 0}',
                     b'{"kind": "k", "meta": ' + nest + b', "entries": [], "body_bytes": 0}',
                     nest):
            with pytest.raises(WireError):
                wire.decode_header(header_bytes(text))
    for shape in ([0], [0, (1 << 48) - 1], [(1 << 48) - 1, 0], [0, 1 << 24, 1 << 23], [0] * 16):
        header = wire.decode_header(header_bytes(with_entry(shape=shape, num_bytes=0)))
        sent = Message("k", {}, header["entries"], torch.zeros(64, dtype=torch.uint8))
        assert tuple(wire.decode(sent)["a"].shape) == tuple(shape)
    for shape in ([0, (1 << 48) - 1, 2], [0] + [(1 << 48) - 1] * 15):  # strides of such a tensor would overflow
        with pytest.raises(WireError, match="whole numbers"):
            wire.decode_header(header_bytes(with_entry(shape=shape, num_bytes=0)))


def mutated(rng, header):
    """A header with a few things wrong: in the values, in the structure, or in the text."""
    junk = [None, True, False, -1, 0, 1, 2, 63, 64, 65, 2**31, 2**47, 2**63, 2**70, 0.5, 1e308, float("nan"), "", "fp32",
            "fp16", "x" * 300, "\ud800", [], {}, [[]], [1, 2], {"round": 3}, [1] * 20]
    value = json.loads(json.dumps(header))
    for _ in range(rng.randint(1, 3)):
        spot, path = value, []
        while isinstance(spot, (list, dict)) and spot and (not path or rng.random() < 0.75):
            key = rng.choice(list(spot) if isinstance(spot, dict) else range(len(spot)))
            path.append((spot, key))
            spot = spot[key]
        if not path:
            continue
        parent, key = path[-1]
        action = rng.random()
        if action < 0.6:
            parent[key] = copy.deepcopy(rng.choice(junk))
        elif action < 0.75:
            del parent[key]
        elif action < 0.85 and isinstance(parent[key], int):
            parent[key] += rng.choice([-64, -1, 1, 64])
        elif isinstance(parent, list):
            parent.insert(key, json.loads(json.dumps(rng.choice(parent))))
        else:
            parent[str(rng.random())] = copy.deepcopy(rng.choice(junk))
    text = bytearray(json.dumps(value, separators=(",", ":")).encode())
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(text))
            change = rng.random()
            if change < 0.5:
                text[place] = rng.choice(b'{}[]",:0123456789-eE.\\ntfu\x00\xff')
            elif change < 0.75:
                del text[place]
            else:
                text = text[:max(1, place)]
    return text


def test_mutated_headers_are_refused_or_valid():
    rng = random.Random(11)
    sent = message()
    original, refused, accepted = wire.encode_header(sent.header()), 0, 0
    for _ in range(3000):
        text = mutated(rng, sent.header())
        if bytes(text) == bytes(original.numpy()):
            continue
        try:
            header = wire.decode_header(header_bytes(text))
        except WireError:
            refused += 1
            continue
        accepted += 1
        # What passes is complete and possible: every tensor lies inside the body that the header announces.
        assert isinstance(header["kind"], str)
        assert isinstance(header["meta"], dict)
        assert header["body_bytes"] >= 0
        assert all(isinstance(entry, Entry) for entry in header["entries"])
        for entry in header["entries"]:
            assert entry.offset % ALIGNMENT == 0
            assert entry.offset + entry.num_bytes <= header["body_bytes"]
            assert entry.num_bytes == wire.codec_of(entry.codec).num_bytes(entry.shape)
        # Decoding from the real body, which may be shorter than announced: right shapes, or the same error.
        try:
            decoded = wire.decode(Message(header["kind"], header["meta"], header["entries"], sent.body))
        except WireError:
            assert header["body_bytes"] != sent.body.numel()
            continue
        assert {name: tuple(value.shape) for name, value in decoded.items()} == {
            entry.name: entry.shape for entry in header["entries"]
        }
    assert refused > 1000  # both outcomes were met
    assert accepted > 300


def test_a_buffer_keeps_the_largest_memory_it_had():
    buffer = wire.Buffer()
    large = buffer.of(1000)
    assert large.numel() == 1000
    small = buffer.of(0)
    assert small.numel() == 0
    assert buffer.of(900).data_ptr() == buffer.of(1000).data_ptr() == large.data_ptr()
    assert buffer.of(1001).numel() == 1001
