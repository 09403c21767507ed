"""Federated Dropout: as HeteroFL, but each client's channels are drawn anew each round.

Source: Caldas, Konečný, McMahan, Talwalkar, "Expanding the Reach of Federated Learning by Reducing Client Resource
Requirements", 2018 (arXiv 1812.07210), section 3.2; the form for clients of different widths is that of Alam et al. 2022
(FedRolex), "random sub-model extraction".

Symbols: of a layer's d outputs ⌈r·d⌉ are drawn without replacement, keyed by seed, round, client and layer.

Deviations: as :mod:`dfed.strategies.heterofl`, whose scaler, masking and norms are used, so that the three methods differ in
the choice of channels only. Caldas et al. draw for all clients of a round alike in width, and leave the first and last layer
whole; here every layer but the classes is narrowed, as in the other two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfed import rng
from dfed.blocks.narrowing import Picker
from dfed.blocks.width import prefix, random_channels
from dfed.state import ServerState
from dfed.strategies.base import Candidate
from dfed.strategies.heterofl import HeteroFL

__all__ = ["FedDropout"]


class FedDropout(HeteroFL):
    """As heterofl, but each client's channels are drawn at random each round (Caldas et al. 2018).

    Arguments as for :class:`HeteroFL`.
    """

    def details(self, rate: float, state: ServerState, candidate: Candidate) -> Mapping[str, Any]:
        common = super().details(rate, state, candidate)
        return common if rate == 1 else {**common, "draw": [candidate.round_index, candidate.client]}

    def examples(self) -> list[Mapping[str, Any]]:
        return [{}, {"draw": [0, 0]}]

    def picker(self, rate: float, details: Mapping[str, Any]) -> Picker:
        if "draw" not in details:
            return prefix
        seed, keys = self.problem.seed, details["draw"]
        return random_channels(lambda group: rng.numpy_generator(seed, "channels", *keys, group))
