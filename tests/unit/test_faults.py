from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from dfed.faults import faults_of, shown, unknown_setting, unusable_numbers
from dfed.settings import ByteRate, Bytes, Settings


class Inner(Settings):
    depth: Annotated[int, Field(ge=1, le=9)] = 1
    words: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=2)] = []


class Outer(Settings):
    count: int = 0
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    big: Annotated[float, Field(le=1e9)] = 1.0
    finite: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    flag: bool = False
    text: Annotated[str, Field(max_length=3)] = ""
    mode: Literal["fast", "slow"] = "fast"
    channels: Literal[1, 3] = 3
    either: int | Literal["auto"] = "auto"
    many: int | list[int] | None = None
    size: Bytes = 0
    link: ByteRate = 1.0
    pair: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)] = [0.0, 0.0]
    even: Annotated[int, Field(multiple_of=2)] = 2
    name: Annotated[str, Field(pattern="^[a-z]+$")] = "a"
    inner: Inner = Inner()
    several: list[Inner] = []
    maybe: Inner | None = None
    table: dict[str, int] = {}


def _faults(value, prefix="", siblings=()):
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(value)
    return [str(fault) for fault in faults_of(caught.value, prefix, Outer, siblings)]


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"count": 1.5}, "`count` must be a whole number, but is 1.5."),
        ({"count": True}, "`count` must be a whole number, but is true."),
        ({"count": "7"}, "`count` must be a whole number, but is '7'."),
        ({"count": None}, "`count` must be a whole number, but is null."),
        ({"count": [1, None, False]}, "`count` must be a whole number, but is [1, null, false]."),
        ({"share": 0}, "`share` must be greater than 0, but is 0."),
        ({"share": 1.0}, "`share` must be less than 1, but is 1.0."),
        ({"share": float("nan")}, "`share` must be less than 1, but is nan."),
        ({"share": "half"}, "`share` must be a number, but is 'half'."),
        ({"share": False}, "`share` must be a number, but is false."),
        ({"big": 2e9}, "`big` must be at most 1000000000, but is 2000000000.0."),
        ({"finite": float("inf")}, "`finite` must be a finite number, but is inf."),
        ({"flag": 1}, "`flag` must be true or false, but is 1."),
        ({"flag": "yes"}, "`flag` must be true or false, but is 'yes'."),
        ({"text": 3}, "`text` must be text, but is 3."),
        ({"text": "abcd"}, "`text` must be text of length 3 or less, but is 'abcd'."),
        ({"mode": "fats"}, "`mode` must be one of fast, slow, but is 'fats'. Did you mean 'fast'?"),
        ({"mode": None}, "`mode` must be one of fast, slow, but is null."),
        ({"channels": 2}, "`channels` must be one of 1, 3, but is 2."),
        ({"either": 1.5}, "`either` must be a whole number or one of auto, but is 1.5."),
        ({"either": "autp"}, "`either` must be a whole number or one of auto, but is 'autp'."),
        ({"many": "x"}, "`many` must be a whole number or a list, but is 'x'."),
        ({"size": "64 XB"}, "`size` must be a number with an optional prefix and unit, such as '64 MB', but is '64 XB'."),
        ({"size": 1.5}, "`size` must be a whole number, but is 1.5."),
        ({"link": "fast"}, "`link` must be a number with an optional prefix and unit, such as '64 MB/s', but is 'fast'."),
        ({"pair": [1.0]}, "`pair` must be a list of length 2 or more, but is [1.0]."),
        ({"pair": [1.0, 2.0, 3.0]}, "`pair` must be a list of length 2 or less, but is [1.0, 2.0, 3.0]."),
        ({"pair": {"a": 1}}, "`pair` must be a list, but is {'a': 1}."),
        ({"pair": [0.5, -1]}, "`pair[1]` must be at least 0, but is -1."),
        ({"even": 3}, "`even` must be a multiple of 2, but is 3."),
        ({"name": "A1"}, "`name` must match pattern '^[a-z]+$', but is 'A1'."),
        ({"inner": 3}, "`inner` must be a group of settings, but is 3."),
        ({"inner": None}, "`inner` must be a group of settings, but is null."),
        ({"inner": {"depth": 0}}, "`inner.depth` must be at least 1, but is 0."),
        ({"inner": {"words": ["a", ""]}}, "`inner.words[1]` must be text of length 1 or more, but is ''."),
        ({"inner": {"dept": 1}}, "`inner.dept` is not a setting; known here: depth, words. Did you mean 'depth'?"),
        ({"several": [{}, {"depth": 10}]}, "`several[1].depth` must be at most 9, but is 10."),
        ({"several": [{"word": []}]}, "`several[0].word` is not a setting; known here: depth, words. Did you mean 'words'?"),
        ({"several": [3]}, "`several[0]` must be a group of settings, but is 3."),
        ({"maybe": {"depth": 0}}, "`maybe.depth` must be at least 1, but is 0."),
        ({"maybe": {"int": 0}}, "`maybe.int` is not a setting; known here: depth, words."),
        ({"table": {"int": "x"}}, "`table.int` must be a whole number, but is 'x'."),
        ({"table": 3}, "`table` must be a group of settings, but is 3."),
    ],
)
def test_the_grammar(value, fault):
    assert _faults(value) == [fault]
    (prefixed,) = _faults(value, "a.b")
    assert prefixed == fault.replace("`", "`a.b.", 1)


@pytest.mark.parametrize("key", ["colour", "learning-rate", "int", "none", "0", "", "a.b", 1, None, True, 2.5])
def test_an_unknown_key_is_named_as_it_stands(key):
    (fault,) = _faults({"inner": {key: 1}}, "top")
    assert fault.startswith(f"`top.inner.{key}` is not a setting; known here: depth, words.")


def test_names_that_stand_beside_the_models_own():
    (fault,) = _faults({"rooot": 1}, "data", siblings=["cache", "root"])
    assert fault.startswith("`data.rooot` is not a setting; known here: cache, root, big, channels, ")
    assert fault.endswith("Did you mean 'root'?")
    (fault,) = _faults({"inner": {"rooot": 1}}, "data", siblings=["cache", "root"])
    assert fault == "`data.inner.rooot` is not a setting; known here: depth, words."


def test_what_must_be_given():
    class Needs(Settings):
        dataset: str

    with pytest.raises(ValidationError) as caught:
        Needs.model_validate({})
    assert [str(fault) for fault in faults_of(caught.value, "data", Needs)] == ["`data.dataset` must be given, but is not."]


def test_all_faults_at_once():
    found = _faults({"count": "x", "flag": 2, "inner": {"depth": 0, "width": 1}, "several": [{"words": 1}], "other": None})
    assert [fault.split("`")[1] for fault in found] == [
        "count", "flag", "inner.depth", "inner.width", "several[0].words", "other",
    ]


def test_no_settings_at_all():
    assert unknown_setting("mu", []) == "is not a setting; there are none here."
    assert unknown_setting("mo", ["mu", "nu"]) == "is not a setting; known here: mu, nu."
    assert unknown_setting("muu", ["mu", "nu"]) == "is not a setting; known here: mu, nu. Did you mean 'mu'?"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"), (True, "true"), (1.5, "1.5"), ("x", "'x'"), ([], "[]"), ({}, "{}"), ({"a": None}, "{'a': null}"),
        (10**39, "1" + "0" * 39), (10**40, "a whole number of about 41 digits"),
    ],
)
def test_values_in_messages(value, text):
    assert shown(value) == text


def test_values_in_messages_are_short():
    assert shown(-(16**5000)) == "a whole number of about 6021 digits"  # more digits than Python writes out
    endless = []
    endless.append(endless)
    for value in ("x" * 10_000, ["y" * 100] * 100, {i: "z" * 100 for i in range(100)}, endless, [[[[[[[[1]]]]]]]], object()):
        assert 2 < len(shown(value)) <= 80


def test_numbers_that_no_setting_takes():
    raw = {
        "a": float("inf"), "b": {"c": [1, {"d": float("nan")}, 2**63], "e": -(2**63)}, 3: float("-inf"),
        "fine": [2**63 - 1, 1e300, True, None, "inf", -(2**63) + 1],
    }
    assert [str(fault) for fault in unusable_numbers(raw, "")] == [
        "`a` must be a finite number, but is inf.",
        "`b.c[1].d` must be a finite number, but is nan.",
        "`b.c[2]` must be a number of 64 bits (at most 9223372036854775807), but is 9223372036854775808.",
        "`b.e` must be a number of 64 bits (at most 9223372036854775807), but is -9223372036854775808.",
        "`3` must be a finite number, but is -inf.",
    ]
