"""How good a model is, and whether it keeps RWKV's promises."""

from .code import longest_run, parses, whole_lines
from .comparison import Comparison, compare
from .compression import Compression, gzip_bits_per_byte, measure_compression
from .machine import matmul_peak
from .recurrence import parallel_recurrent_difference, seconds_per_token

__all__ = [
    "Comparison",
    "Compression",
    "compare",
    "gzip_bits_per_byte",
    "longest_run",
    "matmul_peak",
    "measure_compression",
    "parallel_recurrent_difference",
    "parses",
    "seconds_per_token",
    "whole_lines",
]
