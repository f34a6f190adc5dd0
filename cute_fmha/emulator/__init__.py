"""A functional tcgen05 machine: runs sm_100a kernels on a CPU, reports races and hazards.

`emulate` takes a CuTe DSL function and CPU tensors, `run_ptx` a PTX kernel; `emulating` lets whole
programs believe that they have a Blackwell GPU; `emulated_calls` says how calls with
``backend="emulator"`` are run. What is modelled, and how far a green run can be
trusted: notes/emulator.md. Needs a C compiler; CuTe DSL functions also need the extra `cu13`.
"""

from cute_fmha.emulator.backend import emulated_calls
from cute_fmha.emulator.capture import Report, compile_kernel, emulate
from cute_fmha.emulator.machine import (
    EmulationError,
    Finding,
    Policy,
    Result,
    UnmodelledError,
    run_ptx,
)
from cute_fmha.emulator.programs import emulating

__all__ = [
    "EmulationError",
    "Finding",
    "Policy",
    "Report",
    "Result",
    "UnmodelledError",
    "compile_kernel",
    "emulate",
    "emulated_calls",
    "emulating",
    "run_ptx",
]
