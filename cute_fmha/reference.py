"""The eager specification: what every kernel computes, in plain PyTorch on any device.

Mathematics, per query row i of a sequence with Lq queries and Lk keys, shift = Lk − Lq:

    s_ij = cap(scale · q_i · k_j),  cap(x) = c · tanh(x / c) where a softcap c is given,
    visible where i + shift − left <= j <= i + shift + right and the block mask allows it,
    den_i = Σ_visible exp(s_ij) + exp(sink_h),   out_i = Σ_visible exp(s_ij) v_j / den_i,
    lse_i = ln den_i.

A row without a visible key gives 0, and LSE −inf (with a sink: the sink). A sequence's own tokens
are sliced out before any arithmetic, so memory beyond its length never takes part. A masked key
*inside* a sequence does take part with probability 0, so a NaN there is not guaranteed to vanish.

Three views of that one definition:

* `attention_reference` and `mla_reference` return it unrounded, FP64 by default;
* `tile_oracle` and `mla_tile_oracle` replay the online softmax tile by tile, in the kernels' order,
  with their skip-softmax decisions, and count them;
* `run` is the ``reference`` backend, in FP32; where tiles matter (skip-softmax, counting) it
  uses `REFERENCE_TILE`, one head at a time.

Rows of one key/value head are kept "folded": row m is query position m // group of head m % group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cute_fmha.problem import BlockMask, Problem, SkipSoftmax, Target
from cute_fmha.tiling import ceil_div, kv_tile_ranges, split_tile_range

if TYPE_CHECKING:
    from cute_fmha.ops import Call

REFERENCE_TILE = (128, 128)
"""(query rows, keys) per tile of the skip decisions that the ``reference`` backend makes."""

_CHUNK_SCORES = 1 << 22
"""Scores held at a time: 32 MiB in FP64, and a 2k-token FP32 prefill still runs as few matmuls."""

_NEG_INF = float("-inf")


@dataclass(frozen=True)
class OracleResult:
    """What a tile-by-tile replay gives.

    out, lse: as `attention_reference` returns them.
    max_logits: every row's largest logit, shaped like lse; −inf where it has none.
    skipped, total: KV tiles skipped by skip-softmax, and tiles left after exact skipping.
    margin: the smallest distance, in natural-log score units, between any tile's best gap
        ``max over rows of tile_max − running_max`` and ln λ. Where it is well above rounding error,
        a kernel must take the same decisions. Infinite when nothing was decided.
    """

    out: torch.Tensor
    lse: torch.Tensor
    max_logits: torch.Tensor
    skipped: int
    total: int
    margin: float


@dataclass(frozen=True)
class _Inputs:
    """The tensors of a call: q and k, v dense, packed or paged, with what locates a sequence."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None


@dataclass(frozen=True)
class _Rules:
    """How a (row, key) pair scores; causal is folded into ``right`` and −1 is unbounded.

    ``round_p``: the dtype that unnormalised probabilities are rounded to; None for exact ones.
    """

    scale: float
    left: int
    right: int
    softcap: float
    sink: torch.Tensor | None
    block_mask: BlockMask | None
    round_p: torch.dtype | None = None


@dataclass(frozen=True)
class _Sequence:
    """One sequence, cut to its length: q ``[Lq, Hq, D]``, k ``[Lk, Hkv, D]``, v ``[Lk, Hkv, Dv]``,
    and the views its results go to, out ``[Lq, Hq, Dv]``, lse and max_logits ``[Hq, Lq]``."""

    index: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    max_logits: torch.Tensor

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]


@dataclass(frozen=True)
class _Rows:
    """Folded query rows of one sequence: q ``[N, M, D]``, heads ``[N, M]``, positions ``[M]``."""

    sequence: _Sequence
    q: torch.Tensor
    heads: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class _TilePlan:
    """How the replay cuts the work, and its skip policy (None: off)."""

    tile_m: int
    tile_n: int
    pack_heads: bool
    num_splits: int
    skip: SkipSoftmax | None
    cuts: Iterator[Sequence[int]] | None = None

    def pieces(self, begin: int, end: int) -> list[range]:
        """The KV tiles of the next work tile, ``begin`` to ``end``, as they are cut."""
        if self.cuts is None:
            return [
                range(*split_tile_range(begin, end, split, self.num_splits))
                for split in range(self.num_splits)
            ]
        places = [begin, *(begin + cut for cut in next(self.cuts)), end]
        return [range(*pair) for pair in itertools.pairwise(places)]


@dataclass
class _Softmax:
    """Running softmax of ``[N, M]`` rows: maximum, mass relative to it, and unnormalised output."""

    peak: torch.Tensor
    mass: torch.Tensor
    acc: torch.Tensor

    @classmethod
    def empty(cls, rows: _Rows, head_dim_v: int) -> _Softmax:
        shape = rows.q.shape[:2]
        return cls(
            rows.q.new_full(shape, _NEG_INF),
            rows.q.new_zeros(shape),
            rows.q.new_zeros((*shape, head_dim_v)),
        )


@dataclass
class _Counts:
    """Tile counts and decision margin of a replay so far."""

    skipped: int = 0
    total: int = 0
    margin: float = math.inf


def _gather_pages(cache: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """The pages that hold a sequence's ``length`` tokens, as ``[tokens, H, W]`` with their tail."""
    used = pages[: ceil_div(length, cache.shape[1])].long()
    return cache[used].flatten(0, 1)


def _sequences(inputs: _Inputs, out: torch.Tensor, *per_row: torch.Tensor) -> Iterator[_Sequence]:
    """Each sequence of the batch; ``out`` is shaped like q, lse and max_logits as `attention`
    returns an LSE."""
    q_bounds = None if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.tolist()
    k_bounds = None if inputs.cu_seqlens_k is None else inputs.cu_seqlens_k.tolist()
    used = None if inputs.seqused_k is None else inputs.seqused_k.tolist()
    batch = inputs.q.shape[0] if q_bounds is None else len(q_bounds) - 1
    for index in range(batch):
        if q_bounds is None:
            q, out_rows, results = inputs.q[index], out[index], [x[index] for x in per_row]
        else:
            rows = slice(q_bounds[index], q_bounds[index + 1])
            q, out_rows, results = inputs.q[rows], out[rows], [x[:, rows] for x in per_row]
        if inputs.block_table is not None:
            assert used is not None
            pages = inputs.block_table[index]
            k = _gather_pages(inputs.k, pages, used[index])
            v = _gather_pages(inputs.v, pages, used[index])
        elif k_bounds is not None:
            rows = slice(k_bounds[index], k_bounds[index + 1])
            k, v = inputs.k[rows], inputs.v[rows]
        else:
            k, v = inputs.k[index], inputs.v[index]
        if used is not None:
            k, v = k[: used[index]], v[: used[index]]
        yield _Sequence(index, q, k, v, out_rows, *results)


def _fold(x: torch.Tensor, group: int) -> torch.Tensor:
    """``[L, H, W]`` -> ``[H / group, L · group, W]``: the rows that share a key/value head."""
    length, heads, width = x.shape
    split = x.reshape(length, heads // group, group, width).transpose(0, 1)
    return split.reshape(heads // group, length * group, width)


def _unfold(x: torch.Tensor, group: int) -> torch.Tensor:
    """The inverse of `_fold`."""
    shared, rows, width = x.shape
    split = x.reshape(shared, rows // group, group, width).transpose(0, 1)
    return split.reshape(rows // group, shared * group, width)


def _make_rows(sequence: _Sequence, group: int, first: int, last: int, dtype: torch.dtype) -> _Rows:
    """Folded rows ``[first, last)`` of ``sequence``, ``group`` heads to a position."""
    begin, end = first // group, ceil_div(last, group)
    inside = slice(first - begin * group, last - begin * group)
    q = _fold(sequence.q[begin:end], group)[:, inside].to(dtype)
    m = torch.arange(first, last, device=q.device)
    shared = torch.arange(q.shape[0], device=q.device)
    heads = shared[:, None] * group + m[None, :] % group
    return _Rows(sequence, q, heads, m // group)


def _block_visible(rows: _Rows, keys: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """Bool ``[N, M, C]``: what the block mask alone allows."""
    table = mask.mask[rows.sequence.index if mask.mask.shape[0] > 1 else 0]
    heads = rows.heads if table.shape[0] > 1 else torch.zeros_like(rows.heads)
    blocks_m = (rows.positions // mask.block_m)[None, :, None]
    return table[heads[:, :, None], blocks_m, (keys // mask.block_n)[None, None, :]]


def _window_visible(rows: _Rows, keys: torch.Tensor, rules: _Rules) -> torch.Tensor | None:
    """Bool ``[M, C]``: what causal and window allow; None where that is everything."""
    shift = rows.sequence.k.shape[0] - rows.sequence.q.shape[0]
    distance = keys[None, :] - (rows.positions + shift)[:, None]
    visible = None
    if rules.right >= 0:
        visible = distance <= rules.right
    if rules.left >= 0:
        near = distance >= -rules.left
        visible = near if visible is None else visible & near
    return visible


def _scores(rows: _Rows, k: torch.Tensor, first_key: int, rules: _Rules) -> torch.Tensor:
    """Masked scores ``[N, M, C]`` of keys ``first_key…`` with k ``[N, C, D]``; −inf is masked."""
    s = torch.matmul(rows.q, k.transpose(1, 2)).mul_(rules.scale)
    if rules.softcap > 0:
        s = torch.tanh(s / rules.softcap) * rules.softcap
    keys = torch.arange(first_key, first_key + k.shape[1], device=k.device)
    visible = _window_visible(rows, keys, rules)
    if visible is not None:
        s.masked_fill_(~visible, _NEG_INF)
    if rules.block_mask is not None:
        s.masked_fill_(~_block_visible(rows, keys, rules.block_mask), _NEG_INF)
    return s


def _finite_or_zero(peak: torch.Tensor) -> torch.Tensor:
    """``peak``, 0 where it is −inf: keeps −inf − −inf out of exponents of empty rows."""
    return torch.where(peak == _NEG_INF, 0.0, peak)


def _accumulate(
    state: _Softmax, s: torch.Tensor, v: torch.Tensor, round_p: torch.dtype | None
) -> _Softmax:
    """``state`` after the scores ``s`` ``[N, M, C]`` over values ``v`` ``[N, C, Dv]``."""
    peak = torch.maximum(state.peak, s.amax(-1))
    base = _finite_or_zero(peak)
    p = torch.exp(s - base[..., None])
    fade = torch.exp(state.peak - base)
    mass = state.mass * fade + p.sum(-1)
    if round_p is not None:
        p = p.to(round_p).to(s.dtype)
    return _Softmax(peak, mass, state.acc * fade[..., None] + torch.matmul(p, v))


def _finish(
    state: _Softmax, rows: _Rows, sink: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out ``[N, M, Dv]``, lse ``[N, M]``): the sink joins, the rows are normalised."""
    mass = state.mass
    lse = state.peak + torch.log(mass)
    if sink is not None:
        logit = sink.to(mass.dtype)[rows.heads]
        mass = mass + torch.exp(logit - _finite_or_zero(state.peak))
        lse = torch.logaddexp(lse, logit)
    return state.acc / torch.where(mass == 0, 1.0, mass)[..., None], lse


def _attend(sequence: _Sequence, rules: _Rules, dtype: torch.dtype) -> None:
    """Write one sequence's result, in chunks of positions over the keys their window needs."""
    length_q, length_k = sequence.q.shape[0], sequence.k.shape[0]
    heads, group = sequence.q.shape[1], sequence.group
    k = sequence.k.transpose(0, 1).to(dtype)
    v = sequence.v.transpose(0, 1).to(dtype)
    step = max(1, _CHUNK_SCORES // max(1, heads * length_k))
    for first in range(0, length_q, step):
        last = min(first + step, length_q)
        rows = _make_rows(sequence, group, first * group, last * group, dtype)
        state = _Softmax.empty(rows, v.shape[-1])
        begin, _, _, end = kv_tile_ranges(
            first, last, length_q, length_k, rules.left, rules.right, 1
        )
        if begin < end:
            s = _scores(rows, k[:, begin:end], begin, rules)
            state = _accumulate(state, s, v[:, begin:end], rules.round_p)
        out, lse = _finish(state, rows, rules.sink)
        sequence.out[first:last] = _unfold(out, group)
        sequence.lse[:, first:last] = _unfold(lse[..., None], group)[..., 0].T
        sequence.max_logits[:, first:last] = _unfold(state.peak[..., None], group)[..., 0].T


def _ln_threshold(skip: SkipSoftmax | None, length_k: int) -> float | None:
    """ln λ for a sequence of ``length_k`` keys; None where skipping is off."""
    if skip is None:
        return None
    value = float(skip.value)
    if skip.relative:
        value /= max(1, length_k)
    return math.log(min(1.0, value)) if value > 0 else None


def _keep_tile(
    s: torch.Tensor, peak: torch.Tensor, ln_threshold: float | None, counts: _Counts
) -> torch.Tensor:
    """Bool ``[N]``: which heads keep the tile of scores ``s`` ``[N, M, C]``; counts the others."""
    counts.total += s.shape[0]
    if ln_threshold is None:
        return torch.ones(s.shape[0], dtype=torch.bool, device=s.device)
    tile_max = s.amax(-1)
    gap = tile_max - peak
    votes = (tile_max != _NEG_INF) & ~(gap < ln_threshold)
    keep = votes.any(-1)
    counts.skipped += int((~keep).sum())
    best = torch.where(tile_max == _NEG_INF, _NEG_INF, gap).amax(-1)
    decided = best[best.isfinite()]
    if decided.numel():
        counts.margin = min(counts.margin, float((decided - ln_threshold).abs().min()))
    return keep


def _replay_tiles(
    rows: _Rows, tiles: range, tile_n: int, rules: _Rules, ln_threshold: float | None,
    counts: _Counts,
) -> _Softmax:  # fmt: skip
    """One work tile over the KV tiles of one split, in ascending order."""
    sequence = rows.sequence
    # Without packing every query head is a row block of its own and its group shares the keys.
    repeats = rows.q.shape[0] // sequence.k.shape[1]
    state = _Softmax.empty(rows, sequence.v.shape[-1])
    for tile in tiles:
        columns = slice(tile * tile_n, (tile + 1) * tile_n)
        k = sequence.k[columns].transpose(0, 1).to(rows.q.dtype).repeat_interleave(repeats, 0)
        live = torch.arange(rows.q.shape[0], device=k.device)
        s = _scores(rows, k, columns.start, rules)
        if rules.block_mask is not None:
            keys = torch.arange(columns.start, columns.start + k.shape[1], device=k.device)
            live = live[_block_visible(rows, keys, rules.block_mask).flatten(1).any(1)]
        live = live[_keep_tile(s[live], state.peak[live], ln_threshold, counts)]
        if live.numel() == 0:
            continue
        v = sequence.v[columns].transpose(0, 1).to(rows.q.dtype).repeat_interleave(repeats, 0)
        kept = _Softmax(state.peak[live], state.mass[live], state.acc[live])
        kept = _accumulate(kept, s[live], v[live], rules.round_p)
        state.peak[live], state.mass[live], state.acc[live] = kept.peak, kept.mass, kept.acc
    return state


def _merge(parts: list[_Softmax]) -> _Softmax:
    """The softmax over all splits, each of which kept its own running maximum."""
    if len(parts) == 1:
        return parts[0]
    peak = torch.stack([part.peak for part in parts]).amax(0)
    base = _finite_or_zero(peak)
    weights = [torch.exp(part.peak - base) for part in parts]
    mass = torch.stack([part.mass * w for part, w in zip(parts, weights, strict=True)])
    acc = torch.stack([part.acc * w[..., None] for part, w in zip(parts, weights, strict=True)])
    return _Softmax(peak, mass.sum(0), acc.sum(0))


def _replay(
    sequence: _Sequence, rules: _Rules, plan: _TilePlan, dtype: torch.dtype, counts: _Counts
) -> None:
    """Write one sequence's result as the tiled kernels reach it; adds to ``counts``."""
    length_q, length_k = sequence.q.shape[0], sequence.k.shape[0]
    group = sequence.group if plan.pack_heads else 1
    num_rows = length_q * group
    ln_threshold = _ln_threshold(plan.skip, length_k)
    results = []
    for first in range(0, num_rows, plan.tile_m):
        last = min(first + plan.tile_m, num_rows)
        rows = _make_rows(sequence, group, first, last, dtype)
        begin, _, _, end = kv_tile_ranges(
            first // group, (last - 1) // group + 1, length_q, length_k, rules.left, rules.right,
            plan.tile_n,
        )  # fmt: skip
        parts = [
            _replay_tiles(rows, tiles, plan.tile_n, rules, ln_threshold, counts)
            for tiles in plan.pieces(begin, end)
        ]
        state = _merge(parts)
        results.append((*_finish(state, rows, rules.sink), state.peak))
    if results:
        out, lse, peak = (torch.cat(column, 1) for column in zip(*results, strict=True))
        sequence.out[:] = _unfold(out, group)
        sequence.lse[:] = _unfold(lse[..., None], group)[..., 0].T
        sequence.max_logits[:] = _unfold(peak[..., None], group)[..., 0].T


def _evaluate(
    inputs: _Inputs, rules: _Rules, plan: _TilePlan | None, dtype: torch.dtype
) -> OracleResult:
    """The whole batch, tile by tile where there is a ``plan``."""
    q = inputs.q
    out = q.new_zeros((*q.shape[:-1], inputs.v.shape[-1]), dtype=dtype)
    packed = inputs.cu_seqlens_q is not None
    lse_shape = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_full(lse_shape, _NEG_INF, dtype=dtype)
    max_logits = torch.full_like(lse, _NEG_INF)
    counts = _Counts()
    for sequence in _sequences(inputs, out, lse, max_logits):
        if plan is None:
            _attend(sequence, rules, dtype)
        else:
            _replay(sequence, rules, plan, dtype, counts)
    return OracleResult(out, lse, max_logits, counts.skipped, counts.total, counts.margin)


def _described(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    block_mask: BlockMask | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    round_p: torch.dtype | None = None,
) -> tuple[_Inputs, _Rules, torch.dtype]:
    """A call with the arguments of `cute_fmha.attention`, not validated."""
    left, right = (-1, -1) if window is None else window
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    rules = _Rules(scale, left, 0 if causal else right, softcap, sink, block_mask, round_p)
    return _Inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, seqused_k), rules, dtype


@torch.no_grad()
def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cute_fmha.attention` by definition: ``(out, lse)`` computed and returned in ``dtype``.

    Shapes and ``options`` (scale, causal, window, sink, softcap, block_mask, cu_seqlens_q,
    cu_seqlens_k, block_table, seqused_k) are those of `cute_fmha.attention`, for any head dims; the
    keys of dense k, v may be cut by ``seqused_k``. And of its own: ``dtype``, FP64; ``round_p``,
    which rounds the unnormalised probabilities exp(s − row max) to a kernel's dtype before they
    meet v (the error budget of `cute_fmha.testing`). Inputs are not validated.
    """
    inputs, rules, dtype = _described(q, k, v, **options)
    result = _evaluate(inputs, rules, None, dtype)
    return result.out, result.lse


def mla_reference(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    head_dim_v: int = 512,
    causal: bool = True,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cute_fmha.mla_decode` by definition: attention whose values are the keys' leading columns.

    Shapes are those of `cute_fmha.mla_decode`, for any widths; ``options`` (scale, window, sink,
    softcap, dtype, round_p) and results are those of `attention_reference`.
    """
    v = kv_cache[..., :head_dim_v]
    return attention_reference(
        q, kv_cache, v, causal=causal, block_table=block_table, seqused_k=cache_seqlens, **options
    )


@torch.no_grad()
def tile_oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    tile_m: int,
    tile_n: int,
    pack_heads: bool,
    num_splits: int = 1,
    cuts: Sequence[Sequence[int]] | None = None,
    skip: SkipSoftmax | None = None,
    **options: Any,
) -> OracleResult:
    """Replay `cute_fmha.attention` with a kernel's tiles and its skip-softmax decisions.

    A work tile is ``tile_m`` consecutive query positions of one query head, or with ``pack_heads``
    ``tile_m`` consecutive folded rows of one key/value head. It visits, ascending, the KV tiles of
    `kv_tile_ranges`, cut by `split_tile_range`, or where ``cuts`` says for every ``tile_m`` rows of
    every sequence, in KV tiles from their first; each split starts anew with a running maximum of
    −inf, and the splits merge by log-sum-exp. A tile that the block mask blocks for every row is
    neither visited nor counted. Counts sum over batch, heads, work tiles and splits. ``options``
    are those of `attention_reference`.
    """
    inputs, rules, dtype = _described(q, k, v, **options)
    pieces = None if cuts is None else iter(cuts)
    plan = _TilePlan(tile_m, tile_n, pack_heads, num_splits, skip, pieces)
    return _evaluate(inputs, rules, plan, dtype)


def mla_tile_oracle(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    tile_m: int,
    tile_n: int,
    pack_heads: bool = True,
    head_dim_v: int = 512,
    causal: bool = True,
    **options: Any,
) -> OracleResult:
    """Replay `cute_fmha.mla_decode` likewise; ``options`` are those of `tile_oracle`."""
    v = kv_cache[..., :head_dim_v]
    return tile_oracle(
        q, kv_cache, v, tile_m=tile_m, tile_n=tile_n, pack_heads=pack_heads, causal=causal,
        block_table=block_table, seqused_k=cache_seqlens, **options,
    )  # fmt: skip


def can_implement(problem: Problem, target: Target) -> str | None:
    """None: the specification runs every validated problem on every device."""
    return None


@torch.no_grad()
def run(call: Call) -> None:
    """Write what ``call`` asks for, add to ``call.stats``; FP32 throughout.

    Reads lengths on the host, so it synchronises and cannot be captured in a CUDA graph. Without
    skip-softmax and counting ``num_splits`` has no effect: nothing is split.
    """
    problem = call.problem
    block_mask = None
    if call.block_mask is not None:
        assert problem.block_mask is not None
        block_mask = BlockMask(call.block_mask, *problem.block_mask)
    rules = _Rules(
        call.scale, problem.window_left, problem.window_right, call.softcap, call.sink, block_mask
    )
    plan = None
    if problem.skip or call.stats is not None:
        value = call.skip_value if call.skip_tensor is None else call.skip_tensor
        skip = (
            SkipSoftmax(threshold_scale_factor=value) if call.skip_relative else SkipSoftmax(value)
        )
        plan = _TilePlan(
            *REFERENCE_TILE, False, max(1, problem.num_splits), skip if problem.skip else None
        )
    inputs = _Inputs(
        call.q, call.k, call.v, call.cu_seqlens_q, call.cu_seqlens_k, call.block_table,
        call.seqused_k,
    )  # fmt: skip
    result = _evaluate(inputs, rules, plan, torch.float32)
    stored = call.epilogue.reference(result.out, call.parameters, call.out.dtype)
    if call.extra is not None:
        stored, extra = stored
        call.extra.copy_(extra)
    assert isinstance(stored, torch.Tensor)
    call.out.copy_(stored)
    if call.lse is not None:
        call.lse.copy_(result.lse)
    if call.max_logits is not None:
        call.max_logits.copy_(result.max_logits)
    if call.stats is not None:
        call.stats.add_(torch.tensor([result.skipped, result.total], device=call.stats.device))
