"""A trained model as files that need nothing of dfed: a state dict, a program of ``torch.export``, and a description."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import dfed
from dfed.checkpoint import latest, params_sha256
from dfed.client import Skeleton
from dfed.comm import Link, Local
from dfed.config import Config, load_config
from dfed.data import Dataset
from dfed.errors import CheckpointError, ConfigError, DfedError, Fault
from dfed.evaluation import evaluated_params
from dfed.metrics import finite
from dfed.plan import Plan
from dfed.planner.flops import flop_counter
from dfed.report.folder import CHECKPOINTS
from dfed.run import Prepared, Run, StopFlag, assemble, prepare
from dfed.state import ServerState, save_file

__all__ = ["DESCRIPTION", "PROGRAM", "WEIGHTS", "Trained", "figures", "open_run", "sub_model", "write"]

logger = logging.getLogger(__name__)

WEIGHTS, PROGRAM, DESCRIPTION = "model.safetensors", "model.pt2", "export.json"
"""Names of the files of an export."""

_FORMAT = 1
_TOLERANCE = 1e-4  # of the largest score: a program may come to other kernels, whose rounding stays far below this
_CHECKED_SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run as its newest whole checkpoint has it.

    Attributes:
        path: Its folder.
        prepared: What its config stands for.
        run: The same, at work in this process alone, without caps.
        state: The server's.
    """

    path: Path
    prepared: Prepared
    run: Run
    state: ServerState

    @property
    def config(self) -> Config:
        """The run's own."""
        return self.prepared.config

    @property
    def variants(self) -> Mapping[str, Plan]:
        """The sub-models that the strategy names."""
        return self.run.job.strategy.variants(self.state)

    def plan_of(self, variant: str | None) -> Plan:
        """The plan whose sub-model is the variant of this name, which there is; None: the global model."""
        return self.run.job.strategy.evaluated(self.state) if variant is None else self.variants[variant]


def open_run(path: Path) -> Trained:
    """Read the run in the folder ``path``. Its data must be there: they say what the model's input is.

    Raises:
        ConfigError, DataError: If it is not the folder of a run, or holds no checkpoint, or its config asks for what cannot be
            had.
        CheckpointError: If no checkpoint is whole, or they are of another config.
    """
    if not (path / "config.yaml").is_file():
        raise ConfigError([Fault("RUN", f"must be the folder of a run, but {path} holds no config.yaml.")])
    config = load_config(path / "config.yaml")
    state = _newest(path / CHECKPOINTS, config)
    if state is None:
        raise ConfigError([Fault("RUN", f"must be the folder of a run with a checkpoint, but {path} holds none yet.")])
    device = torch.device("cuda" if config.backend.device != "cpu" and torch.cuda.is_available() else "cpu")
    prepared = prepare(config, device, to_run=False)
    if {name: tuple(value.shape) for name, value in state.params.items()} != dict(prepared.planning.shapes):
        raise CheckpointError(f"the checkpoint in {path} must hold the tensors of model '{config.model.name}' under strategy "
                              f"'{config.strategy.name}', but holds others: it was made by another version, or device.")
    # Nobody is trained: a run is exported where its caps cannot be enforced, too.
    uncapped = replace(config, memory=config.memory.model_copy(update={"enforce": "off"}))
    link = Link(Local(), device, "local", "an export talks to nobody")
    run = assemble(replace(prepared, config=uncapped), link, StopFlag())
    return Trained(path=path, prepared=prepared, run=run, state=state)


def _newest(folder: Path, config: Config) -> ServerState | None:
    """The newest whole checkpoint, on whichever kind of device it was trained; None if there is none at all."""
    try:
        return latest(folder, config.fingerprint("cpu"))
    except CheckpointError as error:
        try:
            return latest(folder, config.fingerprint("cuda"))
        except CheckpointError:
            raise error from None


def sub_model(trained: Trained, plan: Plan) -> tuple[nn.Module, str | None]:
    """The plan's sub-model with its values, on the CPU, in evaluation mode, asking for no gradient.

    Its norm statistics are those with which it is evaluated. Also why there are none, as :func:`evaluated_params` says.
    """
    job = trained.run.job
    params, refused = evaluated_params(trained.run, plan, trained.state)
    skeleton = Skeleton(job.strategy.build(plan))
    regions = job.forms.of(plan).regions
    skeleton.load({name: region.view(params[name]) for name, region in regions.items()}, torch.device("cpu"))
    return skeleton.model.eval().requires_grad_(False), refused


def write(trained: Trained, variant: str | None, out: Path) -> dict[str, Any]:
    """Export a sub-model into the folder ``out``, which is there as a whole or not at all. Returns its description.

    Args:
        variant: One of ``trained.variants``; None: the global model.
        out: Absent or empty; made, with the folders above it.

    Raises:
        ConfigError: If there is something in ``out``, or it cannot be made.
        DfedError: If torch.export cannot follow the model, the program's scores are not the model's, or the disk is full.
    """
    with _new_folder(out) as folder:
        model, refused = sub_model(trained, trained.plan_of(variant))
        if refused is not None:
            logger.warning("the model is exported with the norms' first statistics, as none can be worked out for it: %s",
                           refused)
        program = _program(model, trained.prepared.data.train.shape)
        try:
            save_file(model.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})
            written = io.BytesIO()  # torch's own writer ends the process where the disk is full
            torch.export.save(program, written)
            (folder / PROGRAM).write_bytes(written.getvalue())
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises RuntimeError
            raise DfedError(f"the export cannot be written to {out}: {error}") from error
        found = torch.export.load(folder / PROGRAM).module()
        _check_scores(model, found, trained.prepared.data.test)
        description = {**_description(trained, variant), **_size(model, found, trained.prepared.data.train.shape),
                       **figures(trained, variant), "statistics": None if refused is None else "stale"}
        (folder / DESCRIPTION).write_text(json.dumps(finite(description), indent=2) + "\n", encoding="utf-8")
    return description


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` if all goes well, and else vanishes."""
    target = out.resolve()  # the folder itself, where `out` is a link to an empty one
    partial = target.parent / f".{target.name}.partial"
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            what = "holds something" if target.is_dir() else "is none"
            raise ConfigError([Fault("--out", f"must be a new or empty folder, but {out} {what}.")])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir()
    except OSError as error:
        message = f"must be a folder that can be written, but {out} is not: {error.strerror}."
        raise ConfigError([Fault("--out", message)]) from error
    try:
        yield partial
        partial.rename(target)
    except OSError as error:
        raise DfedError(f"the export cannot be written to {out}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _program(model: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    """The model's forward pass for any number of samples of this shape."""
    try:
        with torch.no_grad():
            program = torch.export.export(model, (torch.zeros(2, *shape),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # a model of the user's own may raise anything
        said = (str(error).strip() or "without a word").splitlines()[0]
        raise DfedError(f"torch.export must be able to follow the model, but cannot: {type(error).__name__}: {said}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # where files lie on this machine is nobody's business
    program.example_inputs = None  # would be pickled
    return program


def _check_scores(model: nn.Module, program: nn.Module, dataset: Dataset) -> None:
    """Refuse a program whose scores of the first samples are not those of the model.

    Raises:
        DfedError: If one is further away than 1e-4 of the largest score, or of 1 if that is less.
    """
    x = dataset.batch(np.arange(min(_CHECKED_SAMPLES, dataset.num_samples)))[0]
    with torch.inference_mode():
        expected: Tensor = model(x.clone())
    with torch.no_grad():
        found: Tensor = program(x.clone())
    largest = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 0.0
    tolerance = _TOLERANCE * max(1.0, largest)
    if not torch.allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True):  # a model that is lost has no numbers
        apart = float((found - expected).abs().max())
        raise DfedError(f"the exported program must give the model's scores to within {tolerance:.3g}, but is {apart:.3g} off.")


def _description(trained: Trained, variant: str | None) -> dict[str, Any]:
    """What the model is, and where it comes from."""
    config, data = trained.config, trained.prepared.data.train
    return {
        "format": _FORMAT,
        "dfed": dfed.__version__,
        "torch": torch.__version__,
        "model": config.model.name,
        "strategy": config.strategy.name,
        "dataset": config.data.dataset,
        "seed": config.seed,
        "variant": variant,
        "round": trained.state.round_index,
        "rounds": config.rounds,
        "input_shape": list(data.shape),
        "num_classes": data.num_classes,
        "class_names": _class_names(config, data),
        "normalisation": None if data.normalisation is None else vars(data.normalisation),
        "params_sha256": params_sha256(trained.state.params),
    }


def _size(model: nn.Module, program: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    with flop_counter() as counter, torch.no_grad():
        program(torch.zeros(1, *shape))
    return {
        "num_params": sum(parameter.numel() for parameter in model.parameters()),
        "num_bytes": sum(value.nbytes for value in model.state_dict().values()),
        "forward_flops": counter.get_total_flops(),
    }


def figures(trained: Trained, variant: str | None) -> dict[str, Any]:
    """``split``, ``accuracy`` and ``loss`` of a sub-model in the run's summary; None where there is none of this very state."""
    try:
        summary = json.loads((trained.path / "summary.json").read_text(encoding="utf-8"))
        same = summary["params_sha256"] == params_sha256(trained.state.params)
        found = (summary if variant is None else summary["variants"].get(variant, {})) if same else {}
        return {"split": summary["split"] if found else None, "accuracy": found.get("accuracy"), "loss": found.get("loss")}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("the summary of %s is left out, as it cannot be read: %s: %s", trained.path, type(error).__name__, error)
    return {"split": None, "accuracy": None, "loss": None}


def _class_names(config: Config, data: Dataset) -> list[str] | None:
    """Of the classes in their order, where there are any: those of one's own images are the names of their folders."""
    if config.data.dataset != "image_folder" or config.data.root is None:
        return None
    names = sorted(path.name for path in (Path(config.data.root).expanduser() / "train").iterdir() if path.is_dir())
    return names if len(names) == data.num_classes else None
