"""YAML as configs use it: safe, no key twice, ``1e-3`` a number; and ``key.sub=value`` overrides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dfed.errors import ConfigError, Fault

__all__ = ["apply_override", "read_yaml"]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-3`` is a number, and a key given twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is there twice", key_node.start_mark)
        seen.add(key)
    return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def _parse(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: If the file cannot be read, is no YAML, or holds no mapping.
    """
    try:
        value = _parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([Fault(str(path), f"must be a readable file, but is not: {error.strerror}.")]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([Fault(str(path), f"must be YAML, but is not: {error}")]) from error
    if not isinstance(value, dict):
        raise ConfigError([Fault(str(path), f"must hold a mapping of settings, but holds {value!r:.60}.")])
    return value


def apply_override(raw: dict[str, Any], override: str, faults: list[Fault]) -> None:
    """Set one ``key.sub=value``, making groups as needed; a name given as text becomes a group with that ``name``."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        faults.append(Fault(override, "must have the form key.sub=value."))
        return
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        faults.append(Fault(path, f"must be a YAML value, but is '{text}': {error}"))
        return
    target: Any = raw
    *groups, last = path.split(".")
    for group in groups:
        target = _enter(target, group)
        if target is None:
            faults.append(Fault(path, f"must lead through groups of settings, but '{group}' is none."))
            return
    if isinstance(target, list) and last.isdigit() and int(last) < len(target):
        target[int(last)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        faults.append(Fault(path, "must name a setting, but there is no place for it."))


def _enter(target: Any, key: str) -> Any:
    if isinstance(target, list):
        return target[int(key)] if key.isdigit() and int(key) < len(target) else None
    if not isinstance(target, dict):
        return None
    child = target.get(key)
    if child is None:
        child = target[key] = {}
    elif isinstance(child, str):
        child = target[key] = {"name": child}
    return child if isinstance(child, (dict, list)) else None
