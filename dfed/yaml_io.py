"""YAML as configs use it: safe, no key twice, ``1e-3`` a number, ``off`` a word; and ``key.sub=value`` overrides."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dfed.errors import ConfigError, Fault
from dfed.faults import shown

__all__ = ["apply_override", "dump_yaml", "parts_of", "read_config", "read_yaml", "set_value"]

_NUMBERS_AND_WORDS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
_REPLACED = [f"tag:yaml.org,2002:{kind}" for kind in (*_NUMBERS_AND_WORDS, "timestamp")]
_MERGE = "tag:yaml.org,2002:merge"
_MAX_VALUES, _MAX_LEVELS = 100_000, 100


class _TooLarge(yaml.MarkedYAMLError):
    """YAML that is larger than any config; ``context`` says what there may be at most."""


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, and bare scalars are what they look like.

    PyYAML follows YAML 1.1, where ``off`` is false, ``010`` is eight, ``1:30`` is ninety and ``1e-3`` is text.

    A few lines of aliases of aliases can stand for billions of values: what they come to is counted, not built.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


    def __init__(self, text: str):
        super().__init__(text)
        self._level = 0
        self._sizes: dict[yaml.Node, tuple[int, int]] = {}  # values and levels of each whole node, aliases expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._level += 1
        if self._level > _MAX_LEVELS:
            raise _TooLarge(f"{_MAX_LEVELS} levels", None, None, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        if isinstance(node, yaml.CollectionNode) and node not in self._sizes:
            parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
            # An alias inside the node that it stands for is not measured yet; that is an error of its own, raised later.
            sizes = [self._sizes.get(part, (1, 1)) for part in parts]
            values, levels = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
            if values > _MAX_VALUES or levels > _MAX_LEVELS:
                most = f"{_MAX_VALUES:,} values" if values > _MAX_VALUES else f"{_MAX_LEVELS} levels"
                raise _TooLarge(f"{most}, its aliases expanded", None, None, node.start_mark)
            self._sizes[node] = values, levels
        return node


for _kind, (_pattern, _first) in _NUMBERS_AND_WORDS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), list(_first))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either this module's reader or another YAML 1.1 reader would take for something else."""

    yaml_implicit_resolvers = {
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }


def dump_yaml(value: Any) -> str:
    """``value`` as YAML that :func:`read_yaml` reads back as it was."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == _MERGE:
            continue
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is there twice", key_node.start_mark)
        seen.add(key)
    return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def _parse(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: If it is none.
    """
    loader = None
    try:
        loader = _Loader(text)
        return _unshared(loader.get_single_data())
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML lets pass what its constructors stumble over: int(''), unhashable keys, recursion
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _unshared(value: Any) -> Any:
    """The same value with every ``*alias`` a copy, so that an override of one place changes no other."""
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value


def _complaint(what: str, found: str, error: Exception) -> str:
    """What a parser has to say of something that must be ``what``, on one line."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    if isinstance(error, _TooLarge):
        return f"must be {what} of at most {error.context}, but has more{where}."
    why = error.problem if isinstance(error, yaml.MarkedYAMLError) else " ".join(str(error).split())
    return f"must be {what}, but is {found}: {why}{where}."


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: If the file cannot be read, is no YAML, or holds no mapping.
    """
    try:
        value = _parse(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError([Fault(str(path), f"must be a readable file, but is not: {error.strerror}.")]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([Fault(str(path), _complaint("YAML", "not", error))]) from error
    if not isinstance(value, dict):
        raise ConfigError([Fault(str(path), f"must hold a mapping of settings, but holds {shown(value)}.")])
    return value


def apply_override(raw: dict[str, Any], override: str, faults: list[Fault]) -> None:
    """Set one ``key.sub=value``; the value is YAML. See :func:`set_value`."""
    path, separator, text = override.partition("=")
    if not separator or not all(_keys(path)):
        faults.append(Fault(override, "must have the form key.sub=value."))
        return
    if _is_too_deep(path, faults):
        return
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        faults.append(Fault(path, _complaint("a YAML value", shown(text), error)))
        return
    set_value(raw, path, value, faults)


def parts_of(text: str) -> list[Any]:
    """The values in a text of YAML values with commas between them: one, unless a comma stands outside of brackets and quotes.

    Empty where the text is none.
    """
    try:
        value = _parse(f"[{text}]")
    except yaml.YAMLError:
        return []
    return value if isinstance(value, list) else []


def set_value(raw: dict[str, Any], path: str, value: Any, faults: list[Fault]) -> None:
    """Set ``key.sub``, making groups as needed; a name given as text becomes a group with that ``name``.

    An entry of a list is ``key.0.sub`` or, as faults write it, ``key[0].sub``; it must be there already.
    """
    *groups, last = _keys(path)
    if not all((*groups, last)):
        faults.append(Fault(shown(path), "must have the form key.sub."))
        return
    if _is_too_deep(path, faults):
        return
    target: Any = raw
    for number, key in enumerate([*groups, last]):
        if isinstance(target, list) and not _is_index(key, target):
            where = ".".join(groups[:number])
            faults.append(Fault(path, f"must name {_entries(target)} of `{where}`, but names {shown(key)}."))
            return
        if number == len(groups):
            break
        target = _enter(target, key)
        if target is None:
            faults.append(Fault(path, f"must lead through groups of settings, but {shown(key)} is none."))
            return
    target[int(last) if isinstance(target, list) else last] = value


def _keys(path: str) -> list[str]:
    return re.sub(r"\[([0-9]+)\]", r".\1", path).split(".")


def _is_too_deep(path: str, faults: list[Fault]) -> bool:
    parts = len(_keys(path))
    if parts > _MAX_LEVELS:
        faults.append(Fault(shown(path), f"must have at most {_MAX_LEVELS} parts, but has {parts}."))
    return parts > _MAX_LEVELS


def _entries(target: list[Any]) -> str:
    """Which entries a list has, for a message."""
    if len(target) < 2:
        return "the only entry (0)" if target else "one of the 0 entries"
    return f"one of the {len(target)} entries (0 to {len(target) - 1})"


def _is_index(key: str, target: list[Any]) -> bool:
    return key.isdecimal() and len(key) < 19 and int(key) < len(target)


def _enter(target: Any, key: str) -> Any:
    if isinstance(target, list):
        child = target[int(key)]
        return child if isinstance(child, (dict, list)) else None
    child = target.get(key)
    if child is None:
        child = target[key] = {}
    elif isinstance(child, str):
        child = target[key] = {"name": child}
    return child if isinstance(child, (dict, list)) else None


def read_config(path: str | Path | None, overrides: Sequence[str], base: Mapping[str, Any] | None
                ) -> tuple[dict[str, Any], list[Fault]]:
    """The values in the YAML file ``path`` (or in ``base``) with ``key.sub=value`` overrides, and what is wrong with these.

    Raises:
        ConfigError: If the file cannot be read.
    """
    raw = copy.deepcopy(dict(base)) if base is not None else read_yaml(path) if path is not None else {}
    faults: list[Fault] = []
    for override in overrides:
        apply_override(raw, override, faults)
    return raw, faults
