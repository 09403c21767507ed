from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest

from dfed.errors import ConfigError
from dfed.fleet import DeviceProfile, Fleet, FleetSettings, TierSettings
from dfed.rng import uniform


def never() -> int:
    raise AssertionError("no budget is a fraction of the full model's peak")


def make(clients, seed=3, peak=never, **tiers):
    settings = FleetSettings(clients=clients, tiers=[TierSettings(name=n, **kw) for n, kw in tiers.items()])
    return Fleet.from_settings(settings, seed=seed, full_peak_bytes=peak)


def test_tiers_have_their_exact_sizes_and_share_one_profile():
    fleet = make(1003, low={"share": 0.3}, mid={"share": 0.5, "availability": 0.5}, high={"share": 0.2})
    everyone = np.arange(1003)
    of = fleet.tier_of(everyone)
    assert fleet.num_clients == 1003
    assert fleet.tier_names == ("low", "mid", "high")
    assert of.dtype == np.int64
    assert [fleet.tier_size(name) for name in fleet.tier_names] == [301, 501, 201]
    assert np.bincount(of).tolist() == [301, 501, 201]
    np.testing.assert_array_equal(fleet.tier_of(everyone[:1002].reshape(2, 501)), of[:1002].reshape(2, 501))
    np.testing.assert_array_equal(fleet.kinds(), of)
    for index, name in enumerate(fleet.tier_names):
        members = fleet.tier_clients(name, None)
        np.testing.assert_array_equal(members, np.flatnonzero(of == index))
        np.testing.assert_array_equal(fleet.tier_clients(name, 7), members[:7])
        assert fleet.tier_clients(name, 0).tolist() == []
        assert len({id(fleet.profile(int(client))) for client in members}) == 1
        assert fleet.profile(int(members[0])).tier == name
    # The row is shuffled: client order says nothing about the tier.
    assert abs(np.corrcoef(everyone, of)[0, 1]) < 0.15  # 5 standard deviations, 1/sqrt(1003) each
    np.testing.assert_array_equal(
        make(1003, low={"share": 0.3}, mid={"share": 0.5}, high={"share": 0.2}).tier_of(everyone), of
    )
    other = make(1003, seed=4, low={"share": 0.3}, mid={"share": 0.5}, high={"share": 0.2})
    assert (other.tier_of(everyone) != of).any()
    for outside in (-1, 1003):
        with pytest.raises(AssertionError, match="less than 1003"):
            fleet.profile(outside)


def test_a_million_clients_cost_no_memory():
    tracemalloc.start()
    fleet = make(1_000_000, low={"share": 0.999999}, rare={"share": 0.000001})
    assert fleet.profile(999_999).tier in ("low", "rare")
    fleet.available(123_456, 5)
    assert fleet.tier_clients("low", 10).size == 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000  # one int64 a client would be 8 MB
    rare = fleet.tier_clients("rare", None)
    assert rare.size == fleet.tier_size("rare") == 1
    assert fleet.profile(int(rare[0])).tier == "rare"


def test_devices_are_looked_up_once_and_few_are_kept(monkeypatch):
    monkeypatch.setattr(sys.modules["dfed.fleet.fleet"], "_KEPT", 3)
    table, looked_up = make(10, low={"share": 0.3}, high={"share": 0.7})._table, []
    own = table.profile
    monkeypatch.setattr(table, "profile", lambda client: looked_up.append(client) or own(client))
    fleet = Fleet(table, seed=0)
    for client in (1, 2, 1, 2, 3, 4, 5, 1):
        assert fleet.profile(client) is own(client)
    assert looked_up == [1, 2, 3, 4, 5, 1]


def test_budgets_resolve_and_the_peak_is_asked_for_once_if_at_all():
    asked = []

    def peak() -> int:
        asked.append(1)
        return 10_000_001

    fleet = make(4, peak=peak, a={"count": 1, "memory": 0.5}, b={"count": 1, "memory": "25%"},
                 c={"count": 1, "memory": "64MB"}, d={"count": 1})
    budgets = {fleet.profile(i).tier: fleet.profile(i).budget_bytes for i in range(4)}
    assert budgets == {"a": 5_000_000, "b": 2_500_000, "c": 64_000_000, "d": None}
    assert all(isinstance(budget, int) for budget in budgets.values() if budget is not None)
    assert asked == [1]
    make(2, a={"count": 2, "memory": 2**20})  # `never` is not called


def test_a_fraction_that_comes_to_less_than_1_mib_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        make(3, peak=lambda: 15 * 2**20, a={"count": 1, "memory": 0.01}, b={"count": 1, "memory": "7%"},
             c={"count": 1, "memory": 0.001})
    assert [str(fault) for fault in caught.value.faults] == [
        "`fleet.tiers[0].memory` must be at least 0.067, as the full model takes 15.00 MiB and a budget 1 MiB or more, "
        "but is 0.01, which is 153.60 KiB.",
        "`fleet.tiers[2].memory` must be at least 0.067, as the full model takes 15.00 MiB and a budget 1 MiB or more, "
        "but is 0.001, which is 15.36 KiB.",
    ]
    make(1, peak=lambda: 15 * 2**20, a={"count": 1, "memory": 0.067})
    with pytest.raises(ConfigError, match=r"must be given in bytes, of at least 1 MiB, as the full model takes 97\.66 KiB"):
        make(1, peak=lambda: 100_000, a={"count": 1, "memory": 10.0})
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "memory\n50%\n1%\n", peak=lambda: 15 * 2**20)
    assert [str(fault) for fault in caught.value.faults] == [
        "`fleet.csv` line 3: `memory` must be at least 0.067, as the full model takes 15.00 MiB and a budget 1 MiB or "
        "more, but is 0.01, which is 153.60 KiB.",
    ]
    with pytest.raises(ConfigError, match="20 faults"):
        read(tmp_path, "memory\n" + "1%\n" * 50, peak=lambda: 15 * 2**20)

    def broken() -> int:
        raise ValueError("of the model, not of the fleet")

    for wrong in ({"memory": 0.5}, {"memory": 0.01}):
        with pytest.raises(ValueError, match=r"^of the model, not of the fleet$"):
            make(1, peak=broken, a={"count": 1, **wrong})


def test_availability_and_dropout_are_keyed_and_have_their_probability():
    fleet = make(3, a={"count": 3, "availability": 0.7, "dropout": 0.2})
    draws = 6000
    for method, probability in ((fleet.available, 0.7), (fleet.drops_out, 0.2)):
        hits = np.array([[method(client, r) for r in range(draws // 3)] for client in range(3)])
        # 4.5 standard deviations of a binomial: passes for all but 1 seed in 100,000; the seed is fixed.
        assert abs(hits.mean() - probability) < 4.5 * (probability * (1 - probability) / draws) ** 0.5
        assert (hits[0] != hits[1]).any()
        assert [method(1, r) for r in reversed(range(50))] == hits[1, :50][::-1].tolist()
    together = np.mean([fleet.available(0, r) and fleet.drops_out(0, r) for r in range(draws)])
    assert abs(together - 0.14) < 4.5 * (0.14 * 0.86 / draws) ** 0.5  # independent of one another
    assert not any(fleet.straggles(0, r) for r in range(100))
    certain = make(2, a={"count": 1}, b={"count": 1, "availability": 0.0, "dropout": 1.0})
    a, b = int(certain.tier_clients("a", 1)[0]), int(certain.tier_clients("b", 1)[0])
    assert all(certain.available(a, r) and not certain.drops_out(a, r) for r in range(100))
    assert all(certain.drops_out(b, r) and not certain.available(b, r) for r in range(100))


def test_straggling_is_keyed_and_independent_of_the_other_draws():
    odds = {"count": 3, "availability": 0.7, "dropout": 0.2}
    fleet, draws = make(3, a={**odds, "straggle": 0.3, "slowdown": 9}), 6000
    hits = np.array([[fleet.straggles(client, r) for r in range(draws // 3)] for client in range(3)])
    # 4.5 standard deviations of a binomial, as above.
    assert abs(hits.mean() - 0.3) < 4.5 * (0.3 * 0.7 / draws) ** 0.5
    assert hits.tolist() == [[uniform(3, "straggle", r, c) < 0.3 for r in range(draws // 3)] for c in range(3)]
    for other, probability in ((fleet.available, 0.7), (fleet.drops_out, 0.2)):
        both = np.mean([[hits[c, r] and other(c, r) for r in range(draws // 3)] for c in range(3)])
        joint = 0.3 * probability
        assert abs(both - joint) < 4.5 * (joint * (1 - joint) / draws) ** 0.5
    usual = make(3, a=odds)  # nothing else is drawn otherwise
    for method in ("available", "drops_out"):
        assert all(getattr(usual, method)(c, r) == getattr(fleet, method)(c, r) for c in range(3) for r in range(200))
    assert [fleet.profile(0).slowdown, usual.profile(0).straggle, usual.profile(0).slowdown] == [9.0, 0.0, 4.0]
    always = make(1, a={"count": 1, "straggle": 1})
    assert all(always.straggles(0, r) for r in range(100))


def read(tmp_path, text, clients=None, peak=never):
    path = tmp_path / "fleet.csv"
    path.write_text(text, encoding="utf-8")
    settings = FleetSettings(csv=str(path), clients=clients)
    return Fleet.from_settings(settings, seed=0, full_peak_bytes=peak)


def test_a_fleet_from_a_file(tmp_path):
    text = (
        "\ufeffclient,tier,memory,flops,up,availability\n"
        "0,phone,64MB,20 GFLOPS,10 Mbps,0.5\n"
        "1,board,50%,5e9,1000,\n"
        "2,phone,,1000000000,,0.25\n"
        "\n"
        " \n"
    )
    fleet = read(tmp_path, text, clients=3, peak=lambda: 10_000_000)
    assert fleet.profile(0) == DeviceProfile("phone", 64_000_000, 20e9, 1.25e6, 6.25e6, 3.0, 1.0, 0.5, 0.0)
    assert fleet.profile(1) == DeviceProfile("board", 5_000_000, 5e9, 1000.0, 6.25e6, 3.0, 1.0, 1.0, 0.0)
    assert fleet.profile(2) == DeviceProfile("phone", None, 1e9, 1.25e6, 6.25e6, 3.0, 1.0, 0.25, 0.0)
    assert fleet.tier_names == ("phone", "board")
    assert fleet.tier_of(np.arange(3)).tolist() == [0, 1, 0]
    assert fleet.tier_of(np.arange(3)).dtype == np.int64
    assert (fleet.tier_size("phone"), fleet.tier_size("board")) == (2, 1)
    assert fleet.tier_clients("phone", None).tolist() == [0, 2]
    assert fleet.tier_clients("phone", 1).tolist() == [0]
    mixed = read(tmp_path, "tier,flops,memory\na,1e9,64MB\na,1e9,\na,1e9,64MB\nb,1e9,64MB\na,1e9,64000001\n")
    slow = read(tmp_path, "flops,straggle,slowdown\n1e9,0.5,2\n1e9,,\n1e9,0.5,2\n1e9,0.5,3\n")
    assert [(slow.profile(i).straggle, slow.profile(i).slowdown) for i in range(4)] == [(0.5, 2), (0, 4), (0.5, 2), (0.5, 3)]
    kinds = slow.kinds().tolist()
    assert kinds[0] == kinds[2]
    assert len(set(kinds)) == 3
    kinds = mixed.kinds().tolist()
    assert kinds[0] == kinds[2]
    assert len(set(kinds)) == 4  # equal numbers for equal devices, and for no others
    assert read(tmp_path, "flops\n1e9\n2e9\n").tier_names == ("all",)
    assert read(tmp_path, 'flops\n1e9\n""\n').num_clients == 2  # a client with the defaults


def test_a_faulty_file_names_its_lines(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "client,memory,flops\n0,1,-5\n1,64MB,1e9,9\n7,,1e9\n3,,fast\n")
    assert [str(fault) for fault in caught.value.faults] == [
        "`fleet.csv` line 2: `memory` must be at least 1 MiB (1048576), but is 1: that is bytes; for a share of the "
        "full model's peak write 0.5 or '50%'.",
        "`fleet.csv` line 2: `flops` must be greater than 0, but is -5.",
        "`fleet.csv` line 3: must have 3 cells, as the header has, but has 4.",
        "`fleet.csv` line 4: `client` must count up from 0 and be 2 here, but is '7'.",
        "`fleet.csv` line 5: `flops` must be a number with an optional prefix and unit, such as '64 MFLOP/s', but is "
        "'fast'.",
    ]
    with pytest.raises(ConfigError, match="20 faults"):
        read(tmp_path, "flops\n" + "-1\n" * 50)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "tier\na,b\n\nc\n \nd\0e\n\n")
    assert [str(fault) for fault in caught.value.faults] == [
        "`fleet.csv` line 2: must have 1 cell, as the header has, but has 2.",
        "`fleet.csv` line 3: must describe a client, but is blank; only the end of the file may be.",
        "`fleet.csv` line 5: must describe a client, but is blank; only the end of the file may be.",
        r"`fleet.csv` line 6: `tier` must be text of at least 1 character, all of which can be printed, but is 'd\x00e'.",
    ]
    with pytest.raises(ConfigError) as caught:  # a spread is for tiers
        read(tmp_path, 'memory,straggle,slowdown\n"{from: 0.1, to: 1.0}",,\n,2,\n,,0.5\n')
    assert [str(fault) for fault in caught.value.faults] == [
        "`fleet.csv` line 2: `memory` must be bytes (64000000, '64MB') or a share (0.5, '50%'), or be left out for no limit, "
        "but is '{from: 0.1, to: 1.0}'.",
        "`fleet.csv` line 3: `straggle` must be less than or equal to 1, but is 2.",
        "`fleet.csv` line 4: `slowdown` must be greater than or equal to 1, but is 0.5.",
    ]
    with pytest.raises(ConfigError, match=r"columns out of client, tier, memory.* has 'colour'"):
        read(tmp_path, "colour\nred\n")
    with pytest.raises(ConfigError, match="name each column once"):
        read(tmp_path, "up,up\n1,1\n")
    with pytest.raises(ConfigError, match=r"as many lines as `clients` \(3\).* has 1"):
        read(tmp_path, "up\n5\n", clients=3)
    with pytest.raises(ConfigError, match="at least one line below the header"):
        read(tmp_path, "")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path, 'up\n"5\n')
    (tmp_path / "latin").write_bytes(b"up\n\xff\n")
    for path, why in (
        (tmp_path / "latin", "values, but .* cannot be read: 'utf-8' codec"),
        ("a\0b", r"but 'a\\x00b' cannot be read: embedded"),
        (tmp_path / "absent", r"can be read, but '[^']*absent' cannot be read: No such file or directory\."),
    ):
        with pytest.raises(ConfigError, match=why):
            Fleet.from_settings(FleetSettings(csv=str(path)), seed=0, full_peak_bytes=never)


def test_what_a_client_can_send_is_drawn_anew_each_round(tmp_path):
    limits = {"upload_least": 0.5, "upload_most": 1.0}
    fleet = make(12, a={"count": 4, **limits}, b={"count": 4, "upload_most": 0.3}, c={"count": 4})
    tiers = fleet.tier_of(np.arange(12))
    drawn = {tier: [fleet.upload_share(client, round) for client in np.flatnonzero(tiers == tier).tolist()
                    for round in range(500)] for tier in range(3)}
    assert 0.5 <= min(drawn[0]) < 0.51  # 2,000 draws
    assert 0.99 < max(drawn[0]) <= 1.0
    assert np.mean(drawn[0]) == pytest.approx(0.75, abs=0.02)  # some six standard deviations
    assert len(set(drawn[0])) == 2000
    assert set(drawn[1]) == {0.3}
    assert set(drawn[2]) == {None}
    assert fleet.upload_share(0, 7) == fleet.upload_share(0, 7)
    from_file = read(tmp_path, "time_share,upload_least,upload_most\n0.33,0.5,1\n,,0.4\n,,\n")
    assert [from_file.profile(i).time_share for i in range(3)] == [0.33, None, None]
    assert 0.5 <= from_file.upload_share(0, 0) <= 1
    assert [from_file.upload_share(i, 0) for i in (1, 2)] == [0.4, None]
    assert len(set(from_file.kinds().tolist())) == 3
