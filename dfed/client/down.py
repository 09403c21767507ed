"""What a round's broadcast says to a rank, decoded once for all of its clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dfed.client.forms import Form
from dfed.client.home import ClientHome
from dfed.comm import wire
from dfed.comm.wire import Message
from dfed.errors import CheckpointError
from dfed.plan import Plan

__all__ = ["Down"]


@dataclass(frozen=True)
class Down:
    """One round's broadcast.

    Attributes:
        values: Global tensors by name and codec, float32.
        scale: What weights are multiplied by before they are added up.
        ranges: Bound on the entries of an update, by tensor.
        rate_factor: The round's factor on the learning rate.
        per_client: Whether updates go up one by one.
        home: Where clients keep what they remember; None: they remember nothing.
    """

    round_index: int
    values: Mapping[tuple[str, str], Tensor]
    scale: float
    ranges: Mapping[str, float]
    rate_factor: float
    per_client: bool
    home: ClientHome | None
    _to_come: Counter[str]
    _payloads: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, message: Message, plans: Iterable[Plan], *, seed: int) -> Down:
        """Decode the broadcast.

        Args:
            plans: Those of the rank's clients, one each.
            seed: The run's.

        Raises:
            WireError: If the message is malformed.
            CheckpointError: If clients remember something in a folder that is not there.
        """
        meta = message.meta
        home = None if meta["clients_folder"] is None else ClientHome(Path(meta["clients_folder"]))
        if home is not None and not home.folder.is_dir():
            raise CheckpointError(f"clients remember something from round to round, in {home.folder}, which every rank must "
                                  "reach, but this one does not: put the run folder (--out) where all nodes see it.")
        return cls(meta["round"], wire.decode_all(message, seed=seed), meta["scale"], meta["ranges"], meta["rate_factor"],
                   meta["exchange"] == "per_client", home, Counter(plan.shape_key() for plan in plans))

    def payload(self, plan: Plan, form: Form) -> dict[str, Tensor]:
        """What the next client with this plan gets. It is kept as long as others with the same plan are to come.

        Parts of tensors may be copies, which lie outside every client's cap: kept for all plans of a large cohort, they would
        be many models.
        """
        key = plan.shape_key()
        payload = self._payloads.pop(key, None)
        if payload is None:
            payload = form.received(self.values)
        self._to_come[key] -= 1
        if self._to_come[key] > 0:
            self._payloads[key] = payload
        return payload
