"""Models as chains of named units; every random number that they draw comes from a generator handed to them."""

from __future__ import annotations

from dfed.models.build import build_chain
from dfed.models.chain import Chain, materialise
from dfed.models.conv_parts import convolutions_in_parts

__all__ = ["Chain", "build_chain", "convolutions_in_parts", "materialise"]
