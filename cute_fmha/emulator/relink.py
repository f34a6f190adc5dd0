"""Object code of compiled host functions, with their CUDA runtime calls sent to the shim.

What `cute_fmha.cache` keeps of a kernel is an ELF object: the host function, which calls the CUDA
runtime by name, and the cubin. Before it is linked for the emulator, the undefined symbols that
name the runtime get the prefix ``shim_`` (see `shim.c`), so that the object itself is what a GPU
would run and the real runtime is never called.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

from cute_fmha.cache import Binary

from .device import CaptureError, require_cutlass

__all__ = ["RUNTIME", "check_shim", "host_function", "rename_undefined", "shim_name"]

RUNTIME = re.compile(r"(_cu|cuda_dialect_|CuteDSLRT_)\w+")
"""The runtime symbols that compiled host code may call."""

# ELF64, little endian: where the header says what, the sections' fields, one symbol.
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SYMBOL_TABLE, _UNDEFINED = 2, 0


def shim_name(name: str) -> str:
    return f"shim_{name.lstrip('_')}" if RUNTIME.fullmatch(name) else name


def check_shim(library: ctypes.CDLL, function: str, names: Iterable[str]) -> None:
    """Refuse host code that calls what the shim does not have."""
    missing = sorted(n for n in names if n.startswith("shim_") and not hasattr(library, n))
    if missing:
        raise CaptureError(
            f"{function} calls {', '.join(missing)}: host code may launch kernels and query the "
            "device, nothing else is modelled"
        )


def host_function(binary: Binary, shim: ctypes.CDLL, path: Path) -> Callable[..., None]:
    """The host function of ``binary``, linked with the shim instead of the CUDA runtime."""
    from cute_fmha.kernels.blackwell.build import link_object

    code, names = rename_undefined(binary.object_code, shim_name)
    check_shim(shim, binary.function_name, names)
    libraries = require_cutlass().cutlass_dsl.CuTeDSL._get_dsl().get_shared_libs()
    return link_object(code, binary.entry, [str(path), *libraries])


def rename_undefined(code: bytes, rename: Callable[[str], str]) -> tuple[bytes, list[str]]:
    """The ELF object with its undefined symbols renamed, and their new names.

    The longer names need room: a new string table goes to the end of the file, the old names
    included, because other sections may keep theirs in it.
    """
    if code[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF object")
    data = bytearray(code)
    _, _, _, _, _, _, sections_at, _, _, _, _, size, count, _ = _HEADER.unpack_from(data)
    sections = [list(_SECTION.unpack_from(data, sections_at + i * size)) for i in range(count)]
    renamed = []
    for section in sections:
        if section[1] != _SYMBOL_TABLE:
            continue
        _, _, _, _, start, length, link, _, _, _ = section
        strings = sections[link]
        table = bytearray(data[strings[4] : strings[4] + strings[5]])
        for at in range(start, start + length, _SYMBOL.size):
            name_at, info, other, where, value, extent = _SYMBOL.unpack_from(data, at)
            if where != _UNDEFINED or not name_at:
                continue
            name = bytes(table[name_at : table.index(b"\0", name_at)]).decode()
            new = rename(name)
            renamed.append(new)
            if new != name:
                symbol = (len(table), info, other, where, value, extent)
                _SYMBOL.pack_into(data, at, *symbol)
                table += new.encode() + b"\0"
        strings[4], strings[5] = len(data), len(table)
        data += table
        _SECTION.pack_into(data, sections_at + link * size, *strings)
    return bytes(data), renamed
