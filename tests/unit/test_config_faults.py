"""Law 5: all faults of a config together, each with field, value and what is allowed."""

from __future__ import annotations

import copy
import functools
import json
import re
import sys

import pytest

from dfed import choices as choices_module
from dfed.config import load_config
from dfed.errors import ConfigError
from dfed.registry import STRATEGIES

SMALL = {
    "rounds": 2,
    "cohort": 4,
    "strategy": "fedavg",
    "model": {"name": "cnn", "channels": [8, 16]},
    "data": {"dataset": "synthetic", "samples": 240, "partition": {"name": "dirichlet", "alpha": 1.0}},
    "fleet": {"clients": 8, "tiers": [{"name": "strong", "count": 5, "memory": 3.0}, {"name": "weak", "count": 3}]},
    "client": {"momentum": 0.9},
}
# "`field` must …, but …." or "`field` is not a setting; ….", or of a group "with … must …."; then perhaps a hint.
GRAMMAR = re.compile(
    r"^`[^`]+` (must,? [^\n]+, but [^\n]+|must be 'test' unless [^\n]+|must have the form key\.sub=value|"
    r"is not a setting; [^\n]+|with [^\n]+ must [^\n]+)(?<!\.)(\.|\. Did you mean '[^']+'\?)$"
)


@pytest.fixture(autouse=True, scope="module")
def _settings_made_once():
    """Making pydantic models is nine tenths of a load, and there are a thousand loads here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choices_module, "settings_of", functools.cache(choices_module.settings_of))
        yield


def _faults(*overrides, base=SMALL):
    """The faults of a config, each of which must keep to the grammar."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides, base=base)
    texts = [str(fault) for fault in caught.value.faults]
    for text in texts:
        assert GRAMMAR.match(text), text
    assert len(set(texts)) == len(texts)
    return texts


def test_no_config_at_all():
    assert _faults(base={}) == [
        "`rounds` must be given, but is not.",
        "`cohort` must be given, but is not.",
        "`fleet.csv` must be given or else `tiers`, exactly one of the two, but neither is.",
        "`model` must be one of " + ", ".join(sorted(
            ["cnn", "densenet40", "mlp", "mobilenet_v2", "resnet18", "resnet20", "resnet34", "resnet50", "resnet56",
             "resnet8", "vgg11_bn", "vgg16_bn", "vgg19_bn", "vit_tiny"])) + ", but is not given.",
        "`data.dataset` must be given, but is not.",
    ]


def test_all_faults_are_reported_together():
    found = _faults(
        "rounds=0", "cohort=99", "seed=-1", "exchange=fast", "strategy.name=fedprox", "strategy.mu=-1", "strategy.nu=1",
        "model.hidden=x",
        "data.samplse=1", "data.partition.alpha=0", "data.validation_fraction=2", "fleet.tiers.0.flops=fast",
        "client.batch_size=0",
        "server.optimizer=adm", "server.max_failed_fraction=2", "sampler=x", "memory.enforce=soft", "backend.threads=0",
        "metrics.every=0", "checkpoint.keep=0", "rouns=1", "client.weight_decay=.inf", "fleet.tiers.9.x=1", "oops",
        "metrics.split=validation",
    )
    assert {text.split("`")[1] for text in found} == {
        "rounds", "cohort", "seed", "exchange", "strategy.mu", "strategy.nu", "model.hidden", "data.samplse",
        "data.partition.alpha",
        "data.validation_fraction", "fleet.tiers[0].flops", "client.batch_size", "server.optimizer",
        "server.max_failed_fraction",
        "sampler", "memory.enforce", "backend.threads", "metrics.every", "checkpoint.keep", "rouns", "client.weight_decay",
        "fleet.tiers.9.x", "oops",
    }
    assert len(found) == 23


KNOWN_AT_THE_TOP = (
    "known here: backend, checkpoint, client, codecs, cohort, compare, data, exchange, fleet, memory, metrics, model, rounds, "
    "sampler, seed, server, strategy, wrap."
)
ONE_FAULT = [
    # The top level.
    ("rounds=0", "`rounds` must be at least 1, but is 0."),
    ("rounds=1.5", "`rounds` must be a whole number, but is 1.5."),
    ("rounds=1e3", "`rounds` must be a whole number, but is 1000.0."),
    ("rounds=true", "`rounds` must be a whole number, but is true."),
    ("rounds='2'", "`rounds` must be a whole number, but is '2'."),
    ("rounds=", "`rounds` must be a whole number, but is null."),
    ("rounds=[1]", "`rounds` must be a whole number, but is [1]."),
    ("rounds={a: 1}", "`rounds` must be a whole number, but is {'a': 1}."),
    ("rounds=.nan", "`rounds` must be a whole number, but is nan."),
    ("rounds=1e400", "`rounds` must be a whole number, but is inf."),
    ("seed=010", "`seed` must be a whole number, but is '010'."),
    ("seed=9223372036854775808",
     "`seed` must be a number of 64 bits (at most 9223372036854775807), but is 9223372036854775808."),
    ("cohort=9", "`cohort` must be at most `fleet.clients` (8), but is 9."),
    ("exchange=fusde", "`exchange` must be one of fused, per_client, but is 'fusde'. Did you mean 'fused'?"),
    ("round=1", f"`round` is not a setting; {KNOWN_AT_THE_TOP} Did you mean 'rounds'?"),
    ("zzz.a=1", f"`zzz` is not a setting; {KNOWN_AT_THE_TOP}"),
    ("codecs.up=top_k(density=0.1)",
     "`codecs.up` must be written {name: top_k, option: …} where it has options, but is 'top_k(density=0.1)'."),
    ("codecs.error_feedback=1", "`codecs.error_feedback` must be true or false, but is 1."),
    ("codecs={error_feedbak: true}",
     "`codecs.error_feedbak` is not a setting; known here: down, up, error_feedback. Did you mean "
     "'error_feedback'?"),
    ("codecs={error_feedback: true}",
     "`codecs.error_feedback` must be false unless `codecs.up` is one of int4, int8, int8_affine, qsgd, random_k, top_k, but "
     "is true with 'fp32', which leaves nothing out to be made up for."),
    ("codecs={up: {name: random_k, unbiased: true}, error_feedback: true}",
     "`codecs.error_feedback` must be false unless `codecs.up` is one of int4, int8, int8_affine, qsgd, random_k, top_k, but "
     "is true with 'random_k', which is unbiased, so that errors would grow."),
    # Things chosen by name.
    ("strategy=fedavgg", f"`strategy` must be one of {', '.join(STRATEGIES)}, but is 'fedavgg'. Did you mean 'fedavg'?"),
    ("strategy={name: fedavgg, mu: 1}",
     f"`strategy.name` must be one of {', '.join(STRATEGIES)}, but is 'fedavgg'. Did you mean 'fedavg'?"),
    ("strategy=", f"`strategy` must be one of {', '.join(STRATEGIES)}, but is not given."),
    ("strategy=[fedavg]", "`strategy` must be a name, or a group of settings with a `name`, but is ['fedavg']."),
    ("strategy={}", "`strategy` must be a name, or a group of settings with a `name`, but is {}."),
    ("strategy={name: }", "`strategy` must be a name, or a group of settings with a `name`, but is {'name': null}."),
    ("strategy=off", f"`strategy` must be one of {', '.join(STRATEGIES)}, but is 'off'."),
    ("strategy=3", "`strategy` must be a name, or a group of settings with a `name`, but is 3."),
    ("strategy.mu=1", "`strategy.mu` is not a setting; there are none here."),
    ("strategy={name: fedprox, nu: 1}", "`strategy.nu` is not a setting; known here: mu."),
    ("strategy={name: fedprox, muu: 1}", "`strategy.muu` is not a setting; known here: mu. Did you mean 'mu'?"),
    ("strategy={name: fedprox, problem: 1}", "`strategy.problem` is not a setting; known here: mu."),
    ("strategy={name: fedprox, mu: -1}", "`strategy.mu` must be at least 0, but is -1."),
    ("strategy={name: fedprox, mu: .nan}", "`strategy.mu` must be at least 0, but is nan."),
    ("strategy={name: fedprox, mu: .inf}", "`strategy.mu` must be a finite number, but is inf."),
    ("strategy={name: fedprox, mu: true}", "`strategy.mu` must be a number, but is true."),
    ("strategy={name: fedprox, mu: '1'}", "`strategy.mu` must be a number, but is '1'."),
    ("strategy={name: fedprox, 1: 2}", "`strategy.1` is not a setting; known here: mu."),
    ("strategy=:b", "`strategy` must be a known name, or have the form package.module:attribute, but is ':b'."),
    ("strategy=..:x", "`strategy` must be a known name, or have the form package.module:attribute, but is '..:x'."),
    ("strategy=no_such:x",
     "`strategy` must name a strategy that can be imported, but 'no_such:x' cannot: No module named 'no_such'."),
    ("strategy=os:getcwd",
     "`strategy` must name a strategy that can be used, but is 'os:getcwd', which cannot: got an unexpected "
                           "keyword argument 'problem'."),
    ("strategy=dfed.models.cnn:cnn",
     "`strategy` must name a strategy that can be used, but is 'dfed.models.cnn:cnn', which cannot: got "
                                     "an unexpected keyword argument 'problem'."),
    ("model=cn", "Did you mean 'cnn'?"),
    ("model=math:pi",
     "`model` must name a model that can be used, but is 'math:pi', which cannot: 3.141592653589793 is not a callable "
                      "object."),
    ("model.channels=3", "`model.channels` must be a list, but is 3."),
    ("model.channels=[]", "`model.channels` must be a list of length 1 or more, but is []."),
    ("model.channels=[8, 0]", "`model.channels[1]` must be at least 1, but is 0."),
    ("model.channels.1=x", "`model.channels[1]` must be a whole number, but is 'x'."),
    ("model.norm=bath", "`model.norm` must be one of none, batch, group, but is 'bath'. Did you mean 'batch'?"),
    ("model.num_classes=3",
     "`model.num_classes` is not a setting; known here: channels, dropout, hidden, kernel, norm, padding, pool."),
    ("sampler=unform", "`sampler` must be one of oort, tifl, uniform, weighted, but is 'unform'. Did you mean 'uniform'?"),
    ("sampler={name: weighted, size: 3}", "`sampler.size` is not a setting; there are none here."),
    ("sampler=tifl", "`metrics.split` must be 'validation' with `sampler: tifl`, whose draws follow the accuracy (and "
                     "`data.validation_fraction` above 0), but is 'test'."),
    ("server.optimizer={learning_rate: 1}",
     "`server.optimizer` must be a name, or a group of settings with a `name`, but is {'learning_rate': 1}."),
    ("server.optimizer={name: adam, beta: 1}", "Did you mean 'beta2'?"),
    ("server.optimiser=sgd",
     "`server.optimiser` is not a setting; known here: optimizer, deadline_s, max_failed_fraction, over_selection. "
     "Did you mean 'optimizer'?"),
    ("server.over_selection=0.5", "`server.over_selection` must be at least 1, but is 0.5."),
    ("server.over_selection=101", "`server.over_selection` must be at most 100, but is 101."),
    ("server.over_selection=.nan", "`server.over_selection` must be"),
    ("server.over_selection=true", "`server.over_selection` must be"),
    ("server.over_selection=null", "`server.over_selection` must be"),
    ("server=3", "`server` must be a group of settings, but is 3."),
    # Data.
    ("data=", "`data` must be a group of settings with a `dataset`, but is null."),
    ("data=digits", "`data` must be a group of settings with a `dataset`, but is 'digits'."),
    ("data={partition: iid}", "`data.dataset` must be given, but is not."),
    ("data.dataset=3", "`data.dataset` must be text, but is 3."),
    ("data.dataset=syntetic", "Did you mean 'synthetic'?"),
    ("data.smaples=3",
     "`data.smaples` is not a setting; known here: cache, dataset, download, partition, root, validation_fraction, "
                       "classes, noise, samples, shape, test_samples. Did you mean 'samples'?"),
    ("data.partitoin=iid", "Did you mean 'partition'?"),
    ("data.seed=3", "`data.seed` is not a setting; known here: "),
    ("data={dataset: cifar10, size: 3}",
     "`data.size` is not a setting; known here: cache, dataset, download, partition, root, validation_fraction."),
    ("data.shape=[1, 16]", "`data.shape` must be a list of length 3 or more, but is [1, 16]."),
    ("data.samples=0", "`data.samples` must be at least 1, but is 0."),
    ("data.noise=.inf", "`data.noise` must be a finite number, but is inf."),
    ("data.download=yes", "`data.download` must be true or false, but is 'yes'."),
    ("data.root=7", "`data.root` must be text, but is 7."),
    ("data.validation_fraction=1", "`data.validation_fraction` must be less than 1, but is 1."),
    ("data.partition=dirichle",
     "`data.partition` must be one of dirichlet, dirichlet_tiers, fixed, iid, quantity_skew, shards, but is "
                                "'dirichle'. Did you mean 'dirichlet'?"),
    ("data.partition=",
     "`data.partition` must be one of dirichlet, dirichlet_tiers, fixed, iid, quantity_skew, shards, but is not given."),
    ("data.partition.alpha=-.inf", "`data.partition.alpha` must be greater than 0, but is -inf."),
    ("data.partition={name: fixed}", "`data.partition.samples_per_client` must be given, but is not."),
    ("data.partition.num_clients=3", "`data.partition.num_clients` is not a setting; known here: alpha, min_samples."),
    ("data.1=2", "`data.1` is not a setting; known here: "),
    # The fleet.
    ("fleet=", "`fleet` must be a group of settings, but is null."),
    ("fleet=[]", "`fleet` must be a group of settings, but is []."),
    ("fleet.clients=", "`fleet.tiers` must come with `clients`, the number of clients to deal out, but that is not given."),
    ("fleet.clients=true", "`fleet.clients` must be a whole number, but is true."),
    ("fleet.tiers=", "`fleet.csv` must be given or else `tiers`, exactly one of the two, but neither is."),
    ("fleet.csv=x", "`fleet.csv` must be given or else `tiers`, exactly one of the two, but both are."),
    ("fleet.tiers={name: a}", "`fleet.tiers` must be a list, but is {'name': 'a'}."),
    ("fleet.tiers=[3]", "`fleet.tiers[0]` must be a group of settings, but is 3."),
    ("fleet.tiers=[null]", "`fleet.tiers[0]` must be a group of settings, but is null."),
    ("fleet.tiers=[]", "`fleet.tiers` must have at least one tier, but is empty."),
    ("fleet.tiers.1.name=strong", "`fleet.tiers` must have names that differ, but 'strong' occurs more than once."),
    ("fleet.tiers.1.count=4", "`fleet.tiers` must have counts that sum to `clients` (8), but they sum to 9."),
    ("fleet.tiers.1.count=0", "`fleet.tiers[1].count` must be at least 1, but is 0."),
    ("fleet.tiers[1].share=0.5",
     "`fleet.tiers[1].count` must be given or else `share`, exactly one of the two, but both are."),
    ("fleet.tiers.1.memory=5", "`fleet.tiers[1].memory` must be at least 1 MiB (1048576), but is 5: "),
    ("fleet.tiers.1.memory=true",
     "`fleet.tiers[1].memory` must be bytes (64000000, '64MB') or a share (0.5, '50%'), or be left out for no limit, "
     "but is true."),
    ("fleet.tiers.1.memory=.nan",
     "`fleet.tiers[1].memory` must, as a fraction of the full model's peak, be at least 0.001 and at most 10, "),
    ("fleet.tiers.1.up=10 XB/s",
     "`fleet.tiers[1].up` must be a number with an optional prefix and unit, such as '64 MB/s', but is '10 XB/s'."),
    ("fleet.tiers.1.up=1e999 MB/s", "`fleet.tiers[1].up` must be a number with an optional prefix and unit, "),
    ("fleet.tiers.1.availability=2", "`fleet.tiers[1].availability` must be at most 1, but is 2."),
    ("fleet.tiers.1.availabilty=1", "Did you mean 'availability'?"),
    ("fleet.tiers.1.name=", "`fleet.tiers[1].name` must be text, but is null."),
    # Local training.
    ("client=", "`client` must be a group of settings, but is null."),
    ("client.learning_rate=.inf", "`client.learning_rate` must be a finite number, but is inf."),
    ("client.learning_rate=0", "`client.learning_rate` must be greater than 0, but is 0."),
    ("client.learning_rate=fast", "`client.learning_rate` must be a number, but is 'fast'."),
    ("client.momentum=1", "`client.momentum` must be less than 1, but is 1."),
    ("client.nesterov=1", "`client.nesterov` must be true or false, but is 1."),
    ("client={nesterov: true}", "`client` must have a `momentum` above 0 with `nesterov`, but has none."),
    ("client.optimizer=adam", "`client` must leave out `momentum` with the optimiser 'adam', but sets it."),
    ("client={optimizer: adam, betas: [0.9]}", "`client.betas` must be a list of length 2 or more, but is [0.9]."),
    ("client={steps: 3, epochs: 1}", "`client` must give either `epochs` or `steps`, but gives both."),
    ("client.steps=0", "`client.steps` must be at least 1, but is 0."),
    ("client.schedule=cosine", "`client.schedule` must be a group of settings, but is 'cosine'."),
    ("client.schedule.factor=0.5", "`client.schedule` must leave out `factor` with the name 'constant', but sets it."),
    ("client.schedule={name: cosine, milestones: [3]}",
     "`client.schedule` must leave out `milestones` with the name 'cosine', but sets it."),
    ("client.schedule={name: step}",
     "`client.schedule` must have at least one of `milestones` with the name 'step', but has none."),
    ("client.schedule.milestones=[1, x]", "`client.schedule.milestones[1]` must be a whole number, but is 'x'."),
    ("client.schedule={nam: x}",
     "`client.schedule.nam` is not a setting; known here: factor, final, milestones, name. Did you mean 'name'?"),
    ("client.learning-rate=1", "`client.learning-rate` is not a setting; known here: "),
    ("client.1=2", "`client.1` is not a setting; known here: "),
    ("client.clip_norm=.inf", "`client.clip_norm` must be a finite number, but is inf."),
    ("client.batch_size=1" + "0" * 30,
     "`client.batch_size` must be less than 2147483648, but is 1" + "0" * 30 + "."),
    ("client.epochs=1" + "0" * 30,
     "`client.epochs` must be a number of 64 bits (at most 9223372036854775807), but is 1" + "0" * 30 + "."),
    ("backend.threads=1000000000", "`backend.threads` must be at most 256, but is 1000000000."),
    # What is around the strategy.
    ("wrap=lips", "`wrap` must be a group of names, each with its options, such as {lips: {density: 0.5}}, but is 'lips'."),
    ("wrap.lips=0.5", "`wrap.lips` must be a group of options, and may be empty ({}), but is 0.5."),
    ("wrap.lip={}", "`wrap` must be one of lips, but is 'lip'. Did you mean 'lips'?"),
    ("wrap.lips.densty=0.5", "`wrap.lips.densty` is not a setting; known here: control, density, fill, masks, norms, period, "
                             "rounds, score. Did you mean 'density'?"),
    ("wrap.lips.density=0", "`wrap.lips.density` must be greater than 0, but is 0."),
    ("wrap.lips.score=grad", "`wrap.lips.score` must be one of gradient, magnitude, low, random, but is 'grad'."),
    # The rest.
    ("memory=off", "`memory` must be a group of settings, but is 'off'."),
    ("memory.enforce=false", "`memory.enforce` must be one of hard, predicted, off, but is false."),
    ("backend=glo", "`backend.name` must be one of auto, gloo, nccl, but is 'glo'. Did you mean 'gloo'?"),
    ("backend=3", "`backend` must be a group of settings, but is 3."),
    ("backend.timeout_s=.inf", "`backend.timeout_s` must be at most 2592000, but is inf."),
    ("metrics.split=validation",
     "`metrics.split` must be 'test' unless `data.validation_fraction` is above 0, but is 'validation'."),
    ("metrics.test_at_end=true",
     "`metrics.test_at_end` must be false where `metrics.split` is 'test', with which all evaluations are on the test set, "
     "but is true."),
    ("metrics=", "`metrics` must be a group of settings, but is null."),
    ("metrics.every=1.0", "`metrics.every` must be a whole number, but is 1.0."),
    ("checkpoint.evry=1", "`checkpoint.evry` is not a setting; known here: every, keep. Did you mean 'every'?"),
    # Overrides.
    ("rounds", "`rounds` must have the form key.sub=value."),
    ("rounds={",
     "`rounds` must be a YAML value, but is '{': expected the node content, but found '<stream end>' (line 1, column 2)."),
    ("data={dataset: synthetic, dataset: digits}", "the key 'dataset' is there twice (line 1, column 22)."),
    ("model={[1]: 2}", "`model` must be a YAML value, but is '{[1]: 2}': TypeError: unhashable type: 'list'."),
    ("rounds=1" + "0" * 5000, "`rounds` must be a YAML value, but is '1000"),
    ("rounds.x=1", "`rounds.x` must lead through groups of settings, but 'rounds' is none."),
]


@pytest.mark.parametrize(("override", "fault"), ONE_FAULT, ids=[override[:40] for override, _ in ONE_FAULT])
def test_what_is_wrong_is_said(override, fault):
    (found,) = _faults(override)
    assert found == fault or (fault in found and (not fault.startswith("`") or found.startswith(fault)))


SECTIONS = ["rounds", "cohort", "seed", "exchange", "strategy", "model", "data", "fleet", "client", "server", "sampler",
            "memory", "backend",
            "metrics", "checkpoint", "data.dataset", "data.partition", "data.shape", "data.cache", "fleet.clients",
            "fleet.tiers",
            "fleet.tiers.0", "fleet.tiers.0.memory", "fleet.tiers.0.flops", "fleet.tiers.0.count", "fleet.csv",
            "client.schedule",
            "client.schedule.milestones", "client.betas", "client.epochs", "client.clip_norm", "model.channels",
            "model.dropout",
            "server.optimizer", "server.max_failed_fraction", "metrics.split", "backend.name", "strategy.name", "model.name",
            "client.batch_size", "backend.threads", "metrics.batch_size"]
JUNK = [None, True, -1, 0.5, float("nan"), float("inf"), 2**63 - 1, 10**30, 16**5000, "", "junk", "a:b", ":", "é\x00", [], [[]],
        [None], [{}], {},
        {"": 1}, {1: 2}, {None: None}, {"name": None}, {"name": "x"}, {"name": {}}, {"a": {"b": [1, {"c": float("nan")}]}},
        ("a",), b"x",
        {1.5: 1, True: 2}, object()]


@pytest.mark.parametrize("place", SECTIONS)
def test_junk_anywhere_is_a_config_error_or_a_config(place):
    for junk in JUNK:
        raw = copy.deepcopy(SMALL)
        target = raw
        *groups, last = place.split(".")
        for group in groups:
            target = target[int(group)] if isinstance(target, list) else target.setdefault(group, {})
            if isinstance(target, str):
                target = raw[group] = {"name": target}
        target[int(last) if isinstance(target, list) else last] = junk
        try:
            config = load_config(None, base=raw)
        except ConfigError as error:
            for fault in error.faults:
                assert fault.field, (place, junk)
                assert len(str(fault)) < 1000
                assert "\n" not in str(fault)
        else:
            json.dumps(config.to_dict(), allow_nan=False)  # what is accepted can be used
            assert config.fingerprint()


def test_a_cross_fault_is_found_beside_others():
    assert _faults("rounds=0", "cohort=9") == [
        "`rounds` must be at least 1, but is 0.", "`cohort` must be at most `fleet.clients` (8), but is 9.",
    ]
    first, second = _faults("sampler={name: tifl, tiers: 0}", "metrics.split=test")
    assert first == "`sampler.tiers` must be at least 1, but is 0."
    assert second.startswith("`metrics.split` must be 'validation' with `sampler: tifl`")
    load_config(None, ["sampler=tifl", "metrics.split=validation", "data.validation_fraction=0.2"], base=SMALL)
    found = _faults("metrics.split=validation", "metrics.every=0", "data.root=3", "fleet.tiers.0.flops=x", "cohort=9")
    assert {text.split("`")[1] for text in found} == {
        "metrics.split", "metrics.every", "data.root", "fleet.tiers[0].flops", "cohort",
    }


def test_things_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "dfed_test_own.py").write_text("""
from pydantic import Field
from typing import Annotated
def data(*, root, download, cache, seed, size: Annotated[int, Field(ge=1)] = 3): "Mine."
def loose(*, size: int, **rest): "Mine."
def forgets(*, root, size: int = 3): "Mine."
def bare(*, root, download, cache, seed, size=3): "Mine."
def unknown(*, root, download, cache, seed, size: "Nowhere" = 3): "Mine."
def odd(*, root, download, cache, seed, size: object() = 3): "Mine."
number = 3
""")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "dfed_test_own", raising=False)
    own = {"dataset": "dfed_test_own:data", "partition": "iid"}
    assert load_config(None, base={**SMALL, "data": own}).dataset_options == {"size": 3}
    assert load_config(None,
                       base={**SMALL, "data": {"dataset": "dfed_test_own:loose", "size": 1}}).dataset_options == {"size": 1}
    for name, wrong in (
        ("data",
         {"size": 0}), ("data", {"sise": 1}), ("forgets", {}), ("bare", {}), ("unknown", {}), ("odd", {}), ("number", {}),
        ("absent", {}), ("loose", {}),
    ):
        (fault,) = _faults(base={**SMALL, "data": {"dataset": f"dfed_test_own:{name}", **wrong}})
        assert fault.startswith("`data."), name
