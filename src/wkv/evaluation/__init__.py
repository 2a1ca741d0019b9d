"""How good a model is, and whether it keeps RWKV's promises."""

from .compression import Compression, compression, gzip_bits_per_byte
from .recurrence import parallel_recurrent_difference, seconds_per_token

__all__ = [
    "Compression",
    "compression",
    "gzip_bits_per_byte",
    "parallel_recurrent_difference",
    "seconds_per_token",
]
