"""A run in this process that the tests of cohorts and samplers share."""

from __future__ import annotations

import torch

from dfed.comm import join
from dfed.config import load_config
from dfed.run import StopFlag, assemble, prepare


def assembled(base, overrides):
    """The run of a config on one rank, and the server's first state."""
    config, device = load_config(None, overrides, base=base), torch.device("cpu")
    run = assemble(prepare(config, device), join(config.backend, device), StopFlag())
    return run, run.job.strategy.init(run.planning.first_params(config.seed))
