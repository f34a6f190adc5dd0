"""All cases. Needs NumPy alone, so that it runs where the emulator is not installed."""

from __future__ import annotations

from silicon import asynchronous, instructions, memory, tensors, warps
from silicon.model import Case, Map


def cases() -> list[Case]:
    found = [
        *instructions.cases(),
        *warps.cases(),
        *memory.cases(),
        *tensors.cases(),
        *asynchronous.cases(),
    ]
    names = [case.name for case in found]
    if len(set(names)) < len(names):
        raise ValueError(f"names used twice: {sorted(n for n in names if names.count(n) > 1)}")
    return found


def failing() -> list[Case]:
    """Kernels that must not run: the GPU's error is recorded."""
    return tensors.failing()


def encodings() -> list[Map]:
    return tensors.encodings()
