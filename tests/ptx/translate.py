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
from .parse import Block, Instruction, Kernel, PtxError

HOME = {"pred": "bool_", "b16": "u16", "b32": "u32", "f32": "f32", "b64": "u64", "u16": "u16"}
ZERO = {"bool_": np.False_, **{n: getattr(arithmetic, n)(0) for n in ("u16", "u32", "f32", "u64")}}
SPECIAL = {"%tid.x": "t.tid", "%ctaid.x": "t.ctaid", "%nctaid.x": "t.nctaid", "%ntid.x": "t.ntid"}
SPACES = {"global": "glob", "shared": "shared", "param": "param"}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNORDERED = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}


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


def _kind(ptx_type: str) -> str:
    """s32 -> i32, b32 -> u32, f32 -> f32"""
    return {"s": "i", "b": "u", "u": "u", "f": "f"}[ptx_type[0]] + ptx_type[1:]


class Translator:
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

    # --- instructions ---

    def _translate(self, i: Instruction) -> None:
        family, *modifiers = i.opcode.split(".")
        rule = getattr(self, f"_do_{family}", None)
        if rule is None or rule(i, *modifiers) is False:
            raise PtxError(f"{self.kernel.name}: unknown opcode, {i}")

    def _simple(self, i: Instruction, kind: str, expression: str, target: str | None = None):
        """Inputs a, b, c of one kind; the result of that kind or of `target`."""
        values = [self._value(o, kind) for o in i.operands[1:]]
        names = dict(zip("abc", values, strict=False))
        self._assign(i.operands[0], expression.format(**names), target or kind)

    def _arithmetic(self, i, modifiers, sign):
        """Wrapping integers, or fp32 rounded to nearest."""
        *rounding, kind = modifiers
        if rounding not in ([], ["rn"]) or kind not in ("s32", "u32", "s64", "u64", "f32"):
            return False
        return self._simple(i, _kind(kind.replace("s", "u")), f"{{a}} {sign} {{b}}")

    def _do_add(self, i, *modifiers):
        if modifiers == ("rz", "f32"):
            return self._simple(i, "f32", "add_to_zero({a}, {b})")
        return self._arithmetic(i, modifiers, "+")

    def _do_sub(self, i, *modifiers):
        return self._arithmetic(i, modifiers, "-")

    def _do_mul(self, i, *modifiers):
        if modifiers == ("hi", "u64"):
            return self._simple(i, "u64", "mul_high_u64({a}, {b})")
        if modifiers in (("wide", "u32"), ("wide", "s32")):
            kind = _kind(modifiers[1])
            wide = kind[0] + "64"
            return self._simple(i, kind, f"{{a}}.astype({wide}) * {{b}}.astype({wide})", wide)
        if modifiers[0] == "lo":
            modifiers = modifiers[1:]
        elif modifiers[-1] != "f32":
            return False
        return self._arithmetic(i, modifiers, "*")

    def _do_mad(self, i, low, kind):
        if low != "lo":
            return False
        return self._simple(i, "u" + kind[1:], "{a} * {b} + {c}")

    def _do_fma(self, i, *modifiers):
        name = {("rn", "f32"): "fma", ("rm", "f32"): "fma_down"}.get(modifiers)
        return bool(name) and self._simple(i, "f32", f"{name}({{a}}, {{b}}, {{c}})")

    def _do_div(self, i, *modifiers):
        if modifiers == ("rn", "f32"):
            return self._simple(i, "f32", "{a} / {b}")
        return len(modifiers) == 1 and self._simple(i, _kind(modifiers[0]), "divide({a}, {b})")

    def _do_rcp(self, i, *modifiers):
        if modifiers == ("rn", "f32"):
            return self._simple(i, "f32", "f32(1) / {a}")
        return modifiers == ("approx", "ftz", "f32") and self._simple(
            i, "f32", "rcp_approx_ftz({a})"
        )

    def _do_sqrt(self, i, *modifiers):
        return modifiers == ("rn", "f32") and self._simple(i, "f32", "np.sqrt({a})")

    def _do_ex2(self, i, *modifiers):
        name = {("approx", "f32"): "exp2_approx", ("approx", "ftz", "f32"): "exp2_approx_ftz"}
        name = name.get(modifiers)
        return bool(name) and self._simple(i, "f32", f"{name}({{a}})")

    def _do_abs(self, i, kind):
        return self._simple(i, _kind(kind), "np.abs({a})")

    def _do_neg(self, i, kind):
        return self._simple(i, _kind(kind), "-{a}")

    def _do_copysign(self, i, kind):
        return self._simple(i, kind, "np.copysign({b}, {a})")

    def _do_min(self, i, kind):
        return kind[0] in "su" and self._simple(i, _kind(kind), "np.minimum({a}, {b})")

    def _do_max(self, i, kind):
        return kind[0] in "su" and self._simple(i, _kind(kind), "np.maximum({a}, {b})")

    def _bitwise(self, i, kind, sign):
        return self._simple(i, "bool_" if kind == "pred" else _kind(kind), f"{{a}} {sign} {{b}}")

    def _do_and(self, i, kind):
        return self._bitwise(i, kind, "&")

    def _do_or(self, i, kind):
        return self._bitwise(i, kind, "|")

    def _do_xor(self, i, kind):
        return self._bitwise(i, kind, "^")

    def _do_not(self, i, kind):
        return self._simple(i, "bool_" if kind == "pred" else _kind(kind), "~{a}")

    def _shift(self, i, kind, sign):
        target, a, by = i.operands
        kind = _kind(kind)
        self._assign(
            target, f"{self._value(a, kind)} {sign} {self._value(by, 'u32')}.astype({kind})", kind
        )

    def _do_shl(self, i, kind):
        return self._shift(i, kind, "<<")

    def _do_shr(self, i, kind):
        return self._shift(i, kind, ">>")

    def _do_shf(self, i, *modifiers):
        return modifiers == ("l", "wrap", "b32") and self._simple(
            i, "u32", "funnel_left({a}, {b}, {c})"
        )

    def _do_setp(self, i, compare, kind):
        kind = _kind(kind)
        if compare in COMPARE:
            test = f"{{a}} {COMPARE[compare]} {{b}}"
            if compare == "ne" and kind == "f32":
                test = "({a} < {b}) | ({a} > {b})"
        elif compare in UNORDERED and kind == "f32":
            test = f"~({{a}} {UNORDERED[compare]} {{b}})"
        elif compare in ("num", "nan") and kind == "f32":
            test = "({a} == {a}) & ({b} == {b})"
            test = test if compare == "num" else f"~({test})"
        else:
            return False
        return self._simple(i, kind, test, "bool_")

    def _do_selp(self, i, kind):
        target, a, b, p = i.operands
        home = self.homes[target]
        values = self._value(a, home), self._value(b, home), self._value(p, "bool_")
        self._assign(target, "select({}, {}, {})".format(*values), home)

    def _do_mov(self, i, kind):
        target, source = i.operands
        if kind not in ("f32", "u32", "u64", "b32", "b64", "u16", "b16", "pred"):
            return False
        if target.startswith("{"):
            low, high = self._parts(target)
            half = f"u{int(kind[1:]) // 2}"
            value, by = self._value(source, f"u{kind[1:]}"), self._constant(f"u{kind[1:]}", half[1:])
            self._assign(low, f"({value}).astype({half})", half)
            self._assign(high, f"({value} >> {by}).astype({half})", half)
        elif source.startswith("{"):
            half = f"u{int(kind[1:]) // 2}"
            low, high = (self._value(o, half) for o in self._parts(source))
            self._assign(target, f"{'pair64' if kind == 'b64' else 'pair'}({low}, {high})", f"u{kind[1:]}")
        else:
            self._assign(target, self._value(source, self.homes[target]), self.homes[target])

    def _do_cvt(self, i, *modifiers):
        to, of = modifiers[-2:]
        rules = {
            ("f32", "f16"): ("u16", "from_half({a})", "f32"),
            ("rn", "f16", "f32"): ("f32", "to_half({a})", "u16"),
            ("rn", "bf16", "f32"): ("f32", "to_bfloat({a})", "u16"),
            # The first operand is the upper half.
            ("rn", "f16x2", "f32"): ("f32", "pair(to_half({b}), to_half({a}))", "u32"),
            ("rn", "bf16x2", "f32"): ("f32", "pair(to_bfloat({b}), to_bfloat({a}))", "u32"),
            ("rni", "f32", "f32"): ("f32", "np.rint({a})", "f32"),
            ("rzi", "f32", "f32"): ("f32", "np.trunc({a})", "f32"),
            ("sat", "f32", "f32"): ("f32", "saturate({a})", "f32"),
            ("rn", "f32", "s32"): ("i32", "{a}.astype(f32)", "f32"),
            ("rn", "f32", "s64"): ("i64", "{a}.astype(f32)", "f32"),
        }
        if modifiers in rules:
            kind, expression, target = rules[modifiers]
            return self._simple(i, kind, expression, target)
        if len(modifiers) != 2 or to[0] not in "su" or of[0] not in "su":
            return False
        return self._simple(i, _kind(of), f"{{a}}.astype({_kind(to)})", _kind(to))

    def _do_cvta(self, i, *modifiers):
        return modifiers == ("to", "global", "u64") and self._simple(i, "u64", "{a}")

    # --- memory ---

    def _access(self, modifiers):
        """Space, count, kind of the elements."""
        space, *how, kind = modifiers
        count = next((int(h[1:]) for h in how if h in ("v2", "v4")), 1)
        if space not in ("global", "shared", "param") or set(how) - {"v2", "v4", "wb"}:
            raise PtxError(f"unknown kind of access: {self.now}")
        return space, count, f"u{kind[1:]}", int(kind[1:]) // 8

    def _do_ld(self, i, *modifiers):
        space, count, kind, size = self._access(modifiers)
        address = self._address(i.operands[1], "u32" if space == "shared" else "u64")
        targets = self._parts(i.operands[0])
        load = f"t.{SPACES[space]}.load({address}, {size * count}, t)"
        if count > 1:
            self._emit(f"raw = split({load}, {RAW[size].__name__.join(('np.', ''))}, {count})")
        for n, target in enumerate(targets):
            value = load if count == 1 else f"raw[{n}]"
            wanted = "u" + self.homes[target][1:]
            self._assign(target, value if wanted == kind else f"({value}).astype({wanted})", wanted)

    def _do_st(self, i, *modifiers):
        space, count, kind, size = self._access(modifiers)
        address = self._address(i.operands[0], "u32" if space == "shared" else "u64")
        values = ", ".join(self._value(o, kind) for o in self._parts(i.operands[1]))
        values = f"join({values})" if count > 1 else values
        self._emit(f"t.{SPACES[space]}.store({address}, {size * count}, {values}, t)")

    def _do_cp(self, i, *modifiers):
        if modifiers == ("async", "commit_group"):
            self._emit("t.commit()")
        elif modifiers == ("async", "wait_group"):
            self._emit(f"t.wait({int(i.operands[0])})")
        elif modifiers == ("async", "cg", "shared", "global") and i.operands[2] == "16":
            to, source = self._address(i.operands[0], "u32"), self._address(i.operands[1], "u64")
            self._emit(f"t.copy_async({to}, {source}, {self._value(i.operands[3], 'u32')})")
        else:
            return False

    # --- collectives: the gate of the block has seen to it that whole warps are here ---

    def _do_bar(self, i, *modifiers):
        whole = {("sync",): "0", ("warp", "sync"): "-1"}.get(modifiers)
        return None if i.operands == [whole] else False

    def _do_shfl(self, i, *modifiers):
        targets, a, mask, clamp, members = i.operands
        if modifiers != ("sync", "bfly", "b32"):
            return False
        target, _, exists = targets.partition("|")
        how = ", ".join(self._value(o, "u32") for o in (mask, clamp, members))
        self._assign(target, f"shuffle_xor(t.each({self._value(a, 'u32')}), {how})", "u32")
        if exists:
            self._assign(exists, "np.True_", "bool_")

    def _do_ldmatrix(self, i, *modifiers):
        if modifiers != ("sync", "aligned", "m8n8", "x4", "shared", "b16"):
            return False
        rows = f"t.shared.load({self._address(i.operands[1], 'u32')}, 16, t)"
        self._emit(f"raw = ldmatrix_x4({rows}.view(np.uint32).reshape(-1, 4))")
        for n, target in enumerate(self._parts(i.operands[0])):
            self._assign(target, f"raw[{n}]", "u32")

    def _do_mma(self, i, *modifiers):
        to_float = {"f16": "from_half", "bf16": "from_bfloat"}.get(modifiers[6])
        shape = "sync aligned m16n8k16 row col f32 {0} {0} f32".format(modifiers[6]).split()
        if to_float is None or list(modifiers) != shape:
            return False
        a, b, c = (self._parts(o) for o in i.operands[1:])
        sides = [
            "(" + ", ".join(f"t.each({self._value(o, kind)})" for o in parts) + ")"
            for parts, kind in ((a, "u32"), (b, "u32"), (c, "f32"))
        ]
        self._emit(f"raw = mma_16x8x16({to_float}, {', '.join(sides)})")
        for n, target in enumerate(self._parts(i.operands[0])):
            self._assign(target, f"raw[{n}]", "f32")

    def _do_bra(self, i, *modifiers):
        return None

    def _do_ret(self, i, *modifiers):
        return None
