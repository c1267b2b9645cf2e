"""What each PTX opcode becomes in Python: `_do_x` for the family x, given the modifiers after it.

A rule answers False to modifiers that it does not know, which is an error: nothing is guessed.
"""

from .memory import RAW
from .parse import Instruction, PtxError

SPACES = {"global": "glob", "shared": "shared", "param": "param"}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNORDERED = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}


def _kind(ptx_type: str) -> str:
    """s32 -> i32, b32 -> u32, f32 -> f32"""
    return {"s": "i", "b": "u", "u": "u", "f": "f"}[ptx_type[0]] + ptx_type[1:]


class Opcodes:
    """The rules; translate.py has operands and how lines are written."""

    def _simple(self, i: Instruction, kind: str, expression: str, target: str | None = None):
        """Inputs a to d of one kind; the result of that kind or of `target`."""
        values = [self._value(o, kind) for o in i.operands[1:]]
        names = dict(zip("abcd", values, strict=False))
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

    def _do_bfi(self, i, kind):
        return kind == "b32" and self._simple(i, "u32", "insert_bits({a}, {b}, {c}, {d})")

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
            value, by = (
                self._value(source, f"u{kind[1:]}"),
                self._constant(f"u{kind[1:]}", half[1:]),
            )
            self._assign(low, f"({value}).astype({half})", half)
            self._assign(high, f"({value} >> {by}).astype({half})", half)
        elif source.startswith("{"):
            half = f"u{int(kind[1:]) // 2}"
            low, high = (self._value(o, half) for o in self._parts(source))
            self._assign(
                target, f"{'pair64' if kind == 'b64' else 'pair'}({low}, {high})", f"u{kind[1:]}"
            )
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
