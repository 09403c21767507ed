"""Validation errors in dfed's grammar: "`field` must be …, but is …."."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from dfed.errors import Fault
from dfed.registry import nearest

__all__ = ["faults_of"]

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
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
    "too_short": ("min_length", "of a length of at least"),
    "too_long": ("max_length", "of a length of at most"),
    "string_too_short": ("min_length", "text of a length of at least"),
}


def faults_of(error: ValidationError, prefix: str, model: type[BaseModel]) -> list[Fault]:
    """All faults of a pydantic error.

    Args:
        prefix: Dotted path of the settings that were validated; empty for the top level.
        model: The settings class, for the names that would have been allowed.
    """
    by_field: dict[str, list[str]] = {}
    for item in error.errors():
        path = _path(prefix, item["loc"])
        by_field.setdefault(path, []).append(_message(item, model))
    # A value that suits no branch of a union is reported once a branch; together they say what is allowed.
    return [Fault(path, _joined(list(dict.fromkeys(messages)))) for path, messages in by_field.items()]


def _joined(messages: list[str]) -> str:
    if len(messages) == 1:
        return messages[0]
    wanted, rest = zip(*(message.removeprefix("must be ").split(", but is ", 1) if ", but is " in message
                         else (message, "") for message in messages), strict=True)
    return f"must be {' or '.join(wanted)}, but is {rest[0] or 'not.'}"


def _path(prefix: str, location: tuple[int | str, ...]) -> str:
    path = prefix
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("int", "float", "str", "bool", "none"):
            path += f".{part}" if path else part
    return path


def _message(item: Any, model: type[BaseModel]) -> str:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    shown = f"but is {value!r:.60}."
    if kind == "extra_forbidden":
        known = _allowed(model, item["loc"][:-1])
        return f"is not a setting; known here: {', '.join(known)}.{nearest(str(item['loc'][-1]), known)}"
    if kind == "missing":
        return "must be given, but is not."
    if kind == "literal_error":
        options = [option.strip().strip("'") for option in context["expected"].replace(" or ", ", ").split(",")]
        return f"must be one of {', '.join(options)}, {shown}{nearest(str(value), options)}"
    if kind == "value_error":
        return str(context["error"])
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must be {words} {context[name]}, {shown}"
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}, {shown}"
    return f"must be valid ({item['msg']}), {shown}"


def _allowed(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """Names of the settings at ``location`` below ``model``."""
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return sorted(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType, typing.Annotated):
        for argument in typing.get_args(annotation):
            found = _model_in(argument)
            if found is not None:
                return found
    return None
