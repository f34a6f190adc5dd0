"""The plan of a Blackwell prefill launch: frozen, resolved in full before tracing."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import torch

from cute_fmha.kernels.blackwell.epilogue import Leaving, Op, unsuited
from cute_fmha.kernels.blackwell.kernel_plan import KernelPlan, Role, unsuited_inputs
from cute_fmha.kernels.blackwell.tmem import TmemMap, attention_map
from cute_fmha.problem import Problem, Target

OTHER_BYTES = 1024
"""Shared memory kept for barriers, decisions and alignment."""

WORK_STAGES = 2
"""Records of work tiles: of the one in work, and of the next, which load and MMA begin before."""

HEADER, SEQLENS, RANGE = 8, 6, 4
"""Words of a record: of `prefill_work.WorkTile`, lengths last; of `KeyTiles` for every Q tile."""

GROUPS = 2
"""Softmax warpgroups, each with an S of its own."""

MASK_TILES = 8192
"""KV tiles of a sequence with a block mask: 8 KiB of bits, a million keys in tiles of 128."""

HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
"""(D, Dv) that the prefill kernel has plans for."""


@dataclass(frozen=True)
class Features:
    """What is compiled in. Presence is compile time; bounds and thresholds are run time."""

    window_left: bool = False
    window_right: bool = False
    lse: bool = True
    max_logits: bool = False
    sink: bool = False
    softcap: bool = False
    skip: bool = False
    skip_tensor: bool = False
    skip_relative: bool = False
    count: bool = False
    packed: bool = False
    used: bool = False
    block_mask: tuple[int, int] | None = None  # query rows and keys of a block

    @staticmethod
    def of(problem: Problem) -> Features:
        """What a kernel for ``problem`` has."""
        return Features(
            window_left=problem.window_left >= 0,
            window_right=problem.window_right >= 0,
            lse=problem.lse,
            max_logits=problem.max_logits,
            sink=problem.sink,
            softcap=problem.softcap,
            skip=problem.skip,
            skip_tensor=problem.skip_tensor,
            skip_relative=problem.skip_relative,
            count=problem.stats,
            packed=problem.packed_q,
            used=problem.seqused,
            block_mask=problem.block_mask,
        )


@dataclass(frozen=True)
class Plan(KernelPlan):
    """Tiles, stages, warps, registers and memory of one kernel.

    A work tile is ``q_tiles`` × ``tile_m`` rows of one query head: each Q tile has its own softmax
    warpgroup and its own range of KV tiles, the fetched K and V serve all of them.

    With ``pair`` two CTAs have one Q tile of ``tile_m`` rows each, the KV tiles of both, and of
    each half of the keys of K and half of the columns of V. KV tiles go by turns to two softmax
    warpgroups and two S.
    """

    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    features: Features
    tile_m: int = 128
    tile_n: int = 128
    q_tiles: int = 2
    k_stages: int = 2
    v_stages: int = 2
    o_stages: int = 2
    o_over_v: bool = (
        False  # the chunks of O lie over V, which is fetched again when they are stored
    )
    ahead: int = 16  # exponentials of a row that do not wait for the decision on their KV tile
    pack: int = 1  # heads of a group that share Q tiles; a row is one head of a position
    p_parts: tuple[int, ...] = (6, 8)  # eighths of P that are there when some is handed on
    by_polynomial: int = 0  # of 16 exponentials, those without the special-function unit
    rescale_threshold: float = 3.0  # log2 that a maximum rises by before O is rescaled
    pair: bool = False
    op: Op = field(default_factory=Op)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.o_over_v and self.o_bytes > self.shared_parts["V"]:
            raise ValueError(f"O has {self.o_bytes} bytes over V: {self.shared_parts}")
        if any(part * self.tile_n % 128 for part in self.p_parts):
            raise ValueError(f"parts of P end in a K step: {self.p_parts} of 8, {self.tile_n} keys")

    @functools.cached_property
    def tmem(self) -> TmemMap:
        return attention_map(GROUPS, self.q_tiles, self.tile_n, self.head_dim_v)

    @property
    def ctas(self) -> int:
        """CTAs that share a work tile."""
        return 2 if self.pair else 1

    @property
    def mma_rows(self) -> int:
        """Rows of an MMA, which have their KV tiles in common."""
        return self.ctas * self.tile_m

    @property
    def p_handed(self) -> tuple[tuple[int, str], ...]:
        """`p_parts`, and the barriers that announce them."""
        names = ("p_ready", "p_more", "p_last") if len(self.p_parts) == 3 else ("p_ready", "p_last")
        return tuple(zip(self.p_parts, names, strict=True))

    @property
    def roles(self) -> tuple[Role, ...]:
        """Every warp has exactly one role."""
        return (
            Role("softmax", tuple(range(8)), 192, groups=GROUPS),
            Role("correction", tuple(range(8, 12)), 80),
            Role("mma", (12,), 48),
            Role("load", (13,), 48),
            Role("epilogue", (14,), 48),
            Role("load_values", (15,), 48),
        )

    @property
    def work_rows(self) -> int:
        return self.q_tiles * self.mma_rows

    @property
    def ragged_keys(self) -> bool:
        """Keys may end before their tensor does."""
        return self.features.packed or self.features.used

    @property
    def leaving(self) -> Leaving:
        """How rows of the output leave."""
        return Leaving(self.op, self.out_dtype, self.head_dim_v)

    @property
    def o_bytes(self) -> int:
        """Bytes of the buffers through which the output leaves."""
        return self.o_stages * self.tile_m * self.leaving.chunk_bytes

    @property
    def mask_words(self) -> int:
        """Words of the bits that a block mask has in shared memory; see `blockmask`."""
        per_record = 2 * self.q_tiles * MASK_TILES // 32
        return 0 if self.features.block_mask is None else per_record * WORK_STAGES

    @property
    def shared_parts(self) -> dict[str, int]:
        """Bytes of shared memory by use."""
        element = self.dtype.itemsize
        return {
            "Q": self.q_tiles * self.tile_m * self.head_dim * element,
            "K": self.k_stages * self.tile_n * self.head_dim * element // self.ctas,
            "V": self.v_stages * self.tile_n * self.head_dim_v * element // self.ctas,
            "O": 0 if self.o_over_v else self.o_bytes,
            "mask": self.mask_words * 4,
            "statistics": GROUPS * self.tile_m * 2 * 4,
            "other": OTHER_BYTES,
        }


def polynomials(head_dim: int, features: Features) -> int:
    """`Plan.by_polynomial`, see `make_plan`; the masks of a block mask leave fewer registers."""
    masked = features.block_mask is not None
    if head_dim > 128 or (masked and features.softcap):
        return 0
    return 2 if head_dim == 128 or masked else 4


def parts_of_p(head_dim: int, features: Features) -> tuple[int, ...]:
    """`Plan.p_parts` of a tile of 128 keys.

    P V that begins with five eighths of P is over when the last eighth is through, but it costs
    instructions. It pays where the tensor core has nothing else to do: at 128 the way from one S of
    a Q tile to the next is longer than the products of both Q tiles, and with skip-softmax those
    of a tile that is kept between others are all there are.
    """
    return (5, 7, 8) if head_dim == 128 or features.skip else (6, 8)


@functools.cache
def make_plan(
    head_dim: int, head_dim_v: int, dtype: torch.dtype, out_dtype: torch.dtype, features: Features,
    op: Op | None = None,
) -> Plan:  # fmt: skip
    """Two Q tiles of 128 keys where TMEM and shared memory allow it, and as many stages as fit.

    At (192, 128) Q takes 96 KiB and two K tiles as much: there is room for one V tile, and none for
    the output beside it. At (256, 256) O takes half of TMEM: a pair of CTAs has one Q tile in each,
    with two S, and two stages of its half of K and of V fill shared memory. Two Q tiles by 128 keys
    keep the special-function unit busy for 2048 cycles, the tensor core for 8 a column of K and of
    V: at 128 as many exponentials go by polynomial as leave the former well below the latter, at 64
    and 96 as many as instructions allow.
    The bits of a block mask take the place of a chunk buffer; at (192, 128) they make tiles of 64
    keys, whose output has buffers of its own.
    """
    parts = parts_of_p(head_dim, features)
    if head_dim == 192 and features.block_mask is None:
        return Plan(
            head_dim, head_dim_v, dtype, out_dtype, features, v_stages=1, o_over_v=True,
            p_parts=parts, op=op or Op(),
        )  # fmt: skip
    if head_dim == 256:
        return Plan(
            head_dim, head_dim_v, dtype, out_dtype, features, pair=True, q_tiles=1,
            o_stages=1 if features.block_mask else 2, p_parts=parts, op=op or Op(),
        )  # fmt: skip
    tile_n = 64 if head_dim == 192 else 128
    plan = Plan(
        head_dim, head_dim_v, dtype, out_dtype, features, tile_n=tile_n,
        o_stages=1 if features.block_mask else 2,
        p_parts=parts if tile_n == 128 else (6, 8),
        by_polynomial=polynomials(head_dim, features),
        op=op or Op(),
    )  # fmt: skip
    while plan.k_stages < 4:
        for stages in ((0, 1), (1, 0)):
            try:
                plan = replace(
                    plan, k_stages=plan.k_stages + stages[0], v_stages=plan.v_stages + stages[1]
                )
            except ValueError:
                return plan
    return plan


def packed_heads(problem: Problem, tile_rows: int) -> int:
    """Heads of a group to pack into Q tiles, of which a work tile has ``tile_rows`` rows; 1: none.

    Packed, the rows of a group fill tiles together: short sequences, and the ends of long ones,
    leave fewer rows empty. A tile has fewer positions, so that with a causal mask fewer of its
    scores lie beyond the diagonal. Against it stands that all rows of a tile must agree before a KV
    tile is left out, by skip-softmax or a block mask: heads together agree less often, so there
    packing has to save a quarter of the work tiles.

    A box of the TMA holds whole positions: the group must divide a Q tile.
    """
    group = problem.group
    if group == 1 or Plan.tile_m % group:
        return 1
    together = -(-problem.seqlen_q * group // tile_rows)
    apart = -(-problem.seqlen_q // tile_rows) * group
    decides = problem.skip or problem.block_mask is not None
    return group if not decides or 4 * together < 3 * apart else 1


def can_implement(problem: Problem, target: Target) -> str | None:
    """Why the prefill kernel cannot run ``problem`` on ``target``; None when it can."""
    reason = unsuited_inputs(problem, target, "the prefill kernel", "attention", HEAD_DIMS)
    if reason is not None:
        return reason
    if problem.layout == "paged":
        return "the prefill kernel takes dense and packed keys; got paged ones"
    no_keys = problem.seqlen_k == 0 and not problem.packed_q
    if problem.seqlen_q == 0 or no_keys or problem.batch == 0:
        return "the prefill kernel needs at least one sequence, query and key"
    most = MASK_TILES * (64 if problem.head_dim == 192 else 128)
    if problem.block_mask is not None and problem.seqlen_k > most:
        return (
            f"the prefill kernel takes up to {most} keys with a block mask; got {problem.seqlen_k}"
        )
    if problem.num_splits > 1:
        return f"the prefill kernel does not split the keys; got num_splits={problem.num_splits}"
    return unsuited(problem)
