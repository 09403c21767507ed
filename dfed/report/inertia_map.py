"""What a run's inertia comes to: a heat map of units over rounds, and the summary's figures, both from metrics.jsonl."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["draw_inertia", "inertia_rows", "inertia_summary"]

logger = logging.getLogger(__name__)

_SHOWN = ("step", "displacement")
_FINAL = ("relative", "displacement", "cosine")
_TITLES = {"step": "step: ‖W_t − W_t−1‖ / ‖W_t−1‖", "displacement": "displacement: ‖W_t − W_ref‖ / √n"}
_STYLE = {"font.size": 9, "axes.linewidth": 0.6}
_MISSING = "#dddddd"

Rows = Mapping[int, Mapping[str, Mapping[str, float]]]


def inertia_rows(folder: Path) -> dict[int, dict[str, dict[str, float]]]:
    """The finite numbers of every round in a run folder's ``metrics.jsonl``, by round, unit and name.

    What is no such line, or holds something else where a number should be, is passed over; so is a file that is not there.
    """
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        logger.warning("the inertia of the run cannot be read: %s", error)
        return {}
    rows: dict[int, dict[str, dict[str, float]]] = {}
    for line in lines:
        if '"inertia"' not in line:  # clients' lines, which are many, need no parsing
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        number, units = (row.get("round"), row.get("inertia")) if isinstance(row, dict) else (None, None)
        if type(number) is int and number >= 0 and isinstance(units, dict):
            rows[number] = {unit: {name: value for name, value in values.items() if _is_number(value)}
                            for unit, values in units.items() if isinstance(values, dict)}
    return dict(sorted(rows.items()))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def inertia_summary(rows: Rows, units: Sequence[str], chain: Sequence[str]) -> dict[str, Any]:
    """The last values of each unit, and how far the middle of the model moved compared to its ends.

    Args:
        units: That have parameters.
        chain: Those of them that the model itself is made of, in order. With n of them, the first and the last ⌊n / 3⌋ are
            outer, the others middle.

    Returns:
        JSON values: ``units``, by unit the last ``relative``, ``displacement`` and ``cosine`` (None where there is none); and
        ``middle_to_outer``, the mean last ``relative`` of the middle units over that of the outer ones, None where one of the
        two has none, or the outer ones did not move.
    """
    final: dict[str, dict[str, float | None]] = {unit: dict.fromkeys(_FINAL) for unit in units}
    for row in rows.values():
        for unit, values in row.items():
            if unit in final:
                final[unit].update({name: values[name] for name in _FINAL if name in values})
    third = len(chain) // 3
    outer, middle = [*chain[:third], *chain[len(chain) - third:]], chain[third:len(chain) - third]
    moved = [[value for unit in group if (value := final[unit]["relative"]) is not None] for group in (middle, outer)]
    means = [statistics.fmean(values) if values else None for values in moved]
    return {"units": final, "middle_to_outer": means[0] / means[1] if means[0] is not None and means[1] else None}


def draw_inertia(rows: Rows, units: Sequence[str], path: Path) -> bool:
    """Write the heat map, units from top to bottom and rounds from left to right, on a logarithmic scale of colours.

    Grey: no value. What did not move at all has the colour of the smallest value that is not 0.

    Args:
        units: In the order of the model.
        path: Of the PNG file, which is written whole or not at all.

    Returns:
        False if there is nothing to be shown, or it could not be drawn, which is logged: that is no reason for a run to fail.
    """
    panels = {name: grid for name in _SHOWN if (grid := _grid(rows, units, name)) is not None}
    if not panels:
        return False
    partial = path.with_name(f".{path.name}.partial")
    try:
        _draw(panels, units, partial)
        partial.replace(path)
    except Exception as error:
        logger.warning("the inertia cannot be drawn to %s: %s: %s", path, type(error).__name__, error)
        return False
    return True


def _grid(rows: Rows, units: Sequence[str], name: str) -> np.ndarray | None:
    """One figure, (units, rounds), NaN where there is none; None if no value is above 0."""
    grid = np.full((len(units), max(rows, default=-1) + 1), np.nan)
    for number, row in rows.items():
        for place, unit in enumerate(units):
            grid[place, number] = row.get(unit, {}).get(name, np.nan)
    above = grid[grid > 0]
    if not len(above):
        return None
    grid[grid <= 0] = above.min()
    return grid


def _draw(panels: Mapping[str, np.ndarray], units: Sequence[str], path: Path) -> None:
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its fonts
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    colours = matplotlib.colormaps["viridis"].with_extremes(bad=_MISSING)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.5 * len(panels), max(2.0, 1.2 + 0.2 * len(units))), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (name, grid) in zip(axes, panels.items(), strict=True):
            low, high = np.nanmin(grid), np.nanmax(grid)
            norm = LogNorm(low, high if high > low else 2 * low)
            image = axis.imshow(grid, aspect="auto", interpolation="nearest", cmap=colours, norm=norm)
            axis.set_title(_TITLES[name])
            axis.set_xlabel("round")
            axis.xaxis.get_major_locator().set_params(integer=True)
            figure.colorbar(image, ax=axis)
        axes[0].set_yticks(range(len(units)), units)
        figure.savefig(path, dpi=120, format="png")
