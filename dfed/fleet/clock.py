"""Virtual time and energy of a client's part in a round, computed from its device profile and never measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dfed.fleet.profile import DeviceProfile

__all__ = ["Cost", "client_cost", "round_time"]


@dataclass(frozen=True)
class Cost:
    """What one round costs one client: seconds for computing, receiving and sending, and energy in joules."""

    compute_s: float
    down_s: float
    up_s: float
    energy_j: float

    @property
    def total_s(self) -> float:
        """Seconds from the first byte received to the last byte sent: the three parts follow one another."""
        return self.down_s + self.compute_s + self.up_s


def client_cost(profile: DeviceProfile, *, flops: float, bytes_down: int, bytes_up: int, int8_flops: float = 0.0,
                slowed: bool = False) -> Cost:
    """The cost of one client's round.

    ::

        factor    = profile.slowdown if slowed else 1
        compute_s = factor * (flops + int8_flops / profile.int8_speedup) / profile.flops
        down_s    = factor * bytes_down / profile.down
        up_s      = factor * bytes_up   / profile.up
        energy_j  = profile.watts * compute_s + profile.radio_watts * (down_s + up_s)

    A client that is slowed down draws the same power for longer. Latency, retransmission, idle power and the energy of the
    server are left out.

    Args:
        profile: The client's device.
        flops: Floating-point operations of the local training.
        int8_flops: Its operations in int8.
        bytes_down, bytes_up: Encoded bytes from and to the server.
        slowed: Whether the client is slowed down in this round; not so in predictions.
    """
    assert min(flops, int8_flops, bytes_down, bytes_up) >= 0, "work and bytes cannot be negative"
    factor = profile.slowdown if slowed else 1.0
    work = flops + int8_flops / profile.int8_speedup
    parts = work / profile.flops, bytes_down / profile.down, bytes_up / profile.up
    compute_s, down_s, up_s = (factor * part for part in parts)
    return Cost(compute_s, down_s, up_s, profile.watts * compute_s + profile.radio_watts * (down_s + up_s))


def round_time(costs: Iterable[Cost]) -> float:
    """Seconds of a synchronous round, which waits for its slowest client: ``max(cost.total_s)``; 0 for no clients."""
    return max((cost.total_s for cost in costs), default=0.0)
