"""Masks of one score row: which columns of a KV tile a query row may attend to."""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32

from cute_fmha.kernels.blackwell import ptx
from cute_fmha.kernels.blackwell.plan import Features


def window_sides(features: Features, scalars: Any) -> tuple[Any, Any]:
    """Window sides; the Python integer −1 for a side that is not compiled in."""
    return (
        scalars.window_left if features.window_left else -1,
        scalars.window_right if features.window_right else -1,
    )


def mask_row(
    scores: list[Float32],
    row: Int32,
    first_key: Int32,
    lengths: tuple[Int32, Int32],
    window: tuple[Any, Any],
    seen: list[Int32] | None = None,
) -> list[Float32]:
    """The ``scores`` of query ``row`` over keys ``first_key…``, −inf where it may not attend.

    ``lengths`` are those of the sequence in queries and keys. A side of ``window`` is a run-time
    value, or the Python integer −1 where the kernel has none. ``seen`` has a bit for every key that
    a block mask shows. Scores are selected, never computed
    with: what the MMA made of keys past the sequence may be NaN.
    """
    seqlen_q, seqlen_k = lengths
    left, right = window
    diagonal = row + seqlen_k - seqlen_q - first_key
    end = seqlen_k - first_key
    if not isinstance(right, int):
        end = cutlass.min(end, diagonal + right + 1)
    begin = None if isinstance(left, int) else diagonal - left
    masked = Float32(-Float32.inf)
    result = []
    for word in range(0, len(scores), 32):
        # A bit for every column: the machine moves seven of them to predicates at a time.
        bits = ~ptx.shift_left(-1 & 0xFFFFFFFF, cutlass.max(end - word, 0))
        if begin is not None:
            bits = bits & ptx.shift_left(-1 & 0xFFFFFFFF, cutlass.max(begin - word, 0))
        if seen is not None:
            bits = bits & seen[word // 32]
        result += [
            cutlass.select_((bits & Int32(1 << j if j < 31 else -(1 << 31))) != 0, score, masked)
            for j, score in enumerate(scores[word : word + 32])
        ]
    return result
