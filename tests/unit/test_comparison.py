"""What a comparison is: its group in a config, the configs of its runs, and how far they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from compare_problem import BASE, load, write_run

from dfed.compare_settings import CompareSettings, check_compare
from dfed.comparison import check_folder, load_comparison, progress_of
from dfed.config import load_config
from dfed.errors import ConfigError
from dfed.yaml_io import read_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = [path for path in sorted(CONFIGS.rglob("*.yaml")) if "compare" in read_yaml(path)]


def faults_of(tmp_path, *overrides, **changes):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides, **changes)
    return [str(fault) for fault in caught.value.faults]


@pytest.mark.parametrize("path", SHIPPED, ids=[str(path.relative_to(CONFIGS)) for path in SHIPPED])
def test_every_shipped_comparison_loads(path):
    comparison = load_comparison(path)
    assert len(comparison.runs) == len(comparison.labels) * len(comparison.seeds) > 1
    if "quick" in read_yaml(path)["compare"]:
        assert len(load_comparison(path, quick=True).runs) <= len(comparison.runs)


def test_a_shipped_comparison_is_found():
    assert CONFIGS / "compare" / "fashion_mnist.yaml" in SHIPPED


def test_what_neulite_claims_is_part_of_the_comparison():
    """The same settings, word for word, so that the same runs serve both; the ablation's NeuLite is the claim's."""
    runs = {name: {run.name: run.config for run in load_comparison(CONFIGS / name).runs}
            for name in ("compare/fashion_mnist.yaml", "claims/neulite.yaml", "claims/neulite_ablation.yaml")}
    whole, claim, ablation = runs.values()
    assert claim.items() <= whole.items()
    assert ablation["neulite-s0"] == claim["neulite-s0"]
    assert all(replace(config, strategy=claim["neulite-s0"].strategy, seed=0) == claim["neulite-s0"]
               for config in ablation.values())


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


def test_a_choice_is_set_as_a_whole_and_its_group_stays(tmp_path):
    settings = {"client.schedule": {"name": "cosine"}, "server.optimizer": {"name": "adam", "learning_rate": 0.5},
                "model": {"name": "mlp", "hidden": [8]}, "codecs.up": "fp16", "client.momentum": 0.25}
    comparison = load(tmp_path, "client.batch_size=7", "server.max_failed_fraction=0.25",
                      compare={"strategies": [{"name": "fedavg", "settings": settings}]})
    config = comparison.runs[0].config
    assert (config.client.batch_size, config.client.momentum, config.client.schedule.name) == (7, 0.25, "cosine")
    assert (config.server.max_failed_fraction, config.server_optimizer.name) == (0.25, "adam")
    assert config.model.options["hidden"] == [8]


def test_the_defaults(tmp_path):
    comparison = load(tmp_path)
    assert (comparison.seeds, comparison.target_accuracy, comparison.reference) == ((5, 6), None, "fedavg")
    assert (comparison.target_share, comparison.quick) == (0.95, None)
    assert load(tmp_path, "compare.target_share=1.5").target_share == 1.5
    assert load(tmp_path, "compare.target_share=null", "compare.target_accuracy=0.5").target_accuracy == 0.5
    assert load(tmp_path, compare={"strategies": ["fedavg"]}).seeds == (5, 6, 7)
    assert check_compare({}, []) == CompareSettings()
    assert load(tmp_path, seeds=1, strategies=["exclusivefl", "fedprox"]).labels == ("exclusivefl", "fedprox")
    assert load(tmp_path, seeds=(4, 9), strategies=["fedprox"]).seeds == (4, 9)
    twice = [{"name": "fedprox", "label": "a"}, {"name": "fedprox", "label": "b"}]
    chosen = load(tmp_path, compare={"strategies": [*twice, "fedavg"], "reference": "fedavg"}, strategies=["fedprox"])
    assert (chosen.labels, chosen.reference) == (("a", "b"), "a")


QUICK = {
    "strategies": ["fedavg", {"name": "fedprox", "mu": 0.5, "label": "prox",
                              "settings": {"rounds": 9, "client.momentum": 0.5}}],
    "seeds": 3,
    "quick": {"settings": {"rounds": 2, "client.batch_size": 8, "data.samples": 24, "fleet.tiers.1.count": 2},
              "entries": {"prox": {"mu": 0.25}}},
}


def test_the_short_form(tmp_path):
    whole, short = load(tmp_path, compare=QUICK), load(tmp_path, compare=QUICK, quick=True)
    assert (whole.quick, whole.seeds, whole.runs[1].config.rounds) == (None, (5, 6, 7), 9)
    assert whole.runs[1].config.strategy.options["mu"] == 0.5
    assert (short.seeds, short.labels, short.reference) == ((5,), ("fedavg", "prox"), "fedavg")
    assert (short.quick.settings, short.quick.entries) == (QUICK["quick"]["settings"], {"prox": {"mu": 0.25}})
    plain, prox = (run.config for run in short.runs)
    for config in (plain, prox):
        assert (config.rounds, config.client.batch_size, config.dataset_options["samples"]) == (2, 8, 24)
    assert (prox.strategy.options["mu"], prox.client.momentum, plain.client.momentum) == (0.25, 0.5, 0)
    assert plain == load(tmp_path, "rounds=2", "client.batch_size=8", "data.samples=24").runs[0].config  # and nothing else
    # What the command line says stays; entries that it adds have their defaults.
    own = load(tmp_path, "rounds=7", "data.samples=32", compare=QUICK, quick=True, seeds=2, strategies=["prox", "exclusivefl"])
    assert (own.seeds, own.labels) == ((5, 6), ("prox", "exclusivefl"))
    assert own.quick.settings == {"client.batch_size": 8, "fleet.tiers.1.count": 2}
    assert [run.config.rounds for run in own.runs[:2]] == [7, 7]  # an entry's own rounds would make it a long form
    assert {run.config.dataset_options["samples"] for run in own.runs} == {32}
    bare = load(tmp_path, compare={"strategies": ["fedavg"], "quick": {}}, quick=True)
    assert (bare.seeds, bare.quick.settings, bare.runs[0].config) == ((5,), {}, load(tmp_path).runs[0].config)


def test_faults_of_the_short_form(tmp_path):
    assert faults_of(tmp_path, quick=True) == ["`compare.quick` must be given for --quick, but is not."]
    quick = {"settings": {"rounds": 0, "clint.epochs": 1, "client.batch_size.x": 1, "fleet.tiers[3].count": 1},
             "entries": {"prox": {"mu": -1, "mew": 1}}}
    found = faults_of(tmp_path, compare={**QUICK, "quick": quick}, quick=True)
    assert [text.split(" ")[0] for text in found] == [*["`compare.quick.settings`"] * 4, "`compare.quick.entries.prox.mu`",
                                                      "`compare.quick.entries.prox.mew`"]
    assert found[0] == ("`compare.quick.settings` must fit the rest of the config, but with them `fleet.tiers[3].count` must "
                        "name one of the 2 entries (0 to 1) of `fleet.tiers`, but names '3'.")
    assert "but with them `rounds` must be at least 1, but is 0." in " ".join(found)
    assert found[4] == "`compare.quick.entries.prox.mu` must be at least 0, but is -1."
    load(tmp_path, compare={**QUICK, "quick": quick})  # without --quick it counts for nothing
    last = 2**63 - 1
    two = {"strategies": ["fedavg"], "seeds": 1, "quick": {"seeds": 2}}
    assert faults_of(tmp_path, seed=last, compare=two, quick=True) == [
        f"`compare.quick.seeds` must be at most 1, as seeds start at `seed` ({last}), but is 2."]


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
    ({"strategy": []}, "`compare.strategy` is not a setting; known here: quick, reference, seeds, strategies, target_accuracy, "
                       "target_share."),
    ({"strategies": "fedavg"}, "`compare.strategies` must be a list of names and groups with a `name`, but is 'fedavg'."),
    ({"strategies": [3]}, "`compare.strategies` must be a list of names and groups with a `name`, but is [3]."),
    ({"strategies": [{"mu": 1}]}, "`compare.strategies[0].name` must name a strategy, but is null."),
    ({"strategies": [{"name": "fedavg", "label": "a/b"}]}, "`compare.strategies[0].label` must be at most 64 of the char"),
    ({"strategies": [{"name": "fedavg", "label": 3}]}, "`compare.strategies[0].label` must be text, but is 3."),
    ({"strategies": ["fedavg", {"name": "fedprox", "label": "FedAvg"}]},
     "`compare.strategies[1].label` must differ from that of compare.strategies[0], but is 'FedAvg' too; give a `label`."),
    ({"strategies": [{"name": "fedavg", "settings": {"seed": 3}}]}, "which are the same for all, but sets 'seed'."),
    ({"strategies": [{"name": "fedavg", "settings": {"fleet[tiers]": 3}}]}, "`compare.strategies[0].settings` must leave"),
    ({"strategies": [{"name": "fedavg", "settings": {"client": {"learning_rate": 0.1}}}]},
     "`compare.strategies[0].settings` must have the form key.sub: value, but sets the whole group 'client'."),
    ({"strategies": [{"name": "fedavg", "settings": {"backend": "gloo"}}]}, "but sets the whole group 'backend'."),
    ({"strategies": [{"name": "fedavg", "settings": {"model.hidden[0]": 8, "rounds": 2, "model": "mlp"}}]},
     "settings` must set nothing twice, but has both 'model' and 'model.hidden[0]', which is part of it."),
    ({"strategies": [{"name": "fedavg", "settings": {"model.hidden.0": 8, "model.hidden[0]": 9}}]},
     "settings` must set nothing twice, but has both 'model.hidden.0' and 'model.hidden[0]', which is part of it."),
    ({"strategies": [{"name": "fedavg", "settings": [1]}]}, "`compare.strategies[0].settings` must be a group of settings"),
    ({"strategies": ["fedavg"], "seeds": 0}, "`compare.seeds` must be a number of seeds of at least 1 and at most 1000"),
    ({"strategies": ["fedavg"], "seeds": [1, 1]}, "seeds of at least 0 and at most 9223372036854775807, but is [1, 1]."),
    ({"strategies": ["fedavg"], "seeds": True}, "but is true."),
    ({"strategies": ["fedavg"], "seeds": 1001}, "but is 1001."),
    ({"strategies": ["fedavg"], "seeds": [0, 2**63]}, "but is [0, 9223372036854775808]."),
    ({"strategies": ["fedavg"], "seeds": list(range(1001))}, "but is [0, 1, 2"),
    ({"strategies": ["fedavg"], "target_accuracy": 50}, "`compare.target_accuracy` must be a number greater than 0 and"),
    ({"target_share": 1.6}, "`compare.target_share` must be a number greater than 0 and at most 1.5, or null, but is 1.6."),
    ({"target_share": True}, "or null, but is true."), ({"target_share": 0}, "or null, but is 0."),
    ({"target_share": 0.9, "target_accuracy": 0.5},
     "`compare.target_share` must be left out, or null, where `compare.target_accuracy` is given, but is 0.9."),
    ({"quick": 3}, "`compare.quick` must be a group of settings, but is 3."),
    ({"quick": {"rounds": 3}}, "`compare.quick.rounds` is not a setting; known here: entries, seeds, settings."),
    ({"quick": {"seeds": 0}}, "`compare.quick.seeds` must be a number of seeds of at least 1 and at most 1000, or a list"),
    ({"quick": {"settings": 3}}, "`compare.quick.settings` must be a group of settings key.sub: value, but is 3."),
    ({"quick": {"settings": {"seed": 3}}},
     "`compare.quick.settings` must leave compare, seed, strategy alone, but sets 'seed'."),
    ({"quick": {"settings": {"strategy.mu": 3}}}, "must leave compare, seed, strategy alone, but sets 'strategy.mu'."),
    ({"quick": {"settings": {"data": {"dataset": "digits"}}}},
     "`compare.quick.settings` must have the form key.sub: value, but sets the whole group 'data'."),
    ({"quick": {"settings": {"fleet": {}}}}, "but sets the whole group 'fleet'."),
    ({"quick": {"settings": {"fleet.tiers": [], "fleet.tiers[0].count": 3}}},
     "must set nothing twice, but has both 'fleet.tiers' and 'fleet.tiers[0].count', which is part of it."),
    ({"quick": {"entries": [1]}}, "`compare.quick.entries` must be a group of labels, each with options, but is [1]."),
    ({"quick": {"entries": {"fedavg": {}}}}, "`compare.quick.entries` must name no label, as no strategies are given, but"),
    ({"strategies": ["fedavg"], "quick": {"entries": {"fedprox": {"mu": 1}}}},
     "`compare.quick.entries` must name one of the labels fedavg, but names 'fedprox'."),
    ({"strategies": ["fedavg"], "quick": {"entries": {"fedavg": 3}}},
     "`compare.quick.entries.fedavg` must be a group of the strategy's options, but is 3."),
    ({"strategies": ["fedavg"], "quick": {"entries": {"fedavg": {"name": "fedprox"}}}},
     "`compare.quick.entries.fedavg` must have options of the strategy only, but has 'name'."),
    ({"strategies": ["fedavg"], "reference": "x"}, "`compare.reference` must be one of the labels fedavg, but is 'x'."),
    ({"reference": "x"}, "`compare.reference` must be left out where no strategies are given, but is 'x'."),
])
def test_a_wrong_group_is_refused_by_every_command(compare, message, tmp_path):
    (fault,) = faults_of(tmp_path, compare=compare)
    assert message in fault
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert str(caught.value.faults[0]) == fault


def test_no_entry_of_the_command_line_is_dropped(tmp_path):
    first, *_ = faults_of(tmp_path, strategies=["m1:FedAvg", "fedprox", "m2:FedAvg"])
    assert first == ("`--strategies` must give different labels, but 'm1:FedAvg' and 'm2:FedAvg' are both 'FedAvg'; list them "
                     "in the config, with a `label` each.")
    (fault,) = faults_of(tmp_path, strategies=["fedavg", "dfed.strategies.fedavg:FedAvg"])  # as folders, they are the same
    assert fault.startswith("`--strategies` must give different labels, but 'fedavg' and 'dfed.strategies.fedavg:FedAvg' are")
    found = faults_of(tmp_path, strategies=["own:a/b"])
    assert found[0].startswith("`--strategies` must give labels of at most 64 of the characters")
    assert found[0].endswith(", but gives 'a/b'.")


def test_every_seed_is_one_that_a_run_takes(tmp_path):
    last = 2**63 - 1
    assert load(tmp_path, seeds=2, seed=last - 1).seeds == (last - 1, last)
    load_config(None, base={**BASE, "seed": last})
    assert faults_of(tmp_path, seed=last - 1, compare={"strategies": ["fedavg"], "seeds": 3}) == [
        f"`compare.seeds` must be at most 2, as seeds start at `seed` ({last - 1}), but is 3."]
    assert faults_of(tmp_path, seed=last, seeds=2) == [
        f"`--seeds` must be at most 1, as seeds start at `seed` ({last}), but is 2."]
    assert [text.split(" ")[0] for text in faults_of(tmp_path, seed=2**63)] == ["`seed`"]


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


SWEPT = {"strategies": ["fedavg", {"name": "fedprox", "mu": 0.5, "settings": {"client.learning_rate": 0.25}}], "seeds": [3],
         "reference": "fedprox", "quick": {"settings": {"client.learning_rate": 0.5, "rounds": 1},
                                           "entries": {"fedprox": {"mu": 0.75}}}}


def test_a_sweep_makes_an_entry_of_each_value(tmp_path):
    comparison = load(tmp_path, "client.learning_rate=0.1,1e-3", "model.hidden=[8],[4, 4]", "rounds=2", compare=SWEPT)
    rates, hidden = (0.1, 0.001), ([8], [4, 4])
    names = {f"{name}-learning_rate{rate}-hidden{text}": (name, rate, sizes)
             for name in ("fedavg", "fedprox") for rate in rates for sizes, text in zip(hidden, ("8", "4_4"), strict=True)}
    assert comparison.labels == tuple(names)
    assert comparison.reference == "fedprox-learning_rate0.1-hidden8"
    for run in comparison.runs:
        name, rate, sizes = names[run.label]
        config = run.config
        assert (config.strategy.name, config.client.learning_rate, config.model.options["hidden"]) == (name, rate, sizes)
        assert (config.rounds, config.seed) == (2, 3)
    mus = load(tmp_path, "strategy.mu=0.1,0.2", compare=SWEPT, strategies=["fedprox"])
    found = {run.label: run.config.strategy.options["mu"] for run in mus.runs}
    assert found == {"fedprox-mu0.1": 0.1, "fedprox-mu0.2": 0.2}
    assert load(tmp_path, "model.hidden=[8, 4]", compare=SWEPT).labels == ("fedavg", "fedprox")
    both = load(tmp_path, "client.learning_rate=0.1,0.2", "server.optimizer.learning_rate=1.0,0.5",
                "server.optimizer={name: sgd}", compare=SWEPT)
    assert both.labels[0] == "fedavg-client.learning_rate0.1-optimizer.learning_rate1.0"
    quick = load(tmp_path, "client.learning_rate=0.1,0.2", compare=SWEPT, quick=True)
    assert [(run.config.client.learning_rate, run.config.rounds) for run in quick.runs] == [(0.1, 1), (0.2, 1)] * 2
    assert [run.config.strategy.options.get("mu") for run in quick.runs] == [None, None, 0.75, 0.75]
    wraps = load(tmp_path, "data.partition={name: dirichlet, alpha: 0.1},iid", compare=SWEPT, strategies=["fedavg"])
    assert [run.config.partition.name for run in wraps.runs] == ["dirichlet", "iid"]


@pytest.mark.parametrize(("override", "fault"), [
    ("seed=1,2", "`seed` must be one value, as it has an option of its own, --seeds, but is '1,2'."),
    ("compare.seeds=1,2", "`compare.seeds` must be one value, as it belongs to the comparison as a whole, but is '1,2'."),
    ("client.learning_rate=0.1,0.1", "`client.learning_rate` must have different values, but is '0.1,0.1'."),
    ("client.learning_rate=0.1,-1", "`client.learning_rate` must be greater than 0, but is -1."),
    ("strategy=fedavg,fedprox", "`strategy` must be one value, as it has an option of its own, --strategies, but is "
                                "'fedavg,fedprox'."),
    ("client.learning_rate=0.1,,1", "`client.learning_rate` must have no empty value, but is '0.1,,1'."),
    ("client.learning_rate=0.1,", "`client.learning_rate` must have no empty value, but is '0.1,'."),
    ("client.learning_rat=0.1,1", "`client.learning_rat` is not a setting"),
    ("strategy.mu=0.1,1", "`compare.strategies[0].mu` is not a setting"),
    ("client.batch_size=" + ",".join(map(str, range(1, 1002))), "at most 1000 combinations, but there are 1001."),
])
def test_what_is_wrong_with_a_sweep_is_said(tmp_path, override, fault):
    found = faults_of(tmp_path, override, compare=SWEPT)
    assert any(fault in each for each in found), found


WRAPPED = {"strategies": ["fedavg", {"name": "fedavg", "label": "lips", "settings": {"wrap": {"lips": {"control": "noise"}}}}],
           "seeds": 1}


def test_a_sweep_leaves_the_rest_of_a_group_alone(tmp_path):
    model = {"name": "mlp", "hidden": [4, 4]}
    comparison = load(tmp_path, "wrap.lips.density=0.3,0.5", compare=WRAPPED, model=model, strategies=["lips"])
    found = [run.config.wrap[0].options for run in comparison.runs]
    assert [(options["density"], options["control"]) for options in found] == [(0.3, "noise"), (0.5, "noise")]
    (fault,) = faults_of(tmp_path, "wrap.lips.density=0.3,0.5", compare=WRAPPED, model=model)
    assert fault == ("`wrap.lips.density` must be a setting of all the entries, but fedavg would get a `wrap.lips` that there "
                     "is none of: choose the others by --strategies.")
    whole = load(tmp_path, "wrap={lips: {density: 0.3}},{}", compare=WRAPPED, model=model, strategies=["lips"])
    assert [len(run.config.wrap) for run in whole.runs] == [1, 0]


def test_one_setting_is_swept_once(tmp_path):
    (found,) = faults_of(tmp_path, "rounds=1,2", "rounds=3,4", compare=SWEPT)
    assert found == "`rounds` must be given once, but is there as 'rounds', too."
