"""The config of a run: YAML and ``key=value`` overrides in, validated frozen settings out.

Each section's settings are declared by the part of dfed that uses them; here they are put together. All faults of a config
are found before any is reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dfed.checkpoint import CheckpointSettings
from dfed.choices import Choice, CodecChoice, DataSettings, check, check_evaluated, choose, choose_data, options_of, within
from dfed.client import ClientSettings, client_conflicts
from dfed.comm import BackendSettings
from dfed.comm.codecs import codec_of
from dfed.compare_settings import check_compare
from dfed.data import PARTITIONER_GIVEN
from dfed.errors import ConfigError, Fault
from dfed.faults import shown, unknown_setting, unusable_numbers
from dfed.fleet import FleetSettings
from dfed.memory import MemorySettings
from dfed.metrics import MetricsSettings
from dfed.registry import CODECS, MODELS, PARTITIONERS, SAMPLERS, SERVER_OPTIMIZERS, STRATEGIES, WRAPPERS, Registry
from dfed.settings import Settings
from dfed.yaml_io import read_config

__all__ = ["Choice", "Config", "DataSettings", "ServerSettings", "load_config"]


class ServerSettings(Settings):
    """The server, apart from its optimiser.

    Attributes:
        max_failed_fraction: The run ends when more of a cohort than this failed by their own fault: exceptions and
            rejected updates; not running out of memory, not dropping out, not being late, not having lost features.
        deadline_s: Simulated seconds for which the server waits for its clients in a round at most; None: for as long as it
            takes. Who would be done later is not waited for.
        over_selection: Clients drawn for each that is wanted, not more than there are: the round takes the ``cohort`` that are
            predicted to be done first (after Bonawitz et al., "Towards Federated Learning at Scale: System Design", MLSys 2019;
            docs/deviations.md).
    """

    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    over_selection: Annotated[float, Field(ge=1, le=100)] = 1.0


class _Top(Settings):
    """The settings that are no group."""

    rounds: Annotated[int, Field(ge=1)]
    cohort: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)] = 0
    exchange: Literal["fused", "per_client"] = "fused"


@dataclass(frozen=True, kw_only=True)
class Config:
    """A complete, valid configuration."""

    seed: int
    rounds: int
    cohort: int
    exchange: str
    strategy: Choice
    wrap: tuple[Choice, ...]
    model: Choice
    data: DataSettings
    dataset_options: Mapping[str, Any]
    partition: Choice
    codecs: Mapping[str, CodecChoice]
    error_feedback: bool
    fleet: FleetSettings
    client: ClientSettings
    server: ServerSettings
    server_optimizer: Choice
    sampler: Choice
    memory: MemorySettings
    backend: BackendSettings
    metrics: MetricsSettings
    checkpoint: CheckpointSettings

    def to_dict(self) -> dict[str, Any]:
        """The resolved config as plain values; loading it again gives an equal config."""
        return {
            "seed": self.seed,
            "rounds": self.rounds,
            "cohort": self.cohort,
            "strategy": self.strategy.to_dict(),
            "wrap": {choice.name: dict(choice.options) for choice in self.wrap},
            "model": self.model.to_dict(),
            "data": {**self.data.model_dump(), **self.dataset_options, "partition": self.partition.to_dict()},
            "fleet": self.fleet.model_dump(exclude_none=True),
            "client": self.client.to_dict(),
            "server": {**self.server.model_dump(), "optimizer": self.server_optimizer.to_dict()},
            "sampler": self.sampler.to_dict(),
            "exchange": self.exchange,
            "codecs": {**{direction: choice.to_dict() for direction, choice in self.codecs.items()},
                       "error_feedback": self.error_feedback},
            "memory": self.memory.model_dump(),
            "backend": self.backend.model_dump(),
            "metrics": self.metrics.model_dump(),
            "checkpoint": self.checkpoint.model_dump(),
        }

    def fingerprint(self, device: str = "cpu") -> str:
        """Hash of what decides the trained bits: a checkpoint is only continued under the same one.

        Args:
            device: Kind of device that clients train on, ``cpu`` or ``cuda``; part of the hash.

        Not part of it: where data lie, how ranks talk, what is measured and saved, how many failures end the run, and the
        number of rounds, which may be extended unless the learning rate, the sampler (``tifl``), the strategy or a wrapper
        follows it. With ``metrics.split: validation`` it counts how often and in what mini-batches is evaluated, as something
        may go by that.
        Where a strategy's norm statistics are worked out anew, the mini-batches in which that is done are part of it.
        """
        value = self.to_dict()
        for name in ("backend", "metrics", "checkpoint", "exchange"):
            del value[name]
        for name in ("root", "cache", "download"):
            del value["data"][name]
        del value["server"]["max_failed_fraction"]
        for group, name, default in _LATER:
            if value[group][name] == default:
                del value[group][name]
        value["device"] = device
        value["threads"] = self.backend.threads  # sums inside kernels depend on how they are shared out
        if self.metrics.split == "validation":  # samplers and strategies may go by what evaluations say
            value["evaluated"] = [self.metrics.every, self.metrics.batch_size]
        by_rounds = self.sampler.name == "tifl" or any("rounds" in w.options and w.options["rounds"] is None for w in self.wrap)
        by_rounds = by_rounds or self.strategy.options.get("block_rounds", 1) is None
        if self.client.schedule.name != "cosine" and not by_rounds:
            del value["rounds"]
        if not self.wrap:
            del value["wrap"]
        if "statistics_samples" in self.strategy.options:  # the last model holds them
            value["statistics"] = self.metrics.batch_size
        if self.fleet.csv is not None:
            path = Path(self.fleet.csv)  # what it holds counts, not where it lies; a missing file is the fleet's to report
            value["fleet"]["csv"] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# Settings that came later: at their defaults they are left out of fingerprints, as checkpoints made before do not have them.
_LATER = (("client", "conv_parts", 1), ("server", "over_selection", 1.0))

_GROUPS: dict[str, type[Settings]] = {
    "fleet": FleetSettings,
    "client": ClientSettings,
    "memory": MemorySettings,
    "backend": BackendSettings,
    "metrics": MetricsSettings,
    "checkpoint": CheckpointSettings,
}
_CHOICES: dict[str, tuple[Registry, tuple[str, ...], str | None]] = {
    "strategy": (STRATEGIES, ("problem",), "fedavg"),
    "model": (MODELS, ("input_shape", "num_classes"), None),
    "sampler": (SAMPLERS, (), "uniform"),
}
_DIRECTIONS = ("down", "up")
_TOP_LEVEL = sorted([*_GROUPS, *_CHOICES, *_Top.model_fields, "codecs", "compare", "data", "server", "wrap"])


def load_config(path: str | Path | None, overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None) -> Config:
    """The config in the YAML file ``path`` (or in ``base``), with ``key.sub=value`` overrides applied.

    The group ``compare`` is for ``dfed compare``: it is checked in itself, and left out.

    Raises:
        ConfigError: With all faults there are.
    """
    return _validate(*read_config(path, overrides, base))


def _validate(raw: Mapping[str, Any], faults: list[Fault]) -> Config:
    if "method" in raw and "strategy" not in raw:
        message = "belongs to training on one device, which `dfed train` runs; a federation has a `strategy`."
        raise ConfigError([Fault("method", message)])
    for key in raw:
        if key not in _TOP_LEVEL:
            faults.append(Fault(str(key), unknown_setting(str(key), _TOP_LEVEL)))
    parts: dict[str, Any] = {}
    top = check(_Top, {key: raw[key] for key in _Top.model_fields if key in raw}, "", faults)
    for name, model in _GROUPS.items():
        value = {"name": raw[name]} if name == "backend" and isinstance(raw.get(name), str) else raw.get(name, {})
        parts[name] = check(model, value, name, faults)
    for name, (registry, given, default) in _CHOICES.items():
        parts[name] = choose(raw.get(name, default), name, registry, given, faults)
    parts["wrap"] = _wraps(raw.get("wrap", {}), faults)
    check_compare(raw.get("compare", {}), faults)
    _data_parts(raw.get("data", {}), parts, faults)
    _server_parts(raw.get("server", {}), parts, faults)
    _codec_parts(raw.get("codecs", {}), parts, faults)
    if parts["client"] is None and isinstance(raw.get("client"), Mapping) and not any(f.field == "client" for f in faults):
        faults.extend(Fault("client", conflict) for conflict in client_conflicts(raw["client"]))
    _cross_check(raw, faults)
    noted = {fault.field for fault in faults}
    faults.extend(fault for fault in unusable_numbers(raw, "") if fault.field not in noted)
    if faults:
        raise ConfigError(faults)
    return Config(seed=top.seed, rounds=top.rounds, cohort=top.cohort, exchange=top.exchange, **parts)


def _wraps(raw: Any, faults: list[Fault]) -> tuple[Choice, ...]:
    """What is put around the strategy, in the order of the config."""
    if not isinstance(raw, Mapping):
        example = f"must be a group of names, each with its options, such as {{lips: {{density: 0.5}}}}, but is {shown(raw)}."
        faults.append(Fault("wrap", example))
        return ()
    found = []
    for name, options in raw.items():
        field = f"wrap.{name}"
        if not isinstance(name, str) or not isinstance(options, Mapping):
            faults.append(Fault(field, f"must be a group of options, and may be empty ({{}}), but is {shown(options)}."))
            continue
        chosen = options_of(name, "wrap", WRAPPERS, ("inner",), options, field, faults)
        if chosen is not None:
            found.append(Choice(name, chosen))
    return tuple(found)


def _data_parts(raw: Any, parts: dict[str, Any], faults: list[Fault]) -> None:
    parts["data"], parts["dataset_options"] = choose_data(raw, DataSettings, faults, beside=("partition",))
    parts["partition"] = None
    if isinstance(raw, Mapping):
        parts["partition"] = choose(raw.get("partition", "iid"), "data.partition", PARTITIONERS, PARTITIONER_GIVEN, faults)


def _server_parts(raw: Any, parts: dict[str, Any], faults: list[Fault]) -> None:
    parts["server"] = parts["server_optimizer"] = None
    if not isinstance(raw, Mapping):
        faults.append(Fault("server", f"must be a group of settings, but is {shown(raw)}."))
        return
    own = {key: value for key, value in raw.items() if key != "optimizer"}
    parts["server"] = check(ServerSettings, own, "server", faults, siblings=["optimizer"])
    parts["server_optimizer"] = choose(raw.get("optimizer", "sgd"), "server.optimizer", SERVER_OPTIMIZERS, (), faults)


def _codec_parts(raw: Any, parts: dict[str, Any], faults: list[Fault]) -> None:
    parts["codecs"], parts["error_feedback"] = {}, False
    if not isinstance(raw, Mapping):
        faults.append(Fault("codecs", f"must be a group of settings, but is {shown(raw)}."))
        return
    known = (*_DIRECTIONS, "error_feedback")
    faults.extend(Fault(f"codecs.{key}", unknown_setting(str(key), known)) for key in raw if key not in known)
    parts["error_feedback"] = raw.get("error_feedback", False)
    if type(parts["error_feedback"]) is not bool:
        faults.append(Fault("codecs.error_feedback", f"must be true or false, but is {shown(parts['error_feedback'])}."))
    for direction in _DIRECTIONS:
        field = f"codecs.{direction}"
        choice = choose(raw.get(direction, "fp32"), field, CODECS, (), faults)
        if choice is not None and choice.name not in CODECS:  # messages name codecs, and must not make a rank import
            faults.append(Fault(field, f"must be one of {', '.join(CODECS)}, but is {shown(choice.name)}."))
        elif choice is not None:
            parts["codecs"][direction] = CodecChoice(choice.name, choice.options)
    up = parts["codecs"].get("up")
    if parts["error_feedback"] is True and up is not None and not codec_of(up.spec).takes_feedback:
        useful = ", ".join(name for name in CODECS if CODECS.get(name).takes_feedback)
        grows = codec_of(up.spec).of_change
        why = "is unbiased, so that errors would grow" if grows else "leaves nothing out to be made up for"
        faults.append(Fault("codecs.error_feedback", f"must be false unless `codecs.up` is one of {useful}, but is true with "
                                                     f"'{up.name}', which {why}."))


def _cross_check(raw: Mapping[str, Any], faults: list[Fault]) -> None:
    """Combinations that cannot be; read from the raw config, so that another fault beside them hides none."""
    cohort, clients = raw.get("cohort"), within(raw, "fleet", "clients")
    if type(cohort) is int and type(clients) is int and cohort > clients >= 1:
        faults.append(Fault("cohort", f"must be at most `fleet.clients` ({clients}), but is {shown(cohort)}."))
    sampler = raw.get("sampler")
    if "tifl" in (sampler, within(raw, "sampler", "name")) and within(raw, "metrics", "split") in (None, "test"):
        message = ("must be 'validation' with `sampler: tifl`, whose draws follow the accuracy (and `data.validation_fraction` "
                   "above 0), but is 'test'.")
        faults.append(Fault("metrics.split", message))
    check_evaluated(raw, faults)
