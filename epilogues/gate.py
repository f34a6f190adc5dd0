"""`Gate`: multiply by a sigmoid gate, as models with gated attention do before their projection.

Also the example of an op of one's own: a key, the tensors it reads, what it computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cute_fmha.epilogues.base import EpilogueOp, Parameters

if TYPE_CHECKING:
    import triton.language as tl


def gate_rows(x, token, head, live, parameters, extra, DV):
    """`Gate` in Triton."""
    gate, strides = parameters[0]
    rows = gate + token * strides[0] + head.to(tl.int64) * strides[1]
    columns = tl.arange(0, x.shape[1])
    mask = live[:, None] & (columns < DV)[None, :]
    logits = tl.load(rows[:, None] + columns[None, :] * strides[2], mask=mask, other=0.0)
    return x * (1.0 / (1.0 + tl.exp(-logits.to(tl.float32))))


def gate_row(row, parameters, extra):
    """`Gate` on Blackwell."""
    from cute_fmha.epilogues.store import columns
    from cute_fmha.kernels.blackwell.softmax import sigmoid

    logits = parameters[0][row.token, row.head, None]

    def apply(x, column):
        gate = columns(logits, column, len(x))
        return [value * sigmoid(logit) for value, logit in zip(x, gate, strict=True)]

    return apply


@dataclass(frozen=True, eq=False)
class Gate(EpilogueOp):
    """``x · sigmoid(gate[token, head, d])``, stored in the dtype of q.

    gate: logits shaped like the output, ``[B, Sq, Hq, Dv]`` or ``[total_q, Hq, Dv]``, in any
        floating-point dtype.
    """

    gate: torch.Tensor

    key = "gate"
    triton = staticmethod(gate_rows)
    blackwell = staticmethod(gate_row)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.gate.flatten(0, -3),)  # [tokens, Hq, Dv]

    def validate(self, q: torch.Tensor, head_dim_v: int) -> None:
        if self.gate.shape != (*q.shape[:-1], head_dim_v):
            raise ValueError(
                f"gate: got {tuple(self.gate.shape)}; allowed: {(*q.shape[:-1], head_dim_v)}"
            )

    @staticmethod
    def reference(x: torch.Tensor, parameters: Parameters, out_dtype: torch.dtype) -> torch.Tensor:
        (gate,) = parameters
        assert isinstance(gate, torch.Tensor)
        return (x * gate.float().sigmoid().view(x.shape)).to(out_dtype)
