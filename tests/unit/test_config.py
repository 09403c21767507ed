from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml

from dfed.config import Choice, Config, load_config
from dfed.fleet.settings import TierSettings
from dfed.registry import STRATEGIES
from dfed.settings import settings_of

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "train")  # which are for `dfed train`
SMALL = {
    "rounds": 2,
    "cohort": 4,
    "strategy": "fedavg",
    "model": {"name": "cnn", "channels": [8, 16]},
    "data": {"dataset": "synthetic", "samples": 240, "partition": {"name": "dirichlet", "alpha": 1.0}},
    "fleet": {"clients": 8, "tiers": [{"name": "strong", "count": 5, "memory": 3.0}, {"name": "weak", "count": 3}]},
    "client": {"momentum": 0.9},
}


def _load(*overrides):
    return load_config(None, overrides, base=SMALL)


@pytest.mark.parametrize("path", SHIPPED, ids=[str(path.relative_to(CONFIGS)) for path in SHIPPED])
def test_every_shipped_config_loads_and_survives_a_round_trip(path, tmp_path):
    config = load_config(path)
    assert isinstance(config, Config)
    written = config.to_dict()
    assert json.loads(json.dumps(written)) == written
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert again.to_dict() == written
    assert again.fingerprint() == config.fingerprint()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["client={optimizer: adamw, epsilon: 1e-6}"],
        ["client={optimizer: adam}"],
        ["client={nesterov: true, momentum: 0.5, steps: 3, clip_norm: 1}"],
        ["client.schedule={name: step, milestones: [1, 5], factor: 0.5}"],
        ["server.optimizer=yogi", "server.max_failed_fraction=1"],
        ["strategy=fedprox", "strategy.mu=1"],
        ["codecs={down: bf16, up: {name: top_k, density: 0.1, values: int8}, error_feedback: true}"],
        ["sampler=weighted", "exchange=per_client", "memory.enforce=off", "backend=gloo"],
        ["data.validation_fraction=0.1", "metrics.split=validation", "data.root=/tmp/x", "data.partition=iid"],
        ["fleet={clients: 6, tiers: [{name: a, share: 0.5, memory: 50%, up: 10 Mbps}, {name: b, share: 0.5, memory: 64MB}]}"],
        ["fleet={csv: fleet.csv}"],
        ["model=mlp", "data.partition={name: fixed, samples_per_client: 3}"],
        ["strategy=dfed.strategies.fedavg:FedAvg"],
    ],
)
def test_round_trips(overrides):
    config = _load(*overrides)
    again = load_config(None, base=yaml.safe_load(yaml.safe_dump(config.to_dict())))
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert again.fingerprint() == config.fingerprint()


def test_defaults_are_filled_in():
    config = _load()
    assert (config.seed, config.exchange) == (0, "fused")
    assert config.strategy == Choice("fedavg", {})
    assert config.model.options["channels"] == [8, 16]
    assert config.model.options["padding"] == "same"
    assert config.dataset_options["classes"] == 10
    assert config.sampler.name == "uniform"
    assert config.server_optimizer.to_dict() == {"name": "sgd", "learning_rate": 1.0}
    minimal = load_config(None, base={
        "rounds": 1, "cohort": 1, "model": "cnn", "data": {"dataset": "digits"},
        "fleet": {"clients": 1, "tiers": [{"name": "a", "count": 1}]},
    })
    assert minimal.strategy.name == "fedavg"
    assert minimal.partition.name == "iid"
    written = _load("client={}").to_dict()["client"]
    assert {"batch_size", "learning_rate", "schedule", "momentum",
            "augment"} <= set(written)  # a later default changes nothing
    assert not {"betas", "epsilon"} & set(written)  # of no use to SGD


def test_the_base_is_left_as_it_was():
    base = copy.deepcopy(SMALL)
    load_config(None, ["client.momentum=0.5", "fleet.tiers.0.count=5", "strategy.name=fedprox", "model.hidden=3"], base=base)
    assert base == SMALL


# What decides the trained bits, and what does not.
DECIDES = [
    "seed=1", "cohort=3", "strategy=fedprox", "strategy=exclusivefl", "strategy={name: fedprox, mu: 0.5}", "model=mlp",
    "model.hidden=7",
"data={dataset: digits}", "data.samples=100", "data.noise=0.5", "data.validation_fraction=0.1", "data.partition=iid",
    "data.partition.alpha=2.0", "fleet.tiers.0.memory=2.0", "fleet.tiers.1.dropout=0.5", "fleet.tiers.1.availability=0.5",
    "client.learning_rate=0.2", "client.momentum=0.5", "client.batch_size=16", "client.epochs=2", "client.steps=5",
    "client.augment=flip",
    "client.clip_norm=1.0", "client.weight_decay=1e-4", "client.drop_last=true", "client.schedule.name=exponential",
    "client.schedule.name=cosine", "server.optimizer=adam", "server.optimizer={name: sgd, learning_rate: 0.5}",
    "sampler=weighted",
    "memory.enforce=off", "backend.threads=2", "codecs.up=int8", "codecs.down=fp16",
    "codecs={up: int8, error_feedback: true}",
]
DOES_NOT = [
    "rounds=9", "exchange=per_client", "data.root=/x", "data.cache=/y", "data.download=true", "backend=gloo",
    "backend.device=cpu",
    "backend.timeout_s=5", "metrics.every=2", "metrics.batch_size=7", "metrics.tensorboard=false",
    "metrics.bytes_by_block=true", "codecs.error_feedback=false",
    "checkpoint.every=1",
    "checkpoint.keep=9",
    "server.max_failed_fraction=1.0",
    # What is the default, written out.
    "seed=0", "client.batch_size=32", "client.learning_rate=0.1", "client.nesterov=false", "client.schedule={name: constant}",
    "client.schedule={}", "server.optimizer={name: sgd}", "sampler={name: uniform}", "model.padding=same",
    "fleet.tiers.1.memory=", "data.classes=10", "strategy={name: fedavg}", "backend.threads=1", "client.epochs=",
]


def test_the_fingerprint_follows_what_decides_the_bits():
    plain = _load().fingerprint()
    prints = {override: _load(override).fingerprint() for override in DECIDES}
    assert [override for override, value in prints.items() if value == plain] == []
    assert len(set(prints.values())) == len(prints)
    assert [override for override in DOES_NOT if _load(override).fingerprint() != plain] == []
    reordered = dict(reversed(SMALL.items()))
    assert load_config(None, base=reordered).fingerprint() == plain


def test_what_evaluation_decides_counts_where_it_decides_something():
    for name in ("heterofl", "fjord"):  # the last model's norm statistics
        assert _load(f"strategy={name}").fingerprint() != _load(f"strategy={name}", "metrics.batch_size=7").fingerprint()
        assert _load(f"strategy={name}").fingerprint() == _load(f"strategy={name}", "metrics.every=7").fingerprint()
    tifl = ["sampler=tifl", "metrics.split=validation", "data.validation_fraction=0.1"]
    for other in ("metrics.every=7", "rounds=9"):
        assert _load(*tifl).fingerprint() != _load(*tifl, other).fingerprint()
    on_validation = tifl[1:]  # a strategy may go by what is said on validation data, and by nothing else
    for other in ("metrics.every=7", "metrics.batch_size=7"):  # losses depend on mini-batches in their last bits
        assert _load(*on_validation).fingerprint() != _load(*on_validation, other).fingerprint()
    assert _load(*on_validation).fingerprint() == _load(*on_validation, "rounds=9").fingerprint()


def test_settings_that_came_later_leave_older_checkpoints_valid():
    """Hashes of what version 0.1.0 had before `client.conv_parts` and `server.over_selection`."""
    config = _load()
    older = {name: dict(group) if isinstance(group, dict) else group for name, group in config.to_dict().items()}
    for group, name, other in (("client", "conv_parts", 2), ("server", "over_selection", 1.5)):
        assert older[group].pop(name) == 1
        assert _load(f"{group}.{name}={other}").fingerprint() != config.fingerprint()
    loaded = load_config(None, base=older)
    assert loaded == config
    quickstart = load_config(CONFIGS / "quickstart.yaml")
    assert quickstart.fingerprint() == "73a7046362e3251130815baeaef0ff660c8d1123c2a60712e36f7619040d84ad"


def test_a_checkpoint_belongs_to_a_kind_of_device():
    assert _load().fingerprint("cpu") == _load().fingerprint() != _load().fingerprint("cuda")


def test_the_number_of_rounds_counts_where_the_learning_rate_follows_it():
    cosine = ["client.schedule.name=cosine"]
    assert _load(*cosine).fingerprint() != _load(*cosine, "rounds=9").fingerprint()
    falling = ["client.schedule.name=exponential"]
    assert _load(*falling).fingerprint() == _load(*falling, "rounds=9").fingerprint()


def test_every_option_of_a_strategy_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
    rows, owners = {}, ""
    for line in page.partition("\n## strategy\n")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 5:
            owners = cells[0] or owners
            for name in STRATEGIES:
                if f"`{name}`" in owners:
                    rows.setdefault(name, set()).update(cell.strip("` ") for cell in cells[1].split(","))
    for name in STRATEGIES:
        assert rows.get(name, set()) == set(settings_of(STRATEGIES.get(name), ("problem",)).model_fields), name


def test_every_setting_of_a_group_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
    tables = {}
    for section in page.split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        first_cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
        for group in title.split(", "):
            tables[group] = {name.strip("` ").removeprefix(f"{group}.") for cell in first_cells for name in cell.split(",")}
    groups, of_synthetic = _load().to_dict(), {"shape", "classes", "samples", "test_samples", "noise"}
    for group in ("fleet", "client", "server", "memory", "backend", "metrics", "checkpoint", "data"):
        assert groups[group].keys() - tables[group] - {"schedule"} <= of_synthetic, group
    assert {"seed", "rounds", "cohort", "exchange"} <= tables["Top level"]
    assert set(TierSettings.model_fields) <= tables["fleet"]
