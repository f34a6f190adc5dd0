"""What a call's scores are multiplied by on their way to base 2: host numbers without CuTe DSL."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cute_fmha.ops import Call

LOG2_E = math.log2(math.e)


def multipliers(call: Call) -> tuple[float, float]:
    """``scale_log2`` and ``cap_inner`` of a kernel's scalars: scale · log2 e and nothing, or with a
    softcap cap · log2 e and scale / cap (`softmax.capped`)."""
    if call.problem.softcap:
        return call.softcap * LOG2_E, call.scale / call.softcap
    return call.scale * LOG2_E, 0.0
