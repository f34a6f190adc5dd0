"""PTX around the instructions that a test is about."""

from __future__ import annotations


def module(body: str, *pointers: str, align: int = 128) -> str:
    """A kernel whose parameters are ``pointers``, loaded into registers of these names.

    %t thread, %lane, %warp, %cta, %rank of the CTA in its cluster, %smem dynamic shared memory;
    predicates of thread 0 of the CTA (%p10), of CTA 0 (%p11), of lane 0 (%p12).
    """
    parameters = ", ".join(f".param .u64 {name}" for name in pointers)
    loads = "\n".join(f"    ld.param.u64 %{name}, [{name}];" for name in pointers)
    return f"""
.version 8.8
.target sm_100a
.address_size 64
.extern .shared .align {align} .b8 buffer[];
.visible .entry kernel({parameters})
{{
    .reg .b16 %h<8>; .reg .b32 %r<60>, %t, %lane, %warp, %cta, %rank, %smem;
    .reg .b64 %rd<40>, %{", %".join(pointers)}; .reg .b128 %q<4>; .reg .pred %p<20>;
{loads}
    mov.u32 %t, %tid.x;
    mov.u32 %cta, %ctaid.x;
    mov.u32 %rank, %cluster_ctarank;
    and.b32 %lane, %t, 31;
    shr.u32 %warp, %t, 5;
    setp.eq.u32 %p10, %t, 0;
    setp.eq.u32 %p11, %cta, 0;
    setp.eq.u32 %p12, %lane, 0;
    mov.u32 %smem, buffer;
{body}
    ret;
}}
"""
