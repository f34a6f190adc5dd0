"""Problems as people type them."""

from __future__ import annotations

import pytest
import torch

from cute_fmha import attention, dispatch
from cute_fmha.epilogues import FP8, NVFP4
from cute_fmha.ops import Call
from cute_fmha.problem_text import ProblemError, parse
from cute_fmha.testing import AttentionCase, MlaCase


def test_a_prefill():
    text = parse("b2,sq512,sk640,hq8,hkv2,d128,causal,bf16,lse")
    problem = text.problem
    assert (problem.op, problem.layout, problem.dtype) == ("attention", "dense", torch.bfloat16)
    assert (problem.batch, problem.seqlen_q, problem.seqlen_k) == (2, 512, 640)
    assert (problem.heads_q, problem.heads_kv) == (8, 2)
    assert (problem.head_dim, problem.head_dim_v) == (128, 128)
    assert (problem.window_left, problem.window_right, problem.lse) == (-1, 0, True)
    case = text.case(3)
    assert isinstance(case, AttentionCase)
    assert case.q.shape == (2, 512, 8, 128)
    assert case.k.shape == (2, 640, 2, 128)
    assert torch.equal(case.q, text.case(3).q)
    assert not torch.equal(case.q, text.case(4).q)


def test_every_word():
    problem = parse(
        "s=100, h4, d192, fp16, out=fp32, window100:-1, sink, softcap30, skip0.01, stats, "
        "blocks64x128, splits4"
    ).problem
    assert (problem.seqlen_q, problem.seqlen_k, problem.heads_q, problem.heads_kv) == (
        100, 100, 4, 4,
    )  # fmt: skip
    assert (problem.head_dim, problem.head_dim_v) == (192, 128)
    assert (problem.dtype, problem.out_dtype) == (torch.float16, torch.float32)
    assert (problem.window_left, problem.window_right) == (100, -1)
    assert problem.sink
    assert problem.softcap
    assert problem.skip
    assert problem.stats
    assert (problem.block_mask, problem.num_splits) == ((64, 128), 4)


def test_layouts():
    packed = parse("b3,sq20,sk30,d64,packed")
    assert (packed.problem.layout, packed.problem.packed_q) == ("packed", True)
    case = packed.case(0)
    assert isinstance(case, AttentionCase)
    assert case.launch == {"max_seqlen_q": 20, "max_seqlen_k": 30}
    assert case.common["cu_seqlens_k"].tolist() == [0, 30, 55, 75]
    paged = parse("b3,sq20,sk30,d64,paged16")
    assert (paged.problem.layout, paged.problem.page_size) == ("paged", 16)
    assert paged.case(0).run(backend="reference")[0].shape == (3, 20, 1, 64)
    latent = parse("mla,b2,sk200,hq16,logits")
    assert latent.problem.max_logits
    assert (latent.problem.op, latent.problem.seqlen_q) == ("mla_decode", 1)
    assert (latent.problem.head_dim, latent.problem.head_dim_v) == (576, 512)
    assert latent.problem.page_size == 64
    assert isinstance(latent.case(0), MlaCase)


def test_epilogues_are_those_of_calls():
    """So that what is compiled ahead of time is what a call looks for."""
    x = torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16)
    for word, op in (("fp8", FP8(torch.ones(1))), ("nvfp4", NVFP4(torch.ones(())))):
        seen: list[Call] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "run", lambda call, backend, seen=seen: seen.append(call))
            attention(x, x, x, epilogue=op)
        assert seen[0].problem == parse(f"s8,d64,{word}").problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s128", "lacks the head dim"),
        ("d128,x3", "'x3' in 'd128,x3' is not a word"),
        ("d128,b0", "'b0' in 'd128,b0' has a wrong value"),
        ("d128,window3", "has a wrong value"),
        ("d128,out=int8", "has a wrong value"),
        ("d128,s100,sq200", "seqlen_q is given twice"),
        ("d128,hq3,hkv2", "multiple of hkv"),
        ("d128,causal5", "not a word"),
        ("d128,logits", "for mla"),
    ],
)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(ProblemError, match=message):
        parse(text)
