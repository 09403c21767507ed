"""The config of ``dfed train``: all faults together, forms of budgets, what decides the bits; and the examples load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from central_problem import CPU, base

from dfed.central.config import load_train_config
from dfed.central.prepared import prepare
from dfed.central.settings import BudgetSettings, EpochSettings, SampleSettings, SaveSettings
from dfed.choices import DataSettings
from dfed.errors import ConfigError
from dfed.fleet import ComputeSettings, TierSettings
from dfed.metrics import EvaluationSettings
from dfed.registry import METHODS
from dfed.settings import Settings, settings_of
from dfed.yaml_io import dump_yaml

NAMES = "bp, flextrain, local, neuroflux"
ROOT = Path(__file__).resolve().parents[3]


def load(*overrides, **changes):
    return load_train_config(None, overrides, base=base(**changes))


def faults(*overrides, **changes):
    with pytest.raises(ConfigError) as caught:
        load(*overrides, **changes)
    return {fault.field: fault.message for fault in caught.value.faults}


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "train").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_loads_and_survives_a_round_trip(path, tmp_path):
    config = load_train_config(path)
    assert config.method.name == path.stem
    (tmp_path / "config.yaml").write_text(dump_yaml(config.to_dict()), encoding="utf-8")
    assert load_train_config(tmp_path / "config.yaml") == config


def test_every_setting_and_option_is_documented():
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:[a-z_]+\.)?([a-z_0-9]+)`", page))
    for model in (SampleSettings, BudgetSettings, EpochSettings, ComputeSettings, EvaluationSettings, SaveSettings):
        assert {*model.model_fields} - {*DataSettings.model_fields} <= named, model
    for name in METHODS:
        assert name in named
        assert set(settings_of(METHODS.get(name)).model_fields) <= named, name


def test_what_decides_the_bits():
    def same(*overrides):
        return load(*overrides).fingerprint() == load().fingerprint()

    for words in ("training.epochs=9", "memory=1GB", "device.watts=9.0", "metrics.every=2", "checkpoint.every=5", "data.root=x",
                  "memory={enforce: off}"):
        assert same(words), words
    for words in ("seed=6", "training.momentum=0.5", "method.beta=0.1", "data.train_samples=9", "backend.threads=2",
                  "fleet={clients: 1, tiers: [{name: a, share: 1.0}]}"):
        assert not same(words), words
    assert load().fingerprint("cuda") != load().fingerprint("cpu")
    fleet = "fleet={clients: 1, tiers: [{name: a, share: 1.0}]}"  # which devices fit what follows from it
    assert load(fleet).fingerprint() != load(fleet, "memory={enforce: predicted}").fingerprint()
    cosine = "training.schedule.name=cosine"
    assert load(cosine).fingerprint() != load(cosine, "training.epochs=9").fingerprint()


def test_a_resolved_config_is_complete_and_loads_again(tmp_path):
    fleet = {"clients": 2, "tiers": [{"name": "a", "share": 1.0}]}
    config = load("memory=64MB", "backend=gloo", metrics={"every": 2}, fleet=fleet)
    (tmp_path / "config.yaml").write_text(dump_yaml(config.to_dict()), encoding="utf-8")
    assert load_train_config(tmp_path / "config.yaml") == config
    assert config.memory.budget == 64_000_000
    assert config.memory.enforce == "hard"
    assert config.method.options == {"depths": 2, "cuts": None, "shares": None, "beta": 0.2}
    assert config.checkpoint.every == 1
    assert config.training.epochs == 3
    assert "steps" not in config.training.to_dict()
    assert list(config.to_dict())[:2] == ["seed", "method"]  # by which the folder is told from a run's
    assert load().fleet is None
    client = config.training.as_client()
    assert (client.epochs, client.momentum, client.batch_size) == (1, 0.9, 8)


def test_the_device_is_a_tiers():
    tier = TierSettings(name="t", count=1)
    assert ComputeSettings().model_dump() == {name: getattr(tier, name) for name in ComputeSettings.model_fields}
    assert isinstance(load("device.flops=20 GFLOPS").device, Settings)
    assert load("device.flops=20 GFLOPS").device.flops == 20e9


@pytest.mark.parametrize(("given", "budget", "enforce"), [
    (None, None, "hard"), ("300MB", 300_000_000, "hard"), (0.5, 0.5, "hard"), ("50%", 0.5, "hard"),
    ({"budget": "1 GiB", "enforce": "off"}, 2**30, "off"), ({"enforce": "predicted"}, None, "predicted"),
])
def test_forms_of_the_budget(given, budget, enforce):
    memory = load(memory=given).memory
    assert (memory.budget, memory.enforce) == (budget, enforce)


def test_all_faults_are_found_together():
    found = faults(
        "seed=-1", "rounds=3", "memory=2", "training.epochs=0", "training.steps=4", "training.momentum=2", "method.depths=0",
        "method.alpha=1", "data.train_samples=0", "data.partition=iid", "metrics.tensorboard=true", "metrics.split=validation",
        "checkpoint.keep=0", "backend.device=tpu", "device.up=3", "fleet.clients=0", "model.name=resnet9",
    )
    assert found["seed"] == "must be at least 0, but is -1."
    assert found["rounds"].startswith("is not a setting; known here: backend, checkpoint, data, device, fleet,")
    assert "that is bytes; for a share of the full model's peak write 0.5" in found["memory"]
    assert found["training.epochs"] == "must be at least 1, but is 0."
    assert found["training.steps"].startswith("is not a setting; known here: activation_checkpointing,")
    assert found["training.momentum"] == "must be less than 1, but is 2."
    assert found["method.depths"] == "must be at least 1, but is 0."
    assert found["method.alpha"] == "is not a setting; known here: beta, cuts, depths, shares."
    assert found["data.train_samples"] == "must be at least 1, but is 0."
    assert found["data.partition"].startswith("is not a setting; known here: ")
    assert found["metrics.split"].startswith("must be 'test' unless")
    assert found["fleet.clients"] == "must be at least 1, but is 0."
    assert "Did you mean 'resnet" in found["model.name"]
    assert {"metrics.tensorboard", "checkpoint.keep", "backend.device", "device.up"} <= found.keys()


def test_single_faults():
    assert faults("method=flxtrain")["method"] == f"must be one of {NAMES}, but is 'flxtrain'. Did you mean 'flextrain'?"
    assert faults("method=null") == {"method": f"must be one of {NAMES}, but is not given."}
    assert faults("method.shares=[0.5,-1]")["method.shares[1]"] == "must be at least 0, but is -1."
    assert faults("memory.enforce=soft", memory={})["memory.enforce"].startswith("must be one of hard, predicted, off")
    assert faults("training.nesterov=true", "training.momentum=0.0")["training"].startswith("must have a `momentum` above 0")
    assert faults("training.optimizer=adam")["training"].startswith("must leave out `momentum` with the optimiser 'adam'")
    assert faults("metrics.test_at_end=true")["metrics.test_at_end"].startswith("must be false where `metrics.split` is 'test'")
    assert faults("data=digits")["data"].startswith("must be a group of settings with a `dataset`")
    with pytest.raises(ConfigError, match=r"`strategy` belongs to a federation, which `dfed run` runs"):
        load_train_config(ROOT / "configs" / "quickstart.yaml")


@pytest.mark.parametrize(("overrides", "field", "text"), [
    (["method.shares=[1]"], "method.shares", "must be as many as this model has depths (2), but are 1."),
    (["method={name: bp, depth: 9, depths: 2}"], "method.depth", "must be at most 2, the number of depths of this model, but"),
    (["method={name: bp, cuts: [conv9]}"], "method.cuts", "must name units of 'cnn'"),
    (["data.train_samples=45"], "data.train_samples", "must be at most the number of training samples (44), but is 45."),
    (["model.channels=[1,1,1,1,1]"], "model", "must suit the images of data set 'synthetic'"),
    (["memory=0.001"], "memory.budget", "must be at least"),
])
def test_faults_that_show_with_the_model_and_the_data(overrides, field, text):
    with pytest.raises(ConfigError) as caught:
        prepare(load(*overrides), CPU)
    assert caught.value.faults[0].field == field
    assert caught.value.faults[0].message.startswith(text)
