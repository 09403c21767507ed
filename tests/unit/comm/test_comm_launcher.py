"""Whose words a launcher uses: torchrun's, MPI's or SLURM's, they come to the same five variables."""

import datetime
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from dfed.comm import BackendSettings, adopt, join, launcher, without_launcher
from dfed.errors import ConfigError, RankLost

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = {"SLURM_JOB_ID": "12345", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8",
         "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[03-05,9]-ib,login1", "SLURM_JOB_NODELIST": "gpu[01-05,9]-ib,login1"}


@pytest.fixture
def environment(monkeypatch):
    """``environment(variables)``: with these and no others of a launcher, what :func:`adopt` makes of it."""
    outside = without_launcher(os.environ)

    def adopted(variables):
        with pytest.MonkeyPatch.context() as patch:
            for name in os.environ.keys() - outside.keys() | SLURM.keys():
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(launcher.os, "environ", dict(os.environ))
            adopt()
            return tuple(launcher.os.environ.get(name) for name in NAMES)

    return adopted


def test_a_process_that_is_alone_stays_so(environment):
    alone = (None,) * 5
    assert environment({}) == alone
    assert environment({"PMI_RANK": "0", "PMI_SIZE": "1"}) == alone
    assert environment({**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) == alone
    # The shell of a job: of sbatch, and of salloc, which is a step with a number of its own kind.
    assert environment({**SLURM, "SLURM_STEP_ID": ""}) == alone
    assert environment({**SLURM, "SLURM_STEP_ID": "batch"}) == alone
    assert environment({name: value for name, value in SLURM.items() if "STEP" not in name}) == alone
    assert environment({**SLURM, "SLURM_STEP_ID": "4294967290"}) == alone


def test_the_launcher_that_stands_closest_counts(environment):
    torchrun = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert environment({**torchrun, **SLURM, "PMI_RANK": "0", "PMI_SIZE": "2"}) == tuple(torchrun.values())
    by_slurm = ("3", "8", "1", "gpu03-ib", "22345")  # 10000 + 12345 mod 20000
    assert environment(SLURM) == by_slurm
    assert environment({**SLURM, "PMI_RANK": "3", "PMI_SIZE": "8"}) == by_slurm  # srun --mpi=pmi2 says both


def test_steps_and_jobs_of_slurm_meet_at_different_places(environment):
    ports = {environment({**SLURM, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})[4]
             for job in range(12345, 12349) for step in (0, 1, 2)}
    assert len(ports) == 12
    assert all(10_000 <= int(port) < 30_000 for port in ports)
    assert environment({**SLURM, "SLURM_STEP_NODELIST": "node7"})[3] == "127.0.0.1"  # one node needs no name
    assert environment({**SLURM, "MASTER_ADDR": "ib0", "MASTER_PORT": "7"})[3:] == ("ib0", "7")
    assert environment({**SLURM, "MASTER_ADDR": "ib0", "SLURM_STEP_NODELIST": "a[1-"})[3] == "ib0"  # which nobody needs then
    assert environment({**SLURM, "SLURM_STEP_NODELIST": "r[1-2]n[3,5],x"})[3] == "r1n3"
    without_step = {name: value for name, value in SLURM.items() if name not in ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")}
    assert environment(without_step)[3] == "gpu01-ib"


@pytest.mark.parametrize(("nodes", "first"), [
    ("a", "a"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[007,9]", "n007"), ("r[1-2]n[3,5],x", "r1n3"), ("n[1,2]-ib", "n1-ib"),
    ("10.0.0.[4-6]", "10.0.0.4"), ("", ""),
])
def test_the_first_host_of_a_list(nodes, first):
    assert launcher.first_host(nodes) == first


@pytest.mark.parametrize(("variables", "message"), [
    ({"RANK": "4", "WORLD_SIZE": "4"}, "`RANK` must be at least 0 and less than `WORLD_SIZE` (4), but is 4."),
    ({"RANK": "x"}, "`RANK` must be a whole number, as launchers set it, but is 'x'."),
    ({"WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "`LOCAL_RANK` must be a whole number"),
    ({"WORLD_SIZE": "2", "MASTER_PORT": "99999"}, "`MASTER_PORT` must be a port from 1 to 65535, but is '99999'."),
    ({"OMPI_COMM_WORLD_RANK": "1"}, "`OMPI_COMM_WORLD_SIZE` must be a whole number, as launchers set it, but is not set."),
    ({"PMI_SIZE": "3", "PMI_RANK": "3"}, "`PMI_RANK` must be at least 0 and less than `PMI_SIZE` (3), but is 3."),
    ({**SLURM, "SLURM_PROCID": "8"}, "`SLURM_PROCID` must be at least 0 and less than `SLURM_STEP_NUM_TASKS` (8), but is 8."),
    ({**SLURM, "SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "`SLURM_STEP_NODELIST` must be set beside SLURM_PROCID"),
    ({**SLURM, "SLURM_STEP_NODELIST": "a[1-"}, "`SLURM_STEP_NODELIST` must be a list of hosts, such as "
                                              "'gpu[03-05,9],login1', but is 'a[1-'."),
    ({**SLURM, "SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": "a,,b"}, "`SLURM_JOB_NODELIST` must be a list of hosts"),
    ({**SLURM, "SLURM_STEP_NODELIST": "a[]"}, "but is 'a[]'."),
    ({**SLURM, "SLURM_STEP_NODELIST": "a b"}, "but is 'a b'."),
])
def test_what_contradicts_itself_is_refused(environment, variables, message):
    with pytest.raises(ConfigError) as refused:
        environment(variables)
    assert message in str(refused.value)


def test_mpi_that_is_missing_or_another_one(environment, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mpi4py", None)
        with pytest.raises(ConfigError, match=r"`mpi4py` must be installed .*'dfed\[mpi\]'.*PMI_SIZE is 2, but is not"):
            environment({"PMI_RANK": "0", "PMI_SIZE": "2"})
    pytest.importorskip("mpi4py")
    # In a process of its own, which MPI takes for the only one: as with another MPI's mpiexec.
    other = {**without_launcher(os.environ), "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "-c", "from dfed.comm import adopt; adopt()"], env=other, capture_output=True,
                          text=True, timeout=100, check=False)
    assert "must be built for the MPI whose mpiexec started this process (rank 1 of 2 by OMPI_COMM_WORLD_RANK" in done.stderr
    assert "but finds rank 0 of 1." in done.stderr


def test_what_a_new_job_is_started_with():
    mine = {"PATH": "/bin", "SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "4", "MPICH_X": "1", "RANKS": "3"}
    theirs = dict.fromkeys([*NAMES, "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "SLURM_PROCID", "SLURM_STEP_ID",
                            "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "MPI_LOCALRANKID", "PMIX_RANK"], "1")
    assert without_launcher({**mine, **theirs}) == mine


def test_where_ranks_cannot_meet(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    settings, device = BackendSettings(timeout_s=1), torch.device("cpu")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ConfigError, match=r"`WORLD_SIZE` must be set beside RANK \(2\), but is not\."):
        join(settings, device)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="`MASTER_ADDR` must be set where several processes are started") as refused:
        join(settings, device)
    assert len(refused.value.faults) == 2
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for wrong in ("abc", "0", "99999", "-1", "1.5"):
        monkeypatch.setenv("MASTER_PORT", wrong)
        with pytest.raises(ConfigError, match=rf"`MASTER_PORT` must be a port from 1 to 65535, but is '{wrong}'\."):
            join(settings, device)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(ConfigError, match=rf"`MASTER_PORT` must be a port that is free .*, but {port} is in use"):
            join(settings, device)
    # Nobody is there; then rank 0 is, but not rank 1.
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(RankLost, match=rf"rank 2 could not reach rank 0 at 127\.0\.0\.1:{port} .* within 1 s") as lost:
        join(settings, device)
    assert lost.value.ranks == (0,)
    assert "frame #" not in str(lost.value)
    assert "\n" not in str(lost.value)
    # Rank 0 is there and waits; the port is free again.
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RankLost, match=r"rank 0 waited 1 s \(`backend\.timeout_s`\) for all 3 ranks .*; missing: 1, 2$"):
        join(settings, device)
    monkeypatch.setenv("RANK", "2")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=1))
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    dist.PrefixStore("dfed/0", store).set("pid/0", "host 1")
    with pytest.raises(RankLost, match=r"rank 2 waited 1 s \(`backend\.timeout_s`\) for all 3 ranks to sign in; missing: 1"):
        join(settings, device)
    assert not dist.is_initialized()


def test_something_silent_listens_where_rank_0_should():
    """Torch's client would wait for a greeting without end; the process comes to its end all the same."""
    code = ("import torch\nfrom dfed.comm import BackendSettings, join\nfrom dfed.errors import RankLost\n"
            "try:\n    join(BackendSettings(timeout_s=1), torch.device('cpu'))\nexcept RankLost as error:\n    print(error)\n")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = subprocess.run([sys.executable, "-c", code], env={**without_launcher(os.environ), **place}, capture_output=True,
                              text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (f"rank 1 could not reach rank 0 at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT) within 1 s: nothing "
                           "there answers as rank 0 would\n")
