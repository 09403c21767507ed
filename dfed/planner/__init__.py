"""The planner: what plans cost, which of them fit a budget, and how to cut a chain so that its stages need little."""

from dfed.planner.bare import chain_costs
from dfed.planner.costs import Costs, with_batch
from dfed.planner.limits import ClientPlanner, Limits, learn
from dfed.planner.profile import UnitProfile, measure_units, profile_chain
from dfed.planner.split import Split, split_chain, stage_peaks
from dfed.planner.store import Store
from dfed.planner.ways import MOST_SAMPLES, Way, ways

__all__ = [
    "MOST_SAMPLES",
    "ClientPlanner",
    "Costs",
    "Limits",
    "Split",
    "Store",
    "UnitProfile",
    "Way",
    "chain_costs",
    "learn",
    "measure_units",
    "profile_chain",
    "split_chain",
    "stage_peaks",
    "ways",
    "with_batch",
]
