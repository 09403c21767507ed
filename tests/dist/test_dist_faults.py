"""Faults: killed runs and ranks, requests to stop, failing clients, wrong configs. The run goes on, or ends clearly."""

import os
import re
import resource
import signal
from pathlib import Path

import pytest
from jobs import Job, poll, rounds_of, rows, run_cli, run_several, summary

ENDS_S = 20  # a job must end this soon after it has lost a rank
BROKEN, STOPPED, CONFIG = 1, 128 + signal.SIGTERM, 2

# A run of many short rounds, none of which anyone can see the end of by chance.
LONG = """
seed: 7
rounds: 40
cohort: 3
model: {name: mlp, hidden: [32]}
data: {dataset: synthetic, shape: [1, 8, 8], classes: 4, samples: 600, test_samples: 40, partition: {name: dirichlet}}
fleet: {clients: 8, tiers: [{name: all, share: 1.0, dropout: 0.1}]}
client: {learning_rate: 0.05, momentum: 0.9, batch_size: 8, steps: 20}
server: {optimizer: momentum}
metrics: {tensorboard: false, every: 5}
checkpoint: {every: 1}
codecs: {up: {name: top_k, density: 0.2}, error_feedback: true}
sampler: {name: oort, window: 4}
"""

# Trains like any model, but trips over some mini-batches. Whether it does is decided by what is in the mini-batch, so it
# is the same on any number of ranks; it looks at real numbers only, not at the planner's tensors without storage.
MODELS = '''
"""Models that go wrong."""

import os
import signal

import torch
from torch import nn


def _trips(x):
    return type(x) is torch.Tensor and x.device.type == "cpu" and float(x.flatten()[0]) > 2.0


class Raises(nn.Module):
    def forward(self, x):
        if self.training and _trips(x):
            raise ValueError("a pixel is too bright")
        return x


class Terminates(nn.Module):
    def forward(self, x):
        if self.training and _trips(x):
            os.kill(os.getpid(), signal.SIGTERM)
        return x


class Nan(nn.Module):
    def forward(self, x):
        return x * float("nan") if self.training and _trips(x) else x


def _model(broken, input_shape, num_classes):
    size = input_shape[0] * input_shape[1] * input_shape[2]
    return nn.Sequential(broken, nn.Flatten(), nn.Linear(size, num_classes))


def raises(*, input_shape, num_classes):
    """Raises."""
    return _model(Raises(), input_shape, num_classes)


def terminates(*, input_shape, num_classes):
    """Asks its own process to stop."""
    return _model(Terminates(), input_shape, num_classes)


def nan(*, input_shape, num_classes):
    """Gives NaN."""
    return _model(Nan(), input_shape, num_classes)
'''


@pytest.fixture(scope="module")
def long_config(tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "long.yaml"
    path.write_text(LONG)
    return path


@pytest.fixture(scope="module")
def undisturbed(long_config, tmp_path_factory):
    """The folder of the run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_cli(["run", long_config, "--out", folder / "run"], folder / "log") == 0, (folder / "log").read_text()
    return folder / "run"


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoint").glob("round_*"))


def wait_for_round(job, folder, number=2):
    """Wait until a checkpoint of round ``number`` or a later one is there, and the run is in the middle of another."""
    def reached():
        assert job.process.poll() is None, job.output
        return [name for name in checkpoints(folder) if int(name.removeprefix("round_")) >= number]

    poll(reached, "no checkpoint was written")


def last_round(folder):
    return int(checkpoints(folder)[-1].removeprefix("round_"))


def clients_of(folder):
    return [(row["round"], row["client"]) for row in rows(folder) if row["kind"] == "client"]


def states_of(folder):
    """What every client remembers at the end, and that nothing else is left over."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "clients").rglob("*") if path.is_file()}


def assert_completed_like(folder, undisturbed):
    """The run is finished, and nothing of it shows that it was disturbed."""
    assert rounds_of(folder) == rounds_of(undisturbed) == list(range(40))
    ours, theirs = summary(folder), summary(undisturbed)
    assert ours["finished"]
    for name in ("params_sha256", "rounds", "clients", "reasons", "accuracy", "loss", "sim_time_s", "energy_j"):
        assert ours[name] == theirs[name], name
    assert [ours["bytes"][name] for name in ("up", "down")] == [theirs["bytes"][name] for name in ("up", "down")]
    assert clients_of(folder) == clients_of(undisturbed)
    assert states_of(folder) == states_of(undisturbed)


def assert_resumes(folder, undisturbed, tmp_path):
    """Goes on where it was, on one rank, and ends as if nothing had been."""
    done, log = last_round(folder), tmp_path / "resumed.log"
    assert done < 40
    assert run_cli(["run", "--resume", folder], log) == 0, log.read_text()
    assert f"going on after round {done}" in log.read_text()
    assert_completed_like(folder, undisturbed)


def test_killed_in_the_middle_and_resumed_on_other_ranks(long_config, undisturbed, tmp_path):
    folder = tmp_path / "run"
    with Job(["run", long_config, "--out", folder], ranks=5, log=tmp_path / "log") as job:
        wait_for_round(job, folder)
        job.kill()
    assert last_round(folder) < 40
    assert not (folder / "summary.json").exists()
    # A kill may come while a line is being written.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "round", "rou')
    with Job(["run", "--resume", folder], ranks=3, log=tmp_path / "resumed.log") as job:
        assert job.wait() == 0, job.output
        job.assert_gone()
    assert_completed_like(folder, undisturbed)


@pytest.mark.parametrize("victim", [2, 0])
def test_a_killed_rank_ends_the_job(long_config, undisturbed, tmp_path, victim):
    folder, temporary = tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()
    variables = {"TMPDIR": str(temporary)}
    with Job(["run", long_config, "--out", folder], ranks=3, log=tmp_path / "log", environment=variables) as job:
        wait_for_round(job, folder)
        ranks = job.ranks()
        assert not [pid for pid in ranks.values() if "/dev/shm/" in Path(f"/proc/{pid}/maps").read_text()]
        os.kill(ranks[victim], signal.SIGKILL)
        assert job.wait(ENDS_S) != 0
        job.assert_gone()
        assert re.search(rf"rank {victim} died", job.output), job.output
        assert "RankLost" in job.output
    # Ports go with their processes; no memory is shared; and of files torchrun's logs and torch's caches are left, not ours.
    assert not [path.name for path in temporary.iterdir() if not path.name.startswith(("torchelastic_", "torchinductor_"))]
    assert_resumes(folder, undisturbed, tmp_path)
    assert not list((folder / "checkpoint").glob(".*"))


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job(long_config, undisturbed, tmp_path):
    """It is found by the time limit of collectives (8 s) and the roll call (5 s)."""
    folder = tmp_path / "run"
    with Job(["run", long_config, "backend.timeout_s=8", "--out", folder], ranks=3, log=tmp_path / "log") as job:
        wait_for_round(job, folder)
        hung = job.ranks()[2]
        os.kill(hung, signal.SIGSTOP)
        poll(lambda: job.ranks().keys() == {2}, "the others wait for a rank that hangs", 8 + 5 + ENDS_S)
        assert re.search(r"RankLost: rank 0 could not complete .* in round \d+: rank 2 did not answer", job.output), job.output
        os.kill(hung, signal.SIGCONT)  # torchrun kills it after 30 s more; that wait is spared
        assert job.wait(ENDS_S) != 0
        job.assert_gone()
    assert_resumes(folder, undisturbed, tmp_path)


def test_a_disk_that_is_full_when_a_checkpoint_is_written_ends_the_job(long_config, undisturbed, tmp_path):
    """The server may write no file as long as a checkpoint, from one on."""
    folder = tmp_path / "run"
    with Job(["run", long_config, "--out", folder], ranks=2, log=tmp_path / "log") as job:
        wait_for_round(job, folder)
        num_bytes = min(path.stat().st_size for path in folder.glob("checkpoint/round_*/state.safetensors")) - 1
        resource.prlimit(job.ranks()[0], resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        assert job.wait(ENDS_S) != 0
        job.assert_gone()
        assert re.search("dfed: rank 0: CheckpointError: cannot write a checkpoint to .*File too large", job.output), job.output
    assert last_round(folder) < 39
    assert not list((folder / "checkpoint").glob(".*"))  # of the one that could not be written nothing is left
    assert_resumes(folder, undisturbed, tmp_path)


def test_a_job_that_the_launcher_starts_again_goes_on(long_config, undisturbed, tmp_path):
    folder = tmp_path / "run"
    arguments = ["run", long_config, "--out", folder]
    with Job(arguments, ranks=2, log=tmp_path / "log", launcher=["--max-restarts=1"]) as job:
        wait_for_round(job, folder)
        os.kill(job.ranks()[1], signal.SIGKILL)
        assert job.wait() == 0, job.output
        job.assert_gone()
        assert "going on after round" in job.output
    assert_completed_like(folder, undisturbed)


@pytest.mark.parametrize("ranks", [1, 3])
def test_sigterm_ends_a_run_after_the_round(long_config, undisturbed, tmp_path, ranks):
    folder = tmp_path / "run"
    # Checkpoints are not due between rounds 1 and 40: the one that is there was written because of the signal.
    with Job(["run", long_config, "checkpoint.every=39", "--out", folder], ranks=ranks, log=tmp_path / "log") as job:
        poll(lambda: (folder / "metrics.jsonl").exists() and rounds_of(folder), "no round was completed")
        job.process.send_signal(signal.SIGTERM)
        status = job.wait()
        job.assert_gone()
        if ranks == 1:
            assert status == STOPPED, job.output
        else:
            assert status != 0
            # torchrun sends the signal on and reports nothing of the ranks; RankLost would mean that one left early.
            assert "RankLost" not in job.output, job.output
        assert "stopped on request after round" in job.output
    done = last_round(folder)
    assert rounds_of(folder) == list(range(done))
    assert not summary(folder)["finished"]
    assert summary(folder)["rounds"] == done
    assert_resumes(folder, undisturbed, tmp_path)


def test_every_rank_leaves_with_143_when_all_are_asked_to_stop(long_config, tmp_path):
    """As a batch system does, which signals every process of a job itself: each rank's own status is written down."""
    folder, statuses = tmp_path / "run", tmp_path / "statuses"
    statuses.mkdir()
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\nfrom pathlib import Path\nfrom dfed.cli import main\n"
        f"status = main(sys.argv[1:])\nPath({str(statuses)!r}, os.environ['RANK']).write_text(str(status))\n"
        "sys.exit(0)\n"
    )
    with Job(["run", long_config, "checkpoint.every=39", "--out", folder], ranks=2, log=tmp_path / "log", script=script) as job:
        poll(lambda: (folder / "metrics.jsonl").exists() and rounds_of(folder), "no round was completed")
        os.kill(job.ranks()[1], signal.SIGTERM)  # one rank's word is enough
        assert job.wait() == 0, job.output
        job.assert_gone()
    assert {path.name: path.read_text() for path in statuses.iterdir()} == {"0": "143", "1": "143"}
    assert rounds_of(folder) == list(range(last_round(folder)))


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder with a module of models that go wrong."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "broken_models.py").write_text(MODELS)
    return folder


def with_model(long_config, name):
    return ["run", long_config, f"model={{name: 'broken_models:{name}'}}", "rounds=3", "cohort=6"]


def test_a_run_that_is_done_when_it_is_asked_to_stop_is_finished(long_config, broken, tmp_path):
    arguments, log = with_model(long_config, "terminates"), tmp_path / "log"
    assert run_cli([*arguments, "rounds=2", "--out", tmp_path / "a"], log, path=broken) == STOPPED, log.read_text()
    assert summary(tmp_path / "a")["rounds"] == 1  # asked in the first round, it ended with the first
    assert not summary(tmp_path / "a")["finished"]
    assert run_cli([*arguments, "rounds=1", "--out", tmp_path / "b"], log, path=broken) == 0, log.read_text()
    assert summary(tmp_path / "b")["rounds"] == 1
    assert summary(tmp_path / "b")["finished"]


@pytest.mark.parametrize(("name", "reason", "said"), [
    ("raises", "exception", "ValueError: a pixel is too bright"),
    ("nan", "non_finite", "must be finite"),
])
def test_a_failing_client_fails_alone(long_config, broken, tmp_path, name, reason, said):
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = [*with_model(long_config, name), "server.max_failed_fraction=1.0", "--out", folder]
    assert run_cli(arguments, log, path=broken) == 0, log.read_text()
    output, result = log.read_text(), summary(folder)
    clients = [row for row in rows(folder) if row["kind"] == "client"]
    failed = [row for row in clients if row["reason"] == reason]
    assert 0 < len(failed) < len(clients)
    assert any(row["status"] == "completed" for row in clients)
    assert {row["status"] for row in failed} == {"failed"}
    # A device whose update is refused has sent it; one whose training broke off has not.
    assert {row["bytes_up"] > 0 for row in failed} == {reason == "non_finite"}
    assert result["reasons"][reason] == len(failed)
    assert result["clients"]["failed"] == sum(row["status"] == "failed" for row in clients)  # dropouts as well
    assert rounds_of(folder) == [0, 1, 2]
    assert result["loss"] == result["loss"] is not None  # a number: nothing went into the mean that is none
    assert said in output
    assert ("Traceback (most recent call last)" in output) == (name == "raises")
    assert f"client {failed[0]['client']} {reason}" in output
    # The rows are JSON to any reader, not only to Python's.
    assert "NaN" not in (folder / "metrics.jsonl").read_text()


def test_too_many_failures_end_the_run(long_config, broken, tmp_path):
    folder = tmp_path / "run"
    arguments = [*with_model(long_config, "raises"), "server.max_failed_fraction=0.0", "--out", folder]
    variables = {"PYTHONPATH": os.pathsep.join([str(broken), os.environ.get("PYTHONPATH", "")])}
    with Job(arguments, ranks=3, log=tmp_path / "log", environment=variables) as job:
        assert job.wait() == BROKEN, job.output
        job.assert_gone()
        output = job.output
    assert "dfed: rank 0: TooManyFailures: round " in output
    assert "clients failed, more than `server.max_failed_fraction` (0) allows" in output
    assert "a pixel is too bright" in output
    assert "RankLost" not in output  # the other ranks were let go
    log = tmp_path / "alone.log"
    assert run_cli([*arguments[:-1], tmp_path / "alone"], log, path=broken) == BROKEN
    assert re.search("TooManyFailures: round .*", log.read_text())[0] == re.search("TooManyFailures: round .*", output)[0]


def test_a_wrong_config_is_refused_with_all_its_faults(long_config, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    wrong = ["run", long_config, "cohort=0", "modle=cnn", "client.learning_rate=fast", "--out", folder]
    assert run_cli(wrong, log) == CONFIG
    for field in ("`cohort` must be", "`modle` is not a setting", "`client.learning_rate` must be a number"):
        assert field in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not folder.exists()
    with Job(wrong, ranks=2, log=tmp_path / "two.log") as job:
        assert job.wait() != 0
        job.assert_gone()
        assert job.output.count("3 faults in the config") == 1  # one rank speaks for all
    assert not folder.exists()


def test_a_run_folder_is_not_written_over(undisturbed, long_config, tmp_path):
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    log = tmp_path / "log"
    arguments = ["run", long_config, "--out", undisturbed]
    assert run_cli(arguments, log) == CONFIG
    assert f"`--out` must be a new folder, or be continued with --resume, but {undisturbed} holds a run" in log.read_text()
    # Only the server looks at the folder: the others, who wait for it, must go too, and at once.
    with Job(arguments, ranks=2, log=tmp_path / "two.log") as job:
        poll(lambda: "holds a run" in job.output, "nothing was said of the folder")
        assert job.wait(ENDS_S) != 0
        job.assert_gone()
    assert {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()} == before


def test_a_folder_without_a_run_cannot_be_resumed(long_config, tmp_path):
    log = tmp_path / "log"
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        for arguments in (["run", "--resume", folder], ["run", long_config, "--resume", folder]):
            assert run_cli(arguments, log) == CONFIG
            assert f"`--resume` must be the folder of a run, but {folder} holds no config.yaml" in log.read_text()
    assert list((tmp_path / "empty").iterdir()) == []
    assert not (tmp_path / "nowhere").exists()
    assert run_cli(["run"], log) == CONFIG
    assert "`CONFIG` must be given" in log.read_text()
    assert run_cli(["run", long_config, "--out", tmp_path / "a", "--resume", tmp_path / "b"], log) == CONFIG
    assert "`--out` must be left out with --resume" in log.read_text()


def test_another_config_cannot_resume_a_run(undisturbed, long_config, tmp_path):
    before = (undisturbed / "config.yaml").read_bytes(), summary(undisturbed)
    log = tmp_path / "log"
    assert run_cli(["run", "--resume", undisturbed, "seed=8", "metrics.every=2", "rounds=99"], log) == CONFIG
    said = log.read_text()
    assert "`seed` must be " in said
    assert "as in the run that is resumed, whose bits depend on it, but is 8." in said
    assert "1 fault" in said  # not those of the others, which may change
    assert run_cli(["run", "--resume", undisturbed, "rounds=1"], log) == CONFIG
    assert "`rounds` must be at least" in log.read_text()
    assert (undisturbed / "config.yaml").read_bytes() == before[0], "a refused config took the place of the run's own"
    assert summary(undisturbed) == before[1]
    with Job(["run", "--resume", undisturbed, "client.batch_size=4"], ranks=2, log=tmp_path / "two.log") as job:
        poll(lambda: "`client.batch_size` must be " in job.output, "nothing was said of the config")
        assert job.wait(ENDS_S) != 0
        job.assert_gone()


def test_a_finished_run_can_be_extended(undisturbed, long_config, tmp_path):
    """The number of rounds is not part of what decides the bits."""
    short, long = tmp_path / "short", tmp_path / "long"
    run_several([[long_config, "rounds=3", "--out", short], ["--resume", short, "rounds=5"],
                 [long_config, "rounds=5", "--out", long]], tmp_path, ranks=1)
    assert rounds_of(short) == rounds_of(long) == list(range(5))
    assert summary(short)["params_sha256"] == summary(long)["params_sha256"]
    # Resuming what is finished does nothing but say so again.
    log = tmp_path / "again.log"
    assert run_cli(["run", "--resume", long], log) == 0, log.read_text()
    assert summary(long)["rounds"] == 5
    assert rounds_of(long) == list(range(5))


DATA = '''
"""A data set whose held-out samples cannot be read on one rank."""

import os

import numpy as np

from dfed.data import ArrayDataset, Bundle


class Unreadable(ArrayDataset):
    def batch(self, indices):
        if os.environ["RANK"] == os.environ["BROKEN_RANK"]:
            raise RuntimeError("the disk of this rank is gone")
        return super().batch(indices)


def unreadable(*, root, download, cache, seed):
    """Cannot be read."""
    images, labels = np.zeros((60, 1, 8, 8), np.uint8), np.arange(60) % 4
    return Bundle(ArrayDataset(images, labels, num_classes=4), Unreadable(images, labels, num_classes=4))
'''


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_in_an_evaluation_ends_the_job(long_config, tmp_path, rank):
    (tmp_path / "broken_data.py").write_text(DATA)
    variables = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]), "BROKEN_RANK": str(rank)}
    arguments = ["run", long_config, "data={dataset: 'broken_data:unreadable'}", "metrics.every=1", "metrics.batch_size=10",
                 "--out", tmp_path / "run"]
    with Job(arguments, ranks=3, log=tmp_path / "log", environment=variables) as job:
        assert job.wait() == BROKEN, job.output
        job.assert_gone()
        assert re.search(rf"RankLost: rank \d could not complete .* in round 1: rank {rank} failed: "
                         r"\w+: .*the disk of this rank is gone", job.output), job.output
    assert rounds_of(tmp_path / "run") == []
