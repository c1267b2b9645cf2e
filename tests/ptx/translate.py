"""Makes a Python function of a block of PTX: a line or two for each instruction.

    def block(t, e):        t: the threads that take this step; e: their registers, by name
        r1 = e["r1"]
        r2 = r1 + K0        arrays over the threads, or NumPy scalars where all threads agree
        e["r2"] = r2
        return p1           who jumps

A register that may be undefined has a companion r1_bad, a mask. Moves copy it; all else that reads
the register faults where the mask is set.
"""

import re

import numpy as np

from . import arithmetic
from .memory import RAW, SHARED_BASE, ParamMemory
from .opcodes import Opcodes
from .parse import Block, Instruction, Kernel, PtxError

HOME = {"pred": "bool_", "b16": "u16", "b32": "u32", "f32": "f32", "b64": "u64", "u16": "u16"}
ZERO = {"bool_": np.False_, **{n: getattr(arithmetic, n)(0) for n in ("u16", "u32", "f32", "u64")}}
SPECIAL = {"%tid.x": "t.tid", "%ctaid.x": "t.ctaid", "%nctaid.x": "t.nctaid", "%ntid.x": "t.ntid"}


def local(register: str) -> str:
    """%f32 -> _f32, which is no name of a type."""
    return "_" + register[1:]


def split(raw, kind, count):
    """The elements of a wide access, one array each."""
    if raw.ndim == 0:
        return tuple(np.array([raw]).view(kind))
    return tuple(np.ascontiguousarray(raw.view(kind).reshape(-1, count).T))


def join(*elements):
    """The elements of a wide access as one number a thread."""
    both = np.stack(np.broadcast_arrays(*elements), axis=-1)
    return np.ascontiguousarray(both).view(RAW[both.itemsize * len(elements)])[..., 0]


class Translator(Opcodes):
    def __init__(self, kernel: Kernel):
        self.kernel, self.homes = kernel, {r: HOME[k] for r, k in kernel.registers.items()}
        self.tainted = set().union(*(b.maybe_undefined for b in kernel.blocks))
        self.names = {k: getattr(arithmetic, k) for k in dir(arithmetic) if not k.startswith("_")}
        self.names |= {"np": np, "split": split, "join": join, "ZERO": ZERO}
        self.constants = {}

    def function(self, block: Block):
        """block(t, e), and the instruction of each of its lines."""
        self.lines, self.origin = ["def block(t, e):"], [None, None]
        self.bad, self.now = set(block.maybe_undefined), None
        read, known = set(), set()
        for i in block.code:
            read |= set(i.reads) - known
            known |= set(i.writes)
        for r in sorted(read):
            name = local(r)
            if r in self.bad:
                self._emit(f'{name}, {name}_bad = t.maybe(e, "{name}", ZERO["{self.homes[r]}"])')
            else:
                self._emit(f'{name} = e["{name}"]')
        for i in block.code:
            self.now = i
            self._check_defined(i)
            self._translate(i)
        live = set().union(*(self.kernel.blocks[s].live_in for s in block.successors))
        self.now = None
        self._emit("pass")
        for r in sorted(known & live):
            name = local(r)
            self._emit(f'e["{name}"] = {name}')
            if r in self.bad:
                self._emit(f'e["{name}_bad"] = {name}_bad')
            elif r in self.tainted:
                self._emit(f'e["{name}_bad"] = np.False_')
        if block.predicate:
            self._emit(f"return {self._predicate(block.predicate)}")
        name = f"<ptx {self.kernel.name} {block.index}>"
        exec(compile("\n".join(self.lines), name, "exec"), self.names)
        return self.names.pop("block"), self.origin

    def _emit(self, line: str) -> None:
        self.lines.append("    " + line)
        self.origin.append(self.now)

    def _check_defined(self, i: Instruction) -> None:
        doubtful = [r for r in i.reads if r in self.bad]
        if i.moves_undefined:
            selects = i.opcode.startswith("selp.")
            if selects and i.operands[3] in doubtful:
                self._require(i.operands[3])
                doubtful.remove(i.operands[3])
            if doubtful:
                masks = {r: f"{local(r)}_bad" for r in doubtful}
                if selects:
                    a, b = (masks.get(o, "np.False_") for o in i.operands[1:3])
                    bad = f"np.where({local(i.operands[3])}, {a}, {b})"
                else:
                    bad = " | ".join(masks.values())
                for r in i.writes:
                    self._emit(f"{local(r)}_bad = {bad}")
                self.bad |= set(i.writes)
                return
        else:
            for r in doubtful:
                self._require(r)
        self.bad -= set(i.writes)

    def _require(self, register: str) -> None:
        self._emit(f't.require({local(register)}_bad, "{register}")')
        self.bad.discard(register)

    # --- operands ---

    def _predicate(self, operand: str) -> str:
        return f"~{local(operand[1:])}" if operand.startswith("!") else local(operand)

    def _constant(self, kind: str, value) -> str:
        key = kind, int(value)
        if key not in self.constants:
            self.constants[key] = f"K{len(self.constants)}"
            bits = {"16": "u2", "32": "u4", "64": "u8"}[kind[1:]]
            number = np.array(int(value) % (1 << int(kind[1:])), dtype=bits)
            self.names[self.constants[key]] = number.view(self.names[kind])[()]
        return self.constants[key]

    def _value(self, operand: str, kind: str) -> str:
        """An operand as bits of `kind`."""
        if operand in self.homes:
            home = self.homes[operand]
            if home == kind:
                return local(operand)
            if home == "bool_" or kind == "bool_" or home[1:] != kind[1:]:
                raise PtxError(f"{operand} is {home}, wanted {kind}: {self.now}")
            return f"{local(operand)}.view({kind})"
        if operand in SPECIAL and kind == "u32":
            return SPECIAL[operand]
        if re.fullmatch(r"0f[0-9A-F]{8}", operand):
            return self._constant(kind, int(operand[2:], 16))
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", operand):
            return self._constant(kind, int(operand, 0))
        if operand == f"{self.kernel.name}_param_0":
            return self._constant(kind, ParamMemory.BASE)
        if operand in self.kernel.shared:
            return self._constant(kind, SHARED_BASE)
        raise PtxError(f"operand {operand} is not understood: {self.now}")

    def _address(self, operand: str, kind: str) -> str:
        base, plus, offset = operand.strip("[] ").partition("+")
        value = self._value(base, kind)
        return f"{value} + {self._constant(kind, int(offset))}" if plus else value

    def _parts(self, operand: str) -> list[str]:
        return [o.strip() for o in operand.strip("{} ").split(",")]

    def _assign(self, register: str, expression: str, kind: str) -> None:
        home = self.homes[register]
        if home != kind:
            if home == "bool_" or kind == "bool_" or home[1:] != kind[1:]:
                raise PtxError(f"{register} is {home}, got {kind}: {self.now}")
            expression = f"({expression}).view({home})"
        self._emit(f"{local(register)} = {expression}")

    def _translate(self, i: Instruction) -> None:
        family, *modifiers = i.opcode.split(".")
        rule = getattr(self, f"_do_{family}", None)
        try:
            known = rule is not None and rule(i, *modifiers) is not False
        except (TypeError, KeyError) as error:  # more modifiers than the rule has, or another type
            raise PtxError(f"{self.kernel.name}: unknown opcode, {i}") from error
        if not known:
            raise PtxError(f"{self.kernel.name}: unknown opcode, {i}")
