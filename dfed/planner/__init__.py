"""The planner: what plans cost, and which of them fit a budget."""

from dfed.planner.costs import Costs

__all__ = ["Costs"]
