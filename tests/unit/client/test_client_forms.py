import gc
import math
import weakref

import pytest
import torch
from client_problem import CNN, Small

from dfed.client import Forms
from dfed.client.forms import PREFIX_BYTES
from dfed.comm import Message, wire
from dfed.errors import ConfigError, UpdateRejected, WireError
from dfed.region import WHOLE, Slices
from dfed.rng import torch_generator
from dfed.strategies import Strategy


class Narrow(Strategy):
    """Holds the first half of a tensor's rows; sends biases not at all."""

    def plan(self, state, candidate):
        return self.full_plan(candidate.client)

    def region(self, name, shape, plan):
        return Slices(((0, -(-shape[0] // 2)),)) if plan.options.get("half") and shape else WHOLE

    def upload(self, name, value, region, plan):
        return None if name.endswith("bias") else super().upload(name, value, region, plan)


PLANS = {
    "whole": {},
    "codecs": {"down": {"conv0": "fp16", "head": "bf16"}, "up": {"conv1": "bf16", "hidden": "fp16"}},
    "part": {"hold": ("conv0", "head"), "train": ("head",)},
    "narrow": {"options": {"half": True}, "up": {"conv0": "fp16"}},
    "nothing up": {"train": ()},
}


@pytest.mark.parametrize("kind", PLANS)
def test_metered_bytes_are_those_of_the_encoded_messages(kind):
    small = Small(make=Narrow)
    plan = small.plan(**PLANS[kind])
    form = small.forms.of(plan)
    whole = {name: value for name, value in small.values.items() if small.splitting.block_of(name) in plan.hold}
    assert form.regions.keys() == whole.keys()
    for round_index, client in ((0, 0), (9, 10), (123, 45_678), (99_999, 1_000_000)):
        payload = {name: form.regions[name].view(value).contiguous() for name, value in whole.items()}
        down = wire.encode("payload", {"round": round_index, "client": client}, form.down, payload,
                           torch.zeros(form.down_body_bytes, dtype=torch.uint8))
        sent = {entry.name: payload[entry.name] for entry in form.up}
        base = form.received({(entry.name, entry.codec): whole[entry.name] for entry in form.down})
        assert all(torch.equal(value, payload[name]) for name, value in base.items())
        up = form.encode_update(round_index, client, sent, base)
        for message, metered in ((down, form.down_bytes(round_index, client)), (up, form.up_bytes(round_index, client))):
            length = PREFIX_BYTES + wire.encode_header(message.header()).numel() + message.body.numel()
            assert sum(metered.values()) == length
            assert metered["values"] == sum(entry.num_bytes for entry in message.entries)
            assert set(metered) == {"header", "values"}
        # What arrives after the codecs is what the server would decode.
        form.check_update(up, round_index, client, rank=1)
        decoded, through = form.decode_update(up, base), form.through_codecs(round_index, client, sent, base)
        assert decoded.keys() == through.keys() == sent.keys()
        for name, value in decoded.items():
            assert torch.equal(value, through[name])
            assert value.shape == form.regions[name].view(whole[name]).shape
    for name in small.values:
        block, sent_up = small.splitting.block_of(name), {entry.name for entry in form.up}
        assert (name in sent_up) == (block in plan.train and not name.endswith("bias"))


def test_prefix_is_three_integers():
    assert torch.zeros(3, dtype=torch.int64).numpy().nbytes == PREFIX_BYTES


def test_exact_codecs_hand_back_the_tensors_themselves():
    small = Small()
    form = small.forms.of(small.plan(up={"head": "fp16"}))
    through = form.through_codecs(0, 0, small.values, small.values)
    for name, value in small.values.items():
        assert (through[name] is value) == (small.splitting.block_of(name) != "head")


def test_a_form_is_made_once_per_shape_of_plan():
    small = Small()
    assert small.forms.of(small.plan(client=0)) is small.forms.of(small.plan(client=4))
    assert small.forms.of(small.plan()) is not small.forms.of(small.plan(train=("head",)))
    other = Forms(small.strategy, small.splitting, small.shapes)
    assert other.of(small.plan()) == small.forms.of(small.plan())
    assert list(small.forms.of(small.plan()).regions) == list(small.shapes)
    assert Small(options=CNN).forms.of(small.plan()).down == small.forms.of(small.plan()).down  # equal on every rank


def test_forms_of_plans_that_do_not_come_again_are_let_go():
    small = Small(model="cnn", options={"channels": [2], "kernel": 3, "hidden": 4, "norm": "none"})
    often, once = small.plan(), weakref.ref(small.forms.of(small.plan(details={"draw": -1})))
    form = small.forms.of(often)
    for draw in range(300):
        small.forms.of(small.plan(details={"draw": draw}))
        assert small.forms.of(often) is form
    gc.collect()
    assert once() is None
    assert small.forms.of(small.plan(details={"draw": -1})).down == form.down  # made again, at the cost of time


def test_an_update_of_someone_else_is_refused():
    small = Small()
    form = small.forms.of(small.plan())
    good = form.encode_update(3, 1, small.values, small.values)
    form.check_update(good, 3, 1, rank=2)
    other = small.forms.of(small.plan(train=("head",)))
    wrong = [
        form.encode_update(2, 1, small.values, small.values),
        form.encode_update(3, 2, small.values, small.values),
        other.encode_update(3, 1, small.values, small.values),
        Message("payload", good.meta, good.entries, good.body),
        Message("update", {**good.meta, "more": 1}, good.entries, good.body),
        Message("update", {}, good.entries, good.body),
        Message("update", good.meta, good.entries[::-1], good.body),
    ]
    for message in wrong:
        with pytest.raises(WireError, match="rank 2 must send the update of client 1 in round 3, but sent"):
            form.check_update(message, 3, 1, rank=2)


LOSSY = ["int8", "int4", "int8_affine", "qsgd(bits=4)", "top_k(density=0.1,values=int8)",
         "random_k(density=0.25,unbiased=true)", "bf16", "bitmask(density=1.0)"]


@pytest.mark.parametrize("codec", LOSSY)
def test_what_arrives_through_a_lossy_codec_is_what_the_server_decodes(codec):
    small = Small()
    forms = Forms(small.strategy, small.splitting, small.shapes, down="int8", up=codec)
    form = forms.of(small.plan())
    generator = torch_generator(1, "change")
    received = {name: value + 0.01 for name, value in small.values.items()}
    trained = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in received.items()}
    message = form.encode_update(3, 1, trained, received)
    decoded, through = form.decode_update(message, received), form.through_codecs(3, 1, trained, received)
    made = wire.codec_of(codec)
    for entry in form.up:
        assert entry.codec == ("fp32" if len(entry.shape) < 2 and made.for_matrices else codec)
        assert torch.equal(decoded[entry.name], through[entry.name])
        if entry.codec == "fp32":
            assert torch.equal(decoded[entry.name], trained[entry.name])
            continue
        sent = trained[entry.name] - received[entry.name] if made.of_change else trained[entry.name]
        error = (decoded[entry.name] - trained[entry.name]).abs().max().item()
        assert error <= made.max_error(sent) + 1e-6  # adding what was received rounds in float32
        assert not torch.equal(decoded[entry.name], received[entry.name])
    metered = form.up_bytes(3, 1)
    tensors = {entry.name: entry.num_bytes for entry in message.entries}
    assert sum(metered.values()) - metered["header"] == sum(tensors.values())
    for block, parts in form.up_blocks.items():
        assert sum(parts.values()) == sum(size for name, size in tensors.items() if small.splitting.block_of(name) == block)
    for part in metered.keys() - {"header"}:
        assert metered[part] == sum(parts.get(part, 0) for parts in form.up_blocks.values())
    if codec.startswith(("qsgd", "random_k")):  # what is drawn is drawn anew for each client and round
        others = [form.through_codecs(*where, trained, received) for where in ((4, 1), (3, 2))]
        assert not any(torch.equal(other["hidden.fc.weight"], through["hidden.fc.weight"]) for other in others)
    for bad in (math.nan, math.inf):
        broken = {**trained, "hidden.fc.weight": trained["hidden.fc.weight"].clone().fill_(bad)}
        with pytest.raises(UpdateRejected, match=r"hidden\.fc\.weight"):
            form.through_codecs(3, 1, broken, received)


class Cuts(Narrow):
    """Uploads less of a tensor than its client holds."""

    def upload(self, name, value, region, plan):
        return value[:1] if value.ndim > 1 else value


def test_an_upload_of_another_shape_is_refused_before_anything_runs():
    small = Small(make=Cuts)
    with pytest.raises(ConfigError, match=r"`strategy` must upload of each tensor the part .* 'conv0.conv.weight' of shape"):
        small.forms.of(small.plan())


def test_an_upload_that_is_not_as_announced_fails_the_client():
    small = Small()
    form, received = small.forms.of(small.plan()), small.values
    for wrong in (received["head.fc.weight"].double(), received["head.fc.weight"][:1]):
        for encode in (form.encode_update, form.through_codecs):
            with pytest.raises(TypeError, match=r"must upload 'head\.fc\.weight' as float32 of shape"):
                encode(1, 2, received | {"head.fc.weight": wrong}, received)
