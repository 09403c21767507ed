"""Predictions on disk: what was worked out once for a model, a plan and a version of the code need not be again."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dfed
from dfed.data import cache_folder
from dfed.models import Chain

__all__ = ["Store", "describe"]

_LIBRARIES = ("torch.", "torchvision.", "dfed.", "builtins.")


class Store:
    """JSON values by key, each in a file of its own under the cache folder; losing it costs time only.

    A folder that cannot be written is no error: values are then worked out anew each time.

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

    def get(self, depends: Any, work_out: Callable[[], Any]) -> Any:
        """The value for ``depends`` (JSON values on which it depends, the code of dfed and torch's version apart)."""
        text = json.dumps([_code(), torch.__version__, depends], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        if key not in self._known:
            value = self._read(key)
            if value is None:
                value = json.loads(json.dumps(work_out()))  # what a file would give back
                self._write(key, value)
            self._known[key] = value
        return self._known[key]

    def _read(self, key: str) -> Any:
        if self._folder is None:
            return None
        try:
            return json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _write(self, key: str, value: Any) -> None:
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._folder, suffix=".partial", delete=False, encoding="utf-8") as file:
                json.dump(value, file)
            os.replace(file.name, self._folder / f"{key}.json")
        except OSError:
            return


@functools.cache
def _code() -> str:
    """Hash of dfed's own source."""
    digest = hashlib.sha256()
    for path in sorted(Path(dfed.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def describe(chain: Chain, *objects: object) -> list[Any]:
    """What predictions for ``chain`` depend on: its modules and shapes, and the source of classes that are the user's own.

    Args:
        objects: Others whose class counts, e.g. the strategy.
    """
    tensors = [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in chain.state_dict().items()]
    trained = [name for name, parameter in chain.named_parameters() if parameter.requires_grad]
    classes = {type(thing) for thing in [*chain.modules(), *objects]}
    sources = sorted(_source(cls) for cls in classes if not f"{cls.__module__}.".startswith(_LIBRARIES))
    return [repr(chain), list(chain.input_shape), tensors, trained, sources]


def _source(cls: type[nn.Module] | type) -> str:
    """Hash of the file that defines a class; its name where there is none."""
    path = getattr(sys.modules.get(cls.__module__), "__file__", None) or inspect.getsourcefile(cls)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else f"{cls.__module__}.{cls.__qualname__}"
