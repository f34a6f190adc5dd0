"""Frozen descriptions: what is asked (`Problem`, `SkipSoftmax`, `BlockMask`), where (`Target`).

Nothing here touches a kernel: dispatch, every backend, the tests and the benchmarks share these.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch

from cute_fmha.epilogues.base import Kind

HEAD_DIMS = (64, 96, 128, 256, 512)
"""Head dims D with Dv == D that `attention` accepts, besides (192, 128)."""

MLA_HEAD_DIMS = ((576, 512), (512, 512))
"""(q and latent width, value width) pairs that `mla_decode` accepts."""


def _check_rate(name: str, value: float, upper: float | None) -> None:
    allowed = "[0, 1]" if upper is not None else "[0, inf)"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Comparisons, which NaN fails: Dynamo cannot trace math.isfinite of a symbolic float.
    if not (number and 0 <= value < math.inf and (upper is None or value <= upper)):
        raise ValueError(
            f"SkipSoftmax {name} must be a finite number in {allowed} (0 or None: off) or a "
            f"one-element float32 device tensor; got {value!r}"
        )


@dataclass(frozen=True)
class SkipSoftmax:
    """Skip-softmax policy (BLASST, arXiv 2512.12087).

    A KV tile is skipped when for every query row of the tile ``tile_max - running_max < ln λ``,
    where ``running_max`` is the row's maximum over the tiles kept before it. A row that has no
    unmasked key in the tile never keeps it. Within a kept tile no row is altered.

    Exactly one of the two fields is given:

    threshold: λ in (0, 1]; ``None`` or 0 is off.
    threshold_scale_factor: λ = factor / KV length of the sequence, capped at 1.

    Either may be a one-element float32 tensor on the device of the inputs; it is then read by the
    kernel, so that it can change between CUDA-graph replays. A device value is not range-checked
    (that would synchronise): the kernel treats NaN and values <= 0 as off and caps λ at 1.

    Raises:
        ValueError: a host value that is NaN, infinite, negative or (for ``threshold``) > 1; both
            fields given; a tensor that is not one float32 element.
    """

    threshold: float | torch.Tensor | None = None
    threshold_scale_factor: float | torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and self.threshold_scale_factor is not None:
            raise ValueError(
                "SkipSoftmax takes threshold or threshold_scale_factor, not both; got "
                f"threshold={self.threshold!r}, "
                f"threshold_scale_factor={self.threshold_scale_factor!r}"
            )
        for name, upper in (("threshold", 1.0), ("threshold_scale_factor", None)):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                if value.numel() != 1 or value.dtype != torch.float32:
                    raise ValueError(
                        f"SkipSoftmax {name} as a tensor must hold one float32 element; got shape "
                        f"{tuple(value.shape)}, dtype {value.dtype}"
                    )
            elif value is not None:
                _check_rate(name, value, upper)

    @property
    def relative(self) -> bool:
        """True when λ is ``threshold_scale_factor`` over the KV length."""
        return self.threshold_scale_factor is not None

    @property
    def value(self) -> float | torch.Tensor:
        """The λ or factor that was given; 0.0 when neither was."""
        given = self.threshold_scale_factor if self.relative else self.threshold
        return 0.0 if given is None else given

    @property
    def enabled(self) -> bool:
        """False when the policy is known on the host to skip nothing."""
        return isinstance(self.value, torch.Tensor) or self.value > 0


@dataclass(frozen=True)
class BlockMask:
    """Block-sparse mask: key block ``n`` is visible to query block ``m`` where ``mask`` is true.

    mask: bool ``[B or 1, Hq or 1, ceil(Sq / block_m), ceil(Sk / block_n)]`` on the device of q;
        for packed (varlen) inputs Sq and Sk are the maximum lengths and blocks count from each
        sequence's own start. It combines (and) with causal and window.
    block_m, block_n: query rows and keys per block.
    """

    mask: torch.Tensor
    block_m: int
    block_n: int

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool or self.mask.dim() != 4:
            raise ValueError(
                "BlockMask mask must be a 4-dimensional bool tensor [B or 1, Hq or 1, "
                f"ceil(Sq/block_m), ceil(Sk/block_n)]; got {self.mask.dtype} "
                f"{tuple(self.mask.shape)}"
            )
        if self.block_m < 1 or self.block_n < 1:
            raise ValueError(
                f"BlockMask block sizes must be >= 1; got {self.block_m} x {self.block_n}"
            )


@dataclass(frozen=True)
class Target:
    """The device a plan is made for. ``arch`` is 10 * major + minor, 0 for no CUDA device."""

    device_type: str
    arch: int
    num_sms: int


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(
        "cuda", 10 * properties.major + properties.minor, properties.multi_processor_count
    )


def target_of(device: torch.device) -> Target:
    """The `Target` that describes ``device`` (cached: no driver query on the hot path)."""
    if device.type == "cuda":
        return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
    return Target(device.type, 0, 1)


@dataclass(frozen=True)
class Problem:
    """Everything about a call that does not depend on tensor values.

    ``seqlen_q`` and ``seqlen_k`` are per-sequence maxima (for paged keys the table's capacity).
    ``window_left``/``window_right`` have causal folded in (causal is ``window_right == 0``), −1 is
    unbounded. ``num_splits`` 0 leaves the choice to the backend. ``lse``, ``max_logits``,
    ``seqused`` and ``skip_tensor`` say that the call has such a tensor; ``seqused`` only for dense
    keys, paged ones always have it. ``skip_relative``: λ is a factor over the KV length.
    ``parameters`` and ``extra`` (its second output) are the epilogue op's.
    """

    op: Literal["attention", "mla_decode"]
    layout: Literal["dense", "packed", "paged"]
    packed_q: bool
    dtype: torch.dtype
    out_dtype: torch.dtype
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    page_size: int = 0
    window_left: int = -1
    window_right: int = -1
    softcap: bool = False
    sink: bool = False
    block_mask: tuple[int, int] | None = None
    skip: bool = False
    stats: bool = False
    epilogue: str = "identity"
    num_splits: int = 0
    lse: bool = False
    max_logits: bool = False
    seqused: bool = False
    skip_tensor: bool = False
    skip_relative: bool = False
    parameters: tuple[Kind, ...] = ()
    extra: Kind | None = None

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads_q // self.heads_kv

    @property
    def problem_class(self) -> tuple[object, ...]:
        """What distinguishes kernels: everything but the sizes. Dispatch logs once per value."""
        return (
            self.op, self.layout, self.packed_q, self.dtype, self.out_dtype, self.head_dim,
            self.head_dim_v, self.window_left >= 0, self.window_right >= 0, self.softcap,
            self.sink, self.block_mask, self.skip, self.stats, self.epilogue, self.seqused,
            self.parameters, self.extra,
        )  # fmt: skip
