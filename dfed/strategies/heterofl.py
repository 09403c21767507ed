"""HeteroFL: clients train the first channels of every layer.

Source: Diao, Ding, Tarokh, "HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous
Clients", ICLR 2021 (arXiv 2010.01264), algorithm 1.

Symbols: r (``rate``), a complexity level; of a layer's d outputs the first ⌈r·d⌉. Aggregation: each entry becomes the mean
over the clients that hold it, weighted by samples; entries that nobody holds keep their value. Scaler: in training, outputs
of layers are divided by r, so that a wide model can be put together from channels trained in narrow ones. Static batch
normalisation: clients normalise by the mini-batch and keep no running statistics; the global model's are worked out from
training data before it is evaluated. Masking: scores of classes that a client has no samples of are held at 0 in training,
and the classifier's rows are averaged over the clients that have the class.

Deviations: weights are numbers of samples, where the authors count clients alike. A client without a class does not hold the
class's row, which is the same computation and fewer bytes. Attention is not scaled. Statistics come from a keyed choice of
the training samples, in mini-batches of ``metrics.batch_size``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from dfed.plan import Phase, Plan
from dfed.state import ServerState
from dfed.strategies.base import Candidate, Problem
from dfed.strategies.width import RATES, Rates, WidthStrategy

__all__ = ["HeteroFL", "Samples", "masked_loss"]


def _not_one(value: int) -> int:
    if value == 1:
        raise ValueError("must be 0 (all) or at least 2, for one sample has no variance, but is 1.")
    return value


Samples = Annotated[int, Field(ge=0), AfterValidator(_not_one)]
"""Training samples for the statistics of norms; 0: all."""


class HeteroFL(WidthStrategy):
    """Each client trains the first channels of every layer, as many as fit; mean per entry (Diao et al. 2021).

    Args:
        rates: Widths that a client may get.
        scaler: Whether outputs of layers are divided by the rate in training.
        mask_classes: Whether scores of classes that a client lacks are held at 0, and their rows left out.
        statistics_samples: Training samples from which the norms' statistics are worked out before evaluation; 0: all.
    """

    def __init__(self, problem: Problem, *, rates: Rates = RATES, scaler: bool = True, mask_classes: bool = True,
                 statistics_samples: Samples = 10_000):
        super().__init__(problem, rates, scaler=scaler, statistics=False, statistics_samples=statistics_samples)
        self.mask_classes = mask_classes

    def details(self, rate: float, state: ServerState, candidate: Candidate) -> Mapping[str, Any]:
        return class_details(self.problem, candidate) if self.mask_classes else {}

    def receive(self, model: nn.Module, client_state: Mapping[str, Tensor], plan: Plan) -> None:
        model.classes = plan.details.get("classes")  # type: ignore[assignment]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, phase: Phase) -> Tensor:
        return masked_loss(model(x), y, model.classes, self.problem.chain.num_classes)  # type: ignore[arg-type]


def class_details(problem: Problem, candidate: Candidate) -> dict[str, Any]:
    """``classes``: those that the client has samples of, where it lacks some."""
    counts = candidate.label_counts()
    present = [] if counts is None else np.flatnonzero(counts).tolist()
    return {"classes": present} if 0 < len(present) < problem.chain.num_classes else {}


def masked_loss(scores: Tensor, y: Tensor, classes: list[int] | None, num_classes: int) -> Tensor:
    """Cross-entropy, where the scores of all classes but ``classes`` (None: all are there) are 0.

    Args:
        scores: (b, len(classes)).
        y: int64 (b,), among ``classes``.
    """
    scores = scores.float() if scores.dtype == torch.bfloat16 else scores
    if classes is not None:
        full = scores.new_zeros(len(scores), num_classes)
        full[:, classes] = scores
        scores = full
    return F.cross_entropy(scores, y)
