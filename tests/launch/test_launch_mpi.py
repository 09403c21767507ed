"""``mpiexec -n N python -m dfed``: the same bits as under torchrun, and nobody waits for a rank that has refused."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from jobs import Job, poll, rounds_of, run_cli, summary

MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
ENDS_S = 60  # far less than `backend.timeout_s` (600 s), which is how long a rank may wait for the others

OPEN_MPI = shutil.which("mpiexec.openmpi")  # as Debian calls it where there is another one, too
# It refuses to run as root, and more processes than cores, unless asked to.
AS_ANYBODY = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1"}


def mpi(arguments, ranks, log, mpiexec=MPIEXEC):
    pytest.importorskip("mpi4py")
    command = [mpiexec, "-n", str(ranks), sys.executable, "-m", "dfed"]
    return Job(["run", *arguments], command=command, log=log, environment=AS_ANYBODY)


@pytest.mark.skipif(OPEN_MPI is None, reason="no Open MPI here: its mpiexec is in Debian's openmpi-bin")
def test_the_same_bits_under_open_mpi(long_config, same_as_undisturbed, tmp_path):
    """Also where an MPICH lies beside Python."""
    with mpi([long_config, "--out", tmp_path / "run"], 4, tmp_path / "log", OPEN_MPI) as job:
        assert job.wait() == 0, job.output
        job.assert_gone()
        assert "1 server and 3 client" in job.output
    same_as_undisturbed(tmp_path / "run")


@pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec here: pip install mpi4py mpich")
def test_the_same_bits_under_mpi(long_config, same_as_undisturbed, tmp_path):
    shared = set(Path("/dev/shm").glob("mpich_*"))
    folder, arguments = tmp_path / "run", [long_config, "checkpoint.every=29", "--out", tmp_path / "run"]
    with mpi(arguments, 3, tmp_path / "log") as job:
        poll(lambda: (folder / "metrics.jsonl").exists() and rounds_of(folder), "no round was completed")
        job.process.send_signal(signal.SIGTERM)  # mpiexec passes it on
        assert job.wait() == 128 + signal.SIGTERM, job.output
        job.assert_gone()
        assert "1 server and 2 client" in job.output
        assert "stopped on request after round" in job.output
    assert not summary(folder)["finished"]
    # Only rank 0 looks at the folder; the others would wait for it to meet them.
    with mpi(arguments, 2, tmp_path / "refused") as job:
        assert job.wait(ENDS_S) != 0
        job.assert_gone()
        assert "RankLost: rank 1 leaves, as there was an error before the ranks have met, on rank 0" in job.output
        assert "BAD TERMINATION" not in job.output  # mpiexec had nobody to kill
        assert f"`--out` must be a new folder, or be continued with --resume, but {folder} holds a run" in job.output
    assert set(Path("/dev/shm").glob("mpich_*")) <= shared
    log = tmp_path / "resumed"
    assert run_cli(["run", "--resume", folder, "checkpoint.every=1"], log) == 0, log.read_text()
    same_as_undisturbed(folder)
