"""The way out of the Blackwell kernels: `Store` alone on fragments."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")
stores = pytest.importorskip("store_harness")
harness = pytest.importorskip("prefill_harness")

policies = pytest.mark.parametrize(
    "policy", harness.POLICIES, ids=lambda policy: f"{policy.mode}{policy.seed or ''}"
)


def guarded(
    shape: tuple[int, ...], dtype: torch.dtype, fill: float = 7.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(an output among guard elements before, after and between its rows; all of the memory)."""
    tokens, heads, columns = shape
    memory = torch.full((tokens + 300, heads, columns + 64), fill).to(dtype)
    return memory[150 : 150 + tokens, :, :columns], memory


@policies
@pytest.mark.parametrize(
    ("dv", "dtype"), [(128, torch.bfloat16), (96, torch.float16), (64, torch.float32)]
)
def test_ragged_rows_end_where_the_next_sequence_begins(policy, dv, dtype):
    """Sequences without a row, with one row, with whole tiles, and with both."""
    lengths = [130, 0, 256, 1, 77]
    x = torch.randn(sum(lengths), 2, dv)
    out, memory = guarded(x.shape, dtype)
    stores.run(x, out, lengths, policy)
    assert torch.equal(out, x.to(dtype))
    out.fill_(7.0)
    assert (memory == 7.0).all(), "memory beside the rows was written"
