"""Codecs: tensor ↔ bytes. Every codec states the exact size before encoding, and the largest error that it makes."""

from dfed.comm.codecs.base import Codec
from dfed.comm.codecs.casts import BF16, FP16, FP32
from dfed.comm.codecs.integers import AffineInt8, Int4, Int8, Stochastic
from dfed.comm.codecs.sparse import Bitmask, RandomK, TopK
from dfed.comm.codecs.spec import codec_of, spec_of

__all__ = [
    "BF16",
    "FP16",
    "FP32",
    "AffineInt8",
    "Bitmask",
    "Codec",
    "Int4",
    "Int8",
    "RandomK",
    "Stochastic",
    "TopK",
    "codec_of",
    "spec_of",
]
