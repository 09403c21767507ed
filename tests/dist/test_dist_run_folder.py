"""What a run leaves behind: every file of the run folder, complete, and in agreement with the others."""

import json
import math
import platform
from importlib import metadata

import pytest
from jobs import ROOT, rows, summary
from safetensors.torch import load_file

import dfed
from dfed.checkpoint import params_sha256
from dfed.config import load_config
from dfed.models import build_chain

ROUND_FIELDS = {"kind", "round", "train_loss", "clients", "bytes", "sim_time_s", "energy_j", "time_s", "accuracy", "loss",
                "personalised_accuracy", "evaluation_s"}
CLIENT_FIELDS = {"kind", "round", "client", "tier", "rank", "status", "reason", "loss", "loss_rms", "num_steps", "num_visits",
                 "peak_bytes", "time_s", "num_samples", "plan", "budget_bytes", "predicted_bytes", "bytes_up", "bytes_down",
                 "bytes_header", "slowed", "sim_time_s", "energy_j"}
COUNTS = {"selected", "completed", "oom", "failed", "ineligible", "unavailable"}


@pytest.fixture(scope="module")
def folder(fedavg_on_three_ranks):
    return fedavg_on_three_ranks


@pytest.fixture(scope="module")
def clients(folder):
    return [row for row in rows(folder) if row["kind"] == "client"]


@pytest.fixture(scope="module")
def rounds(folder):
    return [row for row in rows(folder) if row["kind"] == "round"]


def test_nothing_is_missing_and_nothing_left_lying(folder):
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint", "config.yaml", "environment.json", "metrics.jsonl", "summary.json", "tensorboard"
    }
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_the_config_is_the_resolved_one(folder):
    smoke = ROOT / "configs" / "smoke" / "fedavg.yaml"
    config = load_config(folder / "config.yaml")
    assert config == load_config(smoke, ["rounds=3", "checkpoint.every=1", "metrics.tensorboard=true"])
    assert config.fingerprint() == load_config(smoke, ["rounds=99"]).fingerprint()
    text = (folder / "config.yaml").read_text()
    assert "weight_decay: 0.0" in text  # a default that the smoke config does not mention


def test_the_environment_says_what_it_ran_on(folder):
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["dfed"] == dfed.__version__
    assert environment["python"] == platform.python_version()
    assert environment["packages"]["torch"] == metadata.version("torch")
    assert environment["packages"].keys() >= {"torch", "torchvision", "numpy"}
    assert "git_commit" in environment
    if (ROOT / ".git").exists() and environment["git_commit"] is not None:
        commit = environment["git_commit"].removesuffix("-dirty")
        assert len(commit) == 40
        assert set(commit) <= set("0123456789abcdef")
    assert (environment["ranks"], environment["client_ranks"]) == (3, [1, 2])
    assert environment["backend"] == "gloo"
    assert environment["backend_reason"] == ("ranks share a GPU, which NCCL refuses" if environment["gpu"]
                                             else "ranks train on the CPU")
    assert environment["memory_enforce"] == "hard"
    assert environment["command"][1:3] == ["run", str(ROOT / "configs" / "smoke" / "fedavg.yaml")]
    assert environment["threads"] == 1


def test_one_line_a_client_and_one_a_round(folder, clients, rounds):
    assert [row["round"] for row in rounds] == [0, 1, 2]
    assert {frozenset(row) for row in rounds} == {frozenset(ROUND_FIELDS)}
    assert {frozenset(row) for row in clients} == {frozenset(CLIENT_FIELDS)}
    assert len({(row["round"], row["client"]) for row in clients}) == len(clients)
    for row in rounds:
        assert set(row["clients"]) == COUNTS
        assert set(row["bytes"]) == {"up", "down", "fabric", "by_block"}
        for direction in ("up", "down"):
            mine = [client for client in clients if client["round"] == row["round"] and client[f"bytes_{direction}"]]
            by_block = row["bytes"]["by_block"][direction]
            assert set(by_block) == (set(blocks_of(folder)) if mine else set())
            assert sum(sum(parts.values()) for parts in by_block.values()) == len(mine) * 4 * num_floats(folder)
        assert math.isfinite(row["loss"])
        assert 0 <= row["accuracy"] <= 1
        assert row["bytes"]["fabric"] > 0
    config = load_config(folder / "config.yaml")
    for row in clients:
        done = row["status"] == "completed"
        assert row["status"] in ("completed", "oom")
        assert row["reason"] == (None if done else "oom")
        assert row["tier"] == ("strong" if done else "weak")  # whose memory does not hold the full training
        assert (row["loss"] is not None) == (row["loss_rms"] is not None) == done
        assert not done or row["loss_rms"] >= row["loss"] * (1 - 1e-6)  # a root of a mean square; sums are of float32
        assert row["num_steps"] == (-(-row["num_samples"] // config.client.batch_size) if done else 0)
        assert row["num_visits"] == (row["num_samples"] if done else 0)
        assert (row["bytes_up"] > 0) == done
        assert row["bytes_down"] > row["bytes_header"] > 0
        assert row["rank"] in (1, 2)
        assert row["budget_bytes"] > 0
        assert row["peak_bytes"] is None or not done or row["peak_bytes"] <= row["budget_bytes"]
        assert row["energy_j"] > 0
        assert row["sim_time_s"] > 0
    # The bytes of the tensors are those of the model, in float32; what is left is headers.
    completed = next(row for row in clients if row["status"] == "completed")
    assert completed["bytes_up"] + completed["bytes_down"] - completed["bytes_header"] == 2 * 4 * num_floats(folder)


def chain_of(folder):
    config = load_config(folder / "config.yaml")
    shape, classes = tuple(config.dataset_options["shape"]), config.dataset_options["classes"]
    return build_chain(config.model.name, dict(config.model.options), input_shape=shape, num_classes=classes)


def num_floats(folder):
    """Entries of all tensors that travel."""
    return sum(value.numel() for value in chain_of(folder).state_dict().values() if value.is_floating_point())


def blocks_of(folder):
    """The blocks that hold any tensor."""
    chain = chain_of(folder)
    return [name for name in chain.unit_names if list(chain.unit(name).parameters())]


def test_the_rounds_agree_with_their_clients(clients, rounds):
    for row in rounds:
        mine = [client for client in clients if client["round"] == row["round"]]
        assert row["clients"]["selected"] == len(mine) == 4
        for status in ("completed", "oom", "failed"):
            assert row["clients"][status] == sum(client["status"] == status for client in mine)
        assert row["bytes"]["up"] == sum(client["bytes_up"] for client in mine)
        assert row["bytes"]["down"] == sum(client["bytes_down"] for client in mine)
        assert row["sim_time_s"] == max(client["sim_time_s"] for client in mine)
        # Sums of floats in the order of the lines: equal to the bit.
        assert row["energy_j"] == sum(client["energy_j"] for client in mine)
        visits = sum(client["num_visits"] for client in mine)
        losses = sum(client["loss"] * client["num_visits"] for client in mine if client["loss"] is not None)
        assert row["train_loss"] == losses / visits


def test_the_summary_agrees_with_the_lines(folder, clients, rounds):
    result = summary(folder)
    assert result.keys() >= {"strategy", "rounds", "accuracy", "loss", "params_sha256", "clients", "tiers", "bytes", "time_s",
                             "sim_time_s", "energy_j"}
    assert (result["strategy"], result["rounds"], result["seed"], result["finished"]) == ("fedavg", 3, 3, True)
    assert (result["accuracy"], result["loss"]) == (rounds[-1]["accuracy"], rounds[-1]["loss"])
    assert set(result["clients"]) == COUNTS
    for name in COUNTS:
        assert result["clients"][name] == sum(row["clients"][name] for row in rounds)
    assert result["clients"]["selected"] == len(clients) == 12
    assert result["clients"]["oom"] == result["reasons"]["oom"] > 0
    for name in ("up", "down", "fabric"):
        assert result["bytes"][name] == sum(row["bytes"][name] for row in rounds)
    for name in ("time_s", "sim_time_s", "energy_j"):
        assert result[name] == sum(row[name] for row in rounds)
    # What crossed: each round the model to two ranks, and two ranks' sums (float64) back; headers and reports besides.
    model_bytes = 4 * num_floats(folder)
    assert result["bytes"]["fabric"] > len(rounds) * 2 * (model_bytes + 2 * model_bytes)


def test_the_tiers_agree_with_their_clients(folder, clients):
    tiers = summary(folder)["tiers"]
    assert [(tier["name"], tier["clients"]) for tier in tiers] == [("strong", 5), ("weak", 3)]
    for tier in tiers:
        assert tier.keys() >= {"name", "clients", "completed", "oom", "budget_bytes", "peak_bytes", "accuracy"}
        mine = [row for row in clients if row["tier"] == tier["name"]]
        assert tier["selected"] == len(mine) > 0
        for status in ("completed", "oom", "failed"):
            assert tier[status] == sum(row["status"] == status for row in mine)
        assert tier["bytes_up"] == sum(row["bytes_up"] for row in mine)
        assert tier["bytes_down"] == sum(row["bytes_down"] for row in mine)
        assert {tier["budget_bytes"]} == {row["budget_bytes"] for row in mine}
        peaks = [row["peak_bytes"] for row in mine if row["status"] == "completed" and row["peak_bytes"] is not None]
        assert tier["peak_bytes"] == max(peaks, default=None)
        assert 0 <= tier["accuracy"] <= 1
    assert (tiers[1]["completed"], tiers[0]["oom"]) == (0, 0)
    # memory: 3.0 and 0.2 of the same peak; both are rounded to whole bytes.
    assert abs(tiers[0]["budget_bytes"] - 15 * tiers[1]["budget_bytes"]) <= 15


def test_the_newest_two_checkpoints_are_kept(folder):
    kept = sorted(path for path in (folder / "checkpoint").iterdir())
    assert [path.name for path in kept] == ["round_000002", "round_000003"]
    for path in kept:
        assert sorted(file.name for file in path.iterdir()) == ["state.json", "state.safetensors"]
    header = json.loads((kept[-1] / "state.json").read_text())
    assert header["round_index"] == 3
    assert header["fingerprint"] == load_config(folder / "config.yaml").fingerprint()
    tensors = load_file(kept[-1] / "state.safetensors")
    params = {name.removeprefix("params/"): value for name, value in tensors.items() if name.startswith("params/")}
    assert params_sha256(params) == summary(folder)["params_sha256"]
    assert header["totals"]["clients"] == summary(folder)["clients"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TensorBoard's own reader
def test_the_tensorboard_events_can_be_read(folder, rounds):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    assert tags >= {"train_loss", "accuracy", "loss", "clients/completed", "clients/oom", "bytes/up", "bytes/down",
                    "bytes/fabric", "sim_time_s", "energy_j", "time_s"}
    for tag, value in (("loss", lambda row: row["loss"]), ("bytes/up", lambda row: row["bytes"]["up"])):
        events = accumulator.Scalars(tag)
        assert [event.step for event in events] == [0, 1, 2]
        # TensorBoard keeps float32: half a unit in its last place, 2⁻²⁴ relative.
        assert [event.value for event in events] == pytest.approx([value(row) for row in rounds], rel=2**-24)
