"""``dfed plan`` from its command line to what it prints."""

from __future__ import annotations

import errno
import io
import json
import re
import sys

import pytest
from plan_problem import BASE as PLAIN

from dfed.cli import main

MIB = 2**20
BASE = PLAIN | {"fleet": {"clients": 8, "tiers": [{"name": "[red]:fire:", "count": 5, "memory": 2.0},
                                                  {"name": "[/x]", "count": 3, "memory": 0.4}]}}
MODELS = """
import math
from collections import OrderedDict

from torch import nn


class Looks(nn.Module):
    def forward(self, x):
        return 2 * x if self.training and x.sum().item() > 0 else x


def _linear(shape, classes):
    return nn.Linear(math.prod(shape), classes)


def empty(*, input_shape, num_classes):
    return nn.Sequential(OrderedDict(flat=nn.Flatten(), head=nn.AdaptiveAvgPool1d(num_classes)))


def looks(*, input_shape, num_classes):
    return nn.Sequential(OrderedDict(flat=nn.Flatten(), look=Looks(), head=_linear(input_shape, num_classes)))


def ends(*, input_shape, num_classes):
    units = {"flat": nn.Flatten(), "[bold]": _linear(input_shape, num_classes), "scores": nn.LogSoftmax(1)}
    return nn.Sequential(OrderedDict(units))
"""


def test_the_command(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(BASE))
    assert main(["plan", str(path), "--json", "--strategies", " fedavg , fedprox", "client.batch_size=8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [part["name"] for part in found["strategies"]] == ["fedavg", "fedprox"]
    assert found["batch_size"] == 8
    tiers = found["strategies"][0]["tiers"]
    assert [tier["able"] for tier in tiers] == [5, 0]
    assert found["strategies"][0]["participation"] == {"clients": 5 / 8, "data": 5 / 8, "classes": 4, "num_classes": 4}
    assert main(["plan", str(path)]) == 0
    out = capsys.readouterr().out
    assert "fedprox: 62 % of the clients can take part, with 62 % of the samples and 4 of 4 classes" in out
    assert out.count("[red]:fire: ") == out.count("\n [/x] ") == out.count("can take part")  # as written
    assert out.index("fedprox: ") < out.index("fedavg: ")  # the config's own comes first
    assert f"[/x]: a budget of {tiers[0]['needed_bytes'] / MIB:.2f} MiB would do" not in out  # that was at a batch of 8


def test_a_model_by_itself(capsys):
    assert main(["plan", "--model", "resnet8", "--shape", "3,16,16", "--budget", "20MiB", "--train", "layer3_0:head", "--units",
                 "--split", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["budget_bytes"] == 20 * MIB
    assert [unit["name"] for unit in found["units"]] == ["stem", "layer1_0", "layer2_0", "layer3_0", "head"]
    assert sum(unit["num_params"] for unit in found["units"]) == found["num_params"]
    names = [way["name"] for way in found["ways"]]
    assert names[:2] == ["full training", "full, activations recomputed"]
    assert "layer3_0:head trained" in names
    assert names[-2:] == ["stage 1 of 2", "stage 2 of 2"]
    assert [part["block"] for part in found["splitting"]] == ["b0", "b1"]
    assert [name for part in found["splitting"] for name in part["units"]] == [unit["name"] for unit in found["units"]]
    assert [part["peak_bytes"] for part in found["splitting"]] == [way["peak_bytes"] for way in found["ways"][-2:]]
    full, thrifty = found["ways"][:2]
    assert thrifty["peak_bytes"] < full["peak_bytes"]
    assert all(way["fits"] == (way["needed_bytes"] <= 20 * MIB) for way in found["ways"])
    assert main(["plan", "--model", "resnet8", "--shape", "3,16,16", "--budget", "12.1MiB", "--measure"]) == 0
    out = capsys.readouterr().out
    assert "nothing is sure to fit 12.10 MiB at batch 32; the least that is sure to do is" in out
    assert "times measured here on a mini-batch of 32" in out


def test_a_unit_whose_name_looks_like_markup(capsys, tmp_path, monkeypatch):
    (tmp_path / "plan_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plan_models", raising=False)
    assert main(["plan", "--model", "plan_models:ends", "--units", "--train", "[bold]:"]) == 0
    out = capsys.readouterr().out
    assert "\n [bold] " in out
    assert "trained" in out
    assert "[bold]: trained" not in out  # the same as full training
    assert main(["plan", "--model", "plan_models:ends", "--budget", "1GB", "--json"]) == 0
    assert [way["name"] for way in json.loads(capsys.readouterr().out)["ways"]] == [
        "full training", "full, activations recomputed"]


def test_a_splitting_is_shown_below_its_table_in_short_lines(capsys):
    assert main(["plan", "--model", "resnet8", "--split", "2", "--shape", "3,8,8", "client.batch_size=8"]) == 0
    out = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(out) if line.startswith("b0: peak "))
    said = " ".join(" ".join(out[start:]).split())
    assert re.fullmatch(r"b0: peak [0-9.]+ MiB: stem, .* b1: peak [0-9.]+ MiB: .*, head", said)
    assert max(len(line) for line in out if "stage" in line or line in out[start:]) <= 90


def test_a_measurement_of_a_batch_that_is_too_large(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("dfed.planner.room.free_bytes", lambda device: 64 * MIB)
    monkeypatch.setattr("dfed.planner.measure_units", lambda chain, size, *rest, **options: (
        asked.append(size) or [(1.0, 2.0)] * len(chain)))
    words = ["plan", "--model", "cnn", "--shape", "1,8,8", "model.channels=[2,2]", "model.hidden=4"]
    assert main([*words, "--measure", "client.batch_size=1000000000"]) == 0
    assert f"measured here on a mini-batch of {asked[0]}, not 1000000000" in capsys.readouterr().out
    assert asked[0] < 100_000
    assert main([*words, "--measure", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert asked[1] == found["measured_batch_size"] == found["batch_size"] == 32


def test_a_million_classes_are_not_drawn(capsys, monkeypatch):
    def drawn(*arguments):
        raise AssertionError("images were drawn")

    monkeypatch.setattr("dfed.data.synthetic._patterns", drawn)
    words = ["plan", "--model", "mlp", "--shape", "1,2,2", "--classes", "20000", "model.hidden=[1]", "--strategies", "fedavg"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["strategies"][0]["participation"] == {"clients": 1, "data": 1, "classes": 20000, "num_classes": 20000}
    assert found["num_params"] == 4 + 1 + 2 * 20000


class Full(io.StringIO):
    encoding = "utf-8"

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_output_that_cannot_be_written(capsys, monkeypatch):
    words = ["plan", "--model", "mlp", "--shape", "1,2,2", "model.hidden=[1]"]
    monkeypatch.setattr(sys, "stdout", Full())
    assert main(words) == 1
    assert capsys.readouterr().err == "dfed: standard output cannot be written: No space left on device\n"
    monkeypatch.setattr(sys, "stdout", None)
    assert main(words) == 1
    assert "dfed: standard output is closed" in capsys.readouterr().err
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(words) == 0
    assert b"|full training " in shown.buffer.getvalue()
    assert b"budget ?" in shown.buffer.getvalue()


@pytest.mark.parametrize(("words", "said"), [
    ([], "`CONFIG` must be one YAML file, or else --model NAME"),
    (["x.yaml", "--model", "cnn"], "exactly one of the two"),
    (["--model", "resnet9"], "must be one of .* but is 'resnet9'. Did you mean 'resnet8'"),
    (["--model", "cnn", "--budget", "much"], "`--budget` must be"),
    (["--model", "cnn", "--shape", "3,x,3"], "`--shape` must be a whole number, but is 'x'"),
    (["--model", "cnn", "--train", "conv9"], "`--train` unit must be one of conv0, conv1, hidden, head, but is 'conv9'."),
    (["--model", "cnn", "--train", "head:conv0"], "`--train` must name units in the order of the chain"),
    (["--model", "cnn", "--split", "9"], "must be at least 1 and at most 3, the units of 'cnn' before its last, but is 9"),
    (["--model", "cnn", "--split", "many"], "`--split` must be a whole number, but is 'many'"),
    (["--model", "cnn", "--strategies", "fedavgg"], "`--strategies` must be one of .*Did you mean 'fedavg'"),
    (["--model", "cnn", "client.bach_size=3"], "client.bach_size"),
    (["--model", "cnn", "--strategies", ""], "`--strategies` must be names .* none of them empty, but is ''"),
    (["--model", "cnn", "--strategies", "fedavg, ,"], "`--strategies` must be names .* none of them empty"),
    (["--model", "cnn", "--strategies", "fedavg,fedprox, fedavg"], "`--strategies` must name each strategy once.*'fedavg' 2"),
    (["x.yaml", "--shape", "3,8,8", "--classes", "4", "--budget", "1GB"], "3 faults(.|\n)*`--shape`(.|\n)*`--classes`"),
    (["--model", "cnn", "--train", ""], "`--train` must be FIRST:LAST, FIRST: or :LAST, but is ''"),
    (["--model", "cnn", "--train", ":"], "`--train` must be FIRST:LAST, FIRST: or :LAST, but is ':'"),
    (["--model", "cnn", "--split", ""], "`--split` must be a whole number, but is ''"),
    (["--model", "cnn", "--split", "0"], "`--split` must be at least 1 and at most 3, .*, but is 0"),
    (["--model", "cnn", "--shape", "3,8"], "`--shape` must be three whole numbers"),
    (["--model", "cnn", "--shape", "3,0,8"], "`--shape` must be at least 1, but is 0"),
    (["--model", "vgg11_bn", "--shape", "3,4,4"], "`model` must suit images of this shape"),
    (["--model", "cnn", "--classes", "0"], "`--classes` must be at least 1, but is 0"),
    (["--model", "cnn", "--budget", "0.001"], "`--budget` must be at least 0"),
    (["--model", "plan_models:empty"], "`model` must name a model with parameters to train, but 'plan_models:empty' has none"),
    (["--model", "plan_models:looks"], "'plan_models:looks' raised RuntimeError: it asks for the value of a tensor"),
    (["--model", "plan_models:ends", "--train", "scores"], "`--train` must name units with parameters to train"),
    (["--model", "resnet8", "--shape", "1,4,4", "--measure", "client.batch_size=1"], "`--measure` must .*batch norm"),
    (["--model", "resnet8", "--shape", "1,4,4", "--split", "2", "client.batch_size=1"], "`--split` must .*batch norm"),
])
def test_faults_of_the_command(words, said, capsys, tmp_path, monkeypatch):
    (tmp_path / "plan_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plan_models", raising=False)
    assert main(["plan", *words]) == 2
    out, err = capsys.readouterr()
    assert re.search(said, err)
    assert out == ""
