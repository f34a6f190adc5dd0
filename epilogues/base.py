"""The epilogue contract, and the registry that lets an op travel through a torch.library schema."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

_REGISTRY: dict[str, EpilogueOp] = {}


@runtime_checkable
class EpilogueOp(Protocol):
    """Acts on the normalised FP32 accumulator; data flows one way, from registers to the output.

    With split-KV the op runs once, after the combine.
    """

    @property
    def key(self) -> str:
        """Identifies the op and its compile-time parameters in caches and in the op schema."""

    def out_dtype(self, input_dtype: torch.dtype) -> torch.dtype:
        """The dtype of the output tensor for inputs of ``input_dtype``."""

    def reference(self, x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        """What the op makes of FP32 ``x`` (any shape, head dim last), eagerly."""


def register(op: EpilogueOp) -> str:
    """Remember ``op`` under its key and return the key."""
    key = op.key
    _REGISTRY.setdefault(key, op)
    return key


def resolve(key: str) -> EpilogueOp:
    """The op registered under ``key``.

    Raises:
        KeyError: no op of that key was registered in this process.
    """
    return _REGISTRY[key]
