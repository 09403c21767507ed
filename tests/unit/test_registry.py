from __future__ import annotations

import sys

import pytest

from dfed.errors import CheckpointError, ConfigError, DataError, DfedError
from dfed.registry import ALL, DATASETS, MODELS, STRATEGIES, Registry, UnknownName, calling, nearest


@pytest.mark.parametrize(("title", "name"), [(title, name) for title, registry in ALL.items() for name in registry])
def test_every_entry_can_be_imported_and_says_what_it_is(title, name):
    registry = ALL[title]
    assert callable(registry.get(name))
    summary = registry.summary(name)
    assert 10 <= len(summary) <= 120
    assert summary.endswith(".")
    assert summary == (registry.get(name).__doc__ or "").strip().splitlines()[0].strip()


def test_names_are_listed_in_order_and_known():
    assert list(STRATEGIES) == sorted(STRATEGIES)
    assert "fedavg" in STRATEGIES
    assert "fedavgg" not in STRATEGIES
    assert "dfed.strategies.fedavg:FedAvg" not in STRATEGIES
    assert {"fedavg", "cnn", "digits", "iid"} <= {name for registry in ALL.values() for name in registry}


def test_an_object_of_ones_own_is_imported_by_its_path():
    assert STRATEGIES.get("dfed.strategies.fedavg:FedAvg") is STRATEGIES.get("fedavg")
    assert Registry("thing", {"loads": "json:loads"}).get("loads") is sys.modules["json"].loads


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fedavgg", f"must be one of {', '.join(STRATEGIES)}, but is 'fedavgg'. Did you mean 'fedavg'?"),
        ("zzz", f"must be one of {', '.join(STRATEGIES)}, but is 'zzz'."),
        ("a\nb", "but is 'a\\nb'."),
        ("", f"must be one of {', '.join(STRATEGIES)}, but is ''."),
        ("json:nope", "must name a strategy that can be imported, but 'json:nope' cannot: module 'json' has no attribute"),
        ("no_such_module:x", "must name a strategy that can be imported, but 'no_such_module:x' cannot: No module named"),
        ("json.nope:x", "cannot: No module named 'json.nope'."),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UnknownName) as caught:
        STRATEGIES.get(name)
    assert message in str(caught.value)
    assert isinstance(caught.value, DfedError)
    assert isinstance(caught.value, KeyError)


@pytest.mark.parametrize("name",
                         [":", "a:", ":b", "..:x", ".a:b", "a..b:c", "a b:c", "a:b:c", "a:b.c", "a/b:c", "a: b", "1:2",
                          "a:b\n"])
def test_malformed_paths(name):
    with pytest.raises(UnknownName) as caught:
        DATASETS.get(name)
    assert str(caught.value) == f"must be a known name, or have the form package.module:attribute, but is {name!r}."


@pytest.mark.parametrize("body", ["1 / 0", "raise RuntimeError('no driver')", "def f(:", "import no_such_module"])
def test_a_module_that_cannot_be_imported(body, tmp_path, monkeypatch):
    (tmp_path / "dfed_test_broken.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "dfed_test_broken", raising=False)
    with pytest.raises(UnknownName,
                       match="must name a model that can be imported, but 'dfed_test_broken:f' cannot: ") as caught:
        MODELS.get("dfed_test_broken:f")
    assert caught.value.__cause__ is not None


def test_near_misses():
    assert nearest("roundz", ["rounds", "seed"]) == " Did you mean 'rounds'?"
    assert nearest("xyz", ["rounds", "seed"]) == ""
    assert nearest("", []) == ""


def _called(name, error):
    """What is left of ``error`` when the function ``name``, named in field ``model``, raises it."""
    with pytest.raises(type(error) if name is None else Exception) as caught, calling("model", name or "mlp"):
        raise error
    return caught.value


def test_an_own_function_that_raises_is_a_fault_of_its_field():
    cause = KeyError("missing\nand more")
    found = _called(f"{__name__}:f", cause)
    assert isinstance(found, ConfigError)
    assert found.__cause__ is cause
    (fault,) = found.faults
    assert fault.field == "model"
    assert f"'{__name__}:f' raised KeyError: " in fault.message
    assert f"({__file__}:" in fault.message
    assert "raised ValueError: no text (" in str(_called("a:b", ValueError()))
    assert str(_called("a:b", DataError("no data."))) == "`model` 'a:b': no data."
    refused = CheckpointError("x")
    assert _called("a:b", refused) is refused  # an error of dfed's own says enough


def test_of_our_own_functions_only_a_lack_of_memory_is_the_configs_fault():
    assert "'mlp' raised MemoryError: 3 TiB" in str(_called("mlp", MemoryError("3 TiB")))
    for bug in (KeyError("x"), DataError("x"), ZeroDivisionError()):
        assert _called("mlp", bug) is bug
