"""The emulated GPU as host code sees it: its properties, and CPU tensors as its memory."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

__all__ = [
    "CaptureError",
    "Device",
    "DeviceTensor",
    "Memory",
    "device_tensor",
    "emulated_device",
    "find_memory",
    "map_leaves",
    "merged",
    "patched",
    "require_cutlass",
]


class CaptureError(RuntimeError):
    """A function could not be compiled, or its launches could not be collected."""


def require_cutlass() -> Any:
    try:
        import cutlass
        import cutlass.cute
    except ImportError as error:
        raise CaptureError(
            "CuTe DSL is not installed; it comes with the extra `cu13`: "
            f"pip install 'cute-fmha[cu13]' ({error})"
        ) from error
    return cutlass


# ------------------------------------------------------------------------------------ the device


@dataclasses.dataclass(frozen=True)
class Device:
    """What host code can ask about the emulated GPU; the defaults are a B200's."""

    arch: str = "sm_100a"
    sms: int = 148
    l2_bytes: int = 126 << 20
    memory_bytes: int = 180 << 30
    shared_optin_bytes: int = 227 << 10
    name: str = "NVIDIA B200 (emulated)"

    @property
    def capability(self) -> tuple[int, int]:
        digits = re.sub(r"\D", "", self.arch)
        return int(digits[:-1]), int(digits[-1])

    def max_active_clusters(self, size: int) -> int:
        return self.sms // size

    def attributes(self) -> dict[int, int]:
        """cudaDeviceAttr -> value."""
        major, minor = self.capability
        return {
            1: 1024,  # threads per block
            **dict(zip((2, 3, 4), (1024, 1024, 64), strict=True)),  # block
            **dict(zip((5, 6, 7), (2**31 - 1, 65535, 65535), strict=True)),  # grid
            8: 48 << 10,  # shared memory per block without opting in
            10: 32,  # warp
            12: 65536,  # registers per block
            16: self.sms,
            38: self.l2_bytes,
            39: 2048,  # threads per multiprocessor
            75: major,
            76: minor,
            81: 228 << 10,  # shared memory per multiprocessor
            82: 65536,  # registers per multiprocessor
            95: 1,  # cooperative launch
            97: self.shared_optin_bytes,
            106: 32,  # blocks per multiprocessor
            111: 1024,  # shared memory of each block that is the system's
            120: 1,  # cluster launch
        }


@contextlib.contextmanager
def patched(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes for a while; afterwards they are what (and where) they were."""
    missing = object()
    before = [(owner, name, vars(owner).get(name, missing)) for owner, name, _ in replacements]
    try:
        for owner, name, value in replacements:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextlib.contextmanager
def emulated_device(device: Device | None = None) -> Iterator[Device]:
    """Queries about the GPU (cutlass.utils.HardwareInfo, torch.cuda) are answered for `device`.

    Code that asks for the number of SMs while it traces or plans needs this; launches do not.
    """
    device = device or Device()
    properties = types.SimpleNamespace(
        name=device.name,
        major=device.capability[0],
        minor=device.capability[1],
        multi_processor_count=device.sms,
        total_memory=device.memory_bytes,
        L2_cache_size=device.l2_bytes,
        shared_memory_per_block_optin=device.shared_optin_bytes,
        shared_memory_per_multiprocessor=228 << 10,
        max_threads_per_multi_processor=2048,
        warp_size=32,
        regs_per_multiprocessor=65536,
    )
    capability = device.capability
    stream = types.SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    replacements: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "is_initialized", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "get_device_capability", lambda device=None: capability),
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        (torch.cuda, "get_device_name", lambda device=None: properties.name),
        (torch.cuda, "current_stream", lambda device=None: stream),
        (torch.cuda, "default_stream", lambda device=None: stream),
        (torch.cuda, "synchronize", lambda device=None: None),
    ]
    try:
        from cutlass.utils import HardwareInfo
    except ImportError:
        pass
    else:
        replacements += [
            (HardwareInfo, "__init__", lambda self, device_id=0: None),
            (
                HardwareInfo,
                "get_max_active_clusters",
                lambda self, cluster_size, stream=None: device.max_active_clusters(cluster_size),
            ),
            (HardwareInfo, "get_device_multiprocessor_count", lambda self: device.sms),
            (HardwareInfo, "get_l2_cache_size_in_bytes", lambda self: device.l2_bytes),
        ]
    with patched(*replacements):
        yield device


# ------------------------------------------------------------------------------------ tensors

_DLPACK_CUDA = 2


class DeviceTensor:
    """A CPU tensor that DLPack shows as memory of CUDA device 0, at the same address."""

    def __init__(self, tensor: torch.Tensor):
        if tensor.device.type != "cpu":
            raise CaptureError(f"emulated kernels work on CPU tensors, not on {tensor.device}")
        self.tensor = tensor.detach()

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        capsule = torch.utils.dlpack.to_dlpack(self.tensor)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        # DLManagedTensor begins with DLTensor: data pointer, then device type and number.
        device = (ctypes.c_int32 * 2).from_address(pointer(capsule, b"dltensor") + 8)
        device[:] = [_DLPACK_CUDA, 0]
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return _DLPACK_CUDA, 0


def device_tensor(tensor: torch.Tensor, assumed_align: int | None = 16, **options: Any) -> Any:
    """`cutlass.cute.runtime.from_dlpack` for a CPU tensor that plays device memory."""
    require_cutlass()
    from cutlass.cute.runtime import from_dlpack

    return from_dlpack(DeviceTensor(tensor), assumed_align=assumed_align, **options)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Global memory that kernels may use: the bytes from the first to the last element."""

    name: str
    address: int
    bytes: int
    owner: Any = dataclasses.field(default=None, compare=False, repr=False)

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> Memory:
        extent = sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        count = 0 if tensor.numel() == 0 else extent + 1
        return Memory(name, tensor.data_ptr(), count * tensor.element_size(), tensor)


def merged(memory: Sequence[Memory]) -> list[Memory]:
    """Overlapping pieces (views of one storage) become one, named after all of them."""
    out: list[Memory] = []
    for piece in sorted(memory, key=lambda m: (m.address, -m.bytes)):
        if piece.bytes == 0:
            continue
        last = out[-1] if out else None
        if last is not None and piece.address < last.address + last.bytes:
            end = max(last.address + last.bytes, piece.address + piece.bytes)
            names = last.name.split(" and ")
            name = last.name if piece.name in names else f"{last.name} and {piece.name}"
            owner = (last.owner, piece.owner)
            out[-1] = Memory(name, last.address, end - last.address, owner)
        else:
            out.append(piece)
    return out


def _children(value: Any) -> list[tuple[str, Any]] | None:
    if isinstance(value, dict):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", item) for name, item in zip(value._fields, value, strict=True)]
    if isinstance(value, list | tuple):
        return [(f"[{i}]", item) for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{f.name}", getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    return None


def map_leaves(value: Any, convert: Callable[[Any], Any]) -> Any:
    """`convert` on every leaf of an argument; containers keep their types."""
    if isinstance(value, dict):
        return {key: map_leaves(item, convert) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(item, convert) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_leaves(item, convert) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {}
        for field in dataclasses.fields(value):
            before = getattr(value, field.name, None)
            after = map_leaves(before, convert)
            if after is not before:
                changed[field.name] = after
        return dataclasses.replace(value, **changed) if changed else value
    return convert(value)


def find_memory(name: str, value: Any, out: list[Memory]) -> None:
    if isinstance(value, DeviceTensor):
        value = value.tensor
    if isinstance(value, torch.Tensor):
        out.append(Memory.of(name, value))
    elif hasattr(value, "load_dltensor"):  # a runtime tensor of the DSL: its elements' extent
        shape, stride = _flat(value.shape), _flat(value.stride)
        last = sum((int(n) - 1) * abs(int(s)) for n, s in zip(shape, stride, strict=True))
        width = value.element_type.width
        if all(int(n) > 0 for n in shape):
            bytes_ = ((last + 1) * width + 7) // 8
            out.append(Memory(name, int(value.data_ptr), bytes_, value))
    else:
        for suffix, child in _children(value) or []:
            find_memory(name + suffix, child, out)


def _flat(value: Any) -> list[Any]:
    return [x for item in value for x in _flat(item)] if isinstance(value, tuple) else [value]
