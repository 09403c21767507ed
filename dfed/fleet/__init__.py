"""The fleet: device profiles, availability, the virtual clock and energy."""

from __future__ import annotations

from dfed.fleet.clock import Cost, client_cost, round_time
from dfed.fleet.fleet import Fleet
from dfed.fleet.profile import DeviceProfile
from dfed.fleet.settings import ComputeSettings, FleetSettings, TierSettings

__all__ = ["ComputeSettings", "Cost", "DeviceProfile", "Fleet", "FleetSettings", "TierSettings", "client_cost", "round_time"]
