"""What clients remember: files that are whole or refused, and error feedback."""

import collections
import math
import shutil

import pytest
import torch
from client_problem import Small

from dfed.client import Forms
from dfed.client.home import ClientHome, errors_of, next_state, own_state
from dfed.errors import CheckpointError
from dfed.region import WHOLE, Index, Slices
from dfed.rng import torch_generator
from dfed.strategies import Strategy


def tensors(key=1):
    generator = torch_generator(key, "state")
    return {"error/a.weight": torch.randn(3, 4, generator=generator), "own/c": torch.tensor([math.nan, -0.0, 1e-45]),
            "own/none": torch.empty(0, 2), "own/one": torch.tensor(0.5)}


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and one[name].numpy().tobytes() == other[name].numpy().tobytes() for name in one
    )


def test_what_is_read_is_what_was_written(tmp_path):
    home, state = ClientHome(tmp_path / "clients"), tensors()
    assert home.load(3, None) == {}
    home.save(3, 7, state | {"own/strided": torch.arange(12.0).view(3, 4).t()})
    read = home.load(3, 7)
    assert torch.equal(read.pop("own/strided"), torch.arange(12.0).view(3, 4).t())
    assert same(read, state)
    home.save(3, 7, tensors(2))  # the round is done again
    assert same(home.load(3, 7), tensors(2))
    assert [path.name for path in (tmp_path / "clients" / "000003").iterdir()] == ["000007.safetensors"]
    (tmp_path / "other").touch()
    assert home.path(3, 7).stat().st_mode == (tmp_path / "other").stat().st_mode
    home.save(1_234_567, 8, {})
    assert home.load(1_234_567, 8) == {}


def test_a_state_that_is_missing_or_damaged_is_an_error(tmp_path):
    home = ClientHome(tmp_path)
    home.save(3, 7, tensors())
    with pytest.raises(CheckpointError, match=r"client 3 as it left round 8 must be in .*000008.safetensors"):
        home.load(3, 8)
    home.check({3: 7})
    with pytest.raises(CheckpointError, match="client 4 as it left round 7 must be in"):
        home.check({3: 7, 4: 7})
    with pytest.raises(CheckpointError, match="must reach the disk"):
        home.flush({3: 7, 5: 1})
    home.flush({3: 7})
    path = home.path(3, 7)
    data = path.read_bytes()
    for client, version in ((4, 7), (3, 8)):
        home.save(client, version, {})
        home.path(client, version).write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"client {client} as it left round {version} is damaged, or another's"):
            home.load(client, version)
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1:])
        with pytest.raises(CheckpointError, match="client 3 as it left round 7"):
            home.load(3, 7)
    for length in (0, 5, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="client 3 as it left round 7"):
            home.load(3, 7)


def test_a_disk_that_refuses_is_an_error(tmp_path):
    (tmp_path / "clients").write_text("a file stands where the folder should be")
    with pytest.raises(CheckpointError, match="cannot write the state of client 3"):
        ClientHome(tmp_path / "clients").save(3, 7, tensors())


def test_a_disk_without_room_is_an_error(tmp_path, monkeypatch):
    home, usage = ClientHome(tmp_path / "clients"), collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    home.check_free(1000)
    with pytest.raises(CheckpointError, match=r"must have .* free \(1001 bytes\) for what the clients keep"):
        home.check_free(1001)
    home.features_path(3, 7).parent.mkdir(parents=True)
    home.features_path(3, 7).write_bytes(bytes(500))
    home.check_free(1500)
    with pytest.raises(CheckpointError):
        home.check_free(1501)


def test_versions_that_nobody_needs_are_removed(tmp_path):
    home = ClientHome(tmp_path)
    for client, version in ((1, 2), (1, 5), (1, 9), (2, 3), (4, 4)):
        home.save(client, version, {})
    (tmp_path / "000001" / ".000010.safetensors.99.partial").write_bytes(b"interrupted")
    home.prune([{1: 9, 2: 3}, {1: 5}])
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["000001/000005.safetensors", "000001/000009.safetensors", "000002/000003.safetensors"]
    ClientHome(tmp_path / "none").prune([])


class Parts(Strategy):
    """Holds one half of the rows or the other, or chosen ones."""

    def plan(self, state, candidate):
        return self.full_plan(candidate.client)

    def region(self, name, shape, plan):
        half = plan.options.get("half")
        if half is None or len(shape) < 2:
            return WHOLE
        middle = shape[0] // 2
        if half == "odd":
            return Index((tuple(range(1, shape[0], 2)),))
        return Slices(((0, middle),) if half == 0 else ((middle, shape[0]),))


@pytest.mark.parametrize("codec", ["top_k(density=0.1)", "int4", "random_k(density=0.1)", "qsgd(bits=4)"])
def test_what_arrives_catches_up_with_what_was_trained(codec):
    """After any number of rounds, what has arrived and what is remembered add up to what was trained (in float64)."""
    small = Small()
    forms = Forms(small.strategy, small.splitting, small.shapes, up=codec)
    form = forms.of(small.plan())
    zero = {name: torch.zeros(shape) for name, shape in small.shapes.items()}
    trained = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in small.shapes.items()}
    arrived, kept = {name: value.clone() for name, value in trained.items()}, {}
    for round_index in range(12):
        generator = torch_generator(round_index, "change")
        change = {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in zero.items()}
        errors = errors_of(kept, form)
        arrives = form.through_codecs(round_index, 2, change, zero, errors)
        message = form.encode_update(round_index, 2, change, zero, errors)
        assert same(form.decode_update(message, zero), arrives)
        kept = next_state(kept, {}, form.left_out(change, arrives, errors), form, small.shapes)
        for name in zero:
            trained[name] += change[name].double()
            arrived[name] += arrives[name].double()
    coded = {entry.name for entry in form.up if entry.codec == codec}
    assert coded
    assert kept.keys() == {f"error/{name}" for name in coded}
    for name in coded:
        # 12 additions in float32 of numbers below 10.
        assert torch.allclose(arrived[name] + kept[f"error/{name}"].double(), trained[name], rtol=0, atol=1e-5)
        assert kept[f"error/{name}"].abs().max() > 1e-4  # or there was nothing to make up for


def test_other_parts_of_a_tensor_keep_what_they_had():
    small = Small(make=Parts)
    forms = Forms(small.strategy, small.splitting, small.shapes, up="top_k(density=0.1)")
    first, second, odd = (forms.of(small.plan(options={"half": half})) for half in (0, 1, "odd"))
    name = "conv0.conv.weight"
    shape = small.shapes[name]
    kept = next_state({}, {}, {name: torch.full((2, *shape[1:]), 1.0)}, first, small.shapes)
    kept = next_state(kept, {}, {name: torch.full((2, *shape[1:]), 2.0)}, second, small.shapes)
    assert kept[f"error/{name}"][:, 0, 0, 0].tolist() == [1.0, 1.0, 2.0, 2.0]
    kept = next_state(kept, {"control": torch.ones(1)}, {name: torch.full((2, *shape[1:]), 3.0)}, odd, small.shapes)
    assert kept[f"error/{name}"][:, 0, 0, 0].tolist() == [1.0, 3.0, 2.0, 3.0]
    assert errors_of(kept, odd)[name][:, 0, 0, 0].tolist() == [3.0, 3.0]
    assert errors_of(kept, first)[name][:, 0, 0, 0].tolist() == [1.0, 3.0]
    assert list(own_state(kept, odd, small.shapes)) == ["control"]
    forgets = next_state(kept, {}, {}, odd, small.shapes)
    assert list(own_state(forgets, odd, small.shapes)) == []  # a strategy says each time what it keeps


def test_what_belongs_to_a_tensor_that_is_not_held_now_is_kept_and_not_handed_out():
    small = Small()
    form = small.forms.of(small.plan(hold=("conv0", "head"), train=("head",)))
    own = {"conv0.conv.weight": 1.0, "hidden.fc.weight": 2.0, "turns": 3.0, "error/turns": 4.0}
    kept = {f"own/{name}": torch.tensor(value) for name, value in own.items()} | {"error/head.fc.weight": torch.zeros(2)}
    given = own_state(kept, form, small.shapes)
    assert given.keys() == {"conv0.conv.weight", "turns", "error/turns"}
    after = next_state(kept, {"turns": torch.tensor(5.0)}, {}, form, small.shapes)
    assert after.keys() == {"own/hidden.fc.weight", "own/turns", "error/head.fc.weight"}
    assert (float(after["own/hidden.fc.weight"]), float(after["own/turns"])) == (2.0, 5.0)


@pytest.mark.parametrize(
    "codec", ["top_k(density=0.05)", "random_k(density=0.05)", "int4", "int8", "int8_affine", "qsgd(bits=4)"]
)
def test_what_is_left_out_stays_bounded(codec):
    small = Small()
    forms = Forms(small.strategy, small.splitting, small.shapes, up=codec)
    form, kept, largest = forms.of(small.plan()), {}, []
    zero = {name: torch.zeros(shape) for name, shape in small.shapes.items()}
    for round_index in range(200):
        generator = torch_generator(round_index, "change")
        change = {name: 0.01 * torch.randn(value.shape, generator=generator) for name, value in zero.items()}
        errors = errors_of(kept, form)
        arrives = form.through_codecs(round_index, 2, change, zero, errors)
        kept = next_state(kept, {}, form.left_out(change, arrives, errors), form, small.shapes)
        largest.append(max(float(value.abs().max()) for value in kept.values()))
    # An entry waits some 20 rounds for its turn under a density of 5 %; drawn ones now and then a hundred: 0.01 · √100 · 4.
    assert max(largest[100:]) < 0.5
    assert max(largest[100:]) < 4 * max(largest[40:100])
