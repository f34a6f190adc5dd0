"""What is measured: shapes, the presets of published figures, and the tensors of a shape."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch

Command = Literal["prefill", "decode", "mla-decode"]
COMMANDS: tuple[Command, ...] = ("prefill", "decode", "mla-decode")

FIELDS = {
    "prefill": ("B", "Hq", "Hkv", "S", "D", "Dv"),
    "decode": ("B", "Hq", "Hkv", "D", "KV"),
    "mla-decode": ("B", "Sq", "Hq", "KV"),
}
"""What the numbers of one ``--shapes`` item are, by command."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

MLA_WIDTH, MLA_VALUE_WIDTH = 576, 512
LOW_BLOCK = 128
"""Keys per block that ``low_share`` makes unimportant."""


@dataclass(frozen=True)
class Shape:
    """One problem. ``seqlen_q`` < ``seqlen_k`` is decode; ``page_size`` 0 is contiguous keys."""

    command: Command
    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    causal: bool
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 0

    @property
    def sizes(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.numbers.items())

    @property
    def mask(self) -> str:
        return "causal" if self.causal else "full"

    @property
    def label(self) -> str:
        return f"{self.sizes} {self.mask}"

    @property
    def numbers(self) -> dict[str, int]:
        """The numbers a ``--shapes`` item gives, by their names there."""
        values = {
            "B": self.batch, "Hq": self.heads_q, "Hkv": self.heads_kv, "S": self.seqlen_q,
            "Sq": self.seqlen_q, "KV": self.seqlen_k, "D": self.head_dim, "Dv": self.head_dim_v,
        }  # fmt: skip
        return {name: values[name] for name in FIELDS[self.command]}

    @property
    def flops(self) -> int:
        """Dense operations, 2·B·Hq·Sq·Sk·(D+Dv); half of that for a causal prefill.

        Skipped tiles are not subtracted, so a skip shows as a higher rate.
        """
        products = self.batch * self.heads_q * self.seqlen_q * self.seqlen_k
        dense = 2 * products * (self.head_dim + self.head_dim_v)
        return dense // 2 if self.causal and self.command == "prefill" else dense

    @property
    def bytes_moved(self) -> int:
        """Bytes a call must move: q, every key and value (the latent once), the output."""
        item = self.dtype.itemsize
        rows_q = self.batch * self.seqlen_q * self.heads_q
        rows_k = self.batch * self.seqlen_k * self.heads_kv
        latent = self.command == "mla-decode"
        width_k = self.head_dim if latent else self.head_dim + self.head_dim_v
        return item * (rows_q * (self.head_dim + self.head_dim_v) + rows_k * width_k)

    def to_json(self) -> dict[str, object]:
        fields = dataclasses.asdict(self)
        fields["dtype"] = str(self.dtype).removeprefix("torch.")
        return fields


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call. For MLA ``k`` is the latent cache and ``v`` its leading columns."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    block_table: torch.Tensor | None
    cache_seqlens: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        parts = [self.q, self.k]
        if self.v.untyped_storage().data_ptr() != self.k.untyped_storage().data_ptr():
            parts.append(self.v)
        return sum(part.numel() * part.element_size() for part in parts)


_ANCHORS: dict[Command, tuple[str, ...]] = {
    "prefill": (
        "2,16,16,8192,128,128",
        "1,16,16,16384,128,128",
        "1,64,8,8192,128,128",
        "8,16,16,2048,128,128",
        "1,32,32,8192,192,128",
        "1,128,128,4096,192,128",
        "2,32,32,8192,64,64",
        "1,16,16,8192,256,256",
    ),
    "decode": (
        "1,32,8,128,1024",
        "1,32,8,128,8192",
        "1,32,8,128,131072",
        "8,32,8,128,8192",
        "32,32,8,128,8192",
        "128,32,8,128,1024",
        "128,32,8,128,8192",
        "1,64,8,128,32768",
        "16,64,8,128,32768",
        "64,64,8,128,8192",
    ),
    "mla-decode": (
        "128,1,128,4096",
        "128,1,128,8192",
        "128,2,128,4096",
        "64,1,128,32768",
        "32,2,128,8192",
        "16,1,128,8192",
        "1,1,128,131072",
        "1,1,128,8192",
        "64,1,16,8192",
        "128,1,16,4096",
        "1,1,16,131072",
    ),
}

_QUICK: dict[Command, tuple[str, ...]] = {
    "prefill": ("1,16,16,16384,128,128", "1,32,32,8192,192,128"),
    "decode": ("1,32,8,128,8192", "64,64,8,128,8192"),
    "mla-decode": ("128,1,128,4096", "1,1,128,8192", "64,1,16,8192"),
}

_CPU: dict[Command, tuple[str, ...]] = {
    "prefill": ("1,4,4,256,64,64", "1,8,2,256,128,128"),
    "decode": ("2,8,2,64,512", "1,8,2,128,1024"),
    "mla-decode": ("1,1,16,256", "2,2,16,128"),
}

PRESETS = {"anchors": _ANCHORS, "quick": _QUICK, "cpu": _CPU}
"""``anchors``: the shapes of the project's recorded peer figures. ``cpu``: seconds without a GPU,
and the default there."""


def parse_numbers(command: Command, text: str) -> tuple[int, ...]:
    """``"2,16,16,8192,128,128"`` as the numbers that `FIELDS` names.

    Raises:
        ValueError: not that many positive integers.
    """
    names = FIELDS[command]
    parts = text.split(",")
    if len(parts) != len(names) or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise ValueError(
            f"--shapes: got {text!r}; {command} takes {len(names)} positive integers "
            f"{','.join(names)}"
        )
    return tuple(int(p) for p in parts)


def make_shape(
    command: Command, numbers: tuple[int, ...], causal: bool, dtype: torch.dtype, page_size: int
) -> Shape:
    """The `Shape` of one ``--shapes`` item."""
    if command == "prefill":
        batch, heads_q, heads_kv, seqlen, dim, dim_v = numbers
        return Shape(
            command, batch, heads_q, heads_kv, seqlen, seqlen, dim, dim_v, causal, dtype
        )  # fmt: skip
    if command == "decode":
        batch, heads_q, heads_kv, dim, seqlen_k = numbers
        return Shape(
            command, batch, heads_q, heads_kv, 1, seqlen_k, dim, dim, causal, dtype, page_size
        )  # fmt: skip
    batch, seqlen_q, heads_q, seqlen_k = numbers
    return Shape(
        command, batch, heads_q, 1, seqlen_q, seqlen_k, MLA_WIDTH, MLA_VALUE_WIDTH, causal, dtype,
        page_size,
    )  # fmt: skip


def make_shapes(
    command: Command,
    texts: tuple[str, ...],
    causal: tuple[bool, ...],
    dtype: torch.dtype,
    page_size: int,
) -> list[Shape]:
    """Every ``--shapes`` item with every value of ``causal``."""
    return [
        make_shape(command, parse_numbers(command, text), flag, dtype, page_size)
        for text in texts
        for flag in causal
    ]


def _lower_blocks(
    q: torch.Tensor, k: torch.Tensor, share: float, scale: float, generator: torch.Generator
) -> None:
    """Make a random ``share`` of `LOW_BLOCK`-key blocks score about 20 (natural log) lower.

    One channel is constant in q and differs between blocks in k (``[sequences, keys, heads, D]``),
    the last one, which holds no value columns of a latent cache.
    """
    blocks = -(-k.shape[1] // LOW_BLOCK)
    low = torch.rand(k.shape[0], blocks, generator=generator, device=k.device) < share
    q[..., -1] = 8.0
    per_key = low.repeat_interleave(LOW_BLOCK, dim=1)[:, : k.shape[1]]
    k[..., -1] = torch.where(per_key, -20.0 / (8.0 * scale), 0.0).to(k.dtype)[..., None]


def make_inputs(shape: Shape, device: torch.device, seed: int, low_share: float = 0.0) -> Inputs:
    """Normally distributed tensors; pages in random order. ``low_share``: see `_lower_blocks`."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=shape.dtype, device=device, generator=generator)

    q = draw(shape.batch, shape.seqlen_q, shape.heads_q, shape.head_dim)
    scale = 1.0 / math.sqrt(shape.head_dim)
    if not shape.page_size:
        k = draw(shape.batch, shape.seqlen_k, shape.heads_kv, shape.head_dim)
        v = draw(shape.batch, shape.seqlen_k, shape.heads_kv, shape.head_dim_v)
        if low_share:
            _lower_blocks(q, k, low_share, scale, generator)
        return Inputs(q, k, v, None, None)
    per_sequence = -(-shape.seqlen_k // shape.page_size)
    pages = shape.batch * per_sequence
    order = torch.randperm(pages, generator=generator, device=device)
    cache = draw(pages, shape.page_size, shape.heads_kv, shape.head_dim)
    if low_share:
        # In the order of the tokens, then scattered to the pages.
        tokens = cache.view(shape.batch, -1, shape.heads_kv, shape.head_dim)
        _lower_blocks(q, tokens, low_share, scale, generator)
        cache = cache[order.argsort()].contiguous()
    values = cache[..., : shape.head_dim_v]
    if shape.command != "mla-decode":
        values = draw(pages, shape.page_size, shape.heads_kv, shape.head_dim_v)
    table = order.view(shape.batch, per_sequence).to(torch.int32)
    lengths = torch.full((shape.batch,), shape.seqlen_k, dtype=torch.int32, device=device)
    return Inputs(q, cache, values, table, lengths)


def input_sets(shape: Shape, cache_bytes: int, limit: int = 32) -> int:
    """How many input sets to rotate among, so that a replay finds little of its own in the L2."""
    return max(1, min(limit, -(-4 * cache_bytes // shape.bytes_moved)))
