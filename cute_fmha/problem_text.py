"""Problems as people type them: ``b2,sq512,sk512,hq8,hkv2,d128,causal,bf16``.

`parse` reads such a text into a `ProblemText`, which gives the `Problem` that kernels are planned
for and the random case (`cute_fmha.testing`) that they are tried on.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cute_fmha.epilogues import FP8, NVFP4, EpilogueOp, Identity
from cute_fmha.epilogues.base import kind_of
from cute_fmha.problem import Problem, SkipSoftmax
from cute_fmha.testing import (
    AttentionCase,
    Heads,
    MlaCase,
    Options,
    Source,
    dense_case,
    mla_case,
    packed_case,
    paged_case,
)

SYNTAX = """\
PROBLEM is a list of words, separated by commas; a word's number follows directly or after '=':

  b2                    sequences (default 1)
  s512, sq512, sk512    queries and keys per sequence; s sets both (default 512)
  h8, hq8, hkv2         query and key/value heads; h sets both
  d128, dv128           head dims (dv: d, or 128 for d192, or 512 for mla)
  bf16, fp16            dtype (default bf16); out=fp32 for an output in another one
  causal, window100:30  masks; window LEFT:RIGHT, -1 is unbounded
  sink, softcap30       attention sinks; softcap
  skip, skip0.01        skip-softmax; the number is its threshold
  stats                 count skipped tiles
  lse                   return the log-sum-exp
  logits                return every row's largest logit (mla)
  packed, paged64       cu_seqlens; or a paged cache and its page size
  blocks64x128          block mask of so many queries and keys
  mla                   mla_decode (paged64, d576 unless told), else attention
  splits4               split the keys into so many parts
  fp8, nvfp4            epilogue op, its scale in a tensor of one element (not for `emulate`)
"""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FLAGS = ("causal", "sink", "stats", "lse", "logits", "packed", "mla")
_NUMBERS = {
    "b": "batch", "sq": "seqlen_q", "sk": "seqlen_k", "hq": "heads_q", "hkv": "heads_kv",
    "d": "head_dim", "dv": "head_dim_v", "paged": "page_size", "splits": "num_splits",
}  # fmt: skip
_EPILOGUES = {"fp8": FP8, "nvfp4": NVFP4}
_BOTH = {"s": ("seqlen_q", "seqlen_k"), "h": ("heads_q", "heads_kv")}
_GAP = 12.0
"""Of the scores of a case with skip-softmax, so that its decisions have a margin."""


class ProblemError(ValueError):
    """A text is no problem; the message is for the user."""


@dataclass(frozen=True)
class ProblemText:
    """What a text says; see `SYNTAX`."""

    text: str
    batch: int = 1
    seqlen_q: int = 512
    seqlen_k: int = 512
    heads_q: int = 1
    heads_kv: int = 1
    head_dim: int = 0
    head_dim_v: int = 0
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype | None = None
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    skip: float | None = None
    blocks: tuple[int, int] | None = None
    page_size: int = 0
    num_splits: int = 0
    causal: bool = False
    sink: bool = False
    stats: bool = False
    lse: bool = False
    logits: bool = False
    packed: bool = False
    mla: bool = False
    epilogue: str = ""

    @property
    def op(self) -> EpilogueOp:
        if not self.epilogue:
            return Identity(self.out_dtype)
        return _EPILOGUES[self.epilogue](torch.ones(()))

    @property
    def layout(self) -> Literal["dense", "packed", "paged"]:
        return "paged" if self.page_size else "packed" if self.packed else "dense"

    @property
    def problem(self) -> Problem:
        op = self.op
        parameters: list[torch.Tensor | float] = [*op.tensors, *op.values]
        extra = op.extra(self.batch * self.seqlen_q, self.heads_q, self.head_dim_v)
        left, right = self.window or (-1, -1)
        return Problem(
            "mla_decode" if self.mla else "attention",
            self.layout,
            self.packed,
            self.dtype,
            op.out_dtype(self.dtype),
            self.batch,
            self.seqlen_q,
            self.seqlen_k,
            self.heads_q,
            self.heads_kv,
            self.head_dim,
            self.head_dim_v,
            page_size=self.page_size,
            window_left=left,
            window_right=0 if self.causal else right,
            softcap=self.softcap > 0,
            sink=self.sink,
            block_mask=self.blocks,
            skip=self.skip is not None,
            stats=self.stats,
            epilogue=op.key,
            parameters=tuple(map(kind_of, parameters)),
            extra=extra and kind_of(torch.empty(extra.shape, dtype=extra.dtype)),
            num_splits=self.num_splits,
            lse=self.lse,
            max_logits=self.logits,
        )

    def case(self, seed: int) -> AttentionCase | MlaCase:
        """Random inputs; lengths of several sequences differ, the first has those of the text."""
        gap = 0.0 if self.skip is None else _GAP
        source = Source(self.dtype, seed=seed, std=0.5, gap=gap, gap_block=128)
        options = Options(
            causal=self.causal,
            window=self.window,
            softcap=self.softcap,
            sink=self.sink,
            blocks=None if self.blocks is None else (*self.blocks, 0.5),
        )
        heads = Heads(self.heads_q, self.heads_kv, self.head_dim, self.head_dim_v)
        lengths_q, lengths_k = (
            [length - length * i // (2 * self.batch) for i in range(self.batch)]
            for length in (self.seqlen_q, self.seqlen_k)
        )
        if self.mla:
            return mla_case(
                self.seqlen_q, lengths_k, self.page_size, self.heads_q, self.head_dim, options,
                source,
            )  # fmt: skip
        if self.page_size:
            queries = lengths_q if self.packed else self.seqlen_q
            return paged_case(queries, lengths_k, self.page_size, heads, options, source)
        if self.packed:
            return packed_case(lengths_q, lengths_k, heads, options, source)
        return dense_case(self.batch, self.seqlen_q, self.seqlen_k, heads, options, source)

    @property
    def skip_softmax(self) -> SkipSoftmax | None:
        return None if self.skip is None else SkipSoftmax(self.skip)


def parse(text: str) -> ProblemText:
    """Read ``text``.

    Raises:
        ProblemError: a word is unknown or has a wrong number, or something is missing.
    """
    given: dict[str, Any] = {}

    def put(word: str, name: str, value: Any) -> None:
        if name in given:
            raise ProblemError(f"{word!r} in {text!r}: {name} is given twice")
        given[name] = value

    for word in filter(None, text.replace(" ", "").split(",")):
        for name, value in _read(word, text):
            put(word, name, value)
    mla = given.get("mla", False)
    given.setdefault("head_dim", 576 if mla else 0)
    given.setdefault("head_dim_v", 512 if mla else 128 if given["head_dim"] == 192 else 0)
    given["head_dim_v"] = given["head_dim_v"] or given["head_dim"]
    if mla:
        given.setdefault("page_size", 64)
        given.setdefault("seqlen_q", 1)
    if not given["head_dim"]:
        raise ProblemError(f"{text!r} lacks the head dim, as in d128")
    problem = ProblemText(text, **given)
    if problem.logits and not mla:
        raise ProblemError(f"{text!r}: logits is a word for mla")
    if problem.heads_q % problem.heads_kv:
        raise ProblemError(f"{text!r}: hq has to be a multiple of hkv")
    return problem


def _read(word: str, text: str) -> list[tuple[str, Any]]:
    """(field, value) pairs that one word stands for."""
    if word in ("bf16", "fp16"):
        return [("dtype", _DTYPES[word])]
    if word in _EPILOGUES:
        return [("epilogue", word)]
    match = re.fullmatch(r"([a-z]+)=?(.*)", word)
    name, value = match.groups() if match else ("", "")
    if name in _FLAGS and not value:
        return [(name, True)]
    try:
        if name == "out":
            return [("out_dtype", _DTYPES[value])]
        if name in _NUMBERS:
            return [(_NUMBERS[name], _positive(value))]
        if name in _BOTH:
            return [(field, _positive(value)) for field in _BOTH[name]]
        if name == "window":
            left, right = map(int, value.split(":"))
            return [("window", (left, right))]
        if name == "blocks":
            rows, columns = map(_positive, value.split("x"))
            return [("blocks", (rows, columns))]
        if name == "softcap":
            return [("softcap", float(value))]
        if name == "skip":
            return [("skip", float(value) if value else math.exp(-_GAP / 2))]
    except (ValueError, KeyError):
        raise ProblemError(f"{word!r} in {text!r} has a wrong value") from None
    raise ProblemError(f"{word!r} in {text!r} is not a word of a problem:\n{SYNTAX}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value
