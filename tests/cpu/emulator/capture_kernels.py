"""CuTe DSL kernels for the tests of capture (helper, not collected)."""

import cutlass
import cutlass.cute as cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op


@cute.kernel
def copy_kernel(a: cute.Tensor, b: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    b[block * 128 + thread] = a[block * 128 + thread]


@cute.jit
def copy(a: cute.Tensor, b: cute.Tensor):
    copy_kernel(a, b).launch(grid=(4, 1, 1), block=(128, 1, 1))


@cute.jit
def copy_pair(pair: tuple[cute.Tensor, cute.Tensor]):
    copy_kernel(pair[0], pair[1]).launch(grid=(4, 1, 1), block=(128, 1, 1))


@cute.jit
def dependent(a: cute.Tensor, b: cute.Tensor):
    copy_kernel(a, b).launch(grid=(4, 1, 1), block=(128, 1, 1))
    copy_kernel(a, b).launch(grid=(4, 1, 1), block=(128, 1, 1), use_pdl=True)


@cute.kernel
def scale_kernel(a: cute.Tensor, b: cute.Tensor, s: cutlass.Float32):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    i = block * 128 + thread
    b[i] = a[i] * s


@cute.kernel
def add_kernel(b: cute.Tensor, n: cutlass.Int32):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    i = block * 128 + thread
    if i < n:
        b[i] = b[i] + 1.0


@cute.jit
def scale_then_add(
    a: cute.Tensor,
    b: cute.Tensor,
    s: cutlass.Float32,
    n: cutlass.Int32,
    again: cutlass.Constexpr = False,
):
    scale_kernel(a, b, s).launch(grid=(4, 1, 1), block=(128, 1, 1))
    add_kernel(b, n).launch(grid=(4, 1, 1), block=(128, 1, 1), cluster=(2, 1, 1), smem=4096)
    if cutlass.const_expr(again):
        scale_kernel(b, b, 3.0).launch(grid=(4, 1, 1), block=(128, 1, 1))


TYPES = (
    cutlass.Int32,
    cutlass.Float32,
    cutlass.Int64,
    cutlass.Boolean,
    cutlass.Uint8,
    cutlass.Int16,
    cutlass.Float32,
)


def typed(value, dtype):
    return dtype(value)


@cute.kernel
def scalars_kernel(
    out: cute.Tensor,
    a: cutlass.Int32,
    b: cutlass.Float32,
    c: cutlass.Int64,
    d: cutlass.Boolean,
    e: cutlass.Uint8,
    f: cutlass.Int16,
    g: cutlass.Float32,
):
    thread, _, _ = cute.arch.thread_idx()
    if thread == 0:
        out[0] = cutlass.Float64(a)
        out[1] = cutlass.Float64(b)
        out[2] = cutlass.Float64(c)
        out[3] = cutlass.Float64(cutlass.Int32(d))
        out[4] = cutlass.Float64(cutlass.Int32(e))
        out[5] = cutlass.Float64(cutlass.Int32(f))
        out[6] = cutlass.Float64(g)


@cute.jit
def scalars(
    out: cute.Tensor,
    a: cutlass.Int32,
    b: cutlass.Float32,
    c: cutlass.Int64,
    d: cutlass.Boolean,
    e: cutlass.Uint8,
    f: cutlass.Int16,
    g: cutlass.Float32,
):
    scalars_kernel(out, a, b, c, d, e, f, g).launch(grid=(1, 1, 1), block=(32, 1, 1))


@dsl_user_op
def store_remote(address: cutlass.Int32, value: cutlass.Float32, *, loc=None, ip=None):
    llvm.inline_asm(
        None,
        [x.ir_value(loc=loc, ip=ip) for x in (address, value)],
        "st.shared::cluster.f32 [$0], $1;",
        "r,f",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


@cute.kernel
def swap_kernel(a: cute.Tensor, b: cute.Tensor):
    """Every CTA puts its part of `a` into the shared memory of the other CTA of its pair."""
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    rank = cute.arch.block_idx_in_cluster()
    allocator = cutlass.utils.SmemAllocator()
    shared = allocator.allocate_tensor(cutlass.Float32, cute.make_layout(128), 16)
    theirs = cute.arch.map_dsmem_ptr(shared.iterator, rank ^ 1)
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()
    store_remote(theirs.toint() + thread * 4, a[block * 128 + thread])
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()
    b[block * 128 + thread] = shared[thread]


@cute.jit
def swap_in_cluster(a: cute.Tensor, b: cute.Tensor):
    swap_kernel(a, b).launch(grid=(4, 1, 1), block=(128, 1, 1), cluster=(2, 1, 1), smem=1024)
