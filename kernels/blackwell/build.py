"""From a kernel object to a binary that is kept, and from that to a function that launches it.

CuTe DSL compiles the ``__call__`` of a kernel into a host function with TVM-FFI's calling
convention and a cubin, and exports both as one object file. Another process, or another machine
with the same package versions, links that object in some 10 ms and has the function.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from cute_fmha.cache import Binary, Key, describe, source_digest

ENTRY = "cute_fmha_entry"
"""The host function's name in its object file."""

_HERE = Path(__file__).parent
_PACKAGE = "cute_fmha"
PORTABLE_CPU = {"x86_64": ("x86-64-v2", '"+sse4.2"')}
"""By machine: the CPU, and its features, that host code is compiled for instead of this one."""


def _sources() -> str:
    """Of what kernels are made of, as it was when this was imported."""
    from cute_fmha import epilogues, tiling

    files = [*_HERE.glob("*.py"), Path(tiling.__file__)]
    files += Path(epilogues.__path__[0]).glob("*.py")
    return source_digest(files)


SOURCES = _sources()


@functools.cache
def missing() -> str | None:
    """Why nothing can be compiled or linked here; None when all that it takes is installed."""
    for package in ("nvidia-cutlass-dsl", "apache-tvm-ffi"):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return f"{package} is not installed (pip install 'cute-fmha[cu13]')"
    return None


def key(kernel: str, arch: str, plan: object, *more: tuple[str, str]) -> Key:
    """What a binary is found by. ``more``: sources that are not in this package, by name."""
    parts = (
        ("plan", describe(plan)),
        ("sources", SOURCES),
        ("nvidia-cutlass-dsl", metadata.version("nvidia-cutlass-dsl")),
        ("apache-tvm-ffi", metadata.version("apache-tvm-ffi")),
        ("machine", platform.machine()),
        *more,
    )
    return Key(kernel, arch, parts)


def placeholder(dtype: Any, *shape: int | None, align: int = 0, any_stride: bool = False) -> Any:
    """A tensor to compile for: extents that are None and all strides but the last are dynamic, with
    ``any_stride`` that, too.

    ``align`` bytes hold for its address and its rows; both are checked at every call, in C.
    """
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_tensor

    element = dtype.width // 8
    align = align or element
    extents = tuple(cute.sym_int() if extent is None else extent for extent in shape)
    strides = [cute.sym_int64(divisibility=align // element) for _ in shape[1:]]
    last = cute.sym_int64() if any_stride else 1
    return make_fake_tensor(dtype, extents, (*strides, last), assumed_align=align)


def compile_binary(key: Key, kernel: Any, arguments: tuple[Any, ...]) -> Binary:
    """Compile ``kernel``'s ``__call__`` for placeholders ``arguments``; no GPU is needed."""
    import cutlass.cute as cute

    # The kernel's name in the PTX and in profilers. A short one also keeps the copies of it that
    # the loader code makes from being vectorised for this very CPU.
    type(kernel).kernel.set_name_prefix(
        f"fmha_{key.kernel}", remove_cutlass_symbol=True, keep_mangled_name=False
    )
    with _compiling_for(key.arch) as folder:
        compiled = cute.compile(
            kernel, *arguments, options=f"--gpu-arch {key.arch} --enable-tvm-ffi --keep-ptx "
            f"--keep-cubin --generate-line-info --dump-dir {folder}",
        )  # fmt: skip
        _make_portable(compiled.ir_module)
        path = folder / "host.o"
        compiled.export_to_c(str(path), function_name=ENTRY)
        return Binary(key, ENTRY, path.read_bytes(), compiled.__ptx__, compiled.__cubin__)


@contextlib.contextmanager
def _compiling_for(arch: str) -> Iterator[Path]:
    """CuTe DSL set to ``arch``, whatever GPU there is, and a folder for what it dumps."""
    import cutlass

    environment = cutlass.cutlass_dsl.CuTeDSL._get_dsl().envar
    before = environment.arch
    folder = Path(tempfile.mkdtemp(prefix="cute-fmha-"))
    try:
        environment.arch = arch
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Cache is disabled as user wants to generate PTX")
            yield folder
    finally:
        environment.arch = before
        shutil.rmtree(folder, ignore_errors=True)


def _make_portable(module: Any) -> None:
    """Let host code run on any CPU of this kind: by default it is compiled for this very one."""
    from cutlass._mlir import ir

    if platform.machine() not in PORTABLE_CPU:
        return
    cpu, features = PORTABLE_CPU[platform.machine()]

    def mark(op: Any) -> Any:
        if op.name == "llvm.func" and len(op.regions[0].blocks):
            op.attributes["target_cpu"] = ir.StringAttr.get(cpu)
            op.attributes["target_features"] = ir.Attribute.parse(
                f"#llvm.target_features<[{features}]>"
            )
        return ir.WalkResult.ADVANCE

    with module.context:
        module.operation.walk(mark)


def link(binary: Binary) -> Callable[..., None]:
    """The host function of ``binary``, calling the CUDA runtime that CuTe DSL brings."""
    import cutlass

    libraries = cutlass.cutlass_dsl.CuTeDSL._get_dsl().get_shared_libs()
    return link_object(binary.object_code, binary.entry, libraries)


def link_object(code: bytes, entry: str, libraries: list[str]) -> Callable[..., None]:
    """The TVM-FFI function ``entry`` of an object file linked with shared ``libraries``."""
    import tvm_ffi
    from cutlass._mlir._mlir_libs._cutlass_ir import _execution_engine

    engine = _execution_engine.BinaryExecutionEngine(code, libraries, True)
    function: Callable[..., None] = tvm_ffi.Function.__from_extern_c__(
        engine.lookup(f"__tvm_ffi_{entry}"), keep_alive_object=engine
    )
    return function
