from __future__ import annotations

import pytest

from dfed.settings import ByteRate, Bytes, Rate, Settings, format_bytes, parse_quantity, settings_of


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("64MB", "B", 64e6),
        ("1.5 GiB", "B", 1.5 * 2**30),
        (" 64 mib ", "B", 64 * 2**20),
        ("1e3", "B", 1000.0),
        ("7 k", "B", 7000.0),
        ("20 GFLOPS", "FLOP/s", 20e9),
        ("20 gflop/s", "FLOP/s", 20e9),
        ("3 TFLOP", "FLOP/s", 3e12),
        ("1.25 MB/s", "B/s", 1.25e6),
        ("1.25 MBps", "B/s", 1.25e6),
        ("2 MiB/s", "B/s", 2 * 2**20),
        ("100 bytes/s", "B/s", 100.0),
        ("10 Mbps", "B/s", 1.25e6),
        ("10 mbps", "B/s", 1.25e6),
        ("10 Mb/s", "B/s", 1.25e6),
        ("10 Mbit/s", "B/s", 1.25e6),
        ("8 Kibit/s", "B/s", 1024.0),
        ("1 Gbit/s", "B/s", 125e6),
        ("8 bits/s", "B/s", 1.0),
        ("10 M", "B/s", 10e6),
    ],
)
def test_quantities(text, unit, value):
    assert parse_quantity(text, unit) == value


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("", "B"), ("MB", "B"), ("-5 MB", "B"), ("1e999", "B"), ("1.2.3", "B"), ("e", "B"), ("5 MB/s", "B"),
        ("nan", "B"), ("5 Mbit", "B"), ("5 GFLOPS", "B/s"), ("10 MBPS", "B/s"), ("5 MB/s", "FLOP/s"), ("5 XB", "B"),
    ],
)
def test_what_is_no_quantity(text, unit):
    with pytest.raises(ValueError, match="must be a number with an optional prefix and unit") as caught:
        parse_quantity(text, unit)
    assert f"but is '{text}'." in str(caught.value)


def test_quantities_as_fields():
    class Example(Settings):
        size: Bytes = 1
        speed: Rate = 1.0
        link: ByteRate = 1.0

    read = Example(size="1.5 kB", speed="2 GFLOPS", link="8 Mbps")
    assert (read.size, read.speed, read.link) == (1500, 2e9, 1e6)
    assert type(read.size) is int
    assert Example(size=5, speed=5, link=5.0) == Example(size="5", speed="5", link="5")
    for field in ("size", "speed", "link"):
        for bad in (True, "fast", [1]):
            with pytest.raises(ValueError, match=field):
                Example(**{field: bad})
    with pytest.raises(ValueError, match="frozen"):
        read.size = 3
    with pytest.raises(ValueError, match="extra"):
        Example(colour=1)


def test_bytes_for_people():
    texts = [format_bytes(value) for value in (None, 0, 1023, 1310720, 5 * 2**40)]
    assert texts == ["–", "0 B", "1023 B", "1.25 MiB", "5120.00 GiB"]


def test_settings_of_a_signature():
    def make(model, *, rate: float = 0.5, names: list[str], seed: int = 1):
        return model, rate, names, seed

    settings = settings_of(make, given=["seed"])
    assert settings.__name__ == "makeSettings"
    assert settings(names=["a"]).model_dump() == {"rate": 0.5, "names": ["a"]}
    with pytest.raises(ValueError, match="seed"):
        settings(names=[], seed=2)
    with pytest.raises(TypeError, match="`loose`"):
        settings_of(lambda *, loose=1: loose)
