"""The engine's shared library: its functions and the structures of machine.h."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import numpy as np

from cute_fmha.emulator import build

CLASSES = (
    "move", "integer", "float", "fma", "mufu", "max", "convert", "predicate", "branch", "shuffle",
    "shared", "global", "local", "atomic", "barrier", "wait", "tma", "tmem load", "tmem store",
    "mma", "fence", "other",
)  # fmt: skip
FINDING_KINDS = (
    "race", "proxy", "uninitialised", "bounds", "alignment", "descriptor", "transaction", "parity",
    "barrier", "tmem", "divergence", "deadlock", "unmodelled", "pending load", "other",
    "tcgen05 fence", "benign race",
)  # fmt: skip


class Config(ctypes.Structure):
    _fields_ = (
        ("policy", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("slice", ctypes.c_uint32),
        ("random_order", ctypes.c_uint32),
        ("resident", ctypes.c_uint32),
        ("strict_tmem_load", ctypes.c_uint32),
        ("races", ctypes.c_uint32),
        ("trace_cta", ctypes.c_uint32),
        ("stop_at_finding", ctypes.c_uint32),
        ("max_steps", ctypes.c_uint64),
        ("strict_cp_async", ctypes.c_uint32),
        ("strict_tcgen05_fence", ctypes.c_uint32),
        ("strict_scopes", ctypes.c_uint32),
    )


class Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint32),
    )


class RawFinding(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int),
        ("pc", ctypes.c_uint32),
        ("other_pc", ctypes.c_uint32),
        ("cta", ctypes.c_int),
        ("warp", ctypes.c_int),
        ("count", ctypes.c_uint32),
        ("fatal", ctypes.c_bool),
        ("text", ctypes.c_char * 480),
    )


COUNTS = (
    "mma_flops", "tma_load_bytes", "tma_store_bytes", "tma_multicast_bytes", "global_read_bytes",
    "global_write_bytes", "shared_read_bytes", "shared_write_bytes", "tmem_read_bytes",
    "tmem_write_bytes", "mma_shared_bytes", "mufu_ops", "fma_ops", "wait_failures",
    "async_operations",
)  # fmt: skip


class RawCounters(ctypes.Structure):
    _fields_ = (
        ("steps", ctypes.c_uint64),
        ("executed_by_class", ctypes.c_uint64 * len(CLASSES)),
        *((name, ctypes.c_uint64) for name in COUNTS),
        ("tensor_cycles", ctypes.c_double),
        ("cycles", ctypes.c_double),
    )


EVENT = np.dtype(
    [
        ("start", np.float64),
        ("finish", np.float64),
        ("lane", np.int32),  # the warp; -1 TMA load, -2 TMA store, -3 tensor core, -4 other
        ("pc", np.uint32),
        ("kind", np.uint32),  # 0 instructions from pc on, 1 wait, 2 asynchronous operation
        ("barrier", np.uint32),  # shared offset of the mbarrier waited for
        ("pad", np.uint32),
    ],
    align=True,
)

TICK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)


@functools.lru_cache(maxsize=1)
def engine_functions() -> ctypes.CDLL:
    library = ctypes.CDLL(os.fspath(build.engine_library()))
    pointer, text, integer = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    counted = (pointer, ctypes.POINTER(integer))
    functions: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "program_build": (pointer, (text, pointer, text, *[pointer] * 4)),
        "program_decode": (integer, (pointer, pointer, ctypes.c_size_t)),
        "program_error": (text, (pointer,)),
        "program_classes": (None, (pointer, pointer)),
        "program_free": (None, (pointer,)),
        "patch_new": (
            pointer,
            (
                pointer,
                integer,
                integer,
                pointer,
                integer,
                ctypes.c_int64,
                text,
                text,
                ctypes.c_size_t,
            ),
        ),
        "patch_counts": (None, (pointer, pointer)),
        "patch_free": (None, (pointer, pointer)),
        "machine_new": (pointer, (ctypes.POINTER(Config),)),
        "machine_region": (None, (pointer, ctypes.c_uint64, ctypes.c_uint64, text, integer)),
        "machine_tick": (None, (pointer, TICK)),
        "machine_launch": (None, (pointer, pointer, ctypes.POINTER(Launch), text)),
        "machine_findings": (ctypes.POINTER(RawFinding), counted),
        "machine_events": (pointer, counted),
        "machine_counters": (ctypes.POINTER(RawCounters), (pointer,)),
        "machine_executed": (pointer, (pointer,)),
        "machine_deadlock": (text, (pointer,)),
        "machine_free": (None, (pointer,)),
        "machine_sizes": (None, (pointer,)),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    sizes = (ctypes.c_uint32 * 7)()
    library.machine_sizes(sizes)
    structures = (Config, Launch, RawFinding)
    mine = [*map(ctypes.sizeof, structures), EVENT.itemsize, ctypes.sizeof(RawCounters)]
    if list(sizes) != [*mine, len(CLASSES), len(FINDING_KINDS)]:
        raise RuntimeError("binding.py and machine.h declare different structures")
    return library


def address_of(buffer: Any) -> int:
    """Of an array.array."""
    return int(buffer.buffer_info()[0])
