"""Strategies: one method of federated training a file."""

from dfed.strategies.base import PASS, Candidate, Feed, Problem, Strategy

__all__ = ["PASS", "Candidate", "Feed", "Problem", "Strategy"]
