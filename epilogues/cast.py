"""`Identity`: store the normalised output in the chosen floating-point dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cute_fmha.epilogues.base import EpilogueOp, Parameters

CAST_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_cast(name: str, dtype: torch.dtype | None) -> None:
    """Refuse an output dtype that the kernels do not round to."""
    if dtype is not None and dtype not in CAST_DTYPES:
        raise ValueError(
            f"{name} dtype must be one of {', '.join(map(str, CAST_DTYPES))}; got {dtype}"
        )


@dataclass(frozen=True)
class Identity(EpilogueOp):
    """Cast to ``dtype`` (bfloat16, float16 or float32; None: the dtype of q), to nearest even.

    Every kernel's own store does just that, so the op has no device function.
    """

    dtype: torch.dtype | None = None

    key = "identity"

    def __post_init__(self) -> None:
        check_cast("Identity", self.dtype)

    def out_dtype(self, input_dtype: torch.dtype) -> torch.dtype:
        return self.dtype or input_dtype

    @staticmethod
    def reference(x: torch.Tensor, parameters: Parameters, out_dtype: torch.dtype) -> torch.Tensor:
        return x.to(out_dtype)


IDENTITY = Identity()
