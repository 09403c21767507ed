"""What a config selects by name, with its options, and how both are checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import Field, PydanticUserError, ValidationError

from dfed.comm.codecs import spec_of
from dfed.data import DATASET_GIVEN
from dfed.errors import Fault
from dfed.faults import faults_of, shown
from dfed.registry import DATASETS, Registry, UnknownName
from dfed.settings import Settings, settings_of

__all__ = ["Choice", "CodecChoice", "DataSettings", "check", "check_evaluated", "choose", "choose_data", "options_of", "within"]


class DataSettings(Settings):
    """The data, apart from the options of the data set, which stand beside these.

    Attributes:
        dataset: Name of a data set, or ``package.module:function``.
        root: Folder of the raw files.
        download: Whether missing files may be fetched from the network.
        cache: Folder for decoded data.
        validation_fraction: Share of the training samples held out for validation.
    """

    dataset: str
    root: str | None = None
    download: bool = False
    cache: str | None = None
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0


Data = TypeVar("Data", bound=DataSettings)


@dataclass(frozen=True)
class Choice:
    """Something selected by name, with its options: complete, defaults filled in."""

    name: str
    options: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As a config writes it."""
        return {"name": self.name, **self.options}


class CodecChoice(Choice):
    """A codec with its options."""

    @property
    def spec(self) -> str:
        """As plans and messages name it."""
        return spec_of(self.name, self.options)


def check(model: type[Settings], value: Any, prefix: str, faults: list[Fault], siblings: Sequence[str] = ()) -> Any:
    """The validated settings, or None with the faults noted."""
    if not isinstance(value, Mapping):
        faults.append(Fault(prefix, f"must be a group of settings, but is {shown(value)}."))
        return None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults.extend(faults_of(error, prefix, model, siblings))
        return None


def choose(value: Any, field: str, registry: Registry, given: Sequence[str], faults: list[Fault]) -> Choice | None:
    """``name`` or ``{name: …, option: …}`` as a complete choice."""
    if value is None:
        faults.append(Fault(field, f"must be one of {', '.join(registry)}, but is not given."))
        return None
    if isinstance(value, str) and "(" in value and value.partition("(")[0] in registry:
        name = value.partition("(")[0]
        faults.append(Fault(field, f"must be written {{name: {name}, option: …}} where it has options, but is {shown(value)}."))
        return None
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        faults.append(Fault(field, f"must be a name, or a group of settings with a `name`, but is {shown(value)}."))
        return None
    options = {key: option for key, option in value.items() if key != "name"}
    chosen = options_of(value["name"], f"{field}.name" if len(value) > 1 else field, registry, given, options, field, faults)
    return None if chosen is None else Choice(value["name"], chosen)


def options_of(name: str, name_field: str, registry: Registry, given: Sequence[str], options: Mapping[str, Any], prefix: str,
               faults: list[Fault], siblings: Sequence[str] = ()) -> dict[str, Any] | None:
    """All options of what ``registry`` calls ``name``, defaults filled in; None with the faults noted."""
    try:
        function: Callable[..., Any] = registry.get(name)
    except UnknownName as error:
        faults.append(Fault(name_field, str(error)))
        return None
    try:
        inspect.signature(function).bind_partial(**dict.fromkeys(given))
        model = settings_of(function, given)
    except (TypeError, ValueError, NameError, PydanticUserError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        faults.append(Fault(name_field, f"must name a {registry.kind} that can be used, but is '{name}', which cannot: {why}."))
        return None
    checked = check(model, options, prefix, faults, siblings)
    return None if checked is None else checked.model_dump()


def choose_data(raw: Any, model: type[Data], faults: list[Fault],
                beside: Sequence[str] = ()) -> tuple[Data | None, dict[str, Any] | None]:
    """The section ``data``: its settings, and all options of the data set, which stand among them; None with the faults noted.

    Args:
        model: The section's own settings.
        beside: Further names that the section has.
    """
    if not isinstance(raw, Mapping):
        faults.append(Fault("data", f"must be a group of settings with a `dataset`, but is {shown(raw)}."))
        return None, None
    own = {key: value for key, value in raw.items() if key in model.model_fields}
    options = {key: value for key, value in raw.items() if key not in own and key not in beside}
    settings, name = check(model, own, "data", faults), own.get("dataset")
    if not isinstance(name, str):
        return settings, None
    # To a user, the data set's options and the section's own stand in one list.
    return settings, options_of(name, "data.dataset", DATASETS, DATASET_GIVEN, options, "data", faults,
                                siblings=sorted([*model.model_fields, *beside]))


def check_evaluated(raw: Mapping[str, Any], faults: list[Fault]) -> None:
    """Settings of evaluation that do not go together; read from the raw config, so that a fault beside them hides none."""
    if within(raw, "metrics", "split") == "validation" and within(raw, "data", "validation_fraction") in (None, 0):
        message = "must be 'test' unless `data.validation_fraction` is above 0, but is 'validation'."
        faults.append(Fault("metrics.split", message))
    if within(raw, "metrics", "test_at_end") is True and within(raw, "metrics", "split") in (None, "test"):
        message = "must be false where `metrics.split` is 'test', with which all evaluations are on the test set, but is true."
        faults.append(Fault("metrics.test_at_end", message))


def within(raw: Mapping[str, Any], group: str, name: str) -> Any:
    """What a raw config gives for ``group.name``; None if nothing."""
    settings = raw.get(group)
    return settings.get(name) if isinstance(settings, Mapping) else None
