"""How far units move and how far clients agree: against numpy in float64, entry by entry; figures and heat maps of rows."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dfed import inertia
from dfed.inertia import MeanChange, change_squares, movement
from dfed.inertia_record import REFERENCE, InertiaRecord
from dfed.report import inertia_map
from dfed.report.inertia_map import draw_inertia, inertia_rows, inertia_summary
from dfed.state import ServerState

# Products and stretches' sums are rounded to float32, 2⁻²⁴ each, partial sums of at least eight lanes to as much.
CLOSE = {"rel": 1e-6, "abs": 0}
VALUES = ("cosine", "l1", "l2", "displacement", "relative", "step", "diversity")
SHAPES = {"a.weight": (70_000,), "a.bias": (3,), "b.weight": (40, 30), "b.norm.running_mean": (40,), "c.weight": (2, 5)}
UNITS = {name: name[0] for name in SHAPES if "running" not in name}


def model(seed, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: 1.0 + spread * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def flat(params, unit):
    return np.concatenate([params[name].double().numpy().ravel() for name in UNITS if UNITS[name] == unit])


def test_movement_of_units():
    new, old, reference = model(1), model(2), model(3)
    found = movement(new, old, reference, UNITS, ["a", "b"])
    assert found.keys() == {"a", "b"}  # "c" is not wanted
    for unit, values in found.items():
        w, before, origin = (flat(params, unit) for params in (new, old, reference))
        l2 = np.linalg.norm(w - origin)
        expected = {
            "cosine": w @ origin / np.linalg.norm(w) / np.linalg.norm(origin), "l1": np.abs(w - origin).sum(), "l2": l2,
            "displacement": l2 / np.sqrt(len(w)), "relative": l2 / np.linalg.norm(origin),
            "step": np.linalg.norm(w - before) / np.linalg.norm(before),
        }
        assert values == pytest.approx(expected, **CLOSE)
        assert [*values, "diversity"] == list(VALUES)
        assert movement(new, old, None, UNITS, [unit]) == {unit: {"step": values["step"]}}
    # Models that hardly moved: of the cosine sums in float32 would leave 10⁻⁷, as much as there is to be seen.
    near = {name: value * (1 + 2.0**-12) for name, value in reference.items()}
    close = movement(near, reference, reference, UNITS, ["a"])["a"]
    assert close["relative"] == pytest.approx(2.0**-12, rel=1e-3)  # rounding of `near` to float32
    assert 0 <= 1 - close["cosine"] < 1e-10
    assert close["step"] == close["relative"]
    turned = {name: value + 2.0**-12 * new[name] for name, value in reference.items()}
    w, origin = flat(turned, "a"), flat(reference, "a")
    angle = 1 - w @ origin / np.linalg.norm(w) / np.linalg.norm(origin)
    assert 1e-9 < angle < 1e-7
    assert 1 - movement(turned, new, reference, UNITS, ["a"])["a"]["cosine"] == pytest.approx(angle, rel=1e-2)
    still = movement(reference, reference, reference, UNITS, ["c"])["c"]
    assert still == {"cosine": pytest.approx(1, rel=1e-15), "l1": 0, "l2": 0, "displacement": 0, "relative": 0, "step": 0}


def test_ratios_that_do_not_exist_are_left_out():
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert movement(model(1), zero, zero, UNITS, ["c"])["c"].keys() == {"l1", "l2", "displacement"}
    assert movement(zero, zero, None, UNITS, ["c"]) == {"c": {}}
    empty = {"e": torch.empty(0, 3)}
    assert movement(empty, empty, None, {"e": "e"}, ["e"]) == {"e": {}}
    assert movement(empty, empty, empty, {"e": "e"}, ["e"]) == {"e": {"l1": 0, "l2": 0}}
    lost = {**model(1), "c.weight": torch.full((2, 5), float("nan"))}
    assert movement(lost, model(2), model(3), UNITS, ["b", "c"])["c"].keys() <= {"l1", "l2"}


def test_stretches_of_odd_lengths_and_strides(monkeypatch):
    new, old = model(1), model(2)
    strided = {name: value.t() if value.ndim == 2 else value[::1] for name, value in new.items()}
    base = {name: value.t() if value.ndim == 2 else value for name, value in old.items()}
    expected = {unit: ((flat(new, unit) - flat(old, unit)) ** 2).sum() for unit in "abc"}
    whole = movement(new, old, new, UNITS, "abc")
    for chunk in (7, 64, 100_000):
        monkeypatch.setattr(inertia, "_CHUNK", chunk)
        again = movement(strided, base, strided, UNITS, "abc")
        assert all(again[unit] == pytest.approx(values, rel=1e-6, abs=0) for unit, values in whole.items())
        assert change_squares(new, old, UNITS) == pytest.approx(expected, **CLOSE)
        assert change_squares(strided, base, UNITS) == pytest.approx(expected, **CLOSE)
    assert change_squares({"b.norm.running_mean": new["b.norm.running_mean"]}, old, UNITS) == {}
    assert change_squares({"c.weight": new["c.weight"]}, old, UNITS).keys() == {"c"}
    assert change_squares(new, {"c.weight": old["c.weight"]}, UNITS).keys() == {"c"}  # what was not received has not changed
    assert change_squares({"e": torch.empty(0)}, {"e": torch.empty(0)}, {"e": "e"}) == {"e": 0}


def test_diversity_of_whole_units_by_hand():
    """Two clients with the weights 3 and 1: opposed, alike, and one of them alone."""
    received = {"a": torch.zeros(2), "b": torch.ones(2), "c": torch.ones(1), "d": torch.zeros(1)}
    watch = MeanChange(dict(zip("abcd", "abcd", strict=True)), received)
    first, second = {"a": [1.0, 0.0], "b": [3.0, 2.0], "c": [2.0]}, {"a": [0.0, 1.0], "b": [3.0, 2.0]}
    updates = [(weight, {name: torch.tensor(value) for name, value in of.items()}) for weight, of in ((3, first), (1, second))]
    for name, weight in (("a", 4), ("b", 4), ("c", 3)):
        mean = sum(own * update[name] for own, update in updates if name in update) / weight
        watch(name, mean, weight)
    watch("d", torch.zeros(1), 4)
    watch("norm", torch.full((3,), 9.0), 4)  # no parameter
    found = watch.diversity((weight, change_squares(update, received, dict.fromkeys(update, "") | {n: n for n in update}))
                            for weight, update in updates)
    # (3/4 · 1 + 1/4 · 1) / (9/16 + 1/16); agreement; a single holder; what did not move.
    assert found == {"a": 1.6, "b": 1.0, "c": 1.0, "d": None}
    unknown = MeanChange({"a": "u", "b": "u"}, {"a": torch.zeros(2)})
    unknown("a", torch.ones(2), 1)
    unknown("b", torch.ones(2), 1)
    assert unknown.diversity([(1, {"u": 4.0})]) == {"u": None}
    assert MeanChange({"a": "a"}, {}).diversity([]) == {}


def test_diversity_of_parts_of_a_unit():
    """Entries count with the samples of those that cover them; who agrees on what is shared agrees."""
    received, weights = torch.zeros(4), torch.tensor([2.0, 2.0, 5.0, 3.0], dtype=torch.float64)  # samples 2 and 3
    narrow, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 5.0])
    watch = MeanChange({"w": "u"}, {"w": received})
    watch("w", torch.tensor([1.0, 2.0, 3.0, 5.0]), weights)
    assert watch.diversity([(2, {"u": float(narrow @ narrow)}), (3, {"u": float(other @ other)})]) == {"u": 1.0}
    watch = MeanChange({"w": "u"}, {"w": received})
    opposed = torch.tensor([-3.0, 5.0])
    watch("w", torch.tensor([1.0, 2.0, -3 / 5, 5.0]), weights)
    # 2 · 14 + 3 · 34 over 2 · 1 + 2 · 4 + 5 · 9/25 + 3 · 25; the mean −3/5 is a float32.
    expected = pytest.approx(130 / 86.8, rel=1e-6)
    assert watch.diversity([(2, {"u": 14.0}), (3, {"u": float(opposed @ opposed)})]) == {"u": expected}


def state(seed, rounds):
    return ServerState(round_index=rounds, params=model(seed))


def record(folder, rounds, seed=0, reference=2):
    return InertiaRecord(folder, units=UNITS, reference=reference, state=state(seed, rounds))


def test_the_reference_is_taken_once_and_survives_an_interruption(tmp_path, caplog):
    first, sent = record(tmp_path, 0), {"a": 2.5, "b": None}
    rows = [first.measure(state(n, n), state(n + 1, n + 1), sent) for n in range(4)]
    assert [sorted(row["a"]) for row in rows] == [["diversity", "step"]] * 2 + [sorted(VALUES)] * 2
    assert all(row.keys() == {"a", "b"} and "diversity" not in row["b"] and row["a"]["diversity"] == 2.5 for row in rows)
    w, origin = flat(model(4), "a"), flat(model(2), "a")
    assert rows[3]["a"]["l2"] == pytest.approx(np.linalg.norm(w - origin), **CLOSE)
    saved = load_file(tmp_path / REFERENCE)
    assert saved.keys() == UNITS.keys()
    assert all(torch.equal(value, model(2)[name]) for name, value in saved.items())
    (tmp_path / "other").touch()
    assert (tmp_path / REFERENCE).stat().st_mode == (tmp_path / "other").stat().st_mode
    (tmp_path / "other").unlink()
    assert [path.name for path in tmp_path.iterdir()] == [REFERENCE]
    # Gone on with after the reference round, and exactly there; then from before it, where another model becomes it.
    assert record(tmp_path, 3, 3).measure(state(3, 3), state(4, 4), sent) == rows[3]
    (tmp_path / REFERENCE).unlink()
    assert record(tmp_path, 2, 2).measure(state(2, 2), state(3, 3), sent) == rows[2]
    again = record(tmp_path, 1, 1)
    again.measure(state(1, 1), state(8, 2), sent)
    assert torch.equal(load_file(tmp_path / REFERENCE)["c.weight"], model(8)["c.weight"])
    assert caplog.messages == []


def test_a_reference_that_is_missing_is_said_once(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    record(tmp_path, 2, 2)
    other = {name: value for name, value in model(2).items() if name in UNITS}
    damages = [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"damaged"),
        lambda path: path.write_bytes((tmp_path / "kept").read_bytes()[:-1]),
        lambda path: save_file(other, path),  # does not say of which round
        lambda path: save_file({**other, "c.weight": torch.zeros(3)}, path, metadata={"rounds_completed": "2"}),
        lambda path: save_file({"c.weight": other["c.weight"]}, path, metadata={"rounds_completed": "2"}),
    ]
    (tmp_path / "kept").write_bytes((tmp_path / REFERENCE).read_bytes())
    for damage in damages:
        damage(tmp_path / REFERENCE)
        caplog.clear()
        resumed = record(tmp_path, 3, 3)
        for n in (3, 4):
            assert resumed.measure(state(n, n), state(n + 1, n + 1), {"a": 1.0})["a"].keys() == {"step", "diversity"}
        assert len(caplog.messages) == 1
        assert "no values against the reference" in caplog.messages[0]
    (tmp_path / REFERENCE).write_bytes((tmp_path / "kept").read_bytes())
    assert len(record(tmp_path, 4, 4, reference=3).measure(state(4, 4), state(5, 5), {"a": 1.0})["a"]) == 2  # of round 2


def test_a_disk_that_refuses_the_reference_ends_no_run(tmp_path, caplog):
    (tmp_path / "folder").mkdir()
    there = record(tmp_path / "folder", 1, 1)
    (tmp_path / "folder").rmdir()
    assert "l2" not in there.measure(state(1, 1), state(2, 2), {"a": 1.0})["a"]
    assert "cannot be written" in caplog.text
    assert "l2" in there.measure(state(2, 2), state(3, 3), {"a": 1.0})["a"]


def written(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def line(number, **units):
    return {"kind": "round", "round": number, "inertia": units}


def test_rows_of_a_damaged_file(tmp_path):
    assert inertia_rows(tmp_path) == {}
    written(tmp_path, {"kind": "client", "round": 0}, line(1, a={"step": 0.5, "relative": None, "l1": "x", "l2": True}, b=3),
            line(0, a={"step": 0.25}), '{"round": 3, "inertia": {"a"\n', '"inertia"\n', line("4", a={}), line(-1, a={}),
            {"round": 2, "inertia": []}, '{"round": 5, "inertia": {"a": {"step": Infinity}}}\n', "\ufffd\x00")
    assert inertia_rows(tmp_path) == {0: {"a": {"step": 0.25}}, 1: {"a": {"step": 0.5}}, 5: {"a": {}}}


def test_summary_by_hand():
    units = ["u0", "u1", "u2", "u3", "u4", "extra"]
    rows = {number: {unit: {"relative": number * (place + 1), "cosine": 0.5} for place, unit in enumerate(units)}
            for number in (1, 2)}
    rows[2].pop("u4")
    rows[2]["foreign"] = {"relative": 99.0}
    found = inertia_summary(rows, units, units[:5])
    assert found["units"]["u0"] == {"relative": 2, "displacement": None, "cosine": 0.5}
    assert found["units"]["u4"]["relative"] == 5  # of the last round in which it was sent
    assert list(found["units"]) == units
    assert found["middle_to_outer"] == ((4 + 6 + 8) / 3) / ((2 + 5) / 2)  # one of five at either end
    nothing = dict.fromkeys(("relative", "displacement", "cosine"))
    assert inertia_summary({}, units, units[:5]) == {"units": dict.fromkeys(units, nothing), "middle_to_outer": None}
    assert inertia_summary(rows, units, units[:2])["middle_to_outer"] is None  # too few for thirds
    still = {1: {unit: {"relative": float(unit == "u1")} for unit in units[:3]}}
    assert inertia_summary(still, units, units[:3])["middle_to_outer"] is None


def test_the_heat_map(tmp_path, caplog, monkeypatch):
    path = tmp_path / "inertia.png"
    assert not draw_inertia({}, ["a"], path)
    assert not draw_inertia({0: {"a": {"step": 0.0}}}, ["a"], path)
    rows = {0: {"a": {"step": 0.0}, "b": {"step": 0.5}}, 2: {"a": {"step": 0.25, "displacement": 3.0}}}
    grid = inertia_map._grid(rows, ["a", "b"], "step")
    assert np.array_equal(grid, [[0.25, np.nan, 0.25], [0.5, np.nan, np.nan]], equal_nan=True)  # 0 as the smallest above it
    assert draw_inertia(rows, ["a", "b"], path)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert draw_inertia(rows, ["a", "b"], path)
    assert path.read_bytes() == first
    assert draw_inertia({0: {"a": {"step": 0.5}}}, ["a", "b"], path)  # one panel, one value
    assert path.read_bytes() != first
    assert caplog.messages == []
    monkeypatch.setattr(inertia_map, "_draw", lambda *_: 1 / 0)
    assert not draw_inertia(rows, ["a"], path)
    assert "cannot be drawn" in caplog.text
    assert [child.name for child in tmp_path.iterdir()] == ["inertia.png"]
