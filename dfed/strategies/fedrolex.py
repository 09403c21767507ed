"""FedRolex: as HeteroFL, but the window of channels moves on by one each round.

Source: Alam, Liu, Yan, Zhang, "FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model Extraction",
NeurIPS 2022 (arXiv 2212.01548), algorithm 1, equation 4.

Symbols: β (``rate``), share of the channels; j, the round; of a layer's d outputs those at j, j + 1, …, j + ⌈β·d⌉ − 1, modulo
d. One offset for the whole round, so that clients of one width hold the same channels. The next layer's inputs follow the
layer's window; a shortcut takes the inputs of the block's first convolution and the outputs of its last one. Classes are not
rolled.

Deviations: as :mod:`dfed.strategies.heterofl` (whose scaler, masking and norms the authors use). Channels are kept in their
own order, which changes nothing. Attention: the window moves inside each head, over the dimensions of all heads alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfed.blocks.narrowing import Picker
from dfed.blocks.width import window
from dfed.state import ServerState
from dfed.strategies.base import Candidate
from dfed.strategies.heterofl import HeteroFL

__all__ = ["FedRolex"]


class FedRolex(HeteroFL):
    """As heterofl, but the window of channels moves on by one each round and wraps (Alam et al. 2022).

    Arguments as for :class:`HeteroFL`.
    """

    def details(self, rate: float, state: ServerState, candidate: Candidate) -> Mapping[str, Any]:
        common = super().details(rate, state, candidate)
        return common if rate == 1 else {**common, "start": candidate.round_index}

    def examples(self) -> list[Mapping[str, Any]]:
        return [{}, {"start": 1}]

    def picker(self, rate: float, details: Mapping[str, Any]) -> Picker:
        return window(details.get("start", 0))
