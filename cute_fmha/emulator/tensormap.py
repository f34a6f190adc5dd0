"""Tensor maps (the 128-byte descriptors of TMA copies): made for tests, and described in messages.

Bit positions as the ``tensormap.replace`` instruction writes them; the constant bits as the host
code of CuTe DSL for Blackwell sets them (the driver's maps for Hopper have 0 where this has 2).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

MAP_BYTES = 128
MAX_RANK = 5
_CODES = {
    "uint8": 0,
    "int8": 0,
    "uint16": 1,
    "int16": 1,
    "uint32": 2,
    "int32": 3,
    "uint64": 4,
    "int64": 5,
    "float16": 6,
    "float32": 7,
    "float64": 9,
    "bfloat16": 10,
    "bool": 0,
    "float8_e4m3fn": 0,
    "float8_e5m2": 0,
}
_NAMES = {
    0: "u8",
    1: "u16",
    2: "u32",
    3: "s32",
    4: "u64",
    5: "s64",
    6: "f16",
    7: "f32",
    8: "f32.ftz",
    9: "f64",
    10: "bf16",
}
_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_LARGE_TENSOR = 128 << 10


def _layout(array: Any) -> tuple[int, str, int, tuple[int, ...], tuple[int, ...]]:
    """Address, name of the element type, its bytes, shape, strides in bytes."""
    if hasattr(array, "data_ptr"):
        size = int(array.element_size())
        strides = tuple(int(s) * size for s in array.stride())
        return (
            int(array.data_ptr()),
            str(array.dtype).removeprefix("torch."),
            size,
            tuple(array.shape),
            strides,
        )
    address = int(array.__array_interface__["data"][0])
    return (
        address,
        str(array.dtype),
        int(array.itemsize),
        tuple(array.shape),
        tuple(array.strides),
    )


def tensor_map(
    array: Any,
    box: Sequence[int],
    *,
    strides: Sequence[int] | None = None,
    swizzle: int = 0,
    fill: str = "zero",
    element_strides: Sequence[int] | None = None,
    dtype: str | None = None,
    shape: Sequence[int] | None = None,
) -> bytes:
    """The tensor map of a NumPy array or CPU tensor.

    ``box``, ``strides`` (bytes), ``element_strides`` and ``shape`` are in the order of the array's
    dimensions: the last one is contiguous and becomes dimension 0 of the map, the first coordinate
    in PTX. ``swizzle`` is 0, 32, 64 or 128 bytes; ``fill`` is "zero" or "nan". Nothing is checked
    beyond what must fit into the fields, so that tests can make invalid maps.
    """
    address, name, size, own_shape, own_strides = _layout(array)
    dims = tuple(shape or own_shape)[::-1]
    steps = tuple(strides or own_strides)[::-1]
    code = _CODES[dtype or name]
    rank = len(dims)
    if not 1 <= rank <= MAX_RANK or len(box) != rank or len(steps) != rank:
        raise ValueError(f"a box of {len(box)} and strides of {len(steps)} for {rank} dimensions")
    if steps[0] != size:
        raise ValueError(f"the last dimension has stride {steps[0]}, not {size}")
    if any(not 1 <= extent <= 256 for extent in box):
        raise ValueError(f"a box of {tuple(box)}: every extent is 1 to 256")
    flags = 2 | (rank - 1) << 4 | code << 7 | _SWIZZLES[swizzle] << 13 | 2 << 17
    flags |= {"zero": 0, "nan": 1}[fill] << 15
    total = size
    for extent in dims:
        total *= extent
    flags |= int(total >= _LARGE_TENSOR) << 21
    traversal = 0
    for i, step in enumerate(tuple(element_strides or (1,) * rank)[::-1]):
        if not 1 <= step <= 8:
            raise ValueError(f"an element stride of {step}: 1 to 8")
        traversal |= (step - 1) << 3 * i
    packed = bytearray(MAP_BYTES)
    struct.pack_into("<QI", packed, 0, address, flags)
    high = 0
    for i, stride in enumerate(steps[1:]):
        if stride % 16 or not 0 <= stride < 1 << 40:
            raise ValueError(f"a stride of {stride} bytes: a multiple of 16 below 2^40")
        struct.pack_into("<I", packed, 12 + 4 * i, stride >> 4 & 0xFFFFFFFF)
        high |= (stride >> 36) << 4 * i
    struct.pack_into("<I", packed, 28, high)
    for i, extent in enumerate(dims):
        struct.pack_into("<I", packed, 32 + 4 * i, extent - 1)
    struct.pack_into("<I", packed, 52, traversal)
    for i, extent in enumerate(tuple(box)[::-1]):
        packed[55 + i] = extent - 1
    return bytes(packed)


def describe(packed: bytes) -> str:
    """A tensor map in words, dimension 0 (the contiguous one) first."""
    address, flags = struct.unpack_from("<QI", packed, 0)
    if flags & 15 & ~2:
        return f"no tiled tensor map (flags {flags:#010x})"
    rank = (flags >> 4 & 7) + 1
    code = flags >> 7 & 15
    if rank > MAX_RANK:
        return f"tensor map of rank {rank}, which does not exist"
    high, steps = struct.unpack_from("<I", packed, 28)[0], struct.unpack_from("<I", packed, 52)[0]
    sizes = [struct.unpack_from("<I", packed, 32 + 4 * i)[0] + 1 for i in range(rank)]
    strides = [_BYTES.get(code, 0)]
    for i in range(rank - 1):
        low = struct.unpack_from("<I", packed, 12 + 4 * i)[0]
        strides.append((low | (high >> 4 * i & 15) << 32) << 4)
    box = [packed[55 + i] + 1 for i in range(rank)]
    text = (
        f"{_NAMES.get(code, f'type {code}')} tensor at {address:#x}, sizes {sizes}, strides "
        f"{strides} bytes, box {box}"
    )
    swizzle = flags >> 13 & 3
    if swizzle:
        text += f", swizzle {16 << swizzle} bytes"
    element_strides = [(steps >> 3 * i & 7) + 1 for i in range(rank)]
    if any(step != 1 for step in element_strides):
        text += f", element strides {element_strides}"
    if flags >> 11 & 3:
        text += f", interleave {flags >> 11 & 3}"
    if flags >> 15 & 1:
        text += ", filled with NaN"
    if flags >> 16 & 1:
        text += ", converted to tf32"
    return text
