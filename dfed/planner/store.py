"""Predictions on disk: what was worked out once for a model, a plan and a version of the code need not be again."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dfed
from dfed.data import cache_folder
from dfed.memory import warm_up
from dfed.models import Chain
from dfed.models.chain import shapes_looked_up
from dfed.planner.children import in_children

__all__ = ["Store", "apart", "describe", "own_code", "shapes_kept"]

_LIBRARIES = {"torch", "torchvision", "dfed", *sys.stdlib_module_names}
_OF_EVERY_MODULE = {*vars(nn.Module()), "generator", "_shapes"}


_OWN = "classes of the user's own"


class Store:
    """JSON values by key, each in a file of its own under the cache folder; losing it costs time only.

    A folder that cannot be written is no error: values are then worked out anew each time. So are those of a file whose
    checksum does not fit what it holds, or the name it bears.

    Args:
        folder: See :func:`dfed.data.cache_folder`; None keeps everything in memory.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._known: dict[str, Any] = {}

    @classmethod
    def of_user(cls, cache: str | None = None) -> Store:
        """The store in the user's cache folder."""
        return cls(cache_folder(cache) / "planner")

    def get(self, depends: Any, work_out: Callable[[], Any], *, here: bool = False) -> Any:
        """The value for ``depends`` (JSON values on which it depends, the code of dfed and torch's version apart).

        Where classes of the user's own take part, nothing is kept: what their code depends on cannot be known.

        Args:
            here: Work it out in this process, also inside of :func:`apart`.
        """
        text = json.dumps([_code(), torch.__version__, depends], sort_keys=True)
        if _OWN in text:
            return _worked_out(work_out, here)
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        if key not in self._known:
            value = self._read(key)
            if value is None:
                value = _worked_out(work_out, here)
                self._write(key, value)
            self._known[key] = value
        return self._known[key]

    def _read(self, key: str) -> Any:
        if self._folder is None:
            return None
        try:
            kept = json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
            return kept["value"] if kept["sha256"] == _checksum(key, kept["value"]) else None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def _write(self, key: str, value: Any) -> None:
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._folder, suffix=".partial", delete=False, encoding="utf-8") as file:
                json.dump({"value": value, "sha256": _checksum(key, value)}, file)
            os.chmod(file.name, 0o644)  # a folder may be shared
            os.replace(file.name, self._folder / f"{key}.json")
        except OSError:
            for partial in self._folder.glob("*.partial"):
                with contextlib.suppress(OSError):
                    partial.unlink()


_apart = contextvars.ContextVar("apart", default=False)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, what no store holds is worked out in a forked child, if there can be one; see :mod:`dfed.planner.children`."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


@contextlib.contextmanager
def shapes_kept(store: Store) -> Iterator[None]:
    """Inside, the shapes of a chain are traced for the first time only. Tracing leaves torch's modules behind that children, if
    there are any, want, too; so it is done here."""
    def look_up(chain: Chain, trace: Callable[[], Any]) -> dict[str, tuple[int, ...]]:
        kept = store.get(["shapes", describe(chain)], trace, here=True)
        return {name: tuple(kept[name]) for name in chain.unit_names}

    with shapes_looked_up(look_up):
        yield


def _worked_out(work_out: Callable[[], Any], here: bool) -> Any:
    """What ``work_out`` returns, as a file would give it back."""
    away = _apart.get() and not here
    if away:
        warm_up()
    [text] = in_children(lambda work: json.dumps(work()), [work_out], even_alone=True) if away else [None]
    return json.loads(json.dumps(work_out()) if text is None else text)


def _checksum(key: str, value: Any) -> str:
    """By which a file is known to hold what was written for this key: hash of the key and the value's canonical text."""
    text = json.dumps([key, value], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Hash of dfed's own source."""
    digest = hashlib.sha256()
    for path in sorted(Path(dfed.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def describe(chain: Chain, *objects: object) -> list[Any]:
    """What predictions for ``chain`` depend on: its modules, their attributes and tensors, the source of the user's classes.

    Args:
        objects: Others whose class counts, e.g. the strategy.
    """
    named = [*chain.named_parameters(), *chain.named_buffers()]
    tensors = [[name, list(tensor.shape), str(tensor.dtype), tensor.requires_grad] for name, tensor in named]
    # A text of the module does not tell all, e.g. not how many heads an attention layer has.
    attributes = [[name, _attributes(module)] for name, module in chain.named_modules()]
    sources = sorted(map(_source, own_code(*chain.modules(), *objects)))
    return [repr(chain), list(chain.input_shape), tensors, attributes, [_OWN, *sources] if sources else []]


def own_code(*objects: object) -> set[Any]:
    """What of these objects is the user's own, no library's and not dfed's: their classes, with the bases, and functions that
    they hold, a module's hooks among them."""
    code: set[Any] = {cls for thing in objects for cls in type(thing).__mro__}
    for thing in objects:
        for value in getattr(thing, "__dict__", {}).values():
            code.update(_functions(value))
    return {part for part in code if part.__module__.partition(".")[0] not in _LIBRARIES}


def _functions(value: object) -> Iterator[Any]:
    """Functions among an attribute's value, or its values by key."""
    for one in value.values() if isinstance(value, Mapping) else (value,):
        while isinstance(one, functools.partial):
            one = one.func
        if inspect.isroutine(one) and isinstance(getattr(one, "__module__", None), str):
            yield one


def _attributes(module: nn.Module) -> dict[str, str]:
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    # The text of a function has its address in it, which is another in each process.
    return {name: getattr(value, "__qualname__", None) or repr(value) for name, value in own.items()}


def _source(code: Any) -> str:
    """Hash of the file that defines a class or function; its name where there is none."""
    try:
        return hashlib.sha256(Path(sys.modules[code.__module__].__file__ or "").read_bytes()).hexdigest()
    except (AttributeError, KeyError, OSError):
        return f"{code.__module__}.{code.__qualname__}"
