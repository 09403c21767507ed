"""Memory: hard caps, measured peaks, predicted peaks."""

from dfed.memory.caps import GREY_ZONE, MemoryMeter, MemorySettings, check_cap, is_out_of_memory, make_cap
from dfed.memory.predict import CPU_OVERHEAD_BYTES, Counter, predict_course, predict_levels, predict_peak
from dfed.memory.probe import PROBE_BATCH, Level, NotProportional, at_most, predict_lines
from dfed.memory.storageless import warm_up

__all__ = [
    "CPU_OVERHEAD_BYTES",
    "GREY_ZONE",
    "PROBE_BATCH",
    "Counter",
    "Level",
    "MemoryMeter",
    "MemorySettings",
    "NotProportional",
    "at_most",
    "check_cap",
    "is_out_of_memory",
    "make_cap",
    "predict_course",
    "predict_levels",
    "predict_lines",
    "predict_peak",
    "warm_up",
]
