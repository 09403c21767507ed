"""YAML as configs use it: safe, no key twice, ``1e-3`` a number, ``off`` a word; and ``key.sub=value`` overrides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dfed.errors import ConfigError, Fault
from dfed.faults import shown

__all__ = ["apply_override", "dump_yaml", "read_yaml"]

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


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, and bare scalars are what they look like.

    PyYAML follows YAML 1.1, where ``off`` is false, ``010`` is eight, ``1:30`` is ninety and ``1e-3`` is text.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


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


def _why(error: Exception) -> str:
    """A parser's complaint on one line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    return f"{error.problem}{where}"


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
        raise ConfigError([Fault(str(path), f"must be YAML, but is not: {_why(error)}.")]) from error
    if not isinstance(value, dict):
        raise ConfigError([Fault(str(path), f"must hold a mapping of settings, but holds {shown(value)}.")])
    return value


def apply_override(raw: dict[str, Any], override: str, faults: list[Fault]) -> None:
    """Set one ``key.sub=value``, making groups as needed; a name given as text becomes a group with that ``name``.

    An entry of a list is ``key.0.sub`` or, as faults write it, ``key[0].sub``.
    """
    path, separator, text = override.partition("=")
    *groups, last = re.sub(r"\[([0-9]+)\]", r".\1", path).split(".")
    if not separator or not all((*groups, last)):
        faults.append(Fault(override, "must have the form key.sub=value."))
        return
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        faults.append(Fault(path, f"must be a YAML value, but is {shown(text)}: {_why(error)}."))
        return
    target: Any = raw
    for group in groups:
        target = _enter(target, group)
        if target is None:
            faults.append(Fault(path, f"must lead through groups of settings, but '{group}' is none."))
            return
    if isinstance(target, list) and _is_index(last, target):
        target[int(last)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        faults.append(Fault(path, f"must name a setting or an entry of a list, but there is no '{last}'."))


def _is_index(key: str, target: list[Any]) -> bool:
    return key.isdecimal() and int(key) < len(target)


def _enter(target: Any, key: str) -> Any:
    if isinstance(target, list):
        child = target[int(key)] if _is_index(key, target) else None
        return child if isinstance(child, (dict, list)) else None
    if not isinstance(target, dict):
        return None
    child = target.get(key)
    if child is None:
        child = target[key] = {}
    elif isinstance(child, str):
        child = target[key] = {"name": child}
    return child if isinstance(child, (dict, list)) else None
