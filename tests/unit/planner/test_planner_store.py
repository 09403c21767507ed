"""Predictions on disk: kept, found again, and worked out anew whenever something that they depend on is another."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from dfed.client import ClientSettings
from dfed.errors import ConfigError
from dfed.models import Chain, build_chain
from dfed.planner import Store, chain_costs
from dfed.planner.store import apart, describe, shapes_kept


class Counted:
    """Works a value out, and counts how often."""

    def __init__(self, value):
        self.value, self.calls = value, 0

    def __call__(self):
        self.calls += 1
        return self.value


VALUE = {"peak": 12345, "lines": [[1.5, 2.25], [1e300, 1 / 3]], "name": "Größe", "none": None}


def test_a_value_is_worked_out_once(tmp_path):
    work = Counted(VALUE)
    for folder in (tmp_path / "new" / "cache", None):
        store = Store(folder)
        work.calls = 0
        for _ in range(3):
            assert store.get(["peak", 1], work) == VALUE
        assert work.calls == 1
        assert store.get(["peak", 2], Counted([7])) == [7]
        assert store.get(["peak", 1], work) == VALUE
        assert work.calls == 1
    assert Store(None).get(["peak", 1], Counted(3)) == 3  # shares nothing


@pytest.mark.parametrize("value", [VALUE, 12345, 0, 1.5, [], "text", False, [[1, 2], [3]]], ids=str)
def test_a_value_survives(tmp_path, value):
    first, second = Counted(value), Counted("another")
    assert Store(tmp_path).get("key", first) == value
    assert Store(tmp_path).get("other", Counted(1)) == 1
    again = Store(tmp_path).get("key", second)
    assert again == value
    assert type(again) is type(value)
    assert (first.calls, second.calls) == (1, 0)
    assert len(list(tmp_path.iterdir())) == 2
    assert all(path.suffix == ".json" for path in tmp_path.iterdir())


def test_the_first_answer_is_what_a_file_would_give_back(tmp_path):
    for folder in (tmp_path, None):
        assert Store(folder).get("key", lambda: {"a": (1, 2), 3: [(4,)]}) == {"a": [1, 2], "3": [[4]]}


@pytest.mark.parametrize("damage", [
    b"", b"{", b"\xff\xfe\x00", b"null", b"[]", b"17", b'"value"', b"{}", b'{"Value": 3}', b'{"value": 12',
    b'{"value": 3}', b'{"value": 12345, "sha256": null}', b'{"value": 12345, "sha256": "00"}', b"[" * 100_000,
])
def test_a_damaged_file_is_worked_out_anew(tmp_path, damage):
    Store(tmp_path).get("key", Counted(12345))
    path, = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage)
    work = Counted(12345)
    assert Store(tmp_path).get("key", work) == 12345
    assert work.calls == 1
    assert path.read_bytes() == whole


def test_a_file_of_another_value_or_key_is_worked_out_anew(tmp_path):
    Store(tmp_path).get("key", Counted({"lines": [1, 2]}))
    path, = tmp_path.iterdir()
    whole = path.read_text()
    changed = json.loads(whole)
    changed["value"]["lines"][1] = 3
    path.write_text(json.dumps(changed))
    assert Store(tmp_path).get("key", Counted({"lines": [1, 2]})) == {"lines": [1, 2]}
    assert path.read_text() == whole
    Store(tmp_path).get("other", Counted("other"))
    other, = set(tmp_path.iterdir()) - {path}
    path.write_text(other.read_text())
    assert Store(tmp_path).get("key", Counted("mine")) == "mine"


def test_a_file_cut_short_anywhere_is_worked_out_anew(tmp_path):
    Store(tmp_path).get("key", Counted(12345))
    path, = tmp_path.iterdir()
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert Store(tmp_path).get("key", Counted(12345)) == 12345
        assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    below = tmp_path / "file" / "cache"
    for folder in (below, tmp_path / "file"):
        work = Counted(5)
        store = Store(folder)
        assert store.get("key", work) == store.get("key", work) == 5
        assert work.calls == 1
        assert Store(folder).get("key", work) == 5
        assert work.calls == 2
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_exception_keeps_nothing(tmp_path):
    def fails():
        raise ValueError("too large")

    store = Store(tmp_path)
    with pytest.raises(ValueError, match="too large"):
        store.get("key", fails)
    assert store.get("key", Counted(5)) == 5
    assert len(list(tmp_path.iterdir())) == 1


def test_the_store_of_the_user(tmp_path, monkeypatch):
    Store.of_user(str(tmp_path)).get("key", Counted(5))
    path, = (tmp_path / "planner").iterdir()
    assert json.loads(path.read_text())["value"] == 5
    monkeypatch.setenv("DFED_CACHE", str(tmp_path))
    assert Store.of_user().get("key", Counted(6)) == 5


def chain_of(*units: nn.Module, shape: tuple[int, ...] = (3, 8, 8)) -> Chain:
    return Chain([(f"u{i}", unit) for i, unit in enumerate(units)], input_shape=shape, num_classes=4, name="own")


class Padded(nn.Module):
    """Adds what no text of it shows."""

    def __init__(self, by: int, act=torch.relu) -> None:
        super().__init__()
        self.by, self.act = by, act
        self.register_buffer("hidden", torch.zeros(by), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(nn.functional.pad(x, (self.by, 0)))


def vit(heads: int) -> Chain:
    return build_chain("vit_tiny", {"depth": 1, "width": 24, "heads": heads}, input_shape=(3, 8, 8), num_classes=4)


def frozen(chain: Chain, name: str) -> Chain:
    chain.get_parameter(name).requires_grad_(False)
    return chain


DIFFERENT = [  # each describes another chain
    lambda: chain_of(nn.Conv2d(3, 4, 3)),
    lambda: chain_of(nn.Conv2d(3, 4, 3), shape=(3, 8, 9)),
    lambda: chain_of(nn.Conv2d(3, 4, 3, stride=2)),
    lambda: chain_of(nn.Conv2d(3, 5, 3)),
    lambda: chain_of(nn.Conv2d(3, 4, 3, bias=False)),
    lambda: chain_of(nn.Conv2d(3, 4, 3, dtype=torch.float64)),
    lambda: frozen(chain_of(nn.Conv2d(3, 4, 3)), "u0.weight"),
    lambda: frozen(chain_of(nn.Conv2d(3, 4, 3)), "u0.bias"),
    lambda: chain_of(nn.Conv2d(3, 4, 3), nn.ReLU()),
    lambda: chain_of(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)),
    lambda: chain_of(nn.Conv2d(3, 4, 3), nn.Dropout(0.1)),
    lambda: chain_of(nn.Conv2d(3, 4, 3), nn.Dropout(0.2)),
    lambda: chain_of(nn.Conv2d(3, 4, 3), Padded(1)),
    lambda: chain_of(nn.Conv2d(3, 4, 3), Padded(2)),
    lambda: chain_of(nn.Conv2d(3, 4, 3), Padded(2, torch.sigmoid)),
    lambda: vit(1),
    lambda: vit(2),  # the same tensors and the same text: heads are an attribute of the attention layer only
]


def test_another_chain_has_another_description():
    texts = [json.dumps(describe(make())) for make in DIFFERENT]
    assert len(set(texts)) == len(texts)
    # The same chain, made again, used or not, has the same.
    chains = [make() for make in DIFFERENT]
    chains[-1].output_shapes()
    chains[-1].set_generator(torch.Generator())
    chains[-1].eval()
    assert [json.dumps(describe(chain)) for chain in chains] == texts
    assert json.dumps(describe(chains[-1].skeleton())) == texts[-1]
    # It matters whether it drops its activations.
    chains[-1].recompute = True
    assert json.dumps(describe(chains[-1])) != texts[-1]


MODULE = """
from torch import nn
from helpers_{tag} import Base

class Own(Base):
    def forward(self, x):
        return x{change}
"""
BASE = """
from torch import nn

class Base(nn.Module):
    pass
"""


def own_chain(folder, tag: str, change: str = "", base: str = "") -> Chain:
    """A chain with a class from files in ``folder``, imported anew."""
    (folder / f"helpers_{tag}.py").write_text(BASE + base)
    (folder / f"own_{tag}.py").write_text(MODULE.format(tag=tag, change=change))
    importlib.invalidate_caches()
    for name in (f"helpers_{tag}", f"own_{tag}"):
        sys.modules.pop(name, None)
    module = importlib.import_module(f"own_{tag}")
    return chain_of(nn.Conv2d(3, 4, 3), module.Own())


def test_a_class_of_the_users_own_counts_with_its_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two versions within a second look alike to a cached one
    store, keys = Store(tmp_path / "cache"), {}
    for label, change, base in [("first", "", ""), ("changed", " * 2", ""), ("base changed", "", "\nWIDTH = 3\n")]:
        keys[label] = json.dumps(describe(own_chain(tmp_path, "a", change, base)))
        work = Counted(label)
        assert store.get(keys[label], work) == label
        assert work.calls == 1
    assert len(set(keys.values())) == 3
    assert json.dumps(describe(own_chain(tmp_path, "a"))) == keys["first"]
    # The class of another object, such as a strategy, counts as well.
    chain, own = vit(1), own_chain(tmp_path, "a").unit("u1")
    assert describe(chain, own) != describe(chain)
    assert describe(chain, chain) == describe(chain)


def test_a_class_without_a_file_counts_by_name():
    made = {}
    exec_free = type("Made", (nn.Identity,), {"__module__": "nowhere.at_all"})
    made["one"] = json.dumps(describe(chain_of(exec_free())))
    other = type("Made", (nn.Identity,), {"__module__": "nowhere.else"})
    made["two"] = json.dumps(describe(chain_of(other())))
    main = type("Made", (nn.Identity,), {"__module__": "builtins"})
    made["three"] = json.dumps(describe(chain_of(main())))
    assert len(set(made.values())) == 3


SCRIPT = """
import json
from torch import nn
from dfed.models import Chain
from dfed.planner.store import describe

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.names = nn.functional.relu, ["b", "a"]
    def forward(self, x):
        return self.act(x)

own = Chain([("a", nn.Linear(3, 4)), ("b", Own())], input_shape=(3,), num_classes=4, name="own")
TEXT = json.dumps(describe(own))
print(TEXT)
"""


def test_the_description_is_the_same_in_every_process(tmp_path, monkeypatch):
    script = tmp_path / "describes_own.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONHASHSEED": "1"})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert done.stdout.strip() == importlib.import_module("describes_own").TEXT


def test_shapes_are_traced_once(tmp_path, monkeypatch):
    traced, trace = [], Chain._trace_shapes
    monkeypatch.setattr(Chain, "_trace_shapes", lambda chain: traced.append(chain.name) or trace(chain))
    wanted = build_chain("resnet8", {}, input_shape=(1, 28, 28), num_classes=10).output_shapes()
    assert traced == ["resnet8"]
    for number in range(3):
        with apart(), shapes_kept(Store(tmp_path)):
            found = build_chain("resnet8", {}, input_shape=(1, 28, 28), num_classes=10).output_shapes()
            assert (list(found.items()), len(traced)) == (list(wanted.items()), 2), number
    with shapes_kept(Store(tmp_path)):
        other = build_chain("resnet8", {}, input_shape=(3, 32, 32), num_classes=10).output_shapes()
        assert (other["stem"][1:], len(traced)) == ((32, 32), 3)
        for number in range(4, 6):
            chain_of(type("Mine", (nn.Flatten,), {})()).output_shapes()  # of the user's own: always
            assert len(traced) == number
    build_chain("resnet8", {}, input_shape=(1, 28, 28), num_classes=10)
    assert len(traced) == 6


def cut_to(count, first, *rest):
    """A forward function, or a hook."""
    return (rest[-1] if rest else first)[..., :count]


@pytest.mark.parametrize("way", ["hook", "forward", "partial"])
def test_functions_of_the_users_own_count_as_own_code(tmp_path, way):
    def chain(count: int) -> Chain:
        stem = nn.Identity()
        if way == "hook":
            stem.register_forward_hook(lambda module, given, result: cut_to(count, result))
        else:
            stem.forward = (lambda x: cut_to(count, x)) if way == "forward" else functools.partial(cut_to, count)
        return Chain([("stem", stem), ("head", nn.Linear(4, 3))], input_shape=(6,), num_classes=3, name="own")

    assert describe(chain(4))[-1]
    with shapes_kept(Store(tmp_path)):
        assert chain(4).output_shapes() == {"stem": (4,), "head": (3,)}
        with pytest.raises(ConfigError, match="unit 'head' cannot take an input of shape"):
            chain(3).output_shapes()


def test_costs_are_taken_from_the_store(tmp_path):
    def peak(store: Store, batch_size: int = 4, **settings) -> int:
        chain = build_chain("mlp", {"hidden": [8]}, input_shape=(6,), num_classes=3)
        costs, plan = chain_costs(chain, ClientSettings(batch_size=batch_size, **settings), torch.device("cpu"), store)
        return costs.peak_bytes_at(plan)

    cases = [{}, {"batch_size": 5}, {"momentum": 0.9}, {"optimizer": "adam"}, {"activation_checkpointing": True},
             {"precision": "bf16"}]
    real = [peak(Store(tmp_path), **case) for case in cases]
    assert real == [peak(Store(None), **case) for case in cases]
    files = list(tmp_path.iterdir())
    assert len(files) == len(cases)
    assert peak(Store(tmp_path), learning_rate=0.5) == real[0]  # neither time nor memory depends on it
    assert len(list(tmp_path.iterdir())) == len(cases)
    before = {path: path.read_text() for path in files}
    assert [peak(Store(tmp_path), **case) for case in cases] == real
    assert {path: path.read_text() for path in files} == before  # found, not written again
