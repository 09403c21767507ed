"""The config of training on one device: YAML and ``key=value`` overrides in, validated frozen settings out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dfed.central.settings import BudgetSettings, EpochSettings, SampleSettings, SaveSettings
from dfed.choices import Choice, check, check_evaluated, choose, choose_data
from dfed.client import client_conflicts
from dfed.comm import BackendSettings
from dfed.errors import ConfigError, Fault
from dfed.faults import unknown_setting, unusable_numbers
from dfed.fleet import ComputeSettings, FleetSettings
from dfed.metrics import EvaluationSettings
from dfed.registry import METHODS, MODELS
from dfed.settings import Settings
from dfed.yaml_io import read_config

__all__ = ["TrainConfig", "load_train_config"]


class _Top(Settings):
    """The settings that are no group."""

    seed: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A complete, valid configuration of training on one device."""

    seed: int
    method: Choice
    model: Choice
    data: SampleSettings
    dataset_options: Mapping[str, Any]
    memory: BudgetSettings
    training: EpochSettings
    device: ComputeSettings
    fleet: FleetSettings | None
    metrics: EvaluationSettings
    checkpoint: SaveSettings
    backend: BackendSettings

    def to_dict(self) -> dict[str, Any]:
        """The resolved config as plain values; loading it again gives an equal config."""
        return {
            "seed": self.seed,
            "method": self.method.to_dict(),
            "model": self.model.to_dict(),
            "data": {**self.data.model_dump(), **self.dataset_options},
            "memory": self.memory.model_dump(),
            "training": self.training.to_dict(),
            "device": self.device.model_dump(),
            "fleet": None if self.fleet is None else self.fleet.model_dump(exclude_none=True),
            "metrics": self.metrics.model_dump(),
            "checkpoint": self.checkpoint.model_dump(),
            "backend": self.backend.model_dump(),
        }

    def fingerprint(self, device: str = "cpu") -> str:
        """Hash of what decides the trained bits: a checkpoint is only continued under the same one.

        Not part of it: where data lie, what is measured and saved, the simulated device; unless the method goes by them (see
        :meth:`Method.keyed_by`) the memory budget (and without a fleet how it is kept), and the number of epochs, which may be
        extended if the learning rate does not follow it, either.

        Args:
            device: Kind of device that is trained on, ``cpu`` or ``cuda``; part of the hash.
        """
        value, keyed = self.to_dict(), METHODS.get(self.method.name).keyed_by(self.method.options)
        for name in ("backend", "metrics", "checkpoint", "device"):
            del value[name]
        for name in ("root", "cache", "download"):
            del value["data"][name]
        if "memory" not in keyed:
            del value["memory"]["budget"]
            if self.fleet is None:  # which of its devices fit a depth follows from how they are held to their budgets
                del value["memory"]
        value["on"] = [device, self.backend.threads]  # sums inside kernels depend on how they are shared out
        if self.training.schedule.name != "cosine" and "epochs" not in keyed:
            del value["training"]["epochs"]
        if self.fleet is not None and self.fleet.csv is not None:
            path = Path(self.fleet.csv)  # what it holds counts; a missing file is the fleet's to report
            value["fleet"]["csv"] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


_GROUPS: dict[str, type[Settings]] = {
    "training": EpochSettings,
    "device": ComputeSettings,
    "metrics": EvaluationSettings,
    "checkpoint": SaveSettings,
}
_TOP_LEVEL = sorted([*_GROUPS, *_Top.model_fields, "backend", "data", "fleet", "memory", "method", "model"])


def load_train_config(path: str | Path | None, overrides: Sequence[str] = (),
                      base: Mapping[str, Any] | None = None) -> TrainConfig:
    """The config in the YAML file ``path`` (or in ``base``), with ``key.sub=value`` overrides applied.

    Raises:
        ConfigError: With all faults there are.
    """
    return _validate(*read_config(path, overrides, base))


def _validate(raw: Mapping[str, Any], faults: list[Fault]) -> TrainConfig:
    if "strategy" in raw and "method" not in raw:
        message = "belongs to a federation, which `dfed run` runs: `dfed train` takes a config with a `method`."
        raise ConfigError([Fault("strategy", message)])
    faults.extend(Fault(str(key), unknown_setting(str(key), _TOP_LEVEL)) for key in raw if key not in _TOP_LEVEL)
    parts: dict[str, Any] = {}
    top = check(_Top, {key: raw[key] for key in _Top.model_fields if key in raw}, "", faults)
    for name, model in _GROUPS.items():
        parts[name] = check(model, raw.get(name, {}), name, faults)
    backend = raw.get("backend", {})
    parts["backend"] = check(BackendSettings, {"name": backend} if isinstance(backend, str) else backend, "backend", faults)
    parts["method"] = choose(raw.get("method"), "method", METHODS, (), faults)
    parts["model"] = choose(raw.get("model"), "model", MODELS, ("input_shape", "num_classes"), faults)
    parts["memory"] = _memory(raw.get("memory"), faults)
    parts["data"], parts["dataset_options"] = choose_data(raw.get("data", {}), SampleSettings, faults)
    parts["fleet"] = None if raw.get("fleet") is None else check(FleetSettings, raw["fleet"], "fleet", faults)
    training = raw.get("training")
    if parts["training"] is None and isinstance(training, Mapping) and not any(fault.field == "training" for fault in faults):
        faults.extend(Fault("training", conflict) for conflict in client_conflicts(training))
    check_evaluated(raw, faults)
    noted = {fault.field for fault in faults}
    faults.extend(fault for fault in unusable_numbers(raw, "") if fault.field not in noted)
    if faults:
        raise ConfigError(faults)
    return TrainConfig(seed=top.seed, **parts)


def _memory(raw: Any, faults: list[Fault]) -> BudgetSettings | None:
    """A budget by itself, or a group of settings."""
    if isinstance(raw, Mapping):
        return check(BudgetSettings, raw, "memory", faults)
    own: list[Fault] = []
    settings = check(BudgetSettings, {"budget": raw}, "memory", own)
    faults.extend(Fault("memory", fault.message) for fault in own)
    return settings
