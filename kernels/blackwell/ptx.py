"""Instructions written as PTX, one wrapper each; MMAs are in `ptx_mma`, conversions of short
numbers in `ptx_codes`.

Registers are Python lists of values: a fragment never becomes an array in local memory, and the
registers of an asynchronous TMEM load can be tied to the instruction that waits for it.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass._mlir.dialects import cute as cute_ir
from cutlass._mlir.dialects import cute_nvgpu, llvm, nvvm
from cutlass.cutlass_dsl import T, dsl_user_op


def inline(
    text: str, results: list[Any], operands: list[Any], constraints: str, *, effects: bool,
    loc: Any, ip: Any,
) -> Any:  # fmt: skip
    """What PTX gives: nothing, a value, or a struct of several."""
    kind = None
    if len(results) == 1:
        kind = results[0]
    elif results:
        kind = llvm.StructType.get_literal(results)
    return llvm.inline_asm(
        kind, operands, text, constraints, has_side_effects=effects, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip


def floats(struct: Any, count: int, loc: Any, ip: Any) -> list[Float32]:
    """The values of what `inline` gives."""
    if count == 1:
        return [Float32(struct)]
    return [Float32(llvm.extractvalue(T.f32(), struct, [i], loc=loc, ip=ip)) for i in range(count)]


def _names(first: int, count: int) -> str:
    return "{" + ", ".join(f"${i}" for i in range(first, first + count)) + "}"


@dsl_user_op
def opaque(value: Int32, *, loc=None, ip=None) -> Int32:
    """mov.b32, as a new value of which the compiler knows nothing and which it moves nowhere."""
    result = inline(
        "mov.b32 $0, $1;", [T.i32()], [Int32(value).ir_value(loc=loc, ip=ip)], "=r,r",
        effects=True, loc=loc, ip=ip,
    )  # fmt: skip
    return Int32(result)


@dsl_user_op
def cluster_rank(*, loc=None, ip=None) -> Int32:
    """mov.u32 of %cluster_ctarank: read where it is asked for, so that nobody keeps it."""
    result = inline(
        "mov.u32 $0, %cluster_ctarank;", [T.i32()], [], "=r", effects=True, loc=loc, ip=ip
    )
    return Int32(result)


@dsl_user_op
def mbarrier_wait(address: Int32, offset: int, phase: Any, *, loc=None, ip=None) -> None:
    """mbarrier.try_wait.parity, ``offset`` bytes from the address, until the phase is over."""
    wait = "\n\t".join(wait_lines(f"$0 + {offset}", "$1"))
    inline(
        f"{{\n\t.reg .pred q;\n\t{wait}\n\t}}",
        [], [Int32(x).ir_value(loc=loc, ip=ip) for x in (address, phase)], "r,r", effects=True,
        loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def mbarrier_expect(
    address: Int32, offset: int, size: int, first: bool = False, *, loc=None, ip=None
) -> None:
    """mbarrier.arrive.expect_tx by the elected lane, ``offset`` bytes from the address; ``first``:
    by the first CTA of a cluster only."""
    lane = "elect.sync _|e, 0xffffffff;\n\t"
    if first:
        lane += (
            ".reg .b32 rank;\n\tmov.u32 rank, %cluster_ctarank;\n\t"
            "setp.eq.and.u32 e, rank, 0, e;\n\t"
        )
    inline(
        f"{{\n\t.reg .pred e;\n\t.reg .b64 state;\n\t{lane}"
        f"@e mbarrier.arrive.expect_tx.shared::cta.b64 state, [$0 + {offset}], {size};\n\t}}",
        [], [Int32(address).ir_value(loc=loc, ip=ip)], "r", effects=True, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def mbarrier_arrive_cluster(
    address: Int32, offset: int, ranks: tuple[int, ...], *, loc=None, ip=None
) -> None:
    """mbarrier.arrive by the elected lane in the CTAs ``ranks`` of the cluster, ``offset`` bytes
    from what is the address in this one."""
    arrivals = "".join(
        f"mapa.shared::cluster.u32 there, $0, {rank};\n\t"
        f"@e mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there + {offset}];\n\t"
        for rank in ranks
    )
    inline(
        "{\n\t.reg .pred e;\n\t.reg .b32 there;\n\telect.sync _|e, 0xffffffff;\n\t"
        f"{arrivals}}}",
        [], [Int32(address).ir_value(loc=loc, ip=ip)], "r", effects=True, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def tcgen05_commit(address: Int32, offset: int, pair: bool = False, *, loc=None, ip=None) -> None:
    """tcgen05.commit by the elected lane to the mbarrier ``offset`` bytes from the address; of a
    ``pair`` to that of both CTAs."""
    inline(
        "{\n\t.reg .pred e;\n\telect.sync _|e, 0xffffffff;\n\t"
        f"{commit_line(f'$0 + {offset}', pair)}\n\t}}",
        [], [Int32(address).ir_value(loc=loc, ip=ip)], "r", effects=True, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def tcgen05_fence_before(*, loc=None, ip=None) -> None:
    """tcgen05.fence::before_thread_sync: own tcgen05 operations before a later arrive."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC, loc=loc, ip=ip)


@dsl_user_op
def tcgen05_fence_after(*, loc=None, ip=None) -> None:
    """tcgen05.fence::after_thread_sync: later tcgen05 operations after an earlier wait."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC, loc=loc, ip=ip)


@dsl_user_op
def tcgen05_load(address: Int32, count: int, *, loc=None, ip=None) -> list[Float32]:
    """tcgen05.ld.32x32b: ``count`` columns of the lane's row, from TMEM ``address``.

    The values are undefined until `tcgen05_wait_load` has returned them.
    """
    result = inline(
        f"tcgen05.ld.sync.aligned.32x32b.x{count}.b32 {_names(0, count)}, [${count}];",
        [T.f32()] * count, [Int32(address).ir_value(loc=loc, ip=ip)],
        ",".join(["=f"] * count + ["r"]), effects=True, loc=loc, ip=ip,
    )  # fmt: skip
    return floats(result, count, loc, ip)


@dsl_user_op
def tcgen05_load_fragment(address: Int32, count: int, *, loc=None, ip=None) -> list[Float32]:
    """tcgen05.ld.16x256b: 8 · ``count`` columns of 16 lanes, four values a thread and 8 columns: of
    lane t / 4 columns 2 (t % 4) and the next, then the same of lane t / 4 + 8.

    The values are undefined until `tcgen05_wait_load` has returned them.
    """
    registers = 4 * count
    result = inline(
        f"tcgen05.ld.sync.aligned.16x256b.x{count}.b32 {_names(0, registers)}, [${registers}];",
        [T.f32()] * registers, [Int32(address).ir_value(loc=loc, ip=ip)],
        ",".join(["=f"] * registers + ["r"]), effects=True, loc=loc, ip=ip,
    )  # fmt: skip
    return floats(result, registers, loc, ip)


@dsl_user_op
def tcgen05_store_fragment(address: Int32, values: list[Float32], *, loc=None, ip=None) -> None:
    """tcgen05.st.16x256b: the counterpart of `tcgen05_load_fragment`."""
    count = len(values)
    inline(
        f"tcgen05.st.sync.aligned.16x256b.x{count // 4}.b32 [$0], {_names(1, count)};",
        [], [v.ir_value(loc=loc, ip=ip) for v in (Int32(address), *values)],
        ",".join(["r"] + ["f"] * count), effects=True, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def tcgen05_wait_load(values: list[Float32], *, loc=None, ip=None) -> list[Float32]:
    """tcgen05.wait::ld; returns the ``values`` that earlier loads gave, now complete.

    They pass through the instruction: otherwise the compiler, which sees no connection between
    the two, would be free to read them before it.
    """
    count = len(values)
    result = inline(
        "tcgen05.wait::ld.sync.aligned;",
        [T.f32()] * count, [value.ir_value(loc=loc, ip=ip) for value in values],
        ",".join(["=f"] * count + [str(i) for i in range(count)]), effects=True, loc=loc, ip=ip,
    )  # fmt: skip
    return floats(result, count, loc, ip)


@dsl_user_op
def tcgen05_store(address: Int32, values: list[Any], *, loc=None, ip=None) -> None:
    """tcgen05.st.32x32b: 32-bit ``values`` to the lane's row, from TMEM ``address`` on."""
    count = len(values)
    kind = "f" if isinstance(values[0], Float32) else "r"
    inline(
        f"tcgen05.st.sync.aligned.32x32b.x{count}.b32 [$0], {_names(1, count)};",
        [], [v.ir_value(loc=loc, ip=ip) for v in (Int32(address), *values)],
        ",".join(["r"] + [kind] * count), effects=True, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def tcgen05_wait_store(*, loc=None, ip=None) -> None:
    """tcgen05.wait::st: own TMEM stores are complete."""
    inline("tcgen05.wait::st.sync.aligned;", [], [], "", effects=True, loc=loc, ip=ip)


@dsl_user_op
def pack(low: Float32, high: Float32, dtype: Any, *, loc=None, ip=None) -> Int32:
    """cvt.rn.{f16x2, bf16x2}.f32: two rounded values in one register."""
    name = {cutlass.Float16: "f16x2", cutlass.BFloat16: "bf16x2"}[dtype]
    result = inline(
        f"cvt.rn.{name}.f32 $0, $1, $2;",
        [T.i32()], [high.ir_value(loc=loc, ip=ip), low.ir_value(loc=loc, ip=ip)],
        "=r,f,f", effects=False, loc=loc, ip=ip,
    )  # fmt: skip
    return Int32(result)


@dsl_user_op
def exp2(x: Float32, *, loc=None, ip=None) -> Float32:
    """ex2.approx.ftz.f32."""
    result = inline(
        "ex2.approx.ftz.f32 $0, $1;", [T.f32()], [Float32(x).ir_value(loc=loc, ip=ip)], "=f,f",
        effects=False, loc=loc, ip=ip,
    )  # fmt: skip
    return Float32(result)


@dsl_user_op
def shift_left(value: int, amount: Int32, *, loc=None, ip=None) -> Int32:
    """shl.b32: 0 for amounts of 32 and more, of which LLVM's own shift makes anything."""
    result = inline(
        f"shl.b32 $0, {value:#x}, $1;", [T.i32()], [Int32(amount).ir_value(loc=loc, ip=ip)], "=r,r",
        effects=False, loc=loc, ip=ip,
    )  # fmt: skip
    return Int32(result)


@dsl_user_op
def leading_zeros(x: Int32, *, loc=None, ip=None) -> Int32:
    """clz.b32."""
    result = inline(
        "clz.b32 $0, $1;", [T.i32()], [Int32(x).ir_value(loc=loc, ip=ip)], "=r,r",
        effects=False, loc=loc, ip=ip,
    )  # fmt: skip
    return Int32(result)


@dsl_user_op
def bits_of(x: Float32, *, loc=None, ip=None) -> Int32:
    """The bits of a float, as an integer; no instruction."""
    return Int32(llvm.bitcast(T.i32(), Float32(x).ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def float_of(x: Int32, *, loc=None, ip=None) -> Float32:
    """The float of these bits; no instruction."""
    return Float32(llvm.bitcast(T.f32(), Int32(x).ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def bit_mask(begin: Int32, count: Int32, *, loc=None, ip=None) -> Int32:
    """bmsk.clamp.b32: ``count`` bits from ``begin`` on, both >= 0; those past 31 are left out."""
    operands = [Int32(x).ir_value(loc=loc, ip=ip) for x in (begin, count)]
    result = inline(
        "bmsk.clamp.b32 $0, $1, $2;", [T.i32()], operands, "=r,r,r", effects=False, loc=loc, ip=ip
    )
    return Int32(result)


@dsl_user_op
def max3(a: Float32, b: Float32, c: Float32, *, loc=None, ip=None) -> Float32:
    """max.f32 of three."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b, c)]
    result = inline(
        "max.f32 $0, $1, $2, $3;", [T.f32()], operands, "=f,f,f,f", effects=False, loc=loc, ip=ip
    )
    return Float32(result)


@dsl_user_op
def store_shared(address: Int32, values: list[Any], *, loc=None, ip=None) -> None:
    """st.shared.v4.b32: 16 bytes, aligned."""
    kind = "f" if isinstance(values[0], Float32) else "r"
    inline(
        "st.shared.v4.b32 [$0], {$1, $2, $3, $4};",
        [], [v.ir_value(loc=loc, ip=ip) for v in (Int32(address), *values)],
        ",".join(["r"] + [kind] * 4), effects=True, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def tensor_map(atom: cute.CopyAtom, *, loc=None, ip=None) -> Int64:
    """Generic address of the tensor map of a TMA atom."""
    kind = cute_ir.PtrType.get(
        cute_nvgpu.TmaDescriptorTiledType.get(), cute.AddressSpace.generic, 64
    )
    load = cute_nvgpu.atom_make_exec_tma(atom._trait.value, loc=loc, ip=ip)
    return cute_nvgpu.get_tma_desc_addr(kind, load, loc=loc, ip=ip).toint(loc=loc, ip=ip)


@dsl_user_op
def tma_load(
    target: Int32, offset: int, tensor_map: Int64, coordinates: list[Any], barrier: Int32,
    gather: bool = False, pair: bool = False, *, loc=None, ip=None,
) -> None:  # fmt: skip
    """cp.async.bulk.tensor by the lane that the caller has elected: the box at ``coordinates``,
    fastest first, to ``offset`` bytes from ``target``. What is outside of the map arrives as zeros.

    gather: tile::gather4, coordinates (COLUMN, ROW, ROW, ROW, ROW) of a map whose box has one row.
    pair: the bytes count at the barrier of the first CTA of a pair.
    """
    space, group = "shared::cta", ""
    if pair:
        # Bit 24 of a shared address tells the CTAs of a pair apart.
        space, group, barrier = "shared::cluster", ".cta_group::2", barrier & 0xFEFFFFF8
    values: list[Any] = [Int32(target), Int64(tensor_map), Int32(barrier)]
    place = []
    for coordinate in coordinates:
        place.append(str(coordinate) if isinstance(coordinate, int) else f"${len(values)}")
        values += [] if isinstance(coordinate, int) else [Int32(coordinate)]
    mode = "2d.{}.global.tile::gather4" if gather else f"{len(place)}d.{{}}.global.tile"
    inline(
        f"cp.async.bulk.tensor.{mode.format(space)}.mbarrier::complete_tx::bytes{group} "
        f"[$0 + {offset}], [$1, {{{', '.join(place)}}}], [$2];",
        [], [value.ir_value(loc=loc, ip=ip) for value in values],
        ",".join(["r", "l"] + ["r"] * (len(values) - 2)), effects=True, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def store_matrices(address: Int32, values: list[Int32], *, loc=None, ip=None) -> None:
    """stmatrix of four 8 × 8 matrices of 16-bit values: lane l gives the address of row l % 8 of
    matrix l / 8, and holds columns 2 (l % 4) and the next of row l / 4 of each."""
    inline(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};",
        [], [v.ir_value(loc=loc, ip=ip) for v in (Int32(address), *values)], "r,r,r,r,r",
        effects=True, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def store_shared_word(address: Int32, value: Any, *, loc=None, ip=None) -> None:
    """st.shared.b32."""
    kind = "f" if isinstance(value, Float32) else "r"
    inline(
        "st.shared.b32 [$0], $1;",
        [], [v.ir_value(loc=loc, ip=ip) for v in (Int32(address), value)], f"r,{kind}",
        effects=True, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def load_shared(
    address: Int32, kind: Any = Int32, offset: int = 0, *, loc=None, ip=None
) -> list[Any]:
    """ld.shared.v4.b32: 16 bytes, aligned, ``offset`` bytes from the address, as four numbers of
    ``kind`` (Int32 or Float32)."""
    register = T.f32() if kind is Float32 else T.i32()
    letter = "=f" if kind is Float32 else "=r"
    result = inline(
        f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {offset}];",
        [register] * 4, [Int32(address).ir_value(loc=loc, ip=ip)], ",".join([letter] * 4 + ["r"]),
        effects=True, loc=loc, ip=ip,
    )  # fmt: skip
    return [kind(llvm.extractvalue(register, result, [i], loc=loc, ip=ip)) for i in range(4)]


@dsl_user_op
def store_global(address: Int64, values: list[Any], live: Any = True, *, loc=None, ip=None) -> None:
    """st.global of one, two or four 32-bit ``values``, aligned to their size, where ``live``."""
    count = len(values)
    kind = "f" if isinstance(values[0], Float32) else "r"
    vector = f".v{count}" if count > 1 else ""
    inline(
        f"{{\n\t.reg .pred p;\n\tsetp.ne.b32 p, $1, 0;\n\t"
        f"@p st.global{vector}.b32 [$0], {_names(2, count)};\n\t}}",
        [], [v.ir_value(loc=loc, ip=ip) for v in (Int64(address), Int32(live), *values)],
        ",".join(["l", "r"] + [kind] * count), effects=True, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def store_global_bytes(
    address: Int64, value: Int32, count: int, live: Any, *, loc=None, ip=None
) -> None:
    """st.global of the lowest one, two or four bytes of ``value``, where ``live``."""
    inline(
        f"{{\n\t.reg .pred p;\n\tsetp.ne.b32 p, $1, 0;\n\t"
        f"@p st.global.b{8 * count} [$0], $2;\n\t}}",
        [], [v.ir_value(loc=loc, ip=ip) for v in (Int64(address), Int32(live), Int32(value))],
        "l,r,r", effects=True, loc=loc, ip=ip,
    )  # fmt: skip


def wait_lines(address: str, phase: str) -> list[str]:
    """Wait for a phase of an mbarrier, with a predicate q and a label of its own."""
    return [
        "again:", f"mbarrier.try_wait.parity.shared::cta.b64 q, [{address}], {phase}, 10000000;",
        "@!q bra again;",
    ]  # fmt: skip


def commit_line(address: str, pair: bool) -> str:
    """Commit from the lane of predicate e; of a ``pair`` to both CTAs."""
    kind = "mbarrier::arrive::one.shared::cluster"
    if pair:
        return (
            "{ .reg .b16 both; mov.b16 both, 3; "
            f"@e tcgen05.commit.cta_group::2.{kind}.multicast::cluster.b64 [{address}], both; }}"
        )
    return f"@e tcgen05.commit.cta_group::1.{kind}.b64 [{address}];"


@dsl_user_op
def load_global(address: Int64, live: Any, *, loc=None, ip=None) -> list[Int32]:
    """ld.global.nc.v4.b32: 16 bytes, aligned, of memory that nobody writes meanwhile; zeros where
    not ``live``."""
    result = inline(
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, $5, 0;\n\t"
        "mov.b32 $0, 0;\n\tmov.b32 $1, 0;\n\tmov.b32 $2, 0;\n\tmov.b32 $3, 0;\n\t"
        "@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];\n\t}",
        [T.i32()] * 4,
        [Int64(address).ir_value(loc=loc, ip=ip), Int32(live).ir_value(loc=loc, ip=ip)],
        "=&r,=&r,=&r,=&r,l,r", effects=True, loc=loc, ip=ip,
    )  # fmt: skip
    return [Int32(llvm.extractvalue(T.i32(), result, [i], loc=loc, ip=ip)) for i in range(4)]


@dsl_user_op
def map_shared(address: Int32, rank: Any, *, loc=None, ip=None) -> Int32:
    """mapa: a shared address of this CTA in CTA ``rank`` of the cluster."""
    result = inline(
        "mapa.shared::cluster.u32 $0, $1, $2;",
        [T.i32()], [Int32(x).ir_value(loc=loc, ip=ip) for x in (address, rank)], "=r,r,r",
        effects=False, loc=loc, ip=ip,
    )  # fmt: skip
    return Int32(result)


@dsl_user_op
def store_cluster(
    address: Int32, values: list[Any], offset: int = 0, bits: int = 32, *, loc=None, ip=None
) -> None:
    """st.shared::cluster of the lower ``bits`` of one or four ``values``, aligned to their size,
    ``offset`` bytes from the address."""
    count = len(values)
    vector = f".v{count}" if count > 1 else ""
    values = [Int32(value) for value in values]
    inline(
        f"st.shared::cluster{vector}.b{bits} [$0 + {offset}], {_names(1, count)};",
        [], [v.ir_value(loc=loc, ip=ip) for v in (Int32(address), *values)],
        ",".join(["r"] * (count + 1)), effects=True, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def copy_cluster(
    target: Int32, source: Int32, size: int, barrier: Int32, *, loc=None, ip=None
) -> None:
    """cp.async.bulk by one thread: ``size`` bytes, a multiple of 16, of this CTA's shared memory to
    the cluster's, where they count at a ``barrier`` of the CTA that gets them."""
    values = [Int32(value).ir_value(loc=loc, ip=ip) for value in (target, source, barrier)]
    inline(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
        f"[$0], [$1], {size}, [$2];",
        [], values, "r,r,r", effects=True, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def barrier_sync(identifier: Int32, threads: int, *, loc=None, ip=None) -> None:
    """barrier.sync: waits for ``threads`` threads."""
    inline(
        f"barrier.cta.sync.aligned $0, {threads};",
        [], [Int32(identifier).ir_value(loc=loc, ip=ip)], "r", effects=True, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def barrier_arrive(identifier: Int32, threads: int, *, loc=None, ip=None) -> None:
    """barrier.arrive: counts towards ``threads`` threads, and does not wait."""
    inline(
        f"barrier.cta.arrive.aligned $0, {threads};",
        [], [Int32(identifier).ir_value(loc=loc, ip=ip)], "r", effects=True, loc=loc, ip=ip,
    )  # fmt: skip


@dsl_user_op
def barrier_any(
    identifier: Int32, threads: int, vote: Any, *, loc=None, ip=None
) -> cutlass.Boolean:
    """barrier.red.or: waits for ``threads`` threads; true for all of them if one of them votes."""
    result = inline(
        "{\n\t.reg .pred p, q;\n\tsetp.ne.b32 p, $1, 0;\n\t"
        f"barrier.cta.red.or.pred.aligned q, $2, {threads}, p;\n\tselp.b32 $0, 1, 0, q;\n\t}}",
        [T.i32()],
        [Int32(vote).ir_value(loc=loc, ip=ip), Int32(identifier).ir_value(loc=loc, ip=ip)],
        "=r,r,r", effects=True, loc=loc, ip=ip,
    )  # fmt: skip
    return Int32(result) != 0


@dsl_user_op
def load_floats(address: Int64, *, loc=None, ip=None) -> list[Float32]:
    """ld.global.v4.f32: 16 bytes, aligned, that another CTA may have written in this launch."""
    result = inline(
        "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];",
        [T.f32()] * 4, [Int64(address).ir_value(loc=loc, ip=ip)], "=f,=f,=f,=f,l", effects=True,
        loc=loc, ip=ip,
    )  # fmt: skip
    return floats(result, 4, loc, ip)


@dsl_user_op
def nanosleep(nanoseconds: int, *, loc=None, ip=None) -> None:
    """nanosleep: between looks at memory that another CTA will write."""
    inline(f"nanosleep.u32 {nanoseconds};", [], [], "", effects=True, loc=loc, ip=ip)
