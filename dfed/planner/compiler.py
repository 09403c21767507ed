"""Torch's compiler, not loaded where it would only be told to keep out.

Optimisers, checkpoints and the reference kernels for tensors without storage tell ``torch._dynamo`` not to look into them, each
when it is called for the first time, and for that import it: a second of work, for nothing where nothing is compiled.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["load_compiler_late"]

_NAME = "torch._dynamo"
_lock = threading.RLock()


class _Waiting(types.ModuleType):
    """The compiler's package, which runs when it is asked for anything but to keep out."""

    def disable(self, fn: Callable[..., Any], recursive: bool = True, *, wrapping: bool = True, **options: Any) -> Any:
        """``fn`` itself, for torch's own functions, which want no wrapper and keep the answer until the compiler is there."""
        if wrapping or options:
            return _loaded(self).disable(fn, recursive, wrapping=wrapping, **options)
        _told.append(fn)
        return fn

    def graph_break(self, *_: Any) -> None:
        """Where the compiler would have to stop, if there was one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by those who look through all modules
            raise AttributeError(f"module {_NAME!r} has no attribute {name!r}")
        return getattr(_loaded(self), name)


_told: list[Any] = []


def _loaded(module: types.ModuleType) -> Any:
    with _lock:
        if type(module) is _Waiting:
            module.__class__ = types.ModuleType
            try:
                module.__spec__.loader.exec_module(module)  # type: ignore[union-attr]
            except BaseException:
                module.__class__ = _Waiting
                raise
            for fn in _told:  # from now on they tell the compiler
                vars(fn).pop("__dynamo_disable", None)
            _told.clear()
    return module


def load_compiler_late() -> None:
    """Have ``torch._dynamo`` loaded when somebody uses it, unless it is already."""
    if _NAME in sys.modules:
        return
    spec = importlib.util.find_spec(_NAME)
    if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Waiting
    sys.modules[_NAME] = module
    torch._dynamo = module
