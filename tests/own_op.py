"""An op that a user might write, on all backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cute_fmha.epilogues import EpilogueOp

if TYPE_CHECKING:
    import triton.language as tl


def squared_rows(x, token, head, live, parameters, extra, DV):
    return x * x * tl.load(parameters[0][0] + token)[:, None]


def squared_row(row, parameters, extra):
    weight = parameters[0][row.token]
    return lambda x, column: [value * value * weight for value in x]


class Squared(EpilogueOp):
    """``x² · weight[token]``."""

    key = "test:squared"
    triton = staticmethod(squared_rows)
    blackwell = staticmethod(squared_row)

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.weight,)

    @staticmethod
    def reference(x, parameters, out_dtype):
        return (x * x * parameters[0].view(*x.shape[:-2], 1, 1)).to(out_dtype)
