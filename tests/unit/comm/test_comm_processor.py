from __future__ import annotations

import pytest

from dfed.comm import processor


def cache(folder, number, level, size):
    place = folder / f"index{number}"
    place.mkdir()
    (place / "level").write_text(f"{level}\n", encoding="ascii")
    (place / "size").write_text(size, encoding="ascii")


@pytest.mark.parametrize(("size", "expected"), [("512K\n", 400), ("1023K", 400), ("1024K\n", 100), ("2M\n", 100),
                                                ("262144", 400), ("much", 100), ("", 100)])
def test_pieces_are_longer_where_the_second_level_cache_is_small(tmp_path, monkeypatch, size, expected):
    cache(tmp_path, 0, 1, "32K\n")
    cache(tmp_path, 1, 2, size)
    cache(tmp_path, 2, 3, "32768K\n")
    monkeypatch.setattr(processor, "_CACHES", tmp_path)
    assert processor.piece_length(100) == expected


def test_where_nothing_is_known_pieces_are_of_the_usual_length(tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "_CACHES", tmp_path / "missing")
    assert processor.piece_length(100) == 100
    (tmp_path / "index0").mkdir()  # says nothing
    monkeypatch.setattr(processor, "_CACHES", tmp_path)
    assert processor.piece_length(100) == 100
