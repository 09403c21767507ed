"""``dfed train``: training of one model on one device, under a memory budget."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from dfed.central.config import load_train_config
from dfed.central.prepared import prepare
from dfed.central.state import latest_state
from dfed.central.trainer import Trainer
from dfed.comm import choose_device, join
from dfed.differences import check_same_bits
from dfed.errors import ConfigError, Fault
from dfed.report.folder import Folder
from dfed.run import StopFlag

__all__ = ["train"]

logger = logging.getLogger(__name__)


def train(file: Path, overrides: Sequence[str], out: Path, resume: bool) -> int:
    """Carry out a training. Returns the exit status: 0, or 143 after SIGTERM.

    Args:
        file: The config.
        out: Where everything is written; with ``resume`` the folder of a training, which is gone on with.

    Raises:
        DfedError: If it cannot be carried out.
    """
    config, folder, state = load_train_config(file, overrides), Folder(out), None
    device = choose_device(config.backend)
    if resume:
        folder.check_kind()
        begun = None
        with contextlib.suppress(ConfigError):  # a damaged file says nothing: the checkpoint knows its own config
            begun = load_train_config(out / "config.yaml")
        if begun is not None:
            check_same_bits(begun, config, device.type, load_train_config)
        state = latest_state(folder.checkpoints, config.fingerprint(device.type))
        if state is None:
            logger.warning("%s holds no checkpoint yet: starting from the beginning", out)
    else:
        folder.check_new()
    prepared = prepare(config, device)
    if state is not None and state.epoch > prepared.method.num_epochs:
        message = f"must be at least {state.epoch}, as so many are done in {out}, but is {config.training.epochs}."
        raise ConfigError([Fault("training.epochs", message)])
    if config.fleet is not None and not prepared.method.heeds_fleet:
        logger.warning("the config's `fleet` makes no difference to the method '%s' with these options", config.method.name)
    with folder.held():  # not before: what cannot be trained leaves nothing behind
        folder.create(config)
        folder.write_environment(join(config.backend, device), config)
        stop = StopFlag()
        trainer = Trainer(prepared, folder, state=state, stop=stop)
        stop.install()  # not before: there was nothing to save
        return trainer.train()
