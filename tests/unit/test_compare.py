"""``dfed compare``: what it is asked, what it runs and what it leaves alone. The runs themselves are played by a script."""

from __future__ import annotations

import fcntl
import json
import logging
import signal
import stat
import sys
from pathlib import Path

import pytest
from compare_problem import BASE, load, write_run, write_yaml

from dfed.cli import main
from dfed.config import load_config


@pytest.fixture(autouse=True)
def _own_process_state(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def refused(capsys, *arguments):
    assert main(["compare", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_a_wrong_command_line(tmp_path, capsys, monkeypatch):
    file = write_yaml(tmp_path / "c.yaml")
    for arguments, message in [
        ([], "`CONFIG` must be one YAML file, but 0 are given."), ([file, "b.yaml"], "but 2 are given."),
        ([file, "--seeds", "0"], "`--seeds` must be a number of seeds of at least 1 and at most 1000, or as many"),
        ([file, "--seeds", "1001"], "but is '1001'."), ([file, "--seeds", "9" * 5000], "`--seeds` must be a number of seeds"),
        ([file, "--seeds", f"0,{2**63}"], "but is '0,9223372036854775808'."),
        ([file, "--seeds", "1,1"], "but is '1,1'."), ([file, "--seeds", "x"], "but is 'x'."),
        ([file, "--ranks", "0"], "`--ranks` must be a whole number of at least 1, but is '0'."),
        ([file, "--strategies", "fedavg,,"], "`--strategies` must be different names with commas between them"),
        ([file, "--quick"], "`compare.quick` must be given for --quick, but is not."),
        ([file, "--out", " "], "`--out` must name a folder, but is ' '."),
        ([file, "--report", "--out", "absent"], "`--out` must be the folder of a comparison, but absent does not exist."),
        ([file, "rounds=0"], "`rounds` must be at least 1, but is 0."),
        ([file, "--out", file], "`--out` must be a folder that can be read, but"),
    ]:
        assert message in refused(capsys, *arguments)
    monkeypatch.setenv("RANK", "0")
    assert "starts the ranks of its runs itself (--ranks N), but it is 0." in refused(capsys, file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml"]


@pytest.fixture
def played(tmp_path, monkeypatch):
    """``played(script)``: instead of Python a shell script is started, which leaves a finished run behind if ``script`` lets
    it; ``$out`` is the run's folder, ``$name`` its name. Gives the config file; what was started stands in ``calls``."""
    templates = tmp_path / "templates"
    for run in load(tmp_path).runs:
        write_run(templates / run.name, run.config)

    def play(script):
        path = tmp_path / "python"
        lines = [
            "#!/bin/sh", f'echo "$*" >> {tmp_path}/calls', f"env > {tmp_path}/env", "for out; do :; done",
            'name=$(basename "$out")', script, 'mkdir -p "$out"', f'cp {templates}/$name/* "$out"', "echo done",
        ]
        path.write_text("\n".join(lines) + "\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(path))
        return str(write_yaml(tmp_path / "c.yaml"))

    return play


def calls(tmp_path):
    path = tmp_path / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_runs_are_started_skipped_and_resumed(played, tmp_path, capsys, monkeypatch):
    for name in ("LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT", "DFED_KEPT"):
        monkeypatch.setenv(name, "1")
    file = played("")
    assert main(["compare", file, "--out", "o"]) == 0
    said = capsys.readouterr().out
    assert calls(tmp_path) == [f"-m dfed run o/configs/{name}.yaml --out o/runs/{name}"
                               for name in ("fedavg-s5", "fedprox-s5", "fedavg-s6", "fedprox-s6")]
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert "DFED_KEPT" in names
    assert not names & {"LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT"}
    assert "[1/4] fedavg, seed 5: started\n[1/4] fedavg, seed 5: accuracy 0.8000, " in said
    assert "tables and figures: o/comparison.md" in said
    assert {path.name for path in Path("o").iterdir()} == {
        ".lock", "runs", "configs", "comparison.md", "comparison.csv", "comparison_mean.csv", "comparison.json",
        "comparison.png", "comparison.svg",
    }
    assert load_config("o/configs/fedprox-s6.yaml") == load(tmp_path).runs[3].config
    assert Path("o/runs/fedavg-s5.out").read_text() == "done\n"
    assert Path("o/runs/fedavg-s5.log").read_text() == ""
    # Again: nothing is left to do; then one summary is missing.
    assert main(["compare", file, "--out", "o"]) == 0
    assert calls(tmp_path) == []
    assert "[4/4] fedprox, seed 6: finished before, accuracy 0.8000" in capsys.readouterr().out
    Path("o/runs/fedavg-s6/summary.json").unlink()
    assert main(["compare", file, "--out", "o", "--ranks", "3"]) == 0
    assert calls(tmp_path) == ["-m torch.distributed.run --standalone --nproc_per_node=3 -m dfed run o/configs/fedavg-s6.yaml "
                               "--resume o/runs/fedavg-s6"]
    assert "[3/4] fedavg, seed 6: going on" in capsys.readouterr().out
    # Other settings: nothing is run, nothing overwritten.
    before = {path: path.read_bytes() for path in Path("o").rglob("*") if path.is_file()}
    assert "`rounds` is 3, where it would be 4 now" in refused(capsys, file, "rounds=4", "--out", "o")
    assert {path: path.read_bytes() for path in Path("o").rglob("*") if path.is_file()} == before
    assert calls(tmp_path) == []


def test_the_short_form_has_a_folder_of_its_own_and_says_what_it_is(played, tmp_path, capsys):
    quick = {"settings": {"client.batch_size": 8}}
    file = played("")
    for run in load(tmp_path, compare={**BASE["compare"], "quick": quick}, quick=True).runs:
        write_run(tmp_path / "templates" / run.name, run.config)
    assert main(["compare", file, "--quick", "--strategies", "fedprox"]) == 0
    out = "runs/c-compare-quick"
    assert calls(tmp_path) == [f"-m dfed run {out}/configs/fedprox-s5.yaml --out {out}/runs/fedprox-s5"]
    said = capsys.readouterr().out
    assert "dfed compare --quick: fedprox; seeds 5; runs 1\n" in said
    assert "--quick, the short form, with client.batch_size 8\n" in said
    page = Path(f"{out}/comparison.md").read_text().splitlines()
    assert page[0] == f"# Comparison: {file} --quick"
    assert f"- command: `python -m dfed compare {file} --quick --strategies fedprox`" in page
    assert "- --quick, the short form, with client.batch_size 8" in page
    everything = json.loads(Path(f"{out}/comparison.json").read_text())
    assert everything["quick"] == {"seeds": 1, "settings": {"client.batch_size": 8}, "entries": {}}
    assert everything["command"].endswith(" --quick --strategies fedprox")
    assert load_config(f"{out}/configs/fedprox-s5.yaml").client.batch_size == 8
    assert main(["compare", file, "--quick", "--seeds", "2", "--report"]) == 0
    assert "- seeds: 5, 6" in Path(f"{out}/comparison.md").read_text().splitlines()
    capsys.readouterr()
    # The whole form is another comparison: the folder of the short one is not for it.
    assert "`client.batch_size` is 8, where it would be 32 now" in refused(capsys, file, "--out", out)


def test_a_run_that_fails_is_shown_and_the_others_go_on(played, tmp_path, capsys):
    says = r"printf 'it said\ndfed: 1 fault in the config:\n  no data\n' >&2"
    file = played(f"case $name in fedprox-s5) {says}; exit 2;; esac")
    assert main(["compare", file]) == 1
    out, err = capsys.readouterr()
    assert len(calls(tmp_path)) == 4
    assert "[2/4] fedprox, seed 5: failed after " in out
    assert "  it said\n  dfed: 1 fault in the config:" in err
    assert "fedprox, seed 5: failed: 1 fault in the config: no data" in out
    assert "fedprox, seed 5: failed: 1 fault in the config: no data" in Path("runs/c-compare/comparison.md").read_text()
    assert main(["compare", file, "--report"]) == 1
    assert calls(tmp_path) == []
    assert "failed: 1 fault in the config: no data" in capsys.readouterr().out
    played("case $name in fedprox-s5) kill -9 $$;; esac")
    assert main(["compare", file]) == 1
    assert calls(tmp_path) == ["-m dfed run runs/c-compare/configs/fedprox-s5.yaml --out runs/c-compare/runs/fedprox-s5"]
    assert "fedprox, seed 5: failed: ended by signal 9" in capsys.readouterr().out
    played("")
    assert main(["compare", file]) == 0
    assert not list(Path("runs/c-compare/runs").glob("*.failed"))


def test_a_finished_run_whose_folder_is_damaged_has_failed_until_it_is_moved_away(played, tmp_path, capsys):
    file = played("")
    assert main(["compare", file, "--out", "o"]) == 0
    calls(tmp_path)
    first, second = Path("o/runs/fedavg-s5"), Path("o/runs/fedprox-s6")
    (first / "metrics.jsonl").unlink()
    (second / "summary.json").write_text('{"finished": true}')
    for more in ([], [], ["--report"]):
        capsys.readouterr()
        assert main(["compare", file, "--out", "o", *more]) == 1
        out = " ".join(capsys.readouterr().out.split())
        for name, path, error in (("fedavg, seed 5", first, "FileNotFoundError"), ("fedprox, seed 6", second, "KeyError")):
            assert f"{name}: failed: its folder cannot be used: {error}" in out
            assert f"; move {path} away, and the next call runs it anew" in out
            assert f"{name}: finished before" not in out
        assert calls(tmp_path) == []
    assert not (first / "metrics.jsonl").exists()
    assert (second / "summary.json").read_text() == '{"finished": true}'
    first.rename("first")
    second.rename("second")
    assert main(["compare", file, "--out", "o"]) == 0
    assert [line.rpartition("/")[2] for line in calls(tmp_path)] == ["fedavg-s5", "fedprox-s6"]


def test_a_run_that_ends_without_all_its_rounds_has_failed(played, tmp_path, capsys):
    for path in (tmp_path / "templates").glob("*/metrics.jsonl"):  # as a run leaves it that was resumed without its lines
        path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"round": 0' not in line))
    assert main(["compare", played(""), "--out", "o"]) == 1
    out = capsys.readouterr().out
    assert "[1/4] fedavg, seed 5: failed: its folder cannot be used: 1 of 3 rounds missing in metrics.jsonl, the first" in out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_run_and_ends_the_comparison(played, number, status, tmp_path, capsys):
    before = signal.getsignal(number)
    # The run asks its parent to stop, and is asked in turn; it then leaves in order.
    file = played(f"trap 'touch asked; exit 143' TERM; kill -{int(number)} $PPID; while :; do sleep 0.02; done")
    assert main(["compare", file, "--out", "o", "--seeds", "5,6"]) == status
    assert signal.getsignal(number) == before
    assert Path("asked").exists()
    out = capsys.readouterr().out
    assert out.endswith(f"stopped on request; go on with: python -m dfed compare {file} --seeds 5,6 --out o\n")
    assert "failed" not in out
    assert len(calls(tmp_path)) == 1
    assert not Path("o/comparison.md").exists()


def test_two_comparisons_do_not_share_a_folder(played, tmp_path, capsys):
    # The run holds the lock as well, should the command be killed.
    file = played("ls -l /proc/self/fd | grep -q 'o/.lock$' || exit 1")
    arguments = [file, "--out", "o", "--strategies", "fedavg", "--seeds", "1"]
    assert main(["compare", *arguments]) == 0
    capsys.readouterr()
    with Path("o/.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = "`--out` must be a folder that no other `dfed compare`, or run of one, is using, but o is in use."
        assert said in refused(capsys, *arguments)
    assert main(["compare", *arguments]) == 0


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    file = write_yaml(tmp_path / "c.yaml")
    (tmp_path / "plain").write_text("x")
    assert "`--out` must be a folder that can be" in refused(capsys, file, "--out", "plain/sub")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "runs").touch()
    assert "`--out` must be a folder that can be written, but o is not" in refused(capsys, file, "--out", "o")


def test_one_run_of_the_list(played, tmp_path, capsys):
    """As the jobs of an array do, several at a time in one folder."""
    file = played("")
    assert main(["compare", file, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [run.name for run in load(tmp_path).runs]
    assert lines == [f"{number} {name}" for number, name in enumerate(names, start=1)]
    assert not (tmp_path / "runs").exists()
    assert main(["compare", file, "--out", "o", "--only", "2"]) == 0
    said = capsys.readouterr().out
    assert f"[2/{len(names)}] " in said
    assert "tables and figures" not in said
    assert (tmp_path / "calls").read_text().count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "o" / "configs").iterdir()) == [f"{names[1]}.yaml"]

    with (tmp_path / "o" / ".lock").open() as folder, (tmp_path / "o" / f".lock.{names[1]}").open() as run:
        fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as another job of the array holds it, for another run
        assert main(["compare", file, "--out", "o", "--only", "1"]) == 0
        capsys.readouterr()
        assert "is using, but o is in use" in refused(capsys, file, "--out", "o")
        fcntl.flock(run, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "is using, but o is in use" in refused(capsys, file, "--out", "o", "--only", "2")
    assert main(["compare", file, "--out", "o"]) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    for number in ("0", "x", str(len(names) + 1)):
        message = f"`--only` must be the number of a run, at least 1 and at most {len(names)} (see --list), but is '{number}'."
        assert message in refused(capsys, file, "--only", number)
    with pytest.raises(SystemExit):
        main(["compare", file, "--list", "--report"])
