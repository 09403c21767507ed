"""Strategies: one method of federated training a file."""

from dfed.strategies.base import Candidate, Problem, Strategy

__all__ = ["Candidate", "Problem", "Strategy"]
