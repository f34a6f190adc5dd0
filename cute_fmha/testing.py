"""What tests of every backend share: cases, error budgets derived from FP64, comparison.

A test builds a case, runs it and checks it::

    case = dense_case(2, 100, 300, Heads(8, 2, 128, 128), Options(causal=True), Source(dtype))
    out, lse = case.run(backend="triton")
    check(case, out, lse)

Cases are drawn on the CPU from a seed, so that every device gets the same numbers. Memory that a
kernel must not use is NaN: key rows past ``seqused_k``, page tails, pages no table refers to.
Block-table entries past a sequence's length hold page numbers that do not exist.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cute_fmha import api, reference
from cute_fmha.problem import BlockMask, SkipSoftmax
from cute_fmha.reference import OracleResult
from cute_fmha.tiling import ceil_div

COSINE_FLOOR = {torch.float16: 0.999998, torch.bfloat16: 0.999995, torch.float32: 0.9999999}
"""Least cosine similarity to the FP64 specification, by the kernel's dtype."""

RMS_FACTOR = 1.1
"""Most RMS error, in units of the error of the FP32 computation that rounds only P and output."""

ABSOLUTE = 8e-4
RELATIVE = 2 / 128
"""Elementwise: |error| <= ABSOLUTE · (std / 0.1) + RELATIVE · |expected|."""

LSE_ABSOLUTE = 1e-5
"""|LSE error| <= LSE_ABSOLUTE · max(1, |LSE|): FP32 numbers cannot do better as they grow."""

BAD_PAGE = 1 << 30
"""Fills block-table entries that must never be read; no cache has that many pages."""


_LOW_SHARE = 0.75
"""Of the key blocks of a skip-friendly case: enough that whole tiles are low, for both patterns."""


@dataclass(frozen=True)
class ErrorReport:
    """How far a result is from the specification, over the positions where both are finite.

    cosine: 2⟨a, b⟩ / (|a|² + |b|²): like the cosine to second order, but a wrong scale shows too.
    rms, max_abs: of a − b. worst_index: where |a − b| is largest.
    mismatched: positions where NaN, +inf or −inf are not in both. first_mismatch: one of them.
    """

    cosine: float
    rms: float
    max_abs: float
    worst_index: tuple[int, ...]
    mismatched: int
    first_mismatch: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class Heads:
    """Query and key/value heads, and the widths D and Dv."""

    q: int
    kv: int
    dim: int
    dim_v: int


@dataclass(frozen=True)
class Source:
    """Where numbers come from: dtype, device, seed, and their distribution.

    std: q, k, v ~ N(0, std²) clamped to ±10·std; 0.1 is the scale the absolute budget is stated at.
    gap: > 0 makes scores skip-friendly: blocks of ``gap_block`` keys score about 0 or −gap, by one
        of two patterns that ``gap_block`` query positions share. With ln λ = −gap / 2 every
        decision then has a margin of nearly gap / 2, and rows of one tile disagree.
    """

    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    seed: int = 0
    std: float = 0.1
    gap: float = 0.0
    gap_block: int = 32


@dataclass(frozen=True)
class Options:
    """The options of a call; ``sink`` draws logits, ``blocks`` is (block_m, block_n, density)."""

    scale: float | None = None
    causal: bool = False
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    sink: bool = False
    blocks: tuple[int, int, float] | None = None


@dataclass(frozen=True)
class Tiles:
    """The tiles whose skip decisions a kernel takes; see `cute_fmha.reference.tile_oracle`."""

    tile_m: int
    tile_n: int
    pack_heads: bool
    num_splits: int = 1
    cuts: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True)
class AttentionCase:
    """Inputs of one `cute_fmha.attention` call. ``common`` goes to every function, ``launch`` (host
    upper bounds) only to the call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    std: float
    common: dict[str, Any] = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)

    def run(self, **call: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of `cute_fmha.attention` with the further arguments ``call``."""
        return _pair(
            api.attention(
                self.q, self.k, self.v, return_lse=True, **self.common, **self.launch, **call
            )
        )

    def reference(self, **call: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) by definition, FP64."""
        return reference.attention_reference(self.q, self.k, self.v, **self.common, **call)

    def oracle(self, tiles: Tiles, skip: SkipSoftmax | None = None, **call: Any) -> OracleResult:
        """The tile-by-tile replay, FP64."""
        return reference.tile_oracle(
            self.q, self.k, self.v, skip=skip, **vars(tiles), **self.common, **call
        )


@dataclass(frozen=True)
class MlaCase:
    """Inputs of one `cute_fmha.mla_decode` call."""

    q: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    std: float
    common: dict[str, Any] = field(default_factory=dict)

    def run(self, **call: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of `cute_fmha.mla_decode` with the further arguments ``call``."""
        return _pair(api.mla_decode(**self._inputs, return_lse=True, **call))

    def reference(self, **call: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) by definition, FP64."""
        return reference.mla_reference(**self._inputs, **call)

    def oracle(self, tiles: Tiles, skip: SkipSoftmax | None = None, **call: Any) -> OracleResult:
        """The tile-by-tile replay, FP64."""
        return reference.mla_tile_oracle(**self._inputs, skip=skip, **vars(tiles), **call)

    @property
    def _inputs(self) -> dict[str, Any]:
        return {
            "q": self.q,
            "kv_cache": self.kv_cache,
            "block_table": self.block_table,
            "cache_seqlens": self.cache_seqlens,
            **self.common,
        }


Case = AttentionCase | MlaCase


def _pair(
    result: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(result, tuple)
    return result


def _position(flat: torch.Tensor, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(flat, shape))


def error_report(actual: torch.Tensor, expected: torch.Tensor) -> ErrorReport:
    """Compare ``actual`` with ``expected`` of the same shape, in FP64.

    Raises:
        AssertionError: the shapes differ.
    """
    assert actual.shape == expected.shape, (
        f"shape: got {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    a, b = actual.double(), expected.double().to(actual.device)
    same_special = (a.isnan() & b.isnan()) | (a.isinf() & (a == b))
    finite = a.isfinite() & b.isfinite()
    mismatch = ~(finite | same_special)
    mismatched = int(mismatch.sum())
    first = _position(mismatch.flatten().byte().argmax(), a.shape) if mismatched else ()
    a, b = torch.where(finite, a, 0.0), torch.where(finite, b, 0.0)
    error = (a - b).abs()
    count = int(finite.sum())
    energy = float((a * a).sum() + (b * b).sum())
    cosine = 2 * float((a * b).sum()) / energy if energy > 0 else 1.0
    if count == 0:
        return ErrorReport(cosine, 0.0, 0.0, (), mismatched, first, 0)
    rms = math.sqrt(float((error * error).sum()) / count)
    worst = _position(error.flatten().argmax(), a.shape)
    return ErrorReport(cosine, rms, float(error.max()), worst, mismatched, first, count)


def rounded_baseline(
    case: Case,
    out_dtype: torch.dtype,
    tiles: Tiles | None = None,
    skip: SkipSoftmax | None = None,
) -> torch.Tensor:
    """The output of an FP32 computation that rounds only P and the output to the case's dtype.

    P is unnormalised, exp(s − row max). With ``tiles`` the skip decisions of the replay apply.
    """
    rounding = {"dtype": torch.float32, "round_p": case.q.dtype}
    if tiles is None:
        out, _ = case.reference(**rounding)
    else:
        out = case.oracle(tiles, skip, **rounding).out
    return out.to(out_dtype)


def _rms_limit(baseline: ErrorReport, expected: torch.Tensor) -> float:
    """Most RMS error allowed next to that of ``baseline``.

    Two independent roundings of n elements have RMS errors whose ratio scatters by about 1/√n;
    below 4096 elements that scatter would need more than `RMS_FACTOR`. The FP32 term covers
    results that the baseline reaches without any rounding, and FP32 kernels, which sum in another
    order than the baseline does.
    """
    count = max(1, baseline.count)
    factor = RMS_FACTOR + max(0.0, 4 / math.sqrt(count) - 4 / math.sqrt(4096))
    finite = torch.where(expected.isfinite(), expected, 0.0)
    level = math.sqrt(float((finite * finite).sum()) / count)
    return factor * baseline.rms + 4 * torch.finfo(torch.float32).eps * level


def assert_close(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    expected_out: torch.Tensor,
    expected_lse: torch.Tensor,
    *,
    dtype: torch.dtype,
    baseline_out: torch.Tensor,
    std: float = 0.1,
) -> ErrorReport:
    """Hold ``out`` and ``lse`` against the quality gates; returns the report on ``out``.

    dtype: the kernel's (that of q). baseline_out: of `rounded_baseline`. std: of v.

    Raises:
        AssertionError: a gate is missed; the message says which, by how much and where.
    """
    expected_out = expected_out.double().to(out.device)
    report = error_report(out, expected_out)
    assert report.mismatched == 0, (
        f"out: NaN/inf disagree at {report.mismatched} positions, first {report.first_mismatch}: "
        f"got {out[report.first_mismatch]}, expected {expected_out[report.first_mismatch]}"
    )
    where = f"; worst error {report.max_abs:.3e} at {report.worst_index}"
    baseline = error_report(baseline_out, expected_out)
    # Where the format itself misses the gate (fp16 subnormals), so must every kernel.
    distance = max(1 - COSINE_FLOOR[dtype], RMS_FACTOR**2 * (1 - baseline.cosine))
    assert 1 - report.cosine <= distance, (
        f"out: 1 − cosine is {1 - report.cosine:.3e}, allowed {distance:.3e}{where}"
    )
    limit = _rms_limit(baseline, expected_out)
    assert report.rms <= limit, (
        f"out: RMS error {report.rms:.3e}, allowed {limit:.3e} (baseline {baseline.rms:.3e}){where}"
    )
    allowed = ABSOLUTE * std / 0.1 + RELATIVE * expected_out.abs()
    excess = torch.nan_to_num((out.double() - expected_out).abs() - allowed)
    assert excess.numel() == 0 or float(excess.max()) <= 0, (
        f"out: error exceeds {ABSOLUTE * std / 0.1:.1e} + {RELATIVE:.4f}·|x| by "
        f"{float(excess.max()):.3e} at {_position(excess.flatten().argmax(), excess.shape)}"
    )
    if lse is not None:
        _assert_lse_close(lse, expected_lse)
    return report


def _assert_lse_close(lse: torch.Tensor, expected: torch.Tensor) -> None:
    expected = expected.double().to(lse.device)
    report = error_report(lse, expected)
    assert report.mismatched == 0, (
        f"lse: NaN/inf disagree at {report.mismatched} positions, first {report.first_mismatch}: "
        f"got {lse[report.first_mismatch]}, expected {expected[report.first_mismatch]}"
    )
    error = torch.where(expected.isfinite(), (lse.double() - expected).abs(), 0.0)
    excess = error - LSE_ABSOLUTE * torch.where(expected.isfinite(), expected.abs(), 0.0).clamp(1)
    assert excess.numel() == 0 or float(excess.max()) <= 0, (
        f"lse: worst error {report.max_abs:.3e} at {report.worst_index}, "
        f"allowed {LSE_ABSOLUTE:.0e}·max(1, |lse|)"
    )


def check(
    case: Case,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    tiles: Tiles | None = None,
    skip: SkipSoftmax | None = None,
) -> ErrorReport:
    """`assert_close` against the specification, or against the replay of ``tiles`` and ``skip``."""
    if tiles is None:
        expected_out, expected_lse = case.reference()
    else:
        result = case.oracle(tiles, skip)
        expected_out, expected_lse = result.out, result.lse
    return assert_close(
        out, lse, expected_out, expected_lse, dtype=case.q.dtype, std=case.std,
        baseline_out=rounded_baseline(case, out.dtype, tiles, skip),
    )  # fmt: skip


class _Draw:
    """Draws the numbers of one case, in a fixed order, on the CPU."""

    def __init__(self, source: Source, heads: Heads, options: Options) -> None:
        self.source, self.heads, self.options = source, heads, options
        self.generator = torch.Generator().manual_seed(source.seed)

    def normal(self, *shape: int) -> torch.Tensor:
        std = self.source.std
        x = torch.randn(shape, generator=self.generator) * std
        return x.clamp(-10 * std, 10 * std).to(self.source.dtype)

    def on_device(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.source.device)

    def ints(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.source.device)

    def _blocks(self, length: int) -> int:
        return ceil_div(length, self.source.gap_block)

    def _directions(self, width: int) -> torch.Tensor:
        """Two orthogonal unit vectors ``[2, width]`` over the value columns of an MLA latent."""
        half = torch.zeros(2, width)
        half[0, : width // 2] = half[1, width // 2 :] = 1
        return half / half.norm(dim=1, keepdim=True)

    def queries(self, length: int) -> torch.Tensor:
        """One sequence's q ``[length, Hq, D]``."""
        x = self.normal(length, self.heads.q, self.heads.dim)
        if self.source.gap == 0:
            return x
        scale = self.options.scale or self.heads.dim**-0.5
        pattern = torch.randint(2, (self._blocks(length),), generator=self.generator)
        rows = pattern.repeat_interleave(self.source.gap_block)[:length]
        x = x + (self._directions(self.heads.dim)[rows] / scale)[:, None, :]
        return x.to(self.source.dtype)

    def keys(self, length: int) -> torch.Tensor:
        """One sequence's k ``[length, Hkv, D]``."""
        x = self.normal(length, self.heads.kv, self.heads.dim)
        if self.source.gap == 0:
            return x
        shape = (self._blocks(length), self.heads.kv, 2)
        low = torch.rand(shape, generator=self.generator) < _LOW_SHARE
        levels = (-self.source.gap * low).repeat_interleave(self.source.gap_block, 0)[:length]
        return (x + levels @ self._directions(self.heads.dim)).to(self.source.dtype)

    def values(self, length: int) -> torch.Tensor:
        """One sequence's v ``[length, Hkv, Dv]``."""
        return self.normal(length, self.heads.kv, self.heads.dim_v)

    def options_kwargs(self, batch: int, seqlen_q: int, seqlen_k: int) -> dict[str, Any]:
        """The arguments that `Options` stands for; a None or 0 option is left out."""
        o = self.options
        kwargs: dict[str, Any] = {"causal": o.causal}
        for name in ("scale", "window", "softcap"):
            if getattr(o, name):
                kwargs[name] = getattr(o, name)
        if o.sink:
            kwargs["sink"] = self.on_device(torch.randn(self.heads.q, generator=self.generator))
        if o.blocks is not None:
            block_m, block_n, density = o.blocks
            shape = (batch, self.heads.q, ceil_div(seqlen_q, block_m), ceil_div(seqlen_k, block_n))
            mask = torch.rand(shape, generator=self.generator) < density
            kwargs["block_mask"] = BlockMask(self.on_device(mask), block_m, block_n)
        return kwargs

    def pages(
        self, lengths: Sequence[int], page_size: int, sequences: Sequence[Sequence[torch.Tensor]]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(block table, caches): each list of per-sequence tokens scattered over shuffled pages."""
        counts = [ceil_div(length, page_size) for length in lengths]
        spare = 2
        order = torch.randperm(sum(counts) + spare, generator=self.generator).int()
        table = torch.full((len(lengths), max([1, *counts]) + 1), BAD_PAGE, dtype=torch.int32)
        caches = []
        for tokens in sequences:
            shape = (len(order) * page_size, *tokens[0].shape[1:])
            cache = torch.full(shape, float("nan"), dtype=self.source.dtype)
            start = 0
            for index, (length, count) in enumerate(zip(lengths, counts, strict=True)):
                own = order[start : start + count]
                table[index, :count] = own
                slots = (own.long()[:, None] * page_size + torch.arange(page_size)).flatten()
                cache[slots[:length]] = tokens[index]
                start += count
            caches.append(cache.unflatten(0, (len(order), page_size)))
        return self.on_device(table), caches

    def attention_case(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        common: dict[str, Any],
        launch: dict[str, Any],
    ) -> AttentionCase:
        q, k, v = self.on_device(q), self.on_device(k), self.on_device(v)
        return AttentionCase(q, k, v, self.source.std, common, launch)


def _cumulative(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def dense_case(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads: Heads,
    options: Options = Options(),
    source: Source = Source(),
    seqused_k: Sequence[int] | None = None,
) -> AttentionCase:
    """q, k, v ``[B, S, H, D]``; keys past ``seqused_k`` are NaN."""
    draw = _Draw(source, heads, options)

    def stack(sequence: Callable[[int], torch.Tensor], length: int) -> torch.Tensor:
        return torch.stack([sequence(length) for _ in range(batch)])

    q, k, v = (
        stack(draw.queries, seqlen_q),
        stack(draw.keys, seqlen_k),
        stack(draw.values, seqlen_k),
    )
    common = draw.options_kwargs(batch, seqlen_q, seqlen_k)
    if seqused_k is not None:
        for index, used in enumerate(seqused_k):
            k[index, used:] = float("nan")
            v[index, used:] = float("nan")
        common["seqused_k"] = draw.ints(seqused_k)
    return draw.attention_case(q, k, v, common, {})


def packed_case(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    heads: Heads,
    options: Options = Options(),
    source: Source = Source(),
) -> AttentionCase:
    """q, k, v ``[total, H, D]`` of ragged sequences, zero lengths allowed."""
    draw = _Draw(source, heads, options)
    q = torch.cat([draw.queries(length) for length in lengths_q])
    k = torch.cat([draw.keys(length) for length in lengths_k])
    v = torch.cat([draw.values(length) for length in lengths_k])
    launch = {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}
    common = draw.options_kwargs(len(lengths_q), max(lengths_q), max(lengths_k))
    common["cu_seqlens_q"] = draw.ints(_cumulative(lengths_q))
    common["cu_seqlens_k"] = draw.ints(_cumulative(lengths_k))
    return draw.attention_case(q, k, v, common, launch)


def paged_case(
    lengths_q: int | Sequence[int],
    lengths_k: Sequence[int],
    page_size: int,
    heads: Heads,
    options: Options = Options(),
    source: Source = Source(),
) -> AttentionCase:
    """k, v in shuffled pages; q ``[B, Sq, H, D]`` for one ``lengths_q``, packed for several."""
    draw = _Draw(source, heads, options)
    batch = len(lengths_k)
    common: dict[str, Any] = {}
    launch = {}
    if isinstance(lengths_q, int):
        seqlen_q = lengths_q
        q = torch.stack([draw.queries(seqlen_q) for _ in range(batch)])
    else:
        seqlen_q = max(lengths_q)
        q = torch.cat([draw.queries(length) for length in lengths_q])
        common["cu_seqlens_q"] = draw.ints(_cumulative(lengths_q))
        launch["max_seqlen_q"] = seqlen_q
    k = [draw.keys(length) for length in lengths_k]
    v = [draw.values(length) for length in lengths_k]
    table, (k_cache, v_cache) = draw.pages(lengths_k, page_size, [k, v])
    common |= draw.options_kwargs(batch, seqlen_q, table.shape[1] * page_size)
    common |= {"block_table": table, "seqused_k": draw.ints(lengths_k)}
    return draw.attention_case(q, k_cache, v_cache, common, launch)


def mla_case(
    seqlen_q: int,
    lengths_k: Sequence[int],
    page_size: int,
    heads_q: int,
    width: int = 576,
    options: Options = Options(causal=True),
    source: Source = Source(),
) -> MlaCase:
    """q ``[B, Sq, Hq, width]`` over a latent cache in shuffled pages."""
    draw = _Draw(source, Heads(heads_q, 1, width, 512), options)
    q = torch.stack([draw.queries(seqlen_q) for _ in lengths_k])
    latents = [draw.keys(length) for length in lengths_k]
    table, (cache,) = draw.pages(lengths_k, page_size, [latents])
    common = draw.options_kwargs(len(lengths_k), seqlen_q, 0)
    # The value columns of a skip-friendly latent carry the levels.
    std = max(source.std, source.gap / math.sqrt(width / 2))
    return MlaCase(
        draw.on_device(q), draw.on_device(cache), table, draw.ints(lengths_k), std, common
    )


def skip_friendly(source: Source, gap: float = 14.0) -> tuple[Source, SkipSoftmax]:
    """``source`` with structured scores, and the λ whose decisions on them have wide margins."""
    return replace(source, gap=gap), SkipSoftmax(math.exp(-gap / 2))


def _random_options(rng: random.Random, mla: bool) -> Options:
    window = rng.choice([None, None, (rng.randrange(100), rng.randrange(-1, 40)), (-1, 3)])
    return Options(
        scale=rng.choice([None, 0.05, 0.2]),
        causal=rng.random() < 0.5,
        window=window,
        softcap=rng.choice([0.0, 0.0, 2.0, 30.0]),
        sink=rng.random() < 0.3,
        blocks=None if mla else rng.choice([None, None, (64, 64, 0.5), (128, 128, 0.7)]),
    )


def random_case(
    source: Source,
    kind: str | None = None,
    max_length: int = 300,
    heads: Heads | None = None,
    options: Options | None = None,
) -> Case:
    """A case drawn from ``source.seed``; ``kind``: dense, packed, paged, mla, or None for any."""
    rng = random.Random(source.seed)
    kind = kind or rng.choice(["dense", "packed", "paged", "mla"])
    options = options or _random_options(rng, kind == "mla")
    batch = rng.randint(1, 3)
    lengths_q = [rng.choice([0, 1, 2, rng.randint(1, max_length)]) for _ in range(batch)]
    lengths_k = [rng.choice([0, 1, rng.randint(1, max_length)]) for _ in range(batch)]
    lengths_q[0], lengths_k[0] = max(1, lengths_q[0]), rng.randint(1, max_length)
    page_size = rng.choice([1, 16, 32, 64, 128])
    if kind == "mla":
        heads_q, width = rng.choice([1, 3, 8, 16, 40]), rng.choice([576, 512])
        return mla_case(rng.randint(1, 4), lengths_k, page_size, heads_q, width, options, source)
    if heads is None:
        kv, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 8])
        dim, dim_v = rng.choice([(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
        heads = Heads(kv * group, kv, dim, dim_v)
    if kind == "packed":
        return packed_case(lengths_q, lengths_k, heads, options, source)
    if kind == "paged":
        rows = lengths_q if rng.random() < 0.5 else lengths_q[0]
        return paged_case(rows, lengths_k, page_size, heads, options, source)
    seqlen_k = max(lengths_k)
    used = lengths_k if rng.random() < 0.5 else None
    return dense_case(batch, lengths_q[0], seqlen_k, heads, options, source, used)
