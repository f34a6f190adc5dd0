"""Runs the cases on a GPU through the CUDA driver."""

from __future__ import annotations

import ctypes
import glob
import time
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char, c_int, c_uint32, c_uint64, c_void_p
from typing import Any

import numpy as np

from silicon.model import Argument, Buffer, Case, Map, Outcome, canonical, module, pack

TIMEOUT = 20.0  # seconds for one kernel
PLACES = (
    "libcuda.so.1",
    "/usr/local/nvidia/lib64/libcuda.so.1",
    "/usr/lib/x86_64-linux-gnu/libcuda.so.1",
    "/usr/lib64/libcuda.so.1",
    "/usr/local/cuda*/compat/libcuda.so.1",
)
TYPES = {
    "uint8": 0, "uint16": 1, "uint32": 2, "int32": 3, "uint64": 4, "int64": 5, "float16": 6,
    "float32": 7, "float64": 8, "bfloat16": 9,
}  # fmt: skip
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
FILLS = {"zero": 0, "nan": 1}
PROMOTION_128 = 2
CLUSTER_DIMENSION, MOST_DYNAMIC_SHARED, ANY_CLUSTER = 4, 8, 14
ERROR_LOG, ERROR_LOG_BYTES = 5, 6
NOT_READY = 600


class _Attribute(ctypes.Structure):
    _fields_ = (("id", c_int), ("pad", c_char * 4), ("value", c_uint32 * 16))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", c_uint32 * 3),
        ("block", c_uint32 * 3),
        ("shared", c_uint32),
        ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)),
        ("count", c_uint32),
    )


class DriverError(RuntimeError):
    """A call failed; `sticky`: nothing works in this process any more."""

    def __init__(self, text: str, sticky: bool = False) -> None:
        super().__init__(text)
        self.sticky = sticky


def _library() -> ctypes.CDLL:
    errors = []
    for pattern in PLACES:
        for path in glob.glob(pattern) or [pattern]:
            try:
                return ctypes.CDLL(path)
            except OSError as error:
                errors.append(str(error))
    try:
        import torch

        torch.cuda.init()
        return ctypes.CDLL("libcuda.so.1")
    except (ImportError, OSError, RuntimeError) as error:
        errors.append(str(error))
    raise DriverError("no CUDA driver: " + "; ".join(errors))


class Gpu:
    """A context on the first GPU."""

    def __init__(self) -> None:
        self.cuda = _library()
        self._call("cuInit", 0)
        device, context, stream = c_int(), c_void_p(), c_void_p()
        self._call("cuDeviceGet", byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", byref(stream), 0)  # waits for copies to the device
        self.device, self.stream = device, stream

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorName(code, byref(text))
            what = text.value.decode() if text.value else "?"
            raise DriverError(f"{name}: {what} ({code})", sticky=code >= 700)

    def about(self) -> dict[str, Any]:
        name, version = ctypes.create_string_buffer(100), c_int()
        self._call("cuDeviceGetName", name, 100, self.device)
        self._call("cuDriverGetVersion", byref(version))
        numbers = []
        for attribute in (75, 76):  # compute capability
            value = c_int()
            self._call("cuDeviceGetAttribute", byref(value), attribute, self.device)
            numbers.append(value.value)
        return {
            "device": name.value.decode(),
            "driver": version.value,
            "capability": f"{numbers[0]}.{numbers[1]}",
        }

    # ------------------------------------------------------------ memory and modules

    def allocate(self, data: np.ndarray) -> int:
        address = c_uint64()
        self._call("cuMemAlloc_v2", byref(address), ctypes.c_size_t(max(data.nbytes, 1)))
        flat = np.ascontiguousarray(data)
        self._call(
            "cuMemcpyHtoD_v2", address, c_void_p(flat.ctypes.data), ctypes.c_size_t(flat.nbytes)
        )
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", c_uint64(address))

    def read(self, address: int, like: np.ndarray) -> np.ndarray:
        data = np.zeros(like.shape, like.dtype)
        self._call(
            "cuMemcpyDtoH_v2", c_void_p(data.ctypes.data), c_uint64(address),
            ctypes.c_size_t(data.nbytes),
        )  # fmt: skip
        return data

    def load(self, text: str) -> c_void_p:
        loaded, log = c_void_p(), ctypes.create_string_buffer(8192)
        options = (c_int * 2)(ERROR_LOG, ERROR_LOG_BYTES)
        values = (c_void_p * 2)(ctypes.addressof(log), len(log))
        try:
            self._call(
                "cuModuleLoadDataEx", byref(loaded), ctypes.c_char_p(text.encode()), 2, options,
                values,
            )  # fmt: skip
        except DriverError as error:
            raise DriverError(f"{error}\n{log.value.decode()}", error.sticky) from None
        return loaded

    # ------------------------------------------------------------ tensor maps and launches

    def encode(self, m: Map, address: int) -> bytes:
        rank = len(m.shape)
        room = ctypes.create_string_buffer(192)
        at = ctypes.addressof(room) + -ctypes.addressof(room) % 64
        strides = m.all_strides[::-1]
        self._call(
            "cuTensorMapEncodeTiled",
            c_void_p(at),
            TYPES[m.dtype],
            c_uint32(rank),
            c_void_p(address + m.offset),
            (c_uint64 * rank)(*m.shape[::-1]),
            (c_uint64 * max(rank - 1, 1))(*strides[1:]),
            (c_uint32 * rank)(*m.box[::-1]),
            (c_uint32 * rank)(*(m.steps or (1,) * rank)[::-1]),
            0,
            SWIZZLES[m.swizzle],
            PROMOTION_128,
            FILLS[m.fill],
        )
        return ctypes.string_at(at, 128)

    def launch(self, function: c_void_p, case: Case, parameters: Sequence[bytes]) -> None:
        if case.shared > 48 << 10:
            self._call("cuFuncSetAttribute", function, MOST_DYNAMIC_SHARED, case.shared)
        size = int(np.prod(case.cluster))
        if size > 8:
            self._call("cuFuncSetAttribute", function, ANY_CLUSTER, 1)
        # Parameters may be read as whole structures: tensor maps have to be aligned.
        room = ctypes.create_string_buffer(sum(len(p) + 127 for p in parameters) + 128)
        at, places = ctypes.addressof(room), []
        for data in parameters:
            at += -at % 128
            ctypes.memmove(at, data, len(data))
            places.append(at)
            at += len(data)
        pointers = (c_void_p * len(places))(*places)
        attribute = _Attribute(id=CLUSTER_DIMENSION)
        attribute.value[:3] = case.cluster
        launch = _Launch(
            (c_uint32 * 3)(*case.grid), (c_uint32 * 3)(*case.block), case.shared, self.stream,
            ctypes.pointer(attribute), int(size > 1),
        )  # fmt: skip
        self._call("cuLaunchKernelEx", byref(launch), function, pointers, None)
        until = time.monotonic() + TIMEOUT
        while code := self.cuda.cuStreamQuery(self.stream):
            if code != NOT_READY:
                self._call("cuStreamSynchronize", self.stream)
                raise DriverError(f"cuStreamQuery: {code}", sticky=True)
            if time.monotonic() > until:
                raise DriverError(f"the kernel did not end in {TIMEOUT} s", sticky=True)
            time.sleep(1e-4)

    def run(self, case: Case, loaded: c_void_p) -> Outcome:
        function = c_void_p()
        self._call(
            "cuModuleGetFunction", byref(function), loaded, ctypes.c_char_p(case.entry.encode())
        )
        memory = {id(b): self.allocate(b.data) for b in case.buffers}
        maps: list[bytes] = []

        def parameter(value: Argument) -> bytes:
            if isinstance(value, Buffer):
                return memory[id(value)].to_bytes(8, "little")
            if isinstance(value, Map):
                maps.append(self.encode(value, memory[id(value.buffer)]))
                return maps[-1]
            return pack(value)

        self.launch(function, case, [parameter(value) for value in case.arguments])
        outputs = [canonical(b, self.read(memory[id(b)], b.data)) for b in case.outputs]
        for address in memory.values():
            self.free(address)
        return Outcome(outputs, maps)


class Runner:
    """Runs a batch of cases: one module for all, or one each if it does not compile."""

    def __init__(self) -> None:
        self.gpu = Gpu()

    def about(self) -> dict[str, Any]:
        return self.gpu.about()

    def prepare(self, batch: Sequence[Case]) -> str:
        self.loaded: c_void_p | None = None
        try:
            self.loaded = self.gpu.load(module(batch))
        except DriverError as error:
            if error.sticky:
                raise
            return str(error)
        return ""

    def run(self, case: Case) -> Outcome:
        return self.gpu.run(case, self.loaded or self.gpu.load(case.source))

    def encode(self, maps: Sequence[Map]) -> list[tuple[bytes, str]]:
        """The encoding or the error of each."""
        addresses: dict[int, int] = {}
        found = []
        for m in maps:
            key = id(m.buffer)
            if key not in addresses:
                addresses[key] = self.gpu.allocate(m.buffer.data)
            try:
                found.append((self.gpu.encode(m, addresses[key]), ""))
            except DriverError as error:
                found.append((b"", f"{m.text()}: {error}"))
        return found
