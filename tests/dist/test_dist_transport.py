"""The process-group transport between real processes that meet in a file, not at a port."""

import datetime
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from jobs import TIMEOUT_S, enter, in_child, poll

from dfed.blocks import Splitting
from dfed.client import Forms
from dfed.comm import Entry, Message, ProcessGroup, wire
from dfed.comm.liveness import Liveness
from dfed.comm.partial_sums import PartialSums
from dfed.errors import RankLost, WireError
from dfed.models import build_chain
from dfed.plan import Phase, Plan
from dfed.region import WHOLE
from dfed.strategies import Problem
from dfed.strategies.fedavg import FedAvg

CPU = torch.device("cpu")
MAGIC = 0x64666564
NOTICED_S = 20  # a lost rank must be noticed in seconds; the least patient launcher kills after 30


def _rank(function, rank, size, folder, timeout_s):
    enter(f"{folder}/log{rank}")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    liveness = Liveness(store, rank, size)
    dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=size,
                            timeout=datetime.timedelta(seconds=timeout_s))
    function(ProcessGroup(CPU, liveness))
    # Who leaves early may take the store's file along, in which another still looks for who was lost.
    Path(f"{folder}/done{rank}").touch()
    deadline = time.monotonic() + 5
    while len(list(Path(folder).glob("done*"))) < size - 1 and time.monotonic() < deadline:
        time.sleep(0.02)


def start(function, size, folder, timeout_s=TIMEOUT_S):
    """One process a rank, each with ``function(transport)``."""
    return [in_child(_rank, function, rank, size, str(folder), timeout_s) for rank in range(size)]


def finish(processes, patience_s=TIMEOUT_S):
    """Exit codes of the processes, by rank; fails if one is still there after ``patience_s``."""
    try:
        poll(lambda: all(process.exitcode is not None for process in processes), "a rank hangs", patience_s)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def logs(folder):
    return "\n".join(path.read_text() for path in sorted(folder.glob("log*")))


def message(kind, body_bytes, **meta):
    return Message(kind, meta, (), torch.arange(body_bytes, dtype=torch.int64).to(torch.uint8))


def assert_equal(one, other):
    assert (one.kind, dict(one.meta), one.entries) == (other.kind, dict(other.meta), other.entries)
    assert one.body.dtype == torch.uint8
    assert torch.equal(one.body, other.body)


class Counter:
    """Counts what is handed to ``torch.distributed``, in bytes times the ranks at the other end."""

    def __init__(self, rank, size):
        self.num_bytes, self._others = 0, size - 1 if rank == 0 else 1
        for name in ("broadcast", "reduce", "all_gather", "gather", "send", "recv"):
            setattr(dist, name, self._counted(getattr(dist, name), name))

    def _counted(self, function, name):
        def counted(*arguments, **options):
            value = arguments[1] if name == "all_gather" else arguments[0]
            copies = 1 if name in ("send", "recv") else self._others
            self.num_bytes += value.numel() * value.element_size() * copies
            return function(*arguments, **options)

        return counted


def _metered(transport):
    """What a client's report says of its update is what is handed to ``torch.distributed``, to the byte."""
    counter = Counter(transport.rank, transport.size)
    chain = build_chain("cnn", {"channels": [4, 6], "hidden": 16, "norm": "batch"}, input_shape=(1, 8, 8), num_classes=4)
    splitting = Splitting.by_unit(chain.unit_names)
    shapes = {name: tuple(t.shape) for name, t in chain.state_dict().items() if t.is_floating_point()}
    phases = (Phase(batch_size=8, epochs=1),)
    problem = Problem(chain=chain, splitting=splitting, phases=phases, num_clients=2000, seed=1)
    values = {name: torch.randn(shape, generator=torch.Generator().manual_seed(2)) for name, shape in shapes.items()}
    zero = {name: torch.zeros(shape) for name, shape in shapes.items()}
    seen = set()
    for number, codec in enumerate(("fp32", "fp16", "int8", "int8_affine", "int4", "qsgd", "top_k(density=0.1,values=int8)",
                                    "random_k", "bitmask(density=1.0)")):
        forms = Forms(FedAvg(problem), splitting, shapes, up=codec)
        for client in (7, 1234):
            plan = Plan(client=client, hold=splitting.names, train=splitting.names, phases=phases,
                        up={"head": "bf16"} if client == 7 else {})
            form, before = forms.of(plan), counter.num_bytes
            if transport.is_server:
                form.check_update(transport.receive(1), 10**number, client, 1)
            else:
                transport.send(form.encode_update(10**number, client, values, zero))
            metered = form.up_bytes(10**number, client)
            seen |= metered.keys()
            assert counter.num_bytes - before == sum(metered.values())
            assert sum(metered.values()) - metered["header"] == sum(sum(p.values()) for p in form.up_blocks.values())
    assert seen == {"header", "values", "scales", "indices", "mask"}
    dist.barrier()
    transport.close()


def _traffic(transport):
    rank, size, counter = transport.rank, transport.size, Counter(transport.rank, transport.size)
    assert transport.is_server == (rank == 0)
    assert transport.is_client == (rank != 0)
    assert transport.client_ranks == tuple(range(1, size))

    # Broadcast: bodies of all sizes, an empty one too; tensors, of one entry, none and no dimension.
    for body_bytes in (0, 1, 63, 64, 65, 1_000_003):
        sent = message("round", body_bytes, round=body_bytes, text="näh\n", deep={"a": [None, 1.5, True]})
        assert_equal(transport.broadcast(sent if rank == 0 else None), sent)
        assert transport.fabric_bytes == counter.num_bytes
    tensors = {"a.w": torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), "a.none": torch.zeros(0, 7),
               "b.one": torch.tensor(2.5)}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    entries, body_bytes = wire.layout((name, name[0], "fp32", shape) for name, shape in shapes.items())
    sent = wire.encode("evaluate", {}, entries, tensors, torch.zeros(body_bytes, dtype=torch.uint8))
    arrived = transport.broadcast(sent if rank == 0 else None)
    assert arrived.entries == entries
    assert isinstance(arrived.entries[0], Entry)
    for name, value in wire.decode(arrived).items():
        assert torch.equal(value, tensors[name])

    # Reduce: float64 sums, exact whatever the order; also of nothing, as in a round in which no client takes part.
    for numel in (1, 0, 100_003):
        places = torch.arange(numel, dtype=torch.float64)
        value = places * 2.0**-30 + rank
        transport.reduce(value)
        if rank == 0:
            assert torch.equal(value, size * places * 2.0**-30 + sum(range(size)))
    sums = PartialSums({"w": (1000,)})
    update = torch.randn(1000, generator=torch.Generator().manual_seed(rank))
    sums.add({"w": update}, {"w": WHOLE}, 0.25, {"w": 2.0**14})
    transport.reduce(sums.flat)
    if rank == 0:
        alone = PartialSums({"w": (1000,)})
        for other in reversed(range(size)):
            update = torch.randn(1000, generator=torch.Generator().manual_seed(other))
            alone.add({"w": update}, {"w": WHOLE}, 0.25, {"w": 2.0**14})
        assert torch.equal(sums["w"], alone["w"])

    # Gather: JSON of very different lengths, whoever has the longest.
    for lengths in ([0, 3, 70_000], [70_000, 0, 3], [0, 0, 0]):
        metas = [{"rank": r, "text": "é" * lengths[r], "list": [None, 1.5, {"x": -1}]} for r in range(size)]
        parts = transport.gather(metas[rank])
        assert parts == (metas if rank == 0 else None)
        assert transport.fabric_bytes == counter.num_bytes

    # Point to point: in each rank's own order, whatever order the server asks the ranks in.
    if rank == 0:
        for number, body_bytes in enumerate((0, 100_000, 1)):
            for source in reversed(transport.client_ranks):
                assert_equal(transport.receive(source), message("update", body_bytes, client=source, number=number))
    else:
        for number, body_bytes in enumerate((0, 100_000, 1)):
            transport.send(message("update", body_bytes, client=rank, number=number))
    assert transport.fabric_bytes == counter.num_bytes > 0
    assert not transport.abandoned()
    dist.barrier()
    transport.close()


@pytest.mark.parametrize("size", [2, 3])
def test_messages_sums_and_their_bytes(tmp_path, size):
    assert finish(start(_traffic, size, tmp_path)) == [0] * size, logs(tmp_path)


def test_updates_weigh_what_is_metered(tmp_path):
    assert finish(start(_metered, 2, tmp_path)) == [0, 0], logs(tmp_path)


def _prefix(header_bytes, body_bytes, magic=MAGIC):
    return torch.tensor([magic, header_bytes, body_bytes])


GOOD = wire.encode_header(message("update", 3).header())
TEXT = torch.tensor(list(b'{"kind": '), dtype=torch.uint8)
LIST = torch.tensor(list(b"[1, 2]"), dtype=torch.uint8)
CODEC = wire.encode_header({"kind": "x", "meta": {}, "entries": [["w", "b", "os.system", [1], 0, 4]], "body_bytes": 4})
OUTSIDE = wire.encode_header({"kind": "x", "meta": {}, "entries": [["w", "b", "fp32", [8], 0, 32]], "body_bytes": 4})
BODY = torch.zeros(4, dtype=torch.uint8)
MALFORMED = [
    ([_prefix(GOOD.numel(), 3, magic=12)], "does not begin as one"),
    ([_prefix(0, 3)], "does not begin as one"),
    ([_prefix(-5, 3)], "does not begin as one"),
    ([_prefix(1 << 40, 3)], "does not begin as one"),
    ([_prefix(GOOD.numel(), -1)], "does not begin as one"),
    ([_prefix(GOOD.numel(), 1 << 62)], "does not begin as one"),
    ([_prefix(TEXT.numel(), 4), TEXT, BODY], "must be JSON"),
    ([_prefix(LIST.numel(), 4), LIST, BODY], "JSON object"),
    ([_prefix(CODEC.numel(), 4), CODEC, BODY], "codec must be one of"),
    ([_prefix(OUTSIDE.numel(), 4), OUTSIDE, BODY], "inside the body"),
    ([_prefix(GOOD.numel(), 4), GOOD, BODY], "the body must be 3 bytes, but is 4"),
    ([_prefix(GOOD.numel(), 0), GOOD], "the body must be 3 bytes, but is 0"),
]


def assert_named(error, *parts):
    assert [part for part in parts if part not in str(error)] == []


def _malformed(transport):
    good = message("round", 5, round=17)
    assert_equal(transport.broadcast(good if transport.rank == 0 else None), good)
    for parts, text in MALFORMED:
        # Down: the server speaks nonsense.
        if transport.rank == 0:
            for part in parts:
                dist.broadcast(part, src=0)
        else:
            with pytest.raises(WireError, match=text) as refused:
                transport.broadcast(None)
            assert_named(refused.value, f"rank {transport.rank}", "from rank 0", "round 17")
        # Up: each rank in turn does.
        for source in transport.client_ranks:
            if transport.rank == source:
                for part in parts:
                    dist.send(part, dst=0)
            elif transport.rank == 0:
                with pytest.raises(WireError, match=text) as refused:
                    transport.receive(source)
                assert_named(refused.value, "rank 0", f"from rank {source}", "round 17")
    # Whoever speaks nonsense into a gather is named.
    encode = wire.encode_header
    if transport.rank == 1:
        wire.encode_header = lambda header: TEXT
    if transport.rank == 0:
        with pytest.raises(WireError, match=r"rank 0.*from rank 1, round 17.*must be JSON"):
            transport.gather({})
    else:
        assert transport.gather({}) is None
    wire.encode_header = encode
    # None of this has put the ranks out of step.
    assert_equal(transport.broadcast(good if transport.rank == 0 else None), good)
    dist.barrier()
    transport.close()


def test_a_malformed_message_is_an_error_that_names_round_and_ranks(tmp_path):
    assert finish(start(_malformed, 3, tmp_path)) == [0] * 3, logs(tmp_path)


def _loses(victim, what, sign):
    def scenario(transport):
        good = message("round", 5, round=17)
        transport.broadcast(good if transport.rank == 0 else None)
        if transport.rank == victim:
            os.kill(os.getpid(), sign)
        said = rf"rank {transport.rank} could not .* in round 17: rank {victim} (died|did not answer)"
        with pytest.raises(RankLost, match=said) as lost:
            _step_for_ever(transport, what, good)
        assert lost.value.ranks == (victim,)
        assert lost.value.__cause__ is not None
        assert transport.abandoned()

    return scenario


def _step_for_ever(transport, what, good):
    while True:  # what a rank sends may vanish in a buffer; it notices when it waits for an answer
        _step(transport, what, good)


def _step(transport, what, good):
    if what == "gather":
        transport.gather({"a": 1})
    elif what == "reduce":
        transport.reduce(torch.zeros(1000, dtype=torch.float64))
        transport.gather({"a": 1})
    elif what == "receive" and transport.rank == 0:
        transport.receive(2)
    else:
        transport.broadcast(good if transport.rank == 0 else None)


def lost_in_gather(transport):
    _loses(2, "gather", signal.SIGKILL)(transport)


def lost_in_reduce(transport):
    _loses(1, "reduce", signal.SIGKILL)(transport)


def lost_in_receive(transport):
    _loses(2, "receive", signal.SIGKILL)(transport)


def lost_server(transport):
    _loses(0, "broadcast", signal.SIGKILL)(transport)


def stopped_in_gather(transport):
    _loses(2, "gather", signal.SIGSTOP)(transport)


@pytest.mark.parametrize(("scenario", "victim"), [
    (lost_in_gather, 2), (lost_in_reduce, 1), (lost_in_receive, 2), (lost_server, 0),
])
def test_the_others_learn_who_died(tmp_path, scenario, victim):
    processes = start(scenario, 3, tmp_path)
    codes = finish(processes, NOTICED_S)
    assert codes == [-signal.SIGKILL if rank == victim else 0 for rank in range(3)], logs(tmp_path)


def test_a_rank_that_is_silent_but_not_gone_is_named_as_well(tmp_path):
    """It is there, so only the collective's time limit (2 s) and the roll call (5 s) can tell."""
    *others, stopped = start(stopped_in_gather, 3, tmp_path, timeout_s=2)
    try:
        assert finish(others, NOTICED_S) == [0, 0], logs(tmp_path)
        assert stopped.exitcode is None
    finally:
        stopped.kill()
        stopped.join()
