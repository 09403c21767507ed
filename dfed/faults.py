"""Validation errors in dfed's grammar: "`field` must be …, but is …."."""

from __future__ import annotations

import math
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from dfed.errors import Fault
from dfed.registry import nearest

__all__ = ["faults_of", "shown", "unknown_setting", "unusable_numbers"]

_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a group of settings",
    "model_type": "a group of settings",
    "model_attributes_type": "a group of settings",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than {}"),
    "greater_than_equal": ("ge", "at least {}"),
    "less_than": ("lt", "less than {}"),
    "less_than_equal": ("le", "at most {}"),
    "too_short": ("min_length", "a list of length {} or more"),
    "too_long": ("max_length", "a list of length {} or less"),
    "string_too_short": ("min_length", "text of length {} or more"),
    "string_too_long": ("max_length", "text of length {} or less"),
}
_UNKNOWN_KEY = ("extra_forbidden", "invalid_key")
_MAX_CHARACTERS = 80
_MAX_DIGITS = 40
_LARGEST = 2**63 - 1


class _Short(reprlib.Repr):
    """Values as YAML writes them, cut to a length that fits a message."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = _MAX_CHARACTERS

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    def repr_int(self, value: int, level: int) -> str:
        if abs(value) < 10**_MAX_DIGITS:
            return str(value)
        return f"a whole number of about {int(value.bit_length() * 0.30103) + 1} digits"  # log10(2)


_SHORT = _Short()


def shown(value: object) -> str:
    """A value from a config, for a message: at most 80 characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS - 1]}…"


def unknown_setting(name: str, known: Sequence[str]) -> str:
    """What to say of the key ``name`` where only ``known`` are settings."""
    here = f"known here: {', '.join(known)}" if known else "there are none here"
    return f"is not a setting; {here}.{nearest(name, list(known))}"


def unusable_numbers(value: Any, field: str) -> list[Fault]:
    """Faults of the numbers that no setting can take, whatever it allows: infinite ones, and those above 64 bits."""
    if isinstance(value, Mapping):
        named = [(f"{field}.{key}" if field else str(key), part) for key, part in value.items()]
        return [fault for name, part in named for fault in unusable_numbers(part, name)]
    if isinstance(value, list):
        return [fault for i, part in enumerate(value) for fault in unusable_numbers(part, f"{field}[{i}]")]
    if isinstance(value, float) and not math.isfinite(value):
        return [Fault(field, f"must be a finite number, but is {shown(value)}.")]
    if isinstance(value, int) and abs(value) > _LARGEST:
        return [Fault(field, f"must be a number of 64 bits (at most {_LARGEST}), but is {shown(value)}.")]
    return []


def faults_of(error: ValidationError, prefix: str, model: type[BaseModel], siblings: Sequence[str] = ()) -> list[Fault]:
    """All faults of a pydantic error.

    Args:
        prefix: Dotted path of the settings that were validated; empty for the top level.
        model: The settings class, for the names that would have been allowed.
        siblings: Further names that a config may give beside the model's own.
    """
    by_field: dict[str, list[str]] = {}
    for item in error.errors():
        path, parent = _path(prefix, item, model)
        known = sorted(parent.model_fields) if parent is not None else []
        if parent is model:
            known = [*siblings, *known]
        by_field.setdefault(path, []).append(_message(item, known))
    # A value that suits no branch of a union is reported once a branch; together they say what is allowed.
    return [Fault(path, _joined(list(dict.fromkeys(messages)))) for path, messages in by_field.items()]


def _joined(messages: list[str]) -> str:
    if len(messages) == 1:
        return messages[0]
    if not all(message.startswith("must be ") and ", but is " in message for message in messages):
        return "; or ".join(message.rstrip(".") for message in messages) + "."
    wanted, found = zip(*(message.removeprefix("must be ").split(", but is ", 1) for message in messages), strict=True)
    return f"must be {' or '.join(wanted)}, but is {found[0]}"


def _path(prefix: str, item: Any, model: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """The dotted path of what is wrong, and the settings class that it stands in.

    pydantic's locations also name the branches of unions, which mean nothing to the reader of a config; a name that is
    neither a setting nor an unknown key is such a branch.
    """
    path, here = prefix, model
    parent: type[BaseModel] | None = model
    *_, last = location = item["loc"] or ("",)
    for number, part in enumerate(location, start=1):
        inner = _model_in(here)
        if isinstance(part, str) and inner is not None and part in inner.model_fields:
            path, parent, here = _dotted(path, part), inner, inner.model_fields[part].annotation
        elif number == len(location) and item["type"] in _UNKNOWN_KEY:
            name = last if item["type"] == "extra_forbidden" else item["input"]
            path, parent = _dotted(path, str(name)), inner
        elif isinstance(part, int):
            path += f"[{part}]"
        elif inner is None and typing.get_origin(here) is dict and part != "[key]":
            path, here = _dotted(path, part), typing.get_args(here)[1]
    return path, parent


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _message(item: Any, known: Sequence[str]) -> str:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    but = f"but is {shown(value)}."
    if kind in _UNKNOWN_KEY:
        return unknown_setting(str(item["loc"][-1] if kind == "extra_forbidden" else value), known)
    if kind == "missing":
        return "must be given, but is not."
    if kind == "literal_error":
        options = [option.strip().strip("'") for option in context["expected"].replace(" or ", ", ").split(",")]
        hint = nearest(value, options) if isinstance(value, str) else ""
        return f"must be one of {', '.join(options)}, {but}{hint}"
    if kind == "value_error":
        return str(context["error"])
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must be {words.format(_bound(context[name]))}, {but}"
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}, {but}"
    wanted = item["msg"].partition(" should ")[2] or f"be valid ({item['msg']})"
    return f"must {wanted}, {but}"


def _bound(value: float) -> str:
    """A bound without a fraction that says nothing: ``0``, not ``0.0``."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else str(value)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType, typing.Annotated):
        for argument in typing.get_args(annotation):
            found = _model_in(argument)
            if found is not None:
                return found
    return None
