from __future__ import annotations

import copy
import math

import pytest
import yaml

from dfed.errors import ConfigError
from dfed.yaml_io import apply_override, read_yaml


def _read(tmp_path, text, encoding="utf-8"):
    (tmp_path / "config.yaml").write_bytes(text.encode(encoding))
    return read_yaml(tmp_path / "config.yaml")


def _override(raw, *overrides):
    faults = []
    for override in overrides:
        apply_override(raw, override, faults)
    return [str(fault) for fault in faults]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("-7", -7), ("+3", 3), ("0", 0), ("1_000", 1000),
        ("1.5",
         1.5), ("1e-3", 1e-3), ("1E3", 1000.0), ("1.e2", 100.0), ("-1.5e+2", -150.0), (".5", 0.5), ("5.", 5.0), ("-.5", -0.5),
        (".inf", math.inf), ("-.inf", -math.inf), ("1e400", math.inf),
        ("true", True), ("False", False), ("TRUE", True),
        ("off", "off"), ("on", "on"), ("no", "no"), ("Yes", "Yes"), ("y", "y"),
        ("010",
         "010"), ("0x10", "0x10"), ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("2024-01-31", "2024-01-31"), ("1-2", "1-2"),
        ("null", None), ("~", None), ("", None),
        ("10 Mbps", "10 Mbps"), ("50%", "50%"), ("'1'", "1"), ("e5", "e5"), (".", "."), ("-", "-"), ("1.2.3", "1.2.3"),
        ("[1, 1e-3, off]", [1, 1e-3, "off"]), ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_values_are_what_they_look_like(text, value, tmp_path):
    if text != "-":
        read = _read(tmp_path, f"x: {text}\n")["x"]
        assert read == value
        assert type(read) is type(value)
        raw = {}
        assert _override(raw, f"x={text}") == []
        assert raw == {"x": value}
        assert type(raw["x"]) is type(value)


def test_not_a_number(tmp_path):
    assert math.isnan(_read(tmp_path, "x: .nan")["x"])


def test_what_pyyaml_dumps_is_read_back(tmp_path):
    value = {
        "floats": [1e-8, 1.5e20, 1e16, 0.1, 5e-324, 1.0], "ints": [0, -5, 2**62],
        "texts": ["off", "yes", "010", "1:30", "2024-01-31", "1.5", "null", "", " a ", "a: b", "ä", "1_0", "0x10", "~",
                  "true"],
        "truths": [True, False, None], "empty": [{}, []],
    }
    assert _read(tmp_path, yaml.safe_dump(value)) == value


def test_anchors_are_copies_and_merges_work(tmp_path):
    raw = _read(tmp_path, """
base: &base {flops: 1, link: {up: 2}}
tiers:
  - *base
  - {<<: *base, flops: 3}
""")
    assert raw["tiers"] == [{"flops": 1, "link": {"up": 2}}, {"flops": 3, "link": {"up": 2}}]
    assert _override(raw, "tiers.0.link.up=9") == []
    assert raw["base"]["link"] == raw["tiers"][1]["link"] == {"up": 2}
    assert raw["tiers"][0]["link"] == {"up": 9}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "must be YAML, but is not: the key 'a' is there twice (line 2, column 1)."),
        ("x:\n  b: 1\n  c: 2\n  b: 3", "the key 'b' is there twice (line 4, column 3)."),
        ("x: [{b: 1, b: 1}]", "the key 'b' is there twice (line 1, column 12)."),
        ("1: a\n1: b", "the key '1' is there twice"),
        ("{[1]: 2}", "must be YAML, but is not: TypeError: unhashable type: 'list'."),
        ("a: [", "(line 1, column 5)."), ("a: 'x", "must be YAML, but is not: "), ("a: @x", "cannot start any token"),
        ("\tb: 1", "must be YAML, but is not: "), ("a: *b", "undefined alias 'b'"), ("a: &a [*a]", "recursive node"),
        ("a: " + "[" * 2000, "must be YAML of at most 100 levels, but has more (line 1, column 103)."),
        ("a: " + "{b: " * 99 + "1" + "}" * 99, "must be YAML of at most 100 levels, but has more (line 1, column "),
        ("a: 1" + "0" * 5000, "must be YAML, but is not: ValueError"),
        ("a: !!int x", "must be YAML, but is not: ValueError"), ("a: !!timestamp x", "must be YAML, but is not: "),
        ("a: !!python/object:os.system x", "could not determine a constructor for the tag"), ("a: !mine 3", "'!mine'"),
        ("a: \x00", "must be YAML, but is not: "), ("---\na: 1\n---\nb: 2", "but found another document"),
        ("", "must hold a mapping of settings, but holds null."),
        ("- 1\n- 2", "must hold a mapping of settings, but holds [1, 2]."),
        ("text", "must hold a mapping of settings, but holds 'text'."), ("# nothing", "but holds null."),
    ],
)
def test_files_that_are_no_config(text, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        _read(tmp_path, text)
    assert len(caught.value.faults) == 1
    said = str(caught.value.faults[0])
    assert said.startswith(f"`{tmp_path / 'config.yaml'}` must ")
    assert message in said
    assert said.endswith(".")
    assert "\n" not in said


def test_files_that_cannot_be_read(tmp_path):
    for path, why in ((tmp_path / "absent.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as caught:
            read_yaml(path)
        assert str(caught.value.faults[0]) == f"`{path}` must be a readable file, but is not: {why}."
    with pytest.raises(ConfigError, match="must be YAML, but is not: 'utf-8' codec"):
        _read(tmp_path, "a: ä", "latin-1")
    assert _read(tmp_path, "a: ä", "utf-8-sig") == {"a": "ä"}


def test_overrides_reach_everywhere():
    raw = {"rounds": 1, "strategy": "fedavg", "fleet": {"tiers": [{"name": "a"}, {"name": "b"}]}, "server": None}
    assert _override(
        raw, "rounds=2", "strategy.mu=0.5", "fleet.tiers.1.memory=64 MB", "fleet.tiers[0].link.up=3", "server.optimizer=adam",
        "server.optimizer.tau=1e-3", "client.schedule.name=step", "client.schedule.milestones=[1, 2]", "fleet.csv=",
        "data.root=a=b", "client.schedule.milestones.1=5",
    ) == []
    assert raw == {
        "rounds": 2, "strategy": {"name": "fedavg", "mu": 0.5},
        "fleet": {"tiers": [{"name": "a", "link": {"up": 3}}, {"name": "b", "memory": "64 MB"}], "csv": None},
        "server": {"optimizer": {"name": "adam", "tau": 1e-3}},
        "client": {"schedule": {"name": "step", "milestones": [1, 5]}},
        "data": {"root": "a=b"},
    }


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("rounds", "`rounds` must have the form key.sub=value."), ("=3", "`=3` must have the form key.sub=value."),
        ("a..b=1", "`a..b=1` must have the form key.sub=value."), (".a=1", "`.a=1` must have the form key.sub=value."),
        ("a.=1", "`a.=1` must have the form key.sub=value."), ("", "`` must have the form key.sub=value."),
        ("rounds={",
         "`rounds` must be a YAML value, but is '{': expected the node content, but found '<stream end>' (line 1, column 2)."),
        ("a={b: 1, b: 2}", "`a` must be a YAML value, but is '{b: 1, b: 2}': the key 'b' is there twice (line 1, column 8)."),
        ("rounds.x=1", "`rounds.x` must lead through groups of settings, but 'rounds' is none."),
        ("tiers.2.name=a", "`tiers.2.name` must name one of the 2 entries (0 to 1) of `tiers`, but names '2'."),
        ("tiers[0].name.x=a", "`tiers[0].name.x` must name the only entry (0) of `tiers.0.name`, but names 'x'."),
        ("tiers.x.name=a", "`tiers.x.name` must name one of the 2 entries (0 to 1) of `tiers`, but names 'x'."),
        ("tiers.-1.name=a", "`tiers.-1.name` must name one of the 2 entries (0 to 1) of `tiers`, but names '-1'."),
        ("tiers.²=a", "`tiers.²` must name one of the 2 entries (0 to 1) of `tiers`, but names '²'."),
        ("tiers.2=a", "`tiers.2` must name one of the 2 entries (0 to 1) of `tiers`, but names '2'."),
        ("tiers.first=a", "`tiers.first` must name one of the 2 entries (0 to 1) of `tiers`, but names 'first'."),
        ("none.0=a", "`none.0` must name one of the 0 entries of `none`, but names '0'."),
        (f"tiers.{'1' * 5000}=a", " must name one of the 2 entries (0 to 1) of `tiers`, but names '111"),
        (f"a{'.b' * 100}=1", "a.b.b.b"),
        ("numbers.0.x=a", "`numbers.0.x` must lead through groups of settings, but '0' is none."),
    ],
)
def test_overrides_that_lead_nowhere(override, fault):
    raw = {"rounds": 1, "tiers": [{"name": ["q"]}, {}], "numbers": [1], "none": []}
    before = copy.deepcopy(raw)
    (found,) = _override(raw, override)
    assert found == fault or (len(override) > 100 and fault in found)
    assert raw == before


def test_aliases_of_aliases_are_counted_and_not_built(tmp_path):
    """Ten lines that stand for ten billion values: a test that hangs has failed."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    with pytest.raises(ConfigError) as caught:
        _read(tmp_path, bomb)
    message = "must be YAML of at most 100,000 values, its aliases expanded, but has more (line 5, column 5)."
    assert str(caught.value.faults[0]).endswith(message)
    merges = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 10))
    with pytest.raises(ConfigError, match="at most 100,000 values"):
        _read(tmp_path, merges)
    deep = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 2000))
    with pytest.raises(ConfigError, match=r"at most 100 levels, its aliases expanded, but has more \(line 100, column 6\)"):
        _read(tmp_path, deep)
    raw = {}
    assert _override(raw, "x=" + "[" * 100 + "]" * 100) == []
    assert _override(raw, "x=" + "[" * 101) == [
        "`x` must be a YAML value of at most 100 levels, but has more (line 1, column 101).",
    ]
    assert _override(raw, "x=[&a [1, 2], *a, *a]") == []
    assert raw == {"x": [[1, 2], [1, 2], [1, 2]]}
