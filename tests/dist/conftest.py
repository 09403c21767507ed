import pytest
from jobs import ROOT, Job


@pytest.fixture(scope="session")
def fedavg_on_three_ranks(tmp_path_factory):
    """The run folder of the smoke config on three ranks, with TensorBoard and a checkpoint each of three rounds."""
    folder = tmp_path_factory.mktemp("fedavg")
    arguments = ["run", ROOT / "configs" / "smoke" / "fedavg.yaml", "rounds=3", "checkpoint.every=1",
                 "metrics.tensorboard=true", "--out", folder / "run"]
    with Job(arguments, ranks=3, log=folder / "log") as job:
        assert job.wait() == 0, job.output
        job.assert_gone()
    return folder / "run"
