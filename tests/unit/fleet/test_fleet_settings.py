from __future__ import annotations

import pytest
from pydantic import ValidationError

from dfed.fleet import FleetSettings, TierSettings

FULL = {"name": "a", "share": 1.0}


def errors(cls, **values):
    with pytest.raises(ValidationError) as caught:
        cls(**values)
    return {fault["loc"][0]: fault["msg"] for fault in caught.value.errors()}


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (None, None),
        (64_000_000, 64_000_000),
        ("64000000", 64_000_000),
        ("64MB", 64_000_000),
        ("64MiB", 64 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("1 MiB", 2**20),
        (0.001, 0.001),
        (0.5, 0.5),
        ("0.5", 0.5),
        ("50%", 0.5),
        ("150 %", 1.5),
        (1.0, 1.0),
    ],
)
def test_memory_grammar(given, read):
    memory = TierSettings(**FULL, memory=given).memory
    assert memory == read
    assert type(memory) is type(read)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (1, "write 0.5 or '50%'"),
        ("1", "write 0.5 or '50%'"),
        (2**20 - 1, "at least 1 MiB (1048576), but is 1048575"),
        (0.0, "at least 0.001 and at most 10, but is 0.0"),
        (1e-300, "at least 0.001 and at most 10, but is 1e-300"),
        ("0.05%", "at least 0.001"),
        (-0.5, "at least 0.001"),
        (10.1, "at most 10"),
        (64e6, "write bytes as an integer"),
        ("64e6", "write bytes as an integer"),
        (float("nan"), "at least 0.001"),
        ("nan%", "must be a percentage such as '50%'"),
        ("half%", "must be a percentage such as '50%'"),
        ("a lot", "but is 'a lot'"),
        ("0.1 B", "at least 1 MiB (1048576 bytes)"),
        ("500 kB", "but is 500000"),
        (2**63, "less than 2**63"),
        (True, "(0.5, '50%'), or be left out for no limit, but is true."),
        ("None", "or be left out for no limit, but is 'None'."),
        ([1], "but is [1]"),
        ([None, True], "but is [null, true]"),
        ("x" * 90, f"but is '{'x' * 78}…."),
        (list(range(100)), ", 9, 10, 11,"),
    ],
)
def test_memory_that_is_refused(given, part):
    assert part in errors(TierSettings, **FULL, memory=given)["memory"]


def test_tier_reads_units_and_names_bad_fields():
    tier = TierSettings(name="a", count=3, flops="20 GFLOPS", up="10 Mbps", down="1.25 MB/s", watts=2)
    assert (tier.flops, tier.up, tier.down, tier.watts) == (20e9, 1.25e6, 1.25e6, 2.0)
    bad = {"flops": 0, "up": "5 GFLOPS", "down": float("inf"), "watts": -1, "radio_watts": "x", "availability": 1.1,
           "dropout": -0.1, "straggle": 1.5, "slowdown": 0.5, "name": "", "colour": 1}
    assert errors(TierSettings, **(FULL | bad)).keys() == bad.keys()
    assert "neither is" in errors(TierSettings, name="a")["count"]
    assert "both are" in errors(TierSettings, name="a", share=0.5, count=1)["count"]
    assert errors(TierSettings, name="a", share=1.5).keys() == {"share"}
    assert errors(TierSettings, name="a", count=0).keys() == {"count"}
    for name, written in (("", "''"), ("a\0b", r"'a\x00b'"), ("a\nb", r"'a\nb'")):
        assert errors(TierSettings, name=name, count=1)["name"].endswith(f"can be printed, but is {written}.")
    assert TierSettings(name="schwächer 2", count=1).name == "schwächer 2"


def tiers(**sizes):
    return [TierSettings(name=name, **{"count" if isinstance(size, int) else "share": size})
            for name, size in sizes.items()]


@pytest.mark.parametrize(
    ("values", "field", "part"),
    [
        ({"clients": 0, "tiers": tiers(a=1.0)}, "clients", "greater than or equal to 1"),
        ({"clients": 9, "tiers": tiers(a=0.5, b=0.4)}, "tiers", "sum to 1, but they sum to 0.9"),
        ({"clients": 9, "tiers": tiers(a=4, b=4)}, "tiers", "sum to `clients` (9), but they sum to 8"),
        ({"clients": 9, "tiers": tiers(a=4, b=0.5)}, "tiers", "all give a `share` or all give a `count`"),
        ({"clients": 9, "tiers": tiers(a=0.5) * 2}, "tiers", "'a' occurs more than once"),
        ({"clients": 9, "tiers": []}, "tiers", "is empty"),
        ({"tiers": tiers(a=1.0)}, "tiers", "must come with `clients`"),
        ({"clients": 3, "tiers": tiers(a=0.95, b=0.05)}, "tiers", "'b' gets none"),
        ({"clients": 3}, "csv", "neither is"),
        ({"clients": 3, "tiers": tiers(a=1.0), "csv": "f"}, "csv", "both are"),
    ],
)
def test_fleet_settings_name_the_field(values, field, part):
    found = errors(FleetSettings, **values)
    assert found.keys() == {field}
    assert part in found[field]


@pytest.mark.parametrize(
    ("clients", "sizes", "counts"),
    [
        (100, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, (34, 33, 33)),
        (5, {"a": 0.7, "b": 0.3}, (4, 1)),
        (5, {"a": 0.3, "b": 0.7}, (2, 3)),
        (100, {"a": 0.29, "b": 0.71}, (29, 71)),
        (10, {"a": 0.66, "b": 0.17, "c": 0.17}, (6, 2, 2)),
        (7, {"a": 3, "b": 4}, (3, 4)),
        # Shares within the tolerance still deal out every client exactly once.
        (10**9, {"a": 0.5000004, "b": 0.5000004}, (5 * 10**8, 5 * 10**8)),
    ],
)
def test_shares_round_by_largest_remainder(clients, sizes, counts):
    assert FleetSettings(clients=clients, tiers=tiers(**sizes)).counts() == counts


def test_settings_survive_json():
    settings = FleetSettings(clients=4, tiers=[TierSettings(name="a", share=1.0, memory="100%", up="10 Mbps")])
    assert FleetSettings.model_validate_json(settings.model_dump_json()) == settings
