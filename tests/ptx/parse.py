"""PTX text as kernels: instructions, basic blocks, and what of the registers is live or undefined.

Reads what nvcc emits. What it does not know is an error, here or in translate.py.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property

# Collectives: every thread of the warp, or of the block, has to be at the same one.
GATES = {"bar.sync": "block", "bar.warp.sync": "warp", "shfl.sync": "warp",
         "ldmatrix.sync": "warp", "mma.sync": "warp"}  # fmt: skip
NO_TARGETS = ("st.", "bra", "ret", "bar.", "cp.async")  # opcodes whose first operand is read
REGISTER = re.compile(r"%[a-z]+\d+|%scoped\d+")


class PtxError(RuntimeError):
    """PTX that this machine does not know."""


@dataclass
class Instruction:
    opcode: str
    operands: list[str]
    predicate: str | None  # "%p1" or "!%p1"
    line: int

    def __str__(self):
        return f"line {self.line}: {self.opcode} {', '.join(self.operands)}"

    @cached_property
    def writes(self) -> list[str]:
        if self.opcode.startswith(NO_TARGETS):
            return []
        return REGISTER.findall(self.operands[0])

    @cached_property
    def reads(self) -> list[str]:
        first = 0 if self.opcode.startswith(NO_TARGETS) else 1
        texts = [*self.operands[first:], self.predicate or ""]
        return list(dict.fromkeys(r for text in texts for r in REGISTER.findall(text)))

    @cached_property
    def gate(self) -> str | None:
        return next((g for name, g in GATES.items() if self.opcode.startswith(name)), None)

    @property
    def moves_undefined(self) -> bool:
        """Compilers copy and select registers that were never written; that alone is no fault."""
        return self.opcode.startswith(("mov.", "selp."))


@dataclass
class Block:
    """Instructions that run one after the other; the last one may jump."""

    index: int
    code: list[Instruction]
    gate: str | None = None  # who has to be here before it starts
    synchronises: bool = False  # the gate orders accesses to memory
    jump: int | None = None  # the block that the last instruction may go to
    predicate: str | None = None  # when it does so; None: always
    falls_through: bool = True
    live_in: set[str] = field(default_factory=set)
    maybe_undefined: set[str] = field(default_factory=set)  # of live_in

    @property
    def successors(self) -> list[int]:
        after = [self.index + 1] if self.falls_through else []
        return after if self.jump is None else [*after, self.jump]


@dataclass
class Kernel:
    name: str
    target: str  # sm_80
    param_bytes: int
    max_threads: int
    shared: set[str]  # names of shared memory
    body: str
    line: int  # of the module, where the body begins

    @cached_property
    def _parsed(self):
        return _statements(self.body, self.line)

    @property
    def registers(self) -> dict[str, str]:
        """name -> pred, b16, b32, f32 or b64"""
        return self._parsed[0]

    @cached_property
    def blocks(self) -> list[Block]:
        return _blocks(self._parsed[1])

    @property
    def opcodes(self) -> set[str]:
        return {i.opcode for block in self.blocks for i in block.code}


def kernels_of(text: str) -> dict[str, Kernel]:
    """Every kernel of a PTX module, by name."""
    target = re.search(r"^\.target (\w+)", text, re.M)[1]
    shared = set(re.findall(r"^\.extern \.shared [^;]*?(\w+)\[\];", text, re.M))
    heads = list(re.finditer(r"\.entry (\w+)\(\s*(.*?)\)(.*?)\{", text, re.S))
    ends = [h.start() for h in heads[1:]] + [len(text)]
    kernels = {}
    for head, end in zip(heads, ends, strict=True):
        name, params, limits = head.groups()
        param = re.fullmatch(rf"\.param \.align \d+ \.b8 {name}_param_0\[(\d+)\]\s*", params)
        threads = re.search(r"\.maxntid (\d+)", limits)
        if not (param and threads):
            raise PtxError(f"{name}: expected one struct and a limit of threads")
        line = text.count("\n", 0, head.end()) + 1
        kernels[name] = Kernel(
            name,
            target,
            int(param[1]),
            int(threads[1]),
            shared,
            text[head.end() : end],
            line,
        )
    return kernels


def _statements(body: str, line: int):
    """Kinds of registers, and instructions and labels in order."""
    registers, statements, renamed = {}, [], {}
    # A statement ends at ; or is a label, or a brace around the scope of inline assembly.
    tokens = re.compile(r"(\$\w+):|([{}])|([^;]+);")
    for text in body.split("\n"):
        text = text.partition("//")[0].strip()
        while text:
            token = tokens.match(text)
            if token is None:
                raise PtxError(f"line {line}: not understood: {text}")
            text = text[token.end() :].strip()
            label, brace, statement = token.groups()
            if label:
                statements.append(label)
            elif brace:
                renamed = {}
            elif statement.startswith(".reg"):
                found = re.fullmatch(r"\.reg \.(\w+)\s+(%?\w+)(?:<(\d+)>)?", statement)
                kind, name, count = found.groups()
                if count:
                    kind = "f32" if name == "%f" else kind
                    registers |= {f"{name}{i}": kind for i in range(int(count))}
                else:  # of a scope: another scope may use the name again
                    renamed[name] = f"%scoped{len(registers)}"
                    registers[renamed[name]] = kind
            elif not statement.startswith(".pragma"):
                for name, new in renamed.items():
                    statement = re.sub(rf"\b{name}\b", new, statement)
                statements.append(_instruction(statement, line))
        line += 1
    return registers, statements


def _instruction(text: str, line: int) -> Instruction:
    parts = re.fullmatch(r"(?:@(!?%p\d+)\s+)?([\w.]+)\s*(.*)", text.strip(), re.S)
    if parts is None:
        raise PtxError(f"line {line}: not understood: {text}")
    predicate, opcode, rest = parts.groups()
    # Commas outside of braces and brackets; the second target of shfl comes after a |.
    operands = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", rest)
    operands = [o.strip() for o in operands if o.strip()]
    if predicate and opcode not in ("bra", "bra.uni"):
        raise PtxError(f"line {line}: only jumps may have a predicate, got {text}")
    return Instruction(opcode, operands, predicate, line)


def _blocks(statements: list) -> list[Block]:
    """Basic blocks. One also starts at each collective, where threads wait for each other."""
    blocks, labels = [Block(0, [])], {}
    for s in statements:
        last = blocks[-1]
        ended = bool(last.code) and last.code[-1].opcode.startswith(("bra", "ret"))
        if isinstance(s, str):
            if last.code:
                blocks.append(Block(len(blocks), []))
            labels[s] = blocks[-1].index
            continue
        opens = s.gate == "block" or (s.gate == "warp" and last.gate is None)
        opens = opens or s.opcode.startswith("bar.")
        if ended or (opens and last.code):
            blocks.append(Block(len(blocks), []))
        block = blocks[-1]
        if s.gate and not block.code:
            block.gate, block.synchronises = s.gate, s.opcode.startswith("bar.")
        block.code.append(s)
    blocks = [b for b in blocks if b.code]
    for block in blocks:
        last = block.code[-1]
        if last.opcode.startswith("bra"):
            block.jump, block.predicate = labels[last.operands[0]], last.predicate
            block.falls_through = last.predicate is not None
        elif last.opcode == "ret":
            block.falls_through = False
    _find_live(blocks)
    _find_undefined(blocks)
    return blocks


def _find_live(blocks: list[Block]) -> None:
    """Sets of registers as the bits of integers: a kernel has thousands."""
    bits, names = {}, []

    def bit(register):
        if register not in bits:
            bits[register] = 1 << len(names)
            names.append(register)
        return bits[register]

    used = []
    for block in blocks:
        before = written = 0
        for i in block.code:
            for r in i.reads:
                before |= bit(r) & ~written
            for r in i.writes:
                written |= bit(r)
        used.append((before, written))
    live = [0] * len(blocks)
    changed = True
    while changed:
        changed = False
        for block, (before, written) in reversed(list(zip(blocks, used, strict=True))):
            after = 0
            for s in block.successors:
                after |= live[s]
            found = before | (after & ~written)
            changed |= found != live[block.index]
            live[block.index] = found
    for block in blocks:
        left, block.live_in = live[block.index], set()
        while left:
            last = left & -left
            block.live_in.add(names[last.bit_length() - 1])
            left ^= last


def _find_undefined(blocks: list[Block]) -> None:
    """Registers that some path leaves unwritten, or writes from such a one."""
    blocks[0].maybe_undefined = set(blocks[0].live_in)
    waiting = [0]
    seen = set()
    while waiting:
        block = blocks[waiting.pop()]
        seen.add(block.index)
        bad = set(block.maybe_undefined)
        for i in block.code:
            taints = i.moves_undefined and any(r in bad for r in i.reads)
            bad = bad | set(i.writes) if taints else bad - set(i.writes)
        # What is written on one path alone is undefined where the paths meet.
        known = (block.live_in | {r for i in block.code for r in i.writes}) - bad
        for s in map(blocks.__getitem__, block.successors):
            found = s.maybe_undefined | (s.live_in - known)
            if found != s.maybe_undefined or s.index not in seen:
                s.maybe_undefined = found
                waiting.append(s.index)
