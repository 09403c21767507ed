"""Codecs by name: ``int8``, or with options ``top_k(density=0.01,values=int8)``. A text names one codec and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from dfed.comm.codecs.base import Codec
from dfed.errors import WireError
from dfed.registry import CODECS
from dfed.settings import settings_of

__all__ = ["codec_of", "spec_of"]

_SPEC = re.compile(r"([a-z0-9_]{1,32})(?:\(([a-z0-9_=.,+-]{1,200})\))?")
_MOST = 256  # texts that are remembered
_known: dict[str, Codec] = {}


def spec_of(name: str, options: Mapping[str, Any]) -> str:
    """The text that :func:`codec_of` reads as this codec with these options."""
    given = ",".join(f"{key}={str(value).lower()}" for key, value in sorted(options.items()))
    return f"{name}({given})" if given else name


def codec_of(spec: str) -> Codec:
    """The codec that a text names. Codecs hold no state, so one of each is enough.

    Raises:
        WireError: If the text is none, or names no codec of the table, or options that it does not have.
    """
    if spec not in _known:
        if len(_known) >= _MOST:
            _known.clear()
        _known[spec] = _make(spec)
    return _known[spec]


def _make(spec: str) -> Codec:
    match = _SPEC.fullmatch(spec)
    # Only names of the table: a header must not make a rank import what it likes.
    if match is None or match.group(1) not in CODECS:
        raise WireError(f"a codec must be one of {', '.join(CODECS)}, with options as in top_k(density=0.01), but is "
                        f"{spec!r:.60}.")
    made = CODECS.get(match.group(1))
    options: dict[str, Any] = {}
    for part in (match.group(2) or "").split(","):
        key, _, text = part.partition("=")
        if part:
            options[key] = _value(text)
    try:
        codec: Codec = made(**settings_of(made)(**options).model_dump())
        codec.name = spec
        return codec
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WireError(f"the options of codec {spec!r:.60} must be valid, but `{where}` is not: {first['msg']}.") from error


def _value(text: str) -> Any:
    """A number, a truth value, or a word."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
