"""Epilogue ops: what happens to the normalised FP32 output in registers before it is stored."""

from cute_fmha.epilogues.base import EpilogueOp
from cute_fmha.epilogues.cast import Identity

__all__ = ["EpilogueOp", "Identity"]
