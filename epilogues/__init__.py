"""Epilogue ops: what happens to the normalised FP32 output in registers before it is stored."""

from cute_fmha.epilogues.base import EpilogueOp
from cute_fmha.epilogues.cast import Identity
from cute_fmha.epilogues.fp8 import FP8
from cute_fmha.epilogues.gate import Gate
from cute_fmha.epilogues.nvfp4 import NVFP4, NVFP4Output
from cute_fmha.epilogues.scale import Scale

__all__ = ["FP8", "NVFP4", "EpilogueOp", "Gate", "Identity", "NVFP4Output", "Scale"]
