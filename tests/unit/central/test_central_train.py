"""Whole trainings: what they write, and that interrupted ones go on to the same bits."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from central_problem import CPU, StopAfter, base, trainer

from dfed.central import energy
from dfed.central.config import load_train_config
from dfed.central.energy import EnergyMeter
from dfed.central.prepared import prepare
from dfed.central.state import latest_state
from dfed.cli import main
from dfed.errors import CheckpointError, ConfigError, TrainingFailed
from dfed.yaml_io import dump_yaml

torch.set_num_threads(1)


def config_file(name="a.yaml", **changes) -> str:
    Path(name).write_text(dump_yaml(base(**changes)), encoding="utf-8")
    return name


def summary(folder):
    return json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def bits(state):
    slots = {(name, slot): value for name, kept in state.slots.items() for slot, value in kept.items()}
    return {key: (value.dtype, value.numpy().tobytes()) for key, value in {**state.tensors, **slots}.items()}


def test_a_training_and_what_it_leaves_behind(capsys):
    changes = {"metrics": {"every": 2, "split": "validation", "test_at_end": True}, "data": {"validation_fraction": 0.25},
               "device": {"flops": "1 GFLOPS", "watts": 5.0}, "memory": {"budget": "300MB", "enforce": "off"}}
    assert main(["train", config_file(**changes), "--out", "out"]) == 0
    out = capsys.readouterr().out
    assert "dfed train: flextrain, cnn, synthetic, 33 samples, 3 epochs, on cpu, budget 286.1 MiB (off)" in out
    assert "warning: memory.enforce is off" in out
    assert "epoch 3/3 | train loss" in out
    found, lines = summary("out"), rows("out")
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "checkpoint", "config.yaml", "environment.json", "metrics.jsonl", "summary.json"]
    assert sorted(path.name for path in Path("out/checkpoint").iterdir()) == ["epoch_000002", "epoch_000003"]
    assert load_train_config("out/config.yaml") == load_train_config("a.yaml")
    assert json.loads(Path("out/environment.json").read_text())["memory_enforce"] == "off"
    assert [row["epoch"] for row in lines] == [0, 1, 2]
    assert ["accuracy" in row for row in lines] == [False, True, True]  # every second, and the last
    assert all(sum(row["steps"].values()) == 5 and row["learning_rate"] == 0.05 for row in lines)
    assert found["finished"]
    assert (found["epochs"], found["steps"], found["num_samples"], found["split"]) == (3, 15, 33, "validation")
    assert (found["accuracy"], found["loss"]) == (lines[-1]["accuracy"], lines[-1]["loss"])
    variants = found["variants"]
    assert list(variants) == ["depth 1", "depth 2"]
    assert variants["depth 2"]["accuracy"] == found["accuracy"]
    assert variants["depth 2"]["test"] == found["test"]
    assert variants["depth 1"]["test"]["loss"] != found["test"]["loss"]
    assert sum(variant["steps"] for variant in variants.values()) == 15
    assert sum(variant["step_share"] for variant in variants.values()) == pytest.approx(1)
    assert all(variant["step_s"] > 0 for variant in variants.values())
    assert variants["depth 1"]["num_params"] < variants["depth 2"]["num_params"] == found["num_params"]
    totals = latest_state(Path("out/checkpoint"), load_train_config("a.yaml").fingerprint()).totals
    visits = totals["tally"]["visits"]
    assert sum(visits.values()) == 3 * 33
    flops = sum(variants[name]["training_flops"] * count for name, count in visits.items())
    assert found["training_flops"] == flops
    assert found["sim_time_s"] == pytest.approx(flops / 1e9)
    assert found["energy_j"] == pytest.approx(5 * flops / 1e9)
    assert found["measured_j"] is None
    assert found["measured_j_missing"] == "training on a CPU, whose energy is not measured"
    assert found["budget_bytes"] == 300_000_000
    assert found["needed_bytes"] > found["predicted_bytes"] == variants["depth 2"]["predicted_bytes"]
    assert (found["peak_bytes"] is not None) == sys.platform.startswith("linux")


@pytest.mark.parametrize("changes", [
    {},
    {"method": {"name": "bp", "depths": 2, "depth": 2}, "training": {"schedule": {"name": "cosine"}}},
    {"training": {"optimizer": "adamw", "learning_rate": 0.01, "momentum": None, "augment": "crop", "drop_last": True}},
])
def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path, changes):
    raw = base(**changes)
    raw["training"] = {name: value for name, value in raw["training"].items() if value is not None}
    whole = trainer(raw, tmp_path / "whole")
    assert whole.train() == 0
    state, seen = None, []
    for looks in (4, 9, 3, 100):  # in the middle of epochs, and between them
        # Each step looks, and the trainer before, during and after each epoch.
        part = trainer(raw, tmp_path / "parts", state=state, stop=StopAfter(looks))
        status = part.train()
        fingerprint = load_train_config(None, base=raw).fingerprint()
        state = latest_state(tmp_path / "parts" / "checkpoint", fingerprint)
        assert status == (0 if looks == 100 else 143)
        assert summary(tmp_path / "parts")["finished"] == (looks == 100)
        assert bits(state) == bits(part.state)
        seen.append((state.epoch, state.step))
    assert seen == sorted(set(seen))
    assert any(step for _, step in seen)
    assert bits(state) == bits(whole.state)
    ours, theirs = summary(tmp_path / "parts"), summary(tmp_path / "whole")
    assert ours["params_sha256"] == theirs["params_sha256"]
    assert ours["variants"].keys() == theirs["variants"].keys()
    for name in ours["variants"]:
        assert {k: v for k, v in ours["variants"][name].items() if k != "step_s"} == \
               {k: v for k, v in theirs["variants"][name].items() if k != "step_s"}
    for mine, other in zip(rows(tmp_path / "parts"), rows(tmp_path / "whole"), strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-12)  # sums of float64 in parts
        assert (mine["steps"], mine["accuracy"], mine["loss"]) == (other["steps"], other["accuracy"], other["loss"])


def test_the_command_resumes_extends_and_refuses(capsys, caplog):
    file = config_file()
    assert main(["train", file, "--out", "whole"]) == 0
    assert main(["train", file, "training.epochs=1", "--out", "out"]) == 0
    assert main(["train", "--resume", "out", "training.epochs=3"]) == 0
    assert summary("out")["params_sha256"] == summary("whole")["params_sha256"]
    assert [row["epoch"] for row in rows("out")] == [0, 1, 2]
    assert main(["train", "--resume", "out"]) == 0  # nothing is left to do
    assert summary("out")["params_sha256"] == summary("whole")["params_sha256"]
    assert summary("out")["accuracy"] == summary("whole")["accuracy"]
    capsys.readouterr()

    cases = [
        (["train", "--resume", "out", "training.epochs=2"], "`training.epochs` must be at least 3, as so many are done in out"),
        (["train", "--resume", "out", "seed=6"], "`seed` must be 5, as in the run that is resumed"),
        (["train", "--resume", "out", "method=bp"], "`method.name` must be 'flextrain', as in the run that is resumed"),
        (["train", "--resume", "nothing"], "`--resume` must be the folder of a run, but nothing holds no config.yaml."),
        (["train", file, "--out", "out"], "`--out` must be a new folder, or be continued with --resume, but out holds a run."),
        (["train"], "`CONFIG` must be given"),
        (["train", file, "--out", "new", "method.shares=[1,1,1]"], "`method.shares` must be as many as this model has"),
    ]
    for words, text in cases:
        assert main(words) == 2
        assert text in capsys.readouterr().err
    assert not Path("new").exists()
    # A larger budget, another device to simulate, or other metrics change no bit.
    assert main(["train", "--resume", "out", "device.watts=9.0", "metrics.every=3", "memory={enforce: hard, budget: 2GB}"]) == 0
    assert "needs" in capsys.readouterr().out

    shutil.rmtree("out/checkpoint")
    assert main(["train", "--resume", "out"]) == 0
    assert "out holds no checkpoint yet: starting from the beginning" in caplog.text
    assert summary("out")["params_sha256"] == summary("whole")["params_sha256"]
    assert len(rows("out")) == 3


def test_a_damaged_checkpoint_makes_way_for_the_one_before(capsys, caplog):
    file = config_file()
    assert main(["train", file, "--out", "out"]) == 0
    before = summary("out")["params_sha256"]
    for name in ("state.safetensors", "state.json"):
        path = Path("out/checkpoint/epoch_000003") / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
        caplog.clear()
        assert main(["train", "--resume", "out"]) == 0
        assert "epoch_000003 is damaged" in caplog.text
        assert "going on after epoch 2" in capsys.readouterr().out
        assert summary("out")["params_sha256"] == before
    for path in Path("out/checkpoint").glob("*/state.safetensors"):
        path.write_bytes(b"")
    assert main(["train", "--resume", "out"]) == 1
    assert "CheckpointError: no checkpoint in out/checkpoint can be read" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="can be read"):
        latest_state(Path("out/checkpoint"), load_train_config(file).fingerprint())


def test_several_processes_are_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", config_file(), "--out", "out"]) == 2
    assert "`ranks` must be 1 process, as `dfed train` trains one model on one device, but are 2" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    raw = base(training={"learning_rate": 1e9, "epochs": 4})
    part = trainer(raw, tmp_path / "out")
    with pytest.raises(TrainingFailed, match=r"must be a finite number, but is not in epoch \d, step \d+: check the data"):
        part.train()
    assert not (tmp_path / "out" / "summary.json").exists()
    assert not part.state.step  # the last epoch that was completed is what is left
    saved = latest_state(tmp_path / "out" / "checkpoint", load_train_config(None, base=raw).fingerprint())
    assert (saved.epoch if saved else 0) == part.state.epoch


def test_mini_batches_too_small_for_batch_norm(tmp_path):
    raw = base(method={"name": "bp"}, model={"name": "resnet8", "width": 4})
    raw["model"] = {"name": "resnet8", "width": 4}
    raw["data"] |= {"shape": [1, 2, 2], "samples": 17}  # of which the last stage leaves one pixel
    with pytest.raises(TrainingFailed, match=r"the last mini-batch of an epoch, or a part .*; `training.drop_last`"):
        trainer(raw, tmp_path / "a").train()
    raw["training"]["drop_last"] = True
    assert trainer(raw, tmp_path / "b").train() == 0
    raw["training"]["batch_size"] = 1
    with pytest.raises(ConfigError, match=r"`training.batch_size` must be one at which 'resnet8' can be trained, but is 1: "):
        trainer(raw, tmp_path / "c")


def test_a_choice_of_the_training_samples():
    raw = base(data={"train_samples": 20})
    chosen = prepare(load_train_config(None, base=raw), CPU).data.train
    whole = prepare(load_train_config(None, base=base()), CPU).data.train
    assert chosen.num_samples == 20
    images, every = chosen.batch(np.arange(20))[0], whole.batch(np.arange(44))[0]
    places = [next(i for i in range(44) if torch.equal(image, every[i])) for image in images]
    assert places == sorted(set(places))
    other = prepare(load_train_config(None, base={**raw, "seed": 6}), CPU).data.train
    assert not torch.equal(other.batch(np.arange(20))[1], chosen.batch(np.arange(20))[1]) or places != list(range(20))


def test_a_fleet_that_makes_no_difference_is_said(caplog):
    fleet = {"clients": 2, "tiers": [{"name": "a", "share": 1.0}]}
    assert main(["train", config_file(fleet=fleet, method={"name": "bp", "depths": 2}), "training.epochs=1", "--out", "a"]) == 0
    assert "the config's `fleet` makes no difference to the method 'bp'" in caplog.text
    caplog.clear()
    assert main(["train", config_file(fleet=fleet), "training.epochs=1", "--out", "b"]) == 0
    assert "makes no difference" not in caplog.text
    assert summary("b")["variants"]["depth 2"]["share"] == 1.0  # nobody has a limit


def test_measured_energy(monkeypatch):
    class NVML(types.ModuleType):
        counter = 1500

        def nvmlInit(self):
            pass

        def nvmlDeviceGetHandleByUUID(self, uuid):
            assert uuid == "GPU-12-ab"
            return "handle"

        def nvmlDeviceGetTotalEnergyConsumption(self, handle):
            assert handle == "handle"
            if self.counter is None:
                raise RuntimeError("Not Supported")
            self.counter += 500
            return self.counter

    library = NVML("pynvml")
    monkeypatch.setattr(energy.torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="12-ab"))
    monkeypatch.setitem(sys.modules, "pynvml", library)
    meter = EnergyMeter(torch.device("cuda", 0))
    assert meter.reason is None
    assert meter.read() == 2.5
    assert meter.read() == 3.0
    library.counter = None
    assert meter.read() is None
    assert meter.reason == "NVML cannot say: RuntimeError: Not Supported"
    assert EnergyMeter(torch.device("cuda", 0)).reason == meter.reason
    monkeypatch.setitem(sys.modules, "pynvml", None)
    absent = EnergyMeter(torch.device("cuda", 0))
    assert absent.read() is None
    assert absent.reason == "the module `pynvml` is not there: install dfed[nvml]"
    assert EnergyMeter(CPU).read() is None


def test_a_method_of_ones_own_replaces_the_loop(tmp_path):
    raw = {**base(), "method": {"name": "central_problem:OwnLoop"}}
    name = list(trainer(raw, tmp_path / "look").state.tensors)[-1]
    raw["method"]["tensor"] = name
    part = trainer(raw, tmp_path / "out")
    first = part.state.tensors[name]
    assert part.train() == 0
    assert torch.equal(part.state.tensors[name], first + 1 + 1)
    assert [row["train_loss"] for row in rows(tmp_path / "out")] == [0.75, 0.75]
    assert summary(tmp_path / "out")["epochs"] == 2
    assert latest_state(tmp_path / "out" / "checkpoint", load_train_config(None, base=raw).fingerprint()).epoch == 2
