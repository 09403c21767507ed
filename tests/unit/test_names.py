"""What every module of dfed has in common."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import dfed
from dfed.errors import ConfigError, DfedError, Fault, RankLost, UpdateRejected

MODULES = ["dfed", *(
    module.name for module in pkgutil.walk_packages(dfed.__path__, "dfed.")
    if module.name != "dfed.__main__"  # runs the command line when it is imported
)]


@pytest.mark.parametrize("name", MODULES)
def test_all_names_only_what_exists(name):
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), "a module says what it is for"
    if not hasattr(module, "__all__"):
        assert module.__file__.endswith("__init__.py"), "only a package that exports nothing may do without"
        assert not [public for public, value in vars(module).items() if getattr(value, "__module__", None) == name]
        return
    assert len(set(module.__all__)) == len(module.__all__)
    missing = [public for public in module.__all__ if not hasattr(module, public)]
    assert not missing
    for public in module.__all__:
        value = getattr(module, public)
        if callable(value) and getattr(value, "__module__", "").startswith("dfed"):
            assert (value.__doc__ or "").strip(), f"{name}.{public} needs a docstring"


def test_every_error_is_a_dfed_error():
    errors = importlib.import_module("dfed.errors")
    for public in set(errors.__all__) - {"Fault"}:
        assert issubclass(getattr(errors, public), DfedError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(errors.DataError, ValueError)
    assert UpdateRejected("non_finite", "x is NaN").reason == "non_finite"
    assert RankLost("gone", [2, 3]).ranks == (2, 3)
    assert RankLost("gone").ranks == ()


def test_faults_are_listed_together():
    faults = [Fault("rounds", "must be at least 1, but is 0."), Fault("a.b", "must be text, but is 3.")]
    assert str(ConfigError(faults[:1])) == "1 fault in the config:\n  `rounds` must be at least 1, but is 0."
    error = ConfigError(faults)
    assert error.faults == tuple(faults)
    assert str(error).splitlines() == [
        "2 faults in the config:", "  `rounds` must be at least 1, but is 0.", "  `a.b` must be text, but is 3.",
    ]
    with pytest.raises(AssertionError, match="at least one"):
        ConfigError([])
