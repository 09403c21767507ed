"""Energy that a GPU really took, where NVIDIA's management library says it."""

from __future__ import annotations

import importlib
from typing import Any

import torch

__all__ = ["EnergyMeter"]


class EnergyMeter:
    """Reads the counter of a GPU's energy (the whole card's, since its driver was loaded).

    Args:
        device: What is trained on.

    Attributes:
        reason: Why there is no reading; None if there is one.
    """

    def __init__(self, device: torch.device):
        self._nvml: Any = None
        self.reason: str | None = None
        if device.type != "cuda":
            self.reason = "training on a CPU, whose energy is not measured"
            return
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            self._nvml = nvml
            self.read()
        except ImportError:
            self.reason = "the module `pynvml` is not there: install dfed[nvml]"
        except Exception as error:  # whatever the driver says, the training goes on
            self._fail(error)

    def read(self) -> float | None:
        """Joules on the counter; None where it cannot be read."""
        if self._nvml is None:
            return None
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except Exception as error:  # as above
            self._fail(error)
            return None

    def _fail(self, error: Exception) -> None:
        self._nvml, self.reason = None, f"NVML cannot say: {type(error).__name__}: {error}"
