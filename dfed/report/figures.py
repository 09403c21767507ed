"""Figures of a comparison: accuracy over rounds, over bytes and over simulated time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dfed.report.comparison import Outcome, Results

__all__ = ["Curve", "curve_of", "draw"]

# Okabe and Ito's palette, which people with the common colour vision deficiencies can tell apart; yellow is too pale for lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1)))
_STYLE = {
    "svg.hashsalt": "dfed", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.grid": True, "grid.linewidth": 0.4, "grid.color": "#dddddd", "axes.axisbelow": True, "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """An entry's accuracy, at the rounds at which all its finished runs were evaluated; arrays of one length.

    Attributes:
        rounds: Rounds completed.
        mebibytes: Sent in both directions, mean over the seeds.
        sim_time_s: Simulated seconds, mean over the seeds.
        mean, std: Accuracy in per cent; ``std`` is 0 for a single seed.
        seeds: Number of runs.
    """

    rounds: np.ndarray
    mebibytes: np.ndarray
    sim_time_s: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    seeds: int


def curve_of(runs: Sequence[Outcome]) -> Curve | None:
    """The curve of one entry's finished runs; None if there is no round at which all were evaluated."""
    if not runs:
        return None
    by_round = [{point.rounds: point for point in run.curve} for run in runs]
    rounds = sorted(set.intersection(*(set(points) for points in by_round)))
    if not rounds:
        return None
    values = np.array([[[points[r].num_bytes / 2**20, points[r].sim_time_s, 100 * points[r].accuracy] for r in rounds]
                       for points in by_round])  # (runs, rounds, 3)
    mean = values.mean(axis=0)
    std = values[:, :, 2].std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(rounds))
    return Curve(np.array(rounds), mean[:, 0], mean[:, 1], mean[:, 2], std, len(runs))


def draw(results: Results, folder: Path) -> bool:
    """Write ``comparison.png`` and ``comparison.svg``, the same bytes for the same results; False if there is no curve.

    Three panels share the axis of accuracy: lines are means over the seeds, bands one standard deviation to either side.
    """
    curves = {label: curve for label in results.comparison.labels if (curve := curve_of(results.of(label))) is not None}
    if not curves:
        return False
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its fonts
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 3, sharey=True)
        for panel, name, title in zip(panels, ("rounds", "mebibytes", "sim_time_s"),
                                      ("rounds", "MiB, up and down", "simulated seconds"), strict=True):
            _panel(panel, results, curves, name)
            panel.set_xlabel(title)
        panels[0].xaxis.get_major_locator().set_params(integer=True)
        panels[0].set_ylabel(f"{results.comparison.runs[0].config.metrics.split} accuracy, %")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center")
        figure.savefig(folder / "comparison.svg", metadata={"Date": None})
        figure.savefig(folder / "comparison.png", dpi=150)
    return True


def _panel(panel: Any, results: Results, curves: dict[str, Curve], name: str) -> None:
    for number, label in enumerate(results.comparison.labels):  # an entry keeps its colour when another has no curve
        if label not in curves:
            continue
        curve, x = curves[label], getattr(curves[label], name)
        colour, dash = _COLOURS[number % len(_COLOURS)], _DASHES[number // len(_COLOURS) % len(_DASHES)]
        marker = "o" if len(x) == 1 else None
        panel.plot(x, curve.mean, color=colour, linestyle=dash, linewidth=1.4, marker=marker, markersize=3, label=label)
        if curve.seeds > 1:
            panel.fill_between(x, curve.mean - curve.std, curve.mean + curve.std, color=colour, alpha=0.15, linewidth=0)
    panel.set_xlim(left=0)
