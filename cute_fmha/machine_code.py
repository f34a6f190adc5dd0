"""What is in a cubin: registers, stack, shared memory and SASS, read by NVIDIA's tools.

cuobjdump and nvdisasm come with Triton; those of a CUDA toolkit in PATH serve as well.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path


class ToolError(RuntimeError):
    """A tool is missing or failed."""


@functools.cache
def tool(name: str) -> str:
    """Path of ``name``.

    Raises:
        ToolError: there is none.
    """
    spec = importlib.util.find_spec("triton")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        path = Path(folder) / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    found = shutil.which(name)
    if found is None:
        raise ToolError(f"{name} is not installed: it comes with Triton and with the CUDA toolkit")
    return found


@dataclass(frozen=True)
class MachineCode:
    """Of a cubin's kernel. ``registers``: per thread at entry, before warps take their own."""

    registers: int
    stack: int
    local: int
    static_shared: int
    instructions: collections.Counter[str]  # by mnemonic, with its modifiers
    listing: str = field(repr=False)  # SASS

    def count(self, prefix: str) -> int:
        """Of instructions whose mnemonic, with modifiers, begins so."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix))

    @property
    def spills(self) -> int:
        """Accesses to local memory."""
        return self.count("STL") + self.count("LDL")


def _run(name: str, *arguments: str) -> str:
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolError(f"{name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


def read(cubin: bytes) -> MachineCode:
    """Disassemble a cubin with one kernel.

    Raises:
        ToolError: a tool is missing or cannot read it.
    """
    with tempfile.TemporaryDirectory(prefix="cute-fmha-") as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "-res-usage", str(path))
        listing = _run("nvdisasm", "-c", str(path))
    numbers = {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", usage)}
    return MachineCode(
        registers=numbers["REG"],
        stack=numbers["STACK"],
        local=numbers["LOCAL"],
        static_shared=numbers["SHARED"],
        instructions=collections.Counter(_INSTRUCTION.findall(listing)),
        listing=listing,
    )
