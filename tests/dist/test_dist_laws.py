"""Law 1: the same config and seed give the same bits, on any number of ranks and with either exchange."""

import random

import numpy as np
import pytest
import torch
from jobs import ROOT, TIMEOUT_S, Job, enter, in_child, rows, run_several, summary

SMOKE = ROOT / "configs" / "smoke"
FEDAVG = SMOKE / "fedavg.yaml"
PLAIN = [FEDAVG, "rounds=3"]
OTHERS = sorted(path for path in SMOKE.glob("*.yaml") if path != FEDAVG)
# The second stage is trained from the fourth round on, as two windows of two rounds have been measured by then.
ELASTIC = [SMOKE / "neulite.yaml", "rounds=4",
           "strategy={name: neulite, blocks: 2, order: elastic, window: 2, patience: 1, threshold: 10}"]
# The second round makes the validation loss of the first stage worse.
ROLLED_BACK = [SMOKE / "neulite.yaml", "rounds=2", "strategy={name: neulite, blocks: 2, order: elastic, rollback: 1}",
               "data.validation_fraction=0.2", "metrics.split=validation", "metrics.test_at_end=true"]
# What is measured besides is the same on any number of ranks, too, and changes nothing.
MEASURED = ["metrics.inertia=true", "metrics.inertia_reference=1", "metrics.effectiveness=true"]
VARIANTS = {
    "per_client": [*PLAIN, "exchange=per_client"],
    "predicted": [*PLAIN, "memory.enforce=predicted"],
    "feedback": [*PLAIN, "sampler=oort", "codecs={up: {name: top_k, density: 0.05, values: int8}, error_feedback: true}"],
    "feedback_per_client": [*PLAIN, "sampler=oort", "exchange=per_client",
                            "codecs={up: {name: top_k, density: 0.05, values: int8}, error_feedback: true}"],
    "coded": [*PLAIN, "codecs.up={name: qsgd, bits: 4}", "codecs.down=int8"],
    "coded_per_client": [*PLAIN, "codecs.up={name: qsgd, bits: 4}", "codecs.down=int8", "exchange=per_client"],
    "yogi_weighted": [*PLAIN, "server.optimizer=yogi", "sampler=weighted",
                      "fleet.tiers.0.dropout=0.4", "fleet.tiers.0.availability=0.6", "fleet.tiers.1.availability=0.6"],
    "adam_cosine_validation": [*PLAIN, "client={optimizer: adam, learning_rate: 0.01, batch_size: 16, epochs: 2, "
                               "clip_norm: 1.0, schedule: {name: cosine}}", "model.dropout=[0.2,0.5]",
                               "server.optimizer=momentum", "data.validation_fraction=0.2",
                               "sampler={name: tifl, tiers: 2, interval: 2}", "metrics.split=validation",
                               "metrics.every=2", *MEASURED],
    # What oneDNN maps for this model's kernels is more than a budget leaves beside the tensors, and every rank meets them anew.
    "kernels": [FEDAVG, "rounds=1", "cohort=2", "strategy=exclusivefl", "model={name: densenet40}",
                "data={dataset: synthetic, shape: [3, 32, 32], samples: 24, test_samples: 2}",
                "fleet={clients: 2, tiers: [{name: exact, count: 2, memory: 1.0}]}",
                "client={batch_size: 4, learning_rate: 0.01, epochs: null, steps: 2}"],
    # Parts of tensors, and what clients remember, with each client's update by itself.
    **{f"{name}_per_client": [SMOKE / f"{name}.yaml", "exchange=per_client", *MEASURED] for name in ("feddropout", "depthfl")},
    # Masks that clients make of the gradients that they remember; and what goes down sparse.
    "lips": [*PLAIN, "wrap={lips: {period: 1, rounds: 9, norms: local}}"],
    "lips_shared": [SMOKE / "scaffold.yaml", "wrap={lips: {period: 1, masks: shared}}", "exchange=per_client"],
    "neulite_elastic": ELASTIC, "neulite_rolled_back": ROLLED_BACK,
    **{path.stem: [path] for path in OTHERS},
}

# What may differ between numbers of ranks: where a client was played, how long it took and what that machine measured.
ROUND_ONLY = {"time_s", "evaluation_s"}
CLIENT_ONLY = {"rank", "time_s", "peak_bytes"}


def comparable(folder):
    """The lines of a run's metrics, without what may differ."""
    kept = []
    for row in rows(folder):
        left_out = ROUND_ONLY if row["kind"] == "round" else CLIENT_ONLY
        row = {name: value for name, value in row.items() if name not in left_out}
        if row["kind"] == "round":
            row["bytes"] = {name: row["bytes"][name] for name in ("up", "down", "by_block")}
        kept.append(row)
    return kept


def result(folder):
    """A run's summary, without what may differ."""
    kept = {name: value for name, value in summary(folder).items() if name != "time_s"}
    kept["bytes"] = {name: kept["bytes"][name] for name in ("up", "down")}
    kept["tiers"] = [{name: value for name, value in tier.items() if name != "peak_bytes"} for tier in kept["tiers"]]
    return kept


def assert_same(folder, other):
    assert result(folder) == result(other)
    assert comparable(folder) == comparable(other)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Each variant on one rank; ``"fedavg"`` is the plain config."""
    folder = tmp_path_factory.mktemp("one_rank")
    no_feedback = [*PLAIN, "sampler=oort", "codecs.up={name: top_k, density: 0.05, values: int8}"]
    runs = {"fedavg": PLAIN, "seed": [FEDAVG, "seed=4"], "no_feedback": no_feedback, **VARIANTS}
    run_several([[*arguments, "--out", folder / name] for name, arguments in runs.items()], folder, ranks=1)
    return folder


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory):
    """Each variant on three ranks."""
    folder = tmp_path_factory.mktemp("three_ranks")
    run_several([[*arguments, "--out", folder / name] for name, arguments in VARIANTS.items()], folder, ranks=3)
    return folder


def test_the_reference_shows_what_it_should(reference):
    """It trains, someone runs out of memory, and the server's options take effect: else equality would prove little."""
    fedavg = summary(reference / "fedavg")
    assert fedavg["clients"]["completed"] > 0
    assert fedavg["clients"]["oom"] > 0
    assert fedavg["params_sha256"] == summary(reference / "per_client")["params_sha256"]
    for name in VARIANTS:
        same = name in ("per_client", "predicted")
        assert (summary(reference / name)["params_sha256"] == fedavg["params_sha256"]) == same, name
    assert summary(reference / "feedback")["params_sha256"] != summary(reference / "no_feedback")["params_sha256"]
    assert summary(reference / "kernels")["clients"]["completed"] == 2  # all fit, also the first of a rank
    assert summary(reference / "yogi_weighted")["reasons"].keys() >= {"dropout"}
    assert summary(reference / "yogi_weighted")["clients"]["unavailable"] > 0
    oort, tifl = summary(reference / "feedback"), summary(reference / "adam_cosine_validation")
    assert (oort["clients"]["selected"], oort["reasons"]["late"]) == (3 * 5, 3)  # 1.1 × 4, rounded up, are drawn
    assert tifl["clients"]["selected"] == 3 * 4


def test_the_planner_and_the_kernel_agree(reference):
    """Away from the grey zone a client fails by prediction where it fails for real, and the model is the same."""
    hard, predicted = (summary(reference / name) for name in ("fedavg", "predicted"))
    assert predicted["params_sha256"] == hard["params_sha256"]
    assert predicted["clients"] == hard["clients"]
    assert hard["reasons"] == {"oom": hard["clients"]["oom"]}
    assert predicted["reasons"] == {"predicted": predicted["clients"]["oom"]}
    refused = [row for row in rows(reference / "predicted") if row["kind"] == "client" and row["status"] == "oom"]
    assert all(row["predicted_bytes"] > row["budget_bytes"] and row["rank"] is None and row["bytes_up"] == 0
               and row["bytes_down"] > 0 for row in refused)
    ran = [row for row in rows(reference / "fedavg") if row["kind"] == "client" and row["status"] == "completed"]
    assert all(row["predicted_bytes"] < row["budget_bytes"] for row in ran)


def test_no_plan_is_tried_twice_on_a_budget_that_was_too_small(reference):
    for name in ("fedavg", "per_client", "predicted"):
        clients = [row for row in rows(reference / name) if row["kind"] == "client"]
        failed = {(row["budget_bytes"], row["round"]) for row in clients if row["status"] == "oom"}
        assert failed
        for budget, first in failed:
            # All clients train the same plan here, so after that round nobody with this budget is asked again.
            assert not [row for row in clients if row["budget_bytes"] == budget and row["round"] > first]
        assert summary(reference / name)["clients"]["ineligible"] > 0


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_command_line_gives_the_same_bits(reference, tmp_path, fedavg_on_three_ranks, ranks):
    if ranks == 3:
        folder = fedavg_on_three_ranks  # with checkpoints and TensorBoard besides
    else:
        folder = tmp_path / "run"
        with Job(["run", *PLAIN, "--out", folder], ranks=ranks, log=tmp_path / "log") as job:
            assert job.wait() == 0, job.output
            job.assert_gone()
    assert_same(folder, reference / "fedavg")
    played = {row["rank"] for row in rows(folder) if row["kind"] == "client"}
    assert played == ({0} if ranks == 1 else set(range(1, ranks)))
    fabric = summary(folder)["bytes"]["fabric"]
    assert (fabric == 0) == (ranks == 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_three_ranks_give_the_same_bits(reference, three_ranks, name):
    assert_same(three_ranks / name, reference / name)


@pytest.mark.parametrize("name", ["depthfl", "fedepth", "inclusivefl", "progfed"])
def test_methods_on_depth_stay_within_the_memory_that_they_planned_for(reference, name):
    clients = [row for row in rows(reference / name) if row["kind"] == "client"]
    assert {row["status"] for row in clients} == {"completed"}
    assert all(row["peak_bytes"] <= row["budget_bytes"] and row["predicted_bytes"] < row["budget_bytes"] for row in clients)
    most = {tier: max(row["predicted_bytes"] for row in clients if row["tier"] == tier) for tier in ("strong", "weak")}
    full = next(row["budget_bytes"] for row in clients if row["tier"] == "strong") / 3  # what full training needs
    assert most["weak"] < most["strong"] < 2 * full
    steps = {tier: {row["num_steps"] / -(-row["num_samples"] // 16) for row in clients if row["tier"] == tier} for tier in most}
    assert steps["strong"] == {1}
    assert (steps["weak"] == {1}) == (name != "fedepth")  # several parts, an epoch each


def test_what_methods_remember_survives_a_resumption(reference, tmp_path):
    runs = []
    for name, done in (("depthfl", 1), ("progfed", 2), ("neulite_elastic", 3), ("neulite_rolled_back", 1), ("scaffold", 1),
                       ("lips", 2), ("neuroflux", 3)):
        folder = tmp_path / name
        runs += [[*VARIANTS[name], f"rounds={done}", "--out", folder], ["--resume", folder, f"rounds={done + 1}"]]
    # After the last round of what was asked for there is an evaluation beyond those that are due: it leaves no trace.
    folder = tmp_path / "heterofl"
    runs += [[*VARIANTS["heterofl"], "rounds=1", "metrics.every=2", "--out", folder], ["--resume", folder, "rounds=2"]]
    run_several(runs, tmp_path, ranks=1)
    for name in ("depthfl", "progfed", "neulite_elastic", "neulite_rolled_back", "scaffold", "lips", "neuroflux", "heterofl"):
        assert summary(tmp_path / name)["params_sha256"] == summary(reference / name)["params_sha256"]
        assert comparable(tmp_path / name) == comparable(reference / name)


def test_features_that_clients_keep_are_made_once_and_used_again(reference, three_ranks):
    down = {}
    for row in rows(reference / "neuroflux"):
        if row["kind"] == "client" and row["round"] >= 2:
            down.setdefault(row["client"], []).append(row["bytes_down"])
    assert any(len(turns) == 2 for turns in down.values())
    assert {turns[0] for turns in down.values()} == {max(map(max, down.values()))}
    assert all(turns[1] < turns[0] for turns in down.values() if len(turns) == 2)
    kept, others = (sorted((folder / "neuroflux" / "clients").rglob("*.features")) for folder in (reference, three_ranks))
    assert {int(path.parent.name) for path in kept} == set(down)
    assert [path.read_bytes() for path in kept] == [path.read_bytes() for path in others]


def test_parts_of_tensors_give_the_same_bits_fused_or_per_client(reference):
    for name in ("feddropout", "depthfl"):
        fused, per_client = (summary(reference / each) for each in (name, f"{name}_per_client"))
        assert fused["params_sha256"] == per_client["params_sha256"]
        assert fused["bytes"]["up"] == per_client["bytes"]["up"]


def test_a_stage_that_nobody_has_trained_is_not_evaluated(reference):
    noted = [row["strategy"]["stage"] for row in rows(reference / "neulite_elastic") if row["kind"] == "round"]
    assert noted == [1, 1, 1, 2]
    assert [row["strategy"]["stage"] for row in rows(reference / "neulite") if row["kind"] == "round"] == [1, 2]
    for name, number in (("neulite_elastic", 4), ("neulite", 2)):
        senders = [row["round"] for row in rows(reference / name) if row["kind"] == "client" and row["status"] == "completed"]
        assert set(senders) == set(range(number))


def test_a_stage_that_makes_things_worse_goes_back(reference):
    first, second = (row for row in rows(reference / "neulite_rolled_back") if row["kind"] == "round")
    assert second["strategy"]["left"] == {"stage": 1, "why": "rolled back", "to_round": 1}
    assert second["loss"] == first["loss"] == summary(reference / "neulite_rolled_back")["loss"]  # of the model that came back
    assert summary(reference / "neulite_rolled_back")["test"]["accuracy"] is not None


def test_codecs_give_the_same_bits_fused_or_per_client(reference):
    fused, per_client = (summary(reference / name) for name in ("coded", "coded_per_client"))
    assert fused["params_sha256"] == per_client["params_sha256"] != summary(reference / "fedavg")["params_sha256"]
    assert fused["bytes"]["up"] == per_client["bytes"]["up"]
    plain = summary(reference / "fedavg")["bytes"]
    # Half a byte an entry up and one down, of four; steps, biases and headers on top.
    assert 0.125 < fused["bytes"]["up"] / plain["up"] < 0.16
    assert 0.25 < fused["bytes"]["down"] / plain["down"] < 0.28


def test_error_feedback_is_remembered(reference):
    fused, per_client = (summary(reference / name) for name in ("feedback", "feedback_per_client"))
    assert fused["params_sha256"] == per_client["params_sha256"]
    kept = sorted((reference / "feedback" / "clients").rglob("*.safetensors"))
    others = sorted((reference / "feedback_per_client" / "clients").rglob("*.safetensors"))
    assert [path.read_bytes() for path in kept] == [path.read_bytes() for path in others]
    completed = {row["client"]: row["round"] for row in rows(reference / "feedback") if row.get("status") == "completed"}
    assert {int(path.parent.name): int(path.stem) for path in kept} == completed  # the newest of each, those before are gone
    assert not (reference / "coded" / "clients").exists()


def test_the_seed_decides(reference):
    other, fedavg = summary(reference / "seed"), summary(reference / "fedavg")
    assert other["params_sha256"] != fedavg["params_sha256"]
    assert (other["seed"], fedavg["seed"]) == (4, 3)


def _states():
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def _run_between_states(log, out):
    from dfed.cli import main

    enter(log)
    random.seed(11)
    np.random.seed(12)
    torch.manual_seed(13)
    before = _states()
    assert main(["run", *map(str, PLAIN), "--out", out]) == 0
    assert main(["run", str(FEDAVG), "model.dropout=[0.5,0.5]", "sampler=weighted", "--out", f"{out}_dropout"]) == 0
    after = _states()
    assert [b == a for b, a in zip(before, after, strict=True)] == [True] * 3, "a run moved a global generator"
    random.random(), np.random.random(), torch.rand(1)
    assert [b == a for b, a in zip(before, _states(), strict=True)] == [False] * 3, "the comparison sees no change"


def test_the_global_generators_are_neither_moved_nor_used(reference, tmp_path):
    process = in_child(_run_between_states, str(tmp_path / "log"), str(tmp_path / "run"))
    process.join(TIMEOUT_S)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert_same(tmp_path / "run", reference / "fedavg")  # whose generators stood elsewhere
