"""``dfed compare``: what it is asked, what it runs and what it leaves alone. The runs themselves are played by a script."""

from __future__ import annotations

import fcntl
import logging
import signal
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from compare_problem import BASE, load, write_run, write_yaml

from dfed.cli import main
from dfed.compare_settings import CompareSettings, check_compare
from dfed.comparison import check_folder, load_comparison, progress_of
from dfed.config import load_config
from dfed.errors import ConfigError
from dfed.yaml_io import read_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = [path for path in sorted(CONFIGS.rglob("*.yaml")) if "compare" in read_yaml(path)]


@pytest.fixture(autouse=True)
def _own_process_state(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def faults_of(tmp_path, *overrides, **changes):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides, **changes)
    return [str(fault) for fault in caught.value.faults]


@pytest.mark.parametrize("path", SHIPPED, ids=[str(path.relative_to(CONFIGS)) for path in SHIPPED])
def test_every_shipped_comparison_loads(path):
    comparison = load_comparison(path)
    assert len(comparison.runs) == len(comparison.labels) * len(comparison.seeds) > 1


def test_a_shipped_comparison_is_found():
    assert CONFIGS / "compare" / "fashion_mnist.yaml" in SHIPPED


def test_entries_and_seeds_become_whole_configs(tmp_path):
    comparison = load(tmp_path, "client.learning_rate=0.5", compare={
        "strategies": ["fedavg", {"name": "fedprox", "mu": 0.5, "label": "prox-half",
                                  "settings": {"client.learning_rate": 0.25, "model.hidden.0": 8}}],
        "seeds": [7, 2], "target_accuracy": 0.5, "reference": "prox-half",
    })
    assert (comparison.labels, comparison.seeds) == (("fedavg", "prox-half"), (7, 2))
    assert (comparison.target_accuracy, comparison.reference) == (0.5, "prox-half")
    assert [run.name for run in comparison.runs] == ["fedavg-s7", "prox-half-s7", "fedavg-s2", "prox-half-s2"]
    plain, prox = comparison.runs[0].config, comparison.runs[1].config
    assert (plain.seed, plain.strategy.name) == (7, "fedavg")
    assert (plain.client.learning_rate, plain.model.options["hidden"]) == (0.5, [4])
    assert prox.strategy.to_dict() == {"name": "fedprox", "mu": 0.5}
    assert (prox.client.learning_rate, prox.model.options["hidden"]) == (0.25, [8])
    assert comparison.runs[2].config == replace(plain, seed=2)
    for run in comparison.runs:  # as the runs get them
        assert load_config(None, base=run.config.to_dict()) == run.config


def test_the_defaults(tmp_path):
    comparison = load(tmp_path)
    assert (comparison.seeds, comparison.target_accuracy, comparison.reference) == ((5, 6), None, "fedavg")
    assert load(tmp_path, compare={"strategies": ["fedavg"]}).seeds == (5, 6, 7)
    assert check_compare({}, []) == CompareSettings()
    assert load(tmp_path, seeds=1, strategies=["exclusivefl", "fedprox"]).labels == ("exclusivefl", "fedprox")
    assert load(tmp_path, seeds=(4, 9), strategies=["fedprox"]).seeds == (4, 9)
    twice = [{"name": "fedprox", "label": "a"}, {"name": "fedprox", "label": "b"}]
    chosen = load(tmp_path, compare={"strategies": [*twice, "fedavg"], "reference": "fedavg"}, strategies=["fedprox"])
    assert (chosen.labels, chosen.reference) == (("a", "b"), "a")


def test_all_faults_together(tmp_path):
    compare = {"strategies": [
        "fedavg", {"name": "fedprox", "mu": -1}, "nope", {"name": "fedprox", "label": "b", "settings": {"client.momentum": 2}},
        {"name": "fedavg", "label": "c", "settings": {"clint.momentum": 0}, "width": 3},
    ]}
    found = faults_of(tmp_path, "rounds=0", compare=compare)
    assert found[0] == "`rounds` must be at least 1, but is 0."
    assert found[1] == "`compare.strategies[1].mu` must be at least 0, but is -1."
    assert found[2].startswith("`compare.strategies[2]` must be one of ")
    assert found[3] == ("`compare.strategies[3].settings` must fit the rest of the config, but with them `client.momentum` "
                        "must be less than 1, but is 2.")
    assert [text.split(" ")[0] for text in found[4:]] == ["`compare.strategies[4].settings`", "`compare.strategies[4].width`"]
    assert faults_of(tmp_path, strategies=["fedavg", "nope"])[0].startswith("`--strategies` must be one of ")


@pytest.mark.parametrize(("compare", "message"), [
    (3, "`compare` must be a group of settings, but is 3."),
    ({"strategy": []}, "`compare.strategy` is not a setting; known here: reference, seeds, strategies, target_accuracy."),
    ({"strategies": "fedavg"}, "`compare.strategies` must be a list of names and groups with a `name`, but is 'fedavg'."),
    ({"strategies": [3]}, "`compare.strategies` must be a list of names and groups with a `name`, but is [3]."),
    ({"strategies": [{"mu": 1}]}, "`compare.strategies[0].name` must name a strategy, but is null."),
    ({"strategies": [{"name": "fedavg", "label": "a/b"}]}, "`compare.strategies[0].label` must be at most 64 of the char"),
    ({"strategies": [{"name": "fedavg", "label": 3}]}, "`compare.strategies[0].label` must be text, but is 3."),
    ({"strategies": ["fedavg", {"name": "fedprox", "label": "FedAvg"}]},
     "`compare.strategies[1].label` must differ from that of compare.strategies[0], but is 'FedAvg' too; give a `label`."),
    ({"strategies": [{"name": "fedavg", "settings": {"seed": 3}}]}, "which are the same for all, but sets 'seed'."),
    ({"strategies": [{"name": "fedavg", "settings": {"fleet[tiers]": 3}}]}, "`compare.strategies[0].settings` must leave"),
    ({"strategies": [{"name": "fedavg", "settings": [1]}]}, "`compare.strategies[0].settings` must be a group of settings"),
    ({"strategies": ["fedavg"], "seeds": 0}, "`compare.seeds` must be a number of seeds of at least 1, or a list"),
    ({"strategies": ["fedavg"], "seeds": [1, 1]}, "of different seeds of at least 0, but is [1, 1]."),
    ({"strategies": ["fedavg"], "seeds": True}, "but is true."),
    ({"strategies": ["fedavg"], "target_accuracy": 50}, "`compare.target_accuracy` must be a number greater than 0 and"),
    ({"strategies": ["fedavg"], "reference": "x"}, "`compare.reference` must be one of the labels fedavg, but is 'x'."),
    ({"reference": "x"}, "`compare.reference` must be left out where no strategies are given, but is 'x'."),
])
def test_a_wrong_group_is_refused_by_every_command(compare, message, tmp_path):
    (fault,) = faults_of(tmp_path, compare=compare)
    assert message in fault
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert str(caught.value.faults[0]) == fault


def test_a_comparison_needs_something_to_compare(tmp_path):
    assert faults_of(tmp_path, compare={}) == ["`compare.strategies` must be given, here or by --strategies, but is not."]


def test_the_group_is_no_part_of_a_run(tmp_path):
    without = load_config(None, base={key: value for key, value in BASE.items() if key != "compare"})
    with_group = load_config(None, base=BASE)
    assert with_group == without
    assert "compare" not in with_group.to_dict()
    assert with_group.fingerprint() == without.fingerprint()


def test_how_far_a_run_is(tmp_path):
    config = load(tmp_path).runs[0].config
    assert progress_of(tmp_path / "run") == "new"
    write_run(tmp_path / "run", config)
    assert progress_of(tmp_path / "run") == "finished"
    write_run(tmp_path / "run", config, finished=False)
    assert progress_of(tmp_path / "run") == "unfinished"
    (tmp_path / "run" / "summary.json").write_text("{")
    assert progress_of(tmp_path / "run") == "unfinished"
    (tmp_path / "run" / "summary.json").unlink()
    assert progress_of(tmp_path / "run") == "unfinished"


def test_a_folder_with_other_settings_is_refused(tmp_path):
    out, comparison = tmp_path / "out", load(tmp_path)
    check_folder(out, comparison)
    for run in comparison.runs:
        write_run(out / "runs" / run.name, run.config)
    check_folder(out, comparison)
    with pytest.raises(ConfigError) as caught:
        check_folder(out, load(tmp_path, "client.momentum=0.5", "model.hidden=[4, 5]"))
    first, second = caught.value.faults  # one an entry
    assert str(first) == (f"`--out` must be a folder whose runs have the same settings, but in {out}/runs/fedavg-s5 "
                          "`model.hidden[1]` is not set, where it would be 5 now; choose another folder, or move that one "
                          "away.")
    assert "fedprox-s5" in str(second)
    with pytest.raises(ConfigError, match=r"`client.momentum` is 0.0, where it would be 0.5 now"):
        check_folder(out, load(tmp_path, "client.momentum=0.5"))
    (out / "runs" / "fedavg-s5" / "config.yaml").write_text("rounds: 3")
    with pytest.raises(ConfigError, match=r"can be gone on with, but in .*config.yaml `cohort` must be given"):
        check_folder(out, comparison)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"or one of an earlier comparison, but .* holds 'c.yaml'"):
        check_folder(tmp_path, comparison)


def refused(capsys, *arguments):
    assert main(["compare", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_a_wrong_command_line(tmp_path, capsys, monkeypatch):
    file = write_yaml(tmp_path / "c.yaml")
    for arguments, message in [
        ([], "`CONFIG` must be one YAML file, but 0 are given."), ([file, "b.yaml"], "but 2 are given."),
        ([file, "--seeds", "0"], "`--seeds` must be a number of seeds of at least 1, or different seeds with commas"),
        ([file, "--seeds", "1,1"], "but is '1,1'."), ([file, "--seeds", "x"], "but is 'x'."),
        ([file, "--ranks", "0"], "`--ranks` must be a whole number of at least 1, but is '0'."),
        ([file, "--strategies", "fedavg,,"], "`--strategies` must be different names with commas between them"),
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
    assert main(["compare", file, "--report"]) == 0
    assert calls(tmp_path) == []
    assert "failed: 1 fault in the config: no data" in capsys.readouterr().out
    played("case $name in fedprox-s5) kill -9 $$;; esac")
    assert main(["compare", file]) == 1
    assert calls(tmp_path) == ["-m dfed run runs/c-compare/configs/fedprox-s5.yaml --out runs/c-compare/runs/fedprox-s5"]
    assert "fedprox, seed 5: failed: ended by signal 9" in capsys.readouterr().out
    played("")
    assert main(["compare", file]) == 0
    assert not list(Path("runs/c-compare/runs").glob("*.failed"))


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
