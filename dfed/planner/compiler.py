"""Torch's compiler, not loaded where it would only be told to keep out.

Optimisers, checkpoints and the reference kernels for tensors without storage tell ``torch._dynamo`` not to look into them, each
when it is called for the first time, and for that import it: a second of work, for nothing where nothing is compiled.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["load_compiler_late"]

_NAME = "torch._dynamo"
_lock = threading.RLock()
_told: weakref.WeakSet[Any] = weakref.WeakSet()


class _Waiting(types.ModuleType):
    """The compiler's package, which runs when it is asked for anything but to keep out."""

    def disable(self, fn: Any = None, recursive: bool = True, *, wrapping: bool = True, **options: Any) -> Any:
        """``fn`` for as long as there is no compiler, and from then on what the compiler makes of it."""
        if not isinstance(fn, types.FunctionType) or options:
            return _loaded(self).disable(fn, recursive, wrapping=wrapping, **options)
        if not wrapping:  # torch's own functions keep the answer as an attribute, which is taken from them then
            _told.add(fn)
            return fn
        return _late(self, fn, recursive)

    def graph_break(self, *_: Any) -> None:
        """Where the compiler would have to stop, if there was one."""

    def __getattr__(self, name: str) -> Any:
        # Those who look through all modules ask for names such as `__file__`; the path is wanted for a module in the package,
        # which is not to run before it.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(f"module {_NAME!r} has no attribute {name!r}")
        return getattr(_loaded(self), name)


def _late(module: types.ModuleType, fn: Callable[..., Any], recursive: bool) -> Callable[..., Any]:
    @functools.cache
    def disabled() -> Callable[..., Any]:
        return module.disable(fn, recursive)  # type: ignore[no-any-return]

    @functools.wraps(fn)
    def late(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs) if type(module) is _Waiting else disabled()(*args, **kwargs)

    return late


def _loaded(module: types.ModuleType) -> Any:
    with _lock:
        if type(module) is _Waiting:
            spec = module.__spec__
            assert spec is not None
            assert spec.loader is not None
            module.__class__ = types.ModuleType
            module.__path__ = list(spec.submodule_search_locations or ())
            try:
                spec.loader.exec_module(module)
            except BaseException:
                module.__class__ = _Waiting
                del module.__path__
                raise
            for fn in _told:
                vars(fn).pop("__dynamo_disable", None)
            _told.clear()
    return module


def load_compiler_late() -> None:
    """Have ``torch._dynamo`` loaded when somebody uses it, unless it is already."""
    if _NAME in sys.modules:
        return
    spec = importlib.util.find_spec(_NAME)
    if spec is None or not hasattr(spec.loader, "exec_module"):
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = torch._dynamo = module
    importlib.import_module(f"{_NAME}.config")  # settings, which torch's mode for tensors without storage looks at
    del module.__path__
    module.__class__ = _Waiting
