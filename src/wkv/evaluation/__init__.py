"""How good a model is, and whether it keeps RWKV's promises."""

from .compression import Compression, gzip_bits_per_byte, measure_compression
from .machine import matmul_peak
from .recurrence import parallel_recurrent_difference, seconds_per_token

__all__ = [
    "Compression",
    "gzip_bits_per_byte",
    "matmul_peak",
    "measure_compression",
    "parallel_recurrent_difference",
    "seconds_per_token",
]
