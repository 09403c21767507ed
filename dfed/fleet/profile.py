"""What one device can do: the numbers that plans, the virtual clock and the energy account are made from."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DeviceProfile"]


@dataclass(frozen=True)
class DeviceProfile:
    """One client's device.

    Attributes:
        tier: Name of the class of devices it belongs to.
        budget_bytes: What training may add to the memory of the process; None means no limit.
        flops: Sustained speed of training in FLOP/s.
        up: Speed of the link from client to server in bytes/s.
        down: Speed of the link from server to client in bytes/s.
        watts: Power in W while it computes.
        radio_watts: Power in W while it sends or receives.
        availability: Probability in [0, 1] that it can be reached in a round.
        dropout: Probability in [0, 1] that, once chosen, it vanishes during the round.
        straggle: Probability in [0, 1] that it is slowed down in a round.
        slowdown: How many times as long, at least 1, everything takes it in such a round.
        int8_speedup: How many times as fast it computes in int8 as in floating point.
        time_share: What a round may take it, as a share of plainly training the full model; None: no limit.
        upload_least, upload_most: Between what shares of the full model's bytes it can send in a round; one alone stands for
            both, None for no limit.
    """

    tier: str
    budget_bytes: int | None
    flops: float
    up: float
    down: float
    watts: float
    radio_watts: float
    availability: float
    dropout: float
    straggle: float = 0.0
    slowdown: float = 4.0
    int8_speedup: float = 2.0
    time_share: float | None = None
    upload_least: float | None = None
    upload_most: float | None = None

    @property
    def draws_upload(self) -> bool:
        """Whether what it can send differs from round to round."""
        return None not in (self.upload_least, self.upload_most) and self.upload_least != self.upload_most
