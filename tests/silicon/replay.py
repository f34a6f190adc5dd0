"""Runs the cases in the emulator."""

from __future__ import annotations

import struct

import numpy as np

from cute_fmha.emulator.machine import EmulationError, Policy, run_ptx
from cute_fmha.emulator.tensormap import tensor_map
from silicon.model import (
    ALIGNMENT,
    ITEM_BYTES,
    PLAIN,
    Argument,
    Buffer,
    Case,
    Map,
    Outcome,
    canonical,
    pack,
)

ADDRESS = 8  # bytes of a tensor map that are its address


def aligned(data: np.ndarray) -> np.ndarray:
    """A copy at a multiple of 128 bytes."""
    raw = np.zeros(data.nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    part = raw[start : start + data.nbytes].view(data.dtype).reshape(data.shape)
    part[...] = data
    return part


# The driver's 128 bytes end with what TMA does not need, or is not known to: bytes of a box (whole
# steps in every dimension), and at which alignment its swizzle repeats.
BOX_BYTES_AT, ALIGNMENT_AT = 64, 72


def as_driver(m: Map, packed: bytes) -> bytes:
    """As driver 13.0 writes it for Hopper: first bits 0, not the 2 of CuTe DSL's host code for
    Blackwell, and with no mark of large tensors, but more behind."""
    low, flags = struct.unpack_from("<QI", packed)
    tail = bytearray(packed)
    struct.pack_into("<QI", tail, 0, low, flags & ~(15 | 1 << 21))
    steps = m.steps or (1,) * len(m.box)
    size = np.prod([extent // step for extent, step in zip(m.box, steps, strict=True)])
    struct.pack_into("<I", tail, BOX_BYTES_AT, int(size) * ITEM_BYTES[m.dtype])
    struct.pack_into("<I", tail, ALIGNMENT_AT, 8 * m.swizzle or 16)
    return bytes(tail)


def encode(m: Map, memory: np.ndarray) -> bytes:
    """The emulator's encoding of a map of a part of `memory`."""
    flat = memory.reshape(-1).view(np.uint8)[m.offset :]
    element = flat[: np.dtype(PLAIN[m.dtype]).itemsize].view(PLAIN[m.dtype])
    return tensor_map(
        element,
        m.box,
        shape=m.shape,
        strides=m.all_strides,
        swizzle=m.swizzle,
        fill=m.fill,
        element_strides=m.steps or None,
        dtype=m.dtype,
    )


def run(case: Case, maps: list[bytes] | None = None, policy: Policy | None = None) -> Outcome:
    """`maps`: encoded elsewhere, to use with the addresses here."""
    memory = {id(b): aligned(b.data) for b in case.buffers}
    given = iter(maps or [])
    encoded: list[bytes] = []

    def argument(value: Argument) -> np.ndarray | bytes:
        if isinstance(value, Buffer):
            return memory[id(value)]
        if isinstance(value, Map):
            own = encode(value, memory[id(value.buffer)])
            encoded.append(own)
            return own[:ADDRESS] + next(given)[ADDRESS:] if maps else own
        return pack(value)

    try:
        run_ptx(
            case.source,
            *[argument(value) for value in case.arguments],
            kernel=case.entry,
            grid=case.grid,
            block=case.block,
            cluster=case.cluster,
            dynamic_shared=case.shared,
            policy=policy,
            memory=memory.values(),
        )
    except (EmulationError, ValueError) as error:
        return Outcome(error=str(error) or type(error).__name__)
    return Outcome([canonical(b, memory[id(b)]) for b in case.outputs], encoded)
