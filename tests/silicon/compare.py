"""Where two results of a case differ by more than they may."""

from __future__ import annotations

from collections.abc import Sequence

import alu_harness
import numpy as np

from silicon.model import Buffer, Case


def _same(buffer: Buffer, got: int, want: int) -> bool:
    if not buffer.kind or buffer.kind.lstrip("b").isdigit():
        return False
    case = alu_harness.Case(
        "", "", (), (), lambda: 0, buffer.ulp, buffer.any_nan, absolute=buffer.absolute
    )
    return alu_harness._same(case, buffer.kind, got, want)


def bits(array: np.ndarray) -> np.ndarray:
    """Of the elements, in one dimension: NaNs are equal to themselves."""
    return array.reshape(-1).view(f"u{array.itemsize}")


def differences(case: Case, got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> list[str]:
    """A line for every element that differs, with what it was computed from if that is plain."""
    lines = []
    inputs = [b.data for b in case.buffers if not b.output]
    for number, (buffer, a, b) in enumerate(zip(case.outputs, got, want, strict=True)):
        a, b = bits(a), bits(b)
        for i in np.flatnonzero(a != b):
            x, y = int(a[i]), int(b[i])
            if _same(buffer, x, y):
                continue
            plain = buffer.kind and all(array.shape == buffer.data.shape for array in inputs)
            sources = ", ".join(hex(int(array[i])) for array in inputs) if plain else ""
            place = ", ".join(map(str, np.unravel_index(i, buffer.data.shape)))
            lines.append(
                f"{case.name} output {number} [{place}]({sources}) = {x:#x}, recorded {y:#x}"
            )
    return lines
