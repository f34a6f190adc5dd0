"""Portable backend: Triton kernels for sm_80 and later, and Triton's interpreter on CPU tensors."""

from cute_fmha.kernels.triton.launch import run
from cute_fmha.kernels.triton.plan import Plan, can_implement, make_plan

__all__ = ["Plan", "can_implement", "make_plan", "run"]
