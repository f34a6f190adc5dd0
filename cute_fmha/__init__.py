"""cute_fmha: fused attention and multi-head latent attention (MLA) for serving.

Importing this package imports neither CUTLASS nor Triton; a backend is loaded by its first call.
"""

from cute_fmha.api import attention, make_workspace, mla_decode, skip_softmax
from cute_fmha.problem import BlockMask, SkipSoftmax
from cute_fmha.stats import SkipStats, SkipStatsLogger

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "SkipSoftmax",
    "SkipStats",
    "SkipStatsLogger",
    "attention",
    "make_workspace",
    "mla_decode",
    "skip_softmax",
]
