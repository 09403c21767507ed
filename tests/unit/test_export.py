"""``dfed export``: files that a process without dfed can use, with the scores of the evaluation; and what is refused."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from run_problem import assembled
from safetensors.torch import load_file, save_file
from torch import nn

from dfed import checkpoint, export, rng
from dfed.cli import main
from dfed.errors import CheckpointError, ConfigError, DfedError
from dfed.export_command import export_text
from dfed.leader import Leader
from dfed.models import Chain
from dfed.report.folder import RunFolder
from dfed.strategies.depthfl import DepthFL

BASE = {
    "rounds": 2,
    "cohort": 2,
    "seed": 5,
    "model": {"name": "cnn", "channels": [4, 8], "kernel": 3, "hidden": 16, "norm": "batch"},
    "data": {"dataset": "digits", "image_size": 8},
    "fleet": {"clients": 4, "tiers": [{"name": "all", "share": 1.0}]},
    "client": {"learning_rate": 0.05, "batch_size": 32, "steps": 3, "epochs": None},
    "memory": {"enforce": "off"},
    "metrics": {"tensorboard": False, "every": 2, "batch_size": 64},
}
BLOCKS = "split: [conv0, conv1]"
RUNS = {
    "fedavg": (),
    "resnet20": ("model={name: resnet20}", "cohort=1", "client.steps=1", "rounds=1"),
    "vit_tiny": ("model={name: vit_tiny, width: 24, depth: 2}", "cohort=1", "rounds=1"),
    "heterofl": ("strategy={name: heterofl, rates: [1.0, 0.5], statistics_samples: 200}",),
    "depthfl": ("strategy={name: depthfl, depths: 2}",),
    "rotate": (f"strategy={{name: neulite, order: rotate, projection: [8], {BLOCKS}}}",),
    "elastic": (f"strategy={{name: neulite, order: elastic, {BLOCKS}}}", "rounds=1"),
    "cocofl": ("strategy=cocofl", "rounds=1"),
}
# What is exported of them; None: the global model.
EXPORTS = [("fedavg", None), ("resnet20", None), ("vit_tiny", None), ("heterofl", None), ("heterofl", "width 0.5"),
           ("depthfl", None), ("depthfl", "exit1"), ("rotate", None), ("rotate", "stage 1"), ("elastic", None),
           ("elastic", "stage 2"), ("cocofl", None)]

# Runs where nothing but torch and safetensors is at hand; scores of all samples, and of parts of other sizes.
STRANGER = """
import json, sys
from pathlib import Path

class NoDfed:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("dfed", "torchvision"):
            raise ImportError(name + " is not at hand")

sys.meta_path.insert(0, NoDfed())
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
x, scores = load_file(sys.argv[1])["x"], {}
for number, folder in enumerate(json.loads(sys.argv[3])):
    exported = torch.export.load(Path(folder) / "model.pt2")
    weights, program = load_file(Path(folder) / "model.safetensors"), exported.module()
    own = dict(exported.state_dict)
    assert own.keys() <= weights.keys(), own.keys() - weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in own.items())
    assert not any(value.requires_grad for value in own.values())
    scores[f"{number}"] = program(x)
    for size in (1, 7):
        scores[f"{number}/{size}"] = program(x[:size])
save_file(scores, sys.argv[2])
assert not {"dfed", "torchvision"} & sys.modules.keys()
"""


def make(path, *overrides, base=BASE):
    """A finished run in the folder ``path``."""
    run, _ = assembled(base, overrides)
    folder = RunFolder(path)
    folder.create(run.config)
    assert Leader(run, folder, state=None, start=0.0).lead() == 0
    return path


def options(run, **given):
    return argparse.Namespace(**{"run": str(run), "variant": None, "depth": None, "out": None, "list": False, **given})


def refused(run, kind=ConfigError, **given):
    before = sorted(Path(run).rglob("*"))
    with pytest.raises(kind) as caught:
        export_text(options(run, **given))
    assert sorted(Path(run).rglob("*")) == before
    return str(caught.value)


def summary_of(path):
    return json.loads((path / "summary.json").read_text())


def described(out):
    return json.loads((out / "export.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """``runs[name]``: the folder of a finished run, which tests leave as it is but for what they export."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: make(folder / name, *overrides) for name, overrides in RUNS.items()}


@pytest.fixture(scope="module")
def held_out():
    run, _ = assembled(BASE, [])
    return run.evaluator._dataset.batch(np.arange(run.evaluator._dataset.num_samples))


@pytest.fixture(scope="module")
def exported(runs, held_out, tmp_path_factory):
    """By run and variant: the folder, what the command said, the scores of the test set elsewhere, and of its first 1 and 7."""
    place, found = tmp_path_factory.mktemp("elsewhere"), {}
    for name, variant in EXPORTS:
        said = export_text(options(runs[name], variant=variant))
        found[name, variant] = (runs[name] / "export" / (variant or "model"), said)
    save_file({"x": held_out[0]}, place / "x.safetensors")
    folders = json.dumps([str(folder) for folder, _ in found.values()])
    done = subprocess.run([sys.executable, "-I", "-W", "error", "-c", STRANGER, "x.safetensors", "scores.safetensors", folders],
                          cwd=place, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    scores = load_file(place / "scores.safetensors")
    return {key: (*found[key], scores[f"{number}"], scores[f"{number}/1"], scores[f"{number}/7"])
            for number, key in enumerate(found)}


@pytest.mark.parametrize(("name", "variant"), EXPORTS)
def test_elsewhere_the_program_has_the_figures_of_the_evaluation(name, variant, runs, exported, held_out):
    folder, said, scores, *parts = exported[name, variant]
    y, summary, about = held_out[1], summary_of(runs[name]), described(folder)
    figures = summary if variant is None else summary["variants"][variant]
    assert float((scores.argmax(dim=1) == y).double().mean()) == figures["accuracy"] == about["accuracy"]
    # Sums of 360 float32 losses in another order, of scores from other kernels.
    assert float(F.cross_entropy(scores, y)) == pytest.approx(figures["loss"], rel=1e-4)
    assert about["loss"] == figures["loss"]
    for part in parts:  # kernels differ with the size of the batch
        assert torch.allclose(part, scores[:len(part)], rtol=0, atol=1e-5 * float(scores.abs().max()))
    assert scores.std() > 0
    assert said.startswith(f"{folder}: model.safetensors, model.pt2, export.json\n")
    assert f"{about['num_params']:,} parameters" in said
    assert f"test accuracy {figures['accuracy']:.4f}" in said
    assert sorted(path.name for path in folder.iterdir()) == ["export.json", "model.pt2", "model.safetensors"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
    with zipfile.ZipFile(folder / "model.pt2") as archive:  # what is called .pt would be a pickle
        assert not [member.filename for member in archive.infolist() if member.filename.endswith(".pt") and member.file_size]
    blob = (folder / "model.pt2").read_bytes()
    assert str(Path(export.__file__).parent).encode() not in blob  # where files lie here is nobody's business


def _saved(run):
    (state,) = [load_file(path / "state.safetensors") for path in sorted((run / "checkpoint").iterdir())[-1:]]
    return {name.removeprefix("params/"): value for name, value in state.items() if name.startswith("params/")}


def _unit(x, p, unit, running):
    """One unit of a cnn by hand."""
    if unit.startswith("conv"):
        x = F.conv2d(x, p[f"{unit}.conv.weight"], padding=1)
        mean, var = (running[f"{unit}.norm.running_{name}"][:, None, None] for name in ("mean", "var"))
        x = (x - mean) / (var + 1e-5).sqrt() * p[f"{unit}.norm.weight"][:, None, None] + p[f"{unit}.norm.bias"][:, None, None]
        return F.max_pool2d(x.relu(), 2)
    x = F.linear(x.flatten(1), p[f"{unit}.fc.weight"], p[f"{unit}.fc.bias"])
    return x.relu() if unit == "hidden" else x


def _cnn(x, p, running=None):
    for unit in ("conv0", "conv1", "hidden", "head"):
        x = _unit(x, p, unit, running or p)
    return x


def _near(found, expected):
    # The same sums in float64: what is left is float32 rounding in four layers.
    return torch.allclose(found.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_scores_are_those_of_the_checkpoint_by_hand(runs, exported, held_out):
    """Of the whole model, of the mean of two exits, of one exit, and of the first channels with statistics of their own."""
    x = held_out[0].double()
    for name in ("fedavg", "cocofl", "rotate"):
        p = {key: value.double() for key, value in _saved(runs[name]).items()}
        assert _near(exported[name, None][2], _cnn(x, p))
    p = {key: value.double() for key, value in _saved(runs["depthfl"]).items()}
    first = F.linear(_unit(x, p, "conv0", p).mean(dim=(2, 3)), p["exit1.fc.weight"], p["exit1.fc.bias"])
    assert _near(exported["depthfl", "exit1"][2], first)
    assert _near(exported["depthfl", None][2], (first + _cnn(x, p)) / 2)

    folder, narrow = exported["heterofl", "width 0.5"][0], {}
    whole = _saved(runs["heterofl"])
    weights = load_file(folder / "model.safetensors")
    for key, value in weights.items():
        if key.endswith("num_batches_tracked") or "running" in key:
            continue
        if key == "hidden.fc.weight":  # the pixels of the channels that are kept
            expected = whole[key].view(16, 8, 2, 2)[:8, :4].reshape(8, 16)
        else:
            expected = whole[key][tuple(slice(size) for size in value.shape)]
        assert torch.equal(value, expected)
        narrow[key] = value.double()
    running = {key: value.double() for key, value in weights.items() if "running" in key}
    assert not torch.equal(weights["conv1.norm.running_mean"], whole["conv1.norm.running_mean"][:4])
    assert _near(exported["heterofl", "width 0.5"][2], _cnn(x, narrow, running))


def test_statistics_of_a_variant_are_those_of_its_own_mini_batches(runs, exported):
    """HeteroFL's clients send none: they are means over mini-batches of training data, seen through the narrow model."""
    weights = load_file(exported["heterofl", "width 0.5"][0] / "model.safetensors")
    run, _ = assembled(BASE, RUNS["heterofl"])
    evaluator = run.evaluator
    order = rng.Permutation(evaluator._train.num_samples, 5, "statistics")  # which samples is the evaluation's to say
    means = []
    for number in range(200 // 64):
        x = evaluator._train.batch(order.take(np.arange(number * 64, (number + 1) * 64)))[0].double()
        means.append(F.conv2d(x, weights["conv0.conv.weight"].double(), padding=1).mean(dim=(0, 2, 3)))
    # The grid of exact sums is 2⁻³²; the statistics themselves are float32.
    assert torch.allclose(weights["conv0.norm.running_mean"].double(), torch.stack(means).mean(dim=0), rtol=0, atol=1e-6)


def test_what_is_said_of_a_model(runs, exported):
    about = described(exported["fedavg", None][0])
    summary = summary_of(runs["fedavg"])
    assert about["params_sha256"] == summary["params_sha256"] == checkpoint.params_sha256(_saved(runs["fedavg"]))
    same = {name: about[name] for name in ("strategy", "model", "dataset", "seed", "split", "num_params")}
    assert same == {name: summary[name] for name in same}
    assert (about["round"], about["rounds"], about["variant"], about["statistics"]) == (2, 2, None, None)
    assert (about["input_shape"], about["num_classes"], about["class_names"]) == ([1, 8, 8], 10, None)
    # Weights and biases, norms twice (with statistics) and two counters of 8 bytes.
    params = 9 * 4 + 2 * 4 + 9 * 4 * 8 + 2 * 8 + 32 * 16 + 16 + 16 * 10 + 10
    assert about["num_params"] == params
    assert about["num_bytes"] == 4 * (params + 2 * 4 + 2 * 8) + 2 * 8
    assert about["forward_flops"] == 2 * (64 * 9 * 4 + 16 * 9 * 4 * 8 + 32 * 16 + 16 * 10)
    whole, narrow = (described(exported["heterofl", variant][0]) for variant in (None, "width 0.5"))
    assert narrow["num_params"] < whole["num_params"] / 2
    assert narrow["forward_flops"] < whole["forward_flops"] / 2
    vit = described(exported["vit_tiny", None][0])  # attention counts: 5 tokens, width 24, products with keys and values
    layers = 5 * (24 * 72 + 24 * 24 + 2 * 24 * 96) + 2 * 5 * 5 * 24
    assert vit["forward_flops"] == 2 * (4 * 16 * 24 + 2 * layers + 24 * 10)


def test_the_list_of_what_there_is(runs):
    lines = export_text(options(runs["depthfl"], list=True)).splitlines()
    summary = summary_of(runs["depthfl"])
    assert lines[0] == f"{runs['depthfl']}: 'cnn' under 'depthfl' after 2 rounds"
    assert lines[1].split() == ["parameters", "accuracy", "loss"]
    assert [line[:16].strip() for line in lines[2:]] == ["(global model)", "exit1", "exit2"]
    for line, figures in zip(lines[2:], [summary, *summary["variants"].values()], strict=True):
        assert line.split()[-2:] == [f"{figures[name]:.4f}" for name in ("accuracy", "loss")]
    assert lines[4].split()[1] == f"{1046:,}" == lines[4].split()[-3]  # exit2 alone is the chain
    assert len(export_text(options(runs["fedavg"], list=True)).splitlines()) == 3


def test_a_depth_is_short_for_a_variant(runs, tmp_path, monkeypatch):
    out = tmp_path / "exit"
    assert export_text(options(runs["depthfl"], depth="2", out=str(out))).startswith(f"{out}: ")
    assert described(out)["variant"] == "exit2"
    plans = DepthFL.variants
    monkeypatch.setattr(DepthFL, "variants", lambda self, state: {
        name.replace("exit", "depth "): plan for name, plan in plans(self, state).items()})
    export_text(options(runs["depthfl"], depth="01", out=str(tmp_path / "depth")))
    about = described(tmp_path / "depth")
    assert (about["variant"], about["accuracy"], about["split"]) == ("depth 1", None, None)  # the summary knows no such name
    shutil.rmtree(tmp_path / "depth")


@pytest.mark.parametrize(("name", "given", "said"), [
    ("depthfl", {"depth": "3"}, "`--depth` must be K of a variant called 'depth K' or 'exitK', but is '3': the variants of "
                                "strategy 'depthfl' are exit1, exit2."),
    ("fedavg", {"depth": "1"}, "but is '1': strategy 'fedavg' has no variants."),
    ("heterofl", {"variant": "width 2"}, "`--variant` must name a variant, but is 'width 2': the variants of strategy "
                                         "'heterofl' are width 1, width 0.5."),
    ("fedavg", {"variant": ""}, "`--variant` must name a variant, but is '': "),
    *(("fedavg", {"depth": depth}, f"`--depth` must be a whole number of at least 1, but is '{depth}'.")
      for depth in ("-1", "0", "1.5", "two", "")),
    ("depthfl", {"depth": "1", "variant": "exit1"}, "`--depth` must be left out with --variant"),
    ("depthfl", {"list": True, "out": "x", "depth": "1"}, "2 faults"),
    ("fedavg", {"out": " "}, "`--out` must name a folder, but is ' '."),
])
def test_an_option_that_cannot_be_met(name, given, said, runs):
    assert said in refused(runs[name], **given)


def test_a_place_that_cannot_be_written(runs, exported, tmp_path):
    run, full = runs["fedavg"], exported["fedavg", None][0]
    assert f"`--out` must be a new or empty folder, but {full} holds something." in refused(run)
    (tmp_path / "file").write_text("mine")
    assert "file is none." in refused(run, out=str(tmp_path / "file"))
    assert "must be a folder that can be written" in refused(run, out=str(tmp_path / "file" / "below"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    # Empty folders, links to them, and what an export that was killed left there are no obstacle.
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / ".empty.partial").mkdir()
    (tmp_path / ".empty.partial" / "model.pt2").write_text("half")
    export_text(options(run, out=str(tmp_path / "link")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "link"]
    assert (tmp_path / "empty" / "model.safetensors").read_bytes() == (full / "model.safetensors").read_bytes()
    assert described(tmp_path / "empty") == described(full)


def test_an_export_that_fails_leaves_nothing(runs, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        other = SimpleNamespace(module=lambda: lambda x: torch.full((len(x), 10), 1e3))
        patch.setattr(torch.export, "load", lambda path: other)
        said = refused(runs["fedavg"], DfedError, out=out)
        assert said.startswith("the exported program must give the model's scores to within 0.0001, but is 1e+03 off.")
    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("disk full")))
        assert f"cannot be written to {out}: disk full" in refused(runs["fedavg"], DfedError, out=out)
    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        refused(runs["fedavg"], KeyboardInterrupt, out=out)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_run_with_a_whole_checkpoint(runs, tmp_path):
    assert f"`RUN` must be the folder of a run, but {tmp_path} holds no config.yaml." in refused(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(runs["fedavg"] / "config.yaml", run)
    assert f"`RUN` must be the folder of a run with a checkpoint, but {run} holds none yet." in refused(run)
    shutil.copytree(runs["fedavg"] / "checkpoint", run / "checkpoint")
    (newest,) = (run / "checkpoint").iterdir()
    whole = (newest / "state.safetensors").read_bytes()
    (newest / "state.safetensors").write_bytes(whole[:-1] + b"?")
    assert "the tensors' checksum differs" in refused(run, CheckpointError)
    (newest / "state.safetensors").write_bytes(whole)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("seed: 5", "seed: 6"))
    assert "was written by another configuration" in refused(run, CheckpointError)
    (run / "config.yaml").write_text("rounds: [")
    assert "YAML" in refused(run)


def test_of_an_unfinished_run_the_newest_checkpoint_is_taken(runs, tmp_path, caplog):
    run = shutil.copytree(runs["fedavg"], tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("rounds: 2", "rounds: 9"))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "params_sha256": "of another state"}))
    with caplog.at_level(logging.WARNING):
        assert "accuracy" not in export_text(options(run))
    assert "is not finished: this is the model of its newest checkpoint, after 2 of 9 rounds" in caplog.text
    about = described(run / "export" / "model")
    assert (about["round"], about["rounds"], about["accuracy"], about["split"]) == (2, 9, None, None)
    for damaged in ("{", "[]"):
        (run / "summary.json").write_text(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert export_text(options(run, list=True)).splitlines()[-1].split()[-2:] == ["–", "–"]
        assert "the summary of" in caplog.text
    (run / "summary.json").unlink()
    caplog.clear()
    assert export_text(options(run, list=True)).splitlines()[-1].split()[-2:] == ["–", "–"]
    assert "summary" not in caplog.text


def test_a_run_of_another_kind_of_device_is_exported_here(runs, tmp_path):
    trained = export.open_run(runs["fedavg"])
    shutil.copytree(runs["fedavg"], tmp_path / "run", ignore=shutil.ignore_patterns("export", "checkpoint"))
    checkpoint.save(tmp_path / "run" / "checkpoint", trained.state, trained.config.fingerprint("cuda"), 1)
    export_text(options(tmp_path / "run"))
    export_text(options(runs["fedavg"], out=str(tmp_path / "ours")))
    theirs, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("run/export/model", "ours"))
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_a_model_without_statistics_is_exported_with_its_first_ones(runs, tmp_path, caplog):
    trained = export.open_run(runs["heterofl"])
    broken = {name: torch.full_like(value, float("nan")) if "weight" in name else value
              for name, value in trained.state.params.items()}
    lost = export.Trained(path=trained.path, prepared=trained.prepared, run=trained.run,
                          state=export.replace(trained.state, params=broken))
    with caplog.at_level(logging.WARNING):
        about = export.write(lost, "width 0.5", tmp_path / "lost")
    assert "exported with the norms' first statistics" in caplog.text
    assert (about["statistics"], about["accuracy"]) == ("stale", None)


class _Particular(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] == 2 else x


def particular(*, input_shape, num_classes):
    """A model that treats mini-batches of two in its own way."""
    layers = nn.Sequential(_Particular(), nn.Flatten(), nn.Linear(64, num_classes))
    return Chain([("all", layers)], input_shape=input_shape, num_classes=num_classes, name="particular")


def test_a_model_that_cannot_be_followed(tmp_path):
    run = make(tmp_path / "run", f"model={__name__}:particular", "rounds=1")
    assert "torch.export must be able to follow the model, but cannot: " in refused(run, DfedError, out=str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_pixels_of_ones_own_images(tmp_path):
    """The description says what is to be done to an image, and what a class is called."""
    from PIL import Image

    generator = np.random.Generator(np.random.PCG64(3))
    for part, count in (("train", 12), ("test", 4)):
        for name in ("oak", "ash"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 200, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{number}.png")
    data = {"dataset": "image_folder", "root": str(tmp_path / "images"), "image_size": 8, "cache": str(tmp_path / "cache"),
            "validation_fraction": 0.2}
    run = make(tmp_path / "run", "rounds=1", "client.batch_size=4", "metrics.split=validation", base={**BASE, "data": data})
    export_text(options(run))
    about = described(run / "export" / "model")
    assert about["class_names"] == ["ash", "oak"]
    assert about["split"] == "validation"
    given = about["normalisation"]
    assert given["divide_by"] == 255
    pixels = np.asarray(Image.open(tmp_path / "images" / "test" / "ash" / "0.png")).transpose(2, 0, 1).astype(np.float64)
    mean, std = (np.array(given[name])[:, None, None] for name in ("mean", "std"))
    x = export.open_run(run).prepared.data.test.batch(np.array([0]))[0][0].double().numpy()
    assert np.abs((pixels / 255 - mean) / std - x).max() < 1e-5  # six digits of mean and standard deviation


def test_the_command_line(runs, tmp_path, capsys, monkeypatch):
    root, handler = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers, level = list(root.handlers), root.level
    monkeypatch.delenv("RANK", raising=False)
    run = str(runs["fedavg"])
    try:
        assert main(["export", run, "--list"]) == 0
        assert "(global model)" in capsys.readouterr().out
        assert main(["export", run, "--out", str(tmp_path / "out")]) == 0
        assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: ")
        assert main(["export", run, "--out", str(tmp_path / "out")]) == 2
        assert main(["export", run, "--depth", "-1"]) == 2
        broken = shutil.copytree(run, tmp_path / "broken")
        next((broken / "checkpoint").iterdir()).joinpath("state.json").write_text("{")
        capsys.readouterr()
        assert main(["export", str(broken)]) == 1
        assert "CheckpointError: no checkpoint in" in capsys.readouterr().err
        for wrong in (["export"], ["export", run, "rounds=3"], ["export", run, "--fast"]):
            with pytest.raises(SystemExit) as caught:
                main(wrong)
            assert caught.value.code == 2
    finally:
        root.handlers[:], root.level = handlers, level
    assert signal.getsignal(signal.SIGTERM) is handler
