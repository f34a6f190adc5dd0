"""`Identity`: store the normalised output in the chosen floating-point dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cute_fmha.epilogues import base

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Identity:
    """Cast to ``dtype`` (bfloat16, float16 or float32; None: the dtype of q), to nearest even."""

    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ValueError(
                f"Identity dtype must be one of {', '.join(map(str, _DTYPES))}; got {self.dtype}"
            )

    @property
    def key(self) -> str:
        return "identity" if self.dtype is None else f"identity:{str(self.dtype)[6:]}"

    def out_dtype(self, input_dtype: torch.dtype) -> torch.dtype:
        return self.dtype or input_dtype

    def reference(self, x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        return x.to(out_dtype)


IDENTITY = Identity()
for _op in (IDENTITY, *map(Identity, _DTYPES)):
    base.register(_op)
