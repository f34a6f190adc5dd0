"""Turns a parsed kernel into the engine's records: registers, symbols, operands."""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass, field

from cute_fmha.emulator import liveness, ptx
from cute_fmha.emulator.ptx import (
    Address,
    Constant,
    Instruction,
    Kernel,
    Module,
    Name,
    Operand,
    Parameter,
    PtxError,
    Register,
    Scope,
    Variable,
    Vector,
)

SHARED_START = 1024  # the first bytes of shared memory belong to the system
SM_REGISTERS = 65536

# OperandKind of machine.h
_REGISTER, _IMMEDIATE, _ADDRESS, _VECTOR, _LABEL, _SINK = range(1, 7)
# Symbol.kind of machine.h
_SHARED, _PARAM, _GLOBAL, _SPECIAL, _LOCAL = range(5)

_CLOCKS = {
    "%clock", "%clock_hi", "%clock64", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi",
}  # fmt: skip
_PREDICATES = {"%is_explicit_cluster"}  # special registers of type .pred
# Instructions in which a special register takes the width of the type; elsewhere it has 32 bits.
_WIDENING = {"mov", "add", "sub", "mul", "mad", "and", "or", "xor", "setp", "selp", "min", "max"}
_SCALAR_TYPES = {name: size for name, size in ptx.TYPE_BYTES.items() if size}
_SLOT_BYTES = {0: 4, 1: 128, 2: 128, 4: 128, 8: 256, 16: 512}

Words = tuple[int, ...]


@dataclass(slots=True)
class Symbol:
    """A variable, parameter or special register that is a register filled when a warp starts."""

    name: str
    kind: int
    value: int
    register: Register


@dataclass(slots=True)
class Assembled:
    """What the engine needs to build a program, and what reports say about it."""

    module: Module
    kernel: Kernel
    sizes: array[int]
    strings: bytes
    names: array[int]
    symbols: array[int]
    records: array[int]
    immediates: array[int]
    parameters: list[tuple[Parameter, int]]  # with offsets
    parameter_bytes: int
    globals: list[tuple[Variable, int]]  # with the offset in one block
    lines: list[int]  # PTX line by pc
    sources: list[tuple[str, int]]  # Python file and line by pc


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _value_type(name: str) -> str:
    """The last type in a mnemonic: that of most sources."""
    for part in reversed(name.split(".")):
        if part in _SCALAR_TYPES:
            return part
    return ""


def parameter_layout(parameters: list[Parameter]) -> tuple[list[tuple[Parameter, int]], int]:
    """Where each parameter lies, and the bytes of all."""
    layout, end = [], 0
    for parameter in parameters:
        start = _align(end, parameter.align)
        layout.append((parameter, start))
        end = start + parameter.bytes
    return layout, end


def _launch_registers(kernel: Kernel) -> int:
    """A thread's registers at launch, as far as the directives determine them."""
    directives = kernel.directives
    if directives.get("maxnreg"):
        return _align(directives["maxnreg"][0], 8)
    shape = directives.get("reqntid") or directives.get("maxntid")
    if not shape:
        return 0
    threads = 1
    for extent in shape:
        threads *= extent
    ctas = (directives.get("minnctapersm") or (1,))[0]
    return min(SM_REGISTERS // (_align(threads, 128) * ctas) // 8 * 8, 256)


def _without_unused(instruction: Instruction) -> tuple[Operand, ...]:
    """A load whose other bytes nobody uses: the compiler widened it and said so in a pragma."""
    name, operands, mask = instruction.name, instruction.operands, instruction.used
    if not name.startswith("ld") or not operands or not isinstance(operands[0], Vector):
        raise ValueError("used_bytes_mask is known for vector loads alone")
    size = ptx.TYPE_BYTES[name.rpartition(".")[2]]
    parts = tuple(
        part if mask >> i * size & ((1 << size) - 1) else ptx.Sink()
        for i, part in enumerate(operands[0].parts)
    )
    return (Vector(parts), *operands[1:])


@dataclass
class _Assembler:
    module: Module
    kernel: Kernel
    global_address: int
    registers: list[Register] = field(default_factory=list)
    symbols: dict[tuple[str, int, int], Symbol] = field(default_factory=dict)
    immediates: dict[int, int] = field(default_factory=dict)
    strings: bytearray = field(default_factory=bytearray)
    places: dict[str, int] = field(default_factory=dict)
    mnemonics: dict[int, str] = field(default_factory=dict)  # by place in the strings

    def __post_init__(self) -> None:
        self.parameters, self.parameter_bytes = parameter_layout(self.kernel.parameters)
        self.parameter_offsets = {parameter.name: at for parameter, at in self.parameters}
        self.variables: dict[str, int] = {}
        shared = [v for v in self.module.variables.values() if v.space == "shared"]
        shared += [v for v in self.kernel.variables if v.space == "shared"]
        end = SHARED_START
        for variable in shared:
            if variable.size:
                self._place(variable, end := _align(end, variable.align))
                end += variable.size
        dynamic = [variable for variable in shared if not variable.size]
        alignment = max([16, *(variable.align for variable in dynamic)])
        self.dynamic_start = _align(end, alignment)
        for variable in dynamic:
            self._place(variable, self.dynamic_start)
        self.local_bytes = 0
        for variable in self.kernel.variables:
            if variable.space == "local":
                self.local_bytes = _align(self.local_bytes, variable.align)
                self._place(variable, self.local_bytes)
                self.local_bytes += variable.size
        self.local_bytes = _align(self.local_bytes, 16)
        self.globals, _ = global_layout(self.module)
        for variable, offset in self.globals:
            self._place(variable, self.global_address + offset)

    def _place(self, variable: Variable, address: int) -> None:
        self.variables[f"{id(variable)}"] = address

    def string(self, text: str) -> int:
        place = self.places.get(text)
        if place is None:
            place = self.places[text] = len(self.strings)
            self.strings += text.encode() + b"\0"
        return place

    # ------------------------------------------------------------ registers and symbols

    def use(self, register: Register) -> int:
        if register.index < 0 or (
            register.index >= len(self.registers) or self.registers[register.index] is not register
        ):
            register.index = len(self.registers)
            self.registers.append(register)
        return register.index

    def symbol(self, name: str, kind: int, value: int, width: int) -> Register:
        key = (name, value, width)
        found = self.symbols.get(key)
        if found is None:
            text = f"{name}+{value}" if kind == _SPECIAL and value else name
            found = self.symbols[key] = Symbol(name, kind, value, Register(text, width))
        return found.register

    def named(self, name: Name, scope: Scope, width: int, special_width: int) -> Register:
        """The register behind a name. `width`: for an address, 0: the natural one."""
        register = scope.register(name.text)
        if register is not None:
            if name.addend:
                raise ValueError(f"{name.text}+{name.addend} is not an operand")
            return register
        variable = scope.variable(name.text) or self.module.variables.get(name.text)
        if variable is not None:
            kind = {"shared": _SHARED, "local": _LOCAL}.get(variable.space, _GLOBAL)
            natural = 4 if kind == _SHARED else 8
            address = self.variables[f"{id(variable)}"] + name.addend
            return self.symbol(name.text, kind, address, width or natural)
        if name.text in self.parameter_offsets:
            offset = self.parameter_offsets[name.text] + name.addend
            return self.symbol(name.text, _PARAM, offset, width or 8)
        if name.text.startswith("%") and not name.addend:
            predicate = name.text in _PREDICATES
            return self.symbol(name.text, _SPECIAL, 0, 0 if predicate else special_width)
        raise ValueError(f"{name.text} is not declared")

    # ------------------------------------------------------------ operands

    def constant(self, constant: Constant, kind: str) -> Words:
        value, form = constant.value, constant.form
        if form == "decimal":
            if kind not in ("f32", "f64"):
                raise ValueError(f"{value} is not a number of type .{kind or '?'}")
            packed = struct.pack("<f" if kind == "f32" else "<d", value)
            value = int.from_bytes(packed, "little")
        elif form == "f32" and kind == "f64":
            (single,) = struct.unpack("<f", int(value).to_bytes(4, "little"))
            value = int.from_bytes(struct.pack("<d", single), "little")
        elif form == "f64" and kind == "f32":
            (double,) = struct.unpack("<d", int(value).to_bytes(8, "little"))
            value = int.from_bytes(struct.pack("<f", double), "little")
        value = _signed(int(value))
        if form == "int" and _SCALAR_TYPES.get(kind) == 2:
            value &= 0xFFFF  # as in a register of 16 bits
        index = self.immediates.setdefault(value, len(self.immediates))
        return (_IMMEDIATE, 0, 0, 0, index, 0, value)

    def operand(self, operand: Operand, scope: Scope, kind: str, special_width: int) -> Words:
        if isinstance(operand, Name):
            text = operand.text
            if text[0] not in "%!" and scope.register(text) is None:
                label = scope.label(text)
                if label is not None and not operand.negate and not operand.addend:
                    table = scope.table(text)
                    return self.table(*table) if table else (_LABEL, 0, 0, 0, 0, 0, label)
            width = max(_SCALAR_TYPES.get(kind, 0), 4) if kind else 0
            register = self.named(operand, scope, width, special_width)
            return self.register_words(register, operand.negate)
        if isinstance(operand, Constant):
            return self.constant(operand, kind)
        if isinstance(operand, Address):
            if isinstance(operand.base, Name):
                base = Name(operand.base.text)
                words = self.register_words(self.named(base, scope, 0, 4), False)
            else:
                words = self.constant(operand.base, "")
            return (_ADDRESS, 0, 0, 1, 0, 0, operand.offset, *words)
        if isinstance(operand, Vector):
            parts: list[int] = [_VECTOR, 0, 0, len(operand.parts), 0, 0, 0]
            for part in operand.parts:
                parts += self.operand(part, scope, kind, 4)
            return tuple(parts)
        return (_SINK, 0, 0, 0, 0, 0, 0)

    def register_words(self, register: Register, negate: bool) -> Words:
        # The byte offset is filled in when all registers are known.
        return (_REGISTER, register.width, int(negate), 0, self.use(register), 0, 0)

    def table(self, names: tuple[str, ...], scope: Scope) -> Words:
        words: list[int] = [_VECTOR, 0, 0, len(names), 0, 0, 0]
        for name in names:
            target = scope.label(name)
            if target is None:
                raise ValueError(f"label {name} is not declared")
            words += (_LABEL, 0, 0, 0, 0, 0, target)
        return tuple(words)

    def instruction(self, instruction: Instruction, records: array[int]) -> None:
        name, scope = instruction.name, instruction.scope
        operands = _without_unused(instruction) if instruction.used else instruction.operands
        base = name.partition(".")[0]
        clocks = [o for o in operands if isinstance(o, Name) and o.text in _CLOCKS]
        if clocks:
            if base != "mov" or operands[-1] is not clocks[0] or len(operands) != 2:
                raise ValueError(f"{clocks[0].text} is modelled in mov only")
            name, operands = f"read_clock.{clocks[0].text[1:]}", operands[:1]
        kind = _value_type(name)
        size = _SCALAR_TYPES.get(kind, 4)
        special = size if base in _WIDENING and size in (2, 4, 8) and ".wide" not in name else 4
        guard = index = -1
        if instruction.guard:
            register = scope.register(instruction.guard)
            if register is None or register.width:
                raise ValueError(f"{instruction.guard} is not a predicate")
            guard, index = 0, self.use(register)
        place = self.string(name)
        self.mnemonics[place] = name
        records.extend(
            (
                place,
                instruction.line,
                instruction.source[1],
                guard,
                index,
                int(instruction.negate),
                len(operands),
            )
        )
        for operand in operands:
            records.extend(self.operand(operand, scope, kind, special))

    # ------------------------------------------------------------ all

    def steps(self, records: array[int]) -> list[liveness.Step]:
        """What the records read and write."""
        steps = []
        at, end = 0, len(records)
        while at < end:
            name, index, count = self.mnemonics[records[at]], records[at + 4], records[at + 6]
            guarded = records[at + 3] >= 0
            reads: list[int] = [index] if guarded else []
            writes: list[int] = []
            targets: list[int] = []
            at += 7
            to_address = bool(count) and records[at] == _ADDRESS
            kills = liveness.writes_first(name, guarded, to_address)
            for operand in range(count):
                left = 1
                while left:
                    kind = records[at]
                    if kind == _REGISTER:
                        (writes if kills and not operand else reads).append(records[at + 4])
                    elif kind == _LABEL:
                        targets.append(records[at + 6])
                    left += records[at + 3] - 1
                    at += 7
            steps.append(
                liveness.Step(reads, writes, targets, liveness.falls_through(name, guarded))
            )
        return steps

    def layout(self, records: array[int]) -> tuple[array[int], int]:
        """The byte offset of every register, and the bytes of all."""
        count = len(self.registers)
        first, last = liveness.intervals(self.steps(records), count)
        for symbol in self.symbols.values():  # filled before the first instruction
            first[symbol.register.index] = 0
        sizes = [_SLOT_BYTES[register.width] for register in self.registers]
        return liveness.places(first, last, sizes)

    def finish(self, records: array[int], offsets: array[int]) -> int:
        """Writes byte offsets into the records; returns the number of operands."""
        at, operands, end = 0, 0, len(records)
        while at < end:
            if records[at + 3] >= 0:
                records[at + 3] = offsets[records[at + 4]]
            left = records[at + 6]
            at += 7
            while left:
                if records[at] == _REGISTER:
                    records[at + 5] = offsets[records[at + 4]]
                left += records[at + 3] - 1
                operands += 1
                at += 7
        return operands


def global_layout(module: Module) -> tuple[list[tuple[Variable, int]], int]:
    """Places of the .global and .const variables of a module, all kernels', and their size."""
    layout, end = [], 0
    own = (variable for kernel in module.kernels.values() for variable in kernel.variables)
    for variable in (*module.variables.values(), *own):
        if variable.space in ("global", "const"):
            end = _align(end, max(variable.align, 16))
            layout.append((variable, end))
            end += variable.size
    return layout, end


def assemble(module: Module, kernel: Kernel, global_address: int = 0) -> Assembled:
    """Assemble one kernel; its global variables lie at `global_address`."""
    assembler = _Assembler(module, kernel, global_address)
    records = array("q")
    instructions = list(kernel.instructions)
    last_line = instructions[-1].line if instructions else kernel.line
    # Falling off the end returns; labels at the end point here.
    instructions.append(Instruction("ret", (), "", False, last_line, (0, 0), kernel.scope))
    for instruction in instructions:
        try:
            assembler.instruction(instruction, records)
        except ValueError as error:
            if isinstance(error, PtxError):
                raise
            raise PtxError(instruction.line, f"{instruction.name}: {error}") from error
    for symbol in assembler.symbols.values():
        assembler.use(symbol.register)
    offsets, register_bytes = assembler.layout(records)
    operands = assembler.finish(records, offsets)
    names = array("q", [assembler.string(register.name) for register in assembler.registers])
    symbols = array("q")
    for symbol in assembler.symbols.values():
        register = symbol.register
        symbols.extend(
            (
                assembler.string(symbol.name),
                symbol.kind,
                symbol.value,
                offsets[register.index],
                register.width,
                register.index,
            )
        )
    strings = bytes(assembler.strings) + b"\0"
    sizes = array(
        "q",
        [
            register_bytes,
            len(assembler.registers),
            assembler.dynamic_start,
            assembler.parameter_bytes,
            assembler.local_bytes,
            _launch_registers(kernel),
            len(assembler.symbols),
            len(instructions),
            operands,
            len(assembler.immediates),
            len(strings),
        ],
    )
    files = module.files
    return Assembled(
        module=module,
        kernel=kernel,
        sizes=sizes,
        strings=strings,
        names=names,
        symbols=symbols,
        records=records,
        immediates=array("q", assembler.immediates or [0]),
        parameters=assembler.parameters,
        parameter_bytes=assembler.parameter_bytes,
        globals=assembler.globals,
        lines=[instruction.line for instruction in instructions],
        sources=[(files.get(i.source[0], ""), i.source[1]) for i in instructions],
    )
