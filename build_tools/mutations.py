"""Changes of one line each that a mutant of a source file may be: of Python by its syntax tree, of
C++ and CUDA by the text of a line."""

import ast
import copy
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutation:
    line: int  # from 1
    before: str
    after: str
    operator: str

    def apply(self, text: str) -> str:
        lines = text.split("\n")
        if lines[self.line - 1] != self.before:
            raise ValueError(f"mutants: line {self.line} must be {self.before!r}")
        lines[self.line - 1] = self.after
        return "\n".join(lines)


def of(path: Path) -> list[Mutation]:
    """Every mutation of a file, in the order of its lines."""
    text = path.read_text()
    found = of_python(text) if path.suffix == ".py" else of_cpp(text)
    return sorted(set(found), key=lambda m: (m.line, m.operator, m.after))


# --- Python ---------------------------------------------------------------------------------------

OPPOSITE = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def _name(cls: type) -> str:
    return cls.__name__.lower()


def _expressions(node: ast.AST):
    """(operator, expression in place of `node`)"""
    if isinstance(node, ast.BinOp) and type(node.op) in OPPOSITE:
        # Of texts and paths: a TypeError at once shows nothing.
        if any(isinstance(t, ast.JoinedStr) or _is_text(t) for t in (node.left, node.right)):
            return
        changed = copy.copy(node)
        changed.op = OPPOSITE[type(node.op)]()
        yield f"{_name(type(node.op))} to {_name(type(changed.op))}", changed
        if isinstance(node.op, ast.Add | ast.Sub):
            yield "a term dropped", node.left
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        changed = copy.copy(node)
        changed.ops = [OPPOSITE[type(node.ops[0])]()]
        yield f"{_name(type(node.ops[0]))} to {_name(type(changed.ops[0]))}", changed
    elif isinstance(node, ast.BoolOp):
        changed = copy.copy(node)
        changed.op = OPPOSITE[type(node.op)]()
        yield f"{_name(type(node.op))} to {_name(type(changed.op))}", changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield f"{_name(type(node.op))} dropped", node.operand
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield f"{node.value} to {not node.value}", ast.Constant(not node.value)
        elif _is_number(node):
            for step in (1, -1):
                yield f"constant {step:+d}", ast.Constant(node.value + step)
    elif isinstance(node, ast.Call) and len(node.args) >= 2:
        first, second, *rest = node.args
        if not any(isinstance(a, ast.Starred) for a in (first, second)):
            changed = copy.copy(node)
            changed.args = [second, first, *rest]
            yield "arguments swapped", changed


def _is_number(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, int | float)
        and not isinstance(node.value, bool)
    )


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _left_out(tree: ast.AST) -> set[ast.AST]:
    """Nodes whose change no test can be asked to see: annotations, and texts, whose parts have no
    places of their own."""
    roots: list[ast.AST | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
            roots.append(node)
        elif isinstance(node, ast.AnnAssign | ast.arg):
            roots.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            roots += [node.returns, *node.decorator_list]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            roots.append(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("warn"):
            roots.append(node)
    return {inner for root in roots if root for inner in ast.walk(root)}


def of_python(text: str) -> list[Mutation]:
    tree, lines, found = ast.parse(text), text.split("\n"), []
    left_out = _left_out(tree)

    def replace(node: ast.AST, new: str, operator: str) -> None:
        if node.lineno != node.end_lineno:
            return
        before = lines[node.lineno - 1]
        raw = before.encode()
        after = raw[: node.col_offset] + new.encode() + raw[node.end_col_offset :]
        if after.decode() != before:
            found.append(Mutation(node.lineno, before, after.decode(), operator))

    for node in ast.walk(tree):
        if node in left_out:
            continue
        for operator, changed in _expressions(node):
            replace(node, ast.unparse(changed), operator)
        if isinstance(node, ast.If | ast.While | ast.IfExp) and node.test not in left_out:
            replace(node.test, f"not ({ast.unparse(node.test)})", "condition inverted")
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Delete) and not is_text:
            replace(node, "pass", "statement deleted")
        if isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple):
            replace(node, "pass", "statement deleted")
    return found


# --- C++ and CUDA ---------------------------------------------------------------------------------

# (pattern, in its place, operator); clang-format puts spaces around operators of two operands,
# and none within template arguments, pointers and references
SWAPS = [
    (r" \+ ", " - ", "add to sub"),
    (r" - ", " + ", "sub to add"),
    (r" \* ", " / ", "mult to div"),
    (r" / ", " * ", "div to mult"),
    (r" % ", " / ", "mod to div"),
    (r" < ", " <= ", "lt to lte"),
    (r" <= ", " < ", "lte to lt"),
    (r" > ", " >= ", "gt to gte"),
    (r" >= ", " > ", "gte to gt"),
    (r" == ", " != ", "eq to noteq"),
    (r" != ", " == ", "noteq to eq"),
    (r" && ", " || ", "and to or"),
    (r" \|\| ", " && ", "or to and"),
    (r" >> ", " << ", "rshift to lshift"),
    (r" << ", " >> ", "lshift to rshift"),
    (r" & ", " | ", "bitand to bitor"),
    (r" \| ", " & ", "bitor to bitand"),
    (r" \+= ", " -= ", "add to sub"),
    (r" -= ", " += ", "sub to add"),
    (r"\btrue\b", "false", "true to false"),
    (r"\bfalse\b", "true", "false to true"),
    (r"\bif \((?!constexpr)([^;{]*)\)(?= *[{]?$)", r"if (!(\1))", "condition inverted"),
    (r"(?<![*/%] )(?<![\w.>])(\w+) [+-] \w+(?![\w(.\[]|->| [*/%])", r"\1", "a term dropped"),
    (r"(?<=\()(\w+), (\w+)(?=[,)])", r"\2, \1", "arguments swapped"),
    (r"\? ([^:?]+) : ([^:?;,)]+)(?=[;,)]|$)", r"? \2 : \1", "choices swapped"),
    (r"(?<![\w.])(\d+)(?![\w.'])", 1, "constant +1"),
    (r"(?<![\w.])([1-9]\d*)(?![\w.'])", -1, "constant -1"),
]
NOT_CODE = re.compile(
    r"^\s*(?://|#|\*|using |namespace |template|static_assert|asm\b|struct |class |enum |extern |"
    r"case .*:$|[\w:]+: *$|TORCH_|STABLE_TORCH_|m\.(?:def|impl))|STD_TORCH_CHECK|^[}\])]*;?$"
)
# A statement of its own on a line: a call, an assignment to what exists, a way out of a loop.
STATEMENT = re.compile(
    r"^(\s+)(?:[\w:.\[\]>\-]+(?:<[\w, ]+>)?\(.*\)|[\w.\[\]()>\-]+ [-+*/|&^]?= .*);$"
)


def of_cpp(text: str) -> list[Mutation]:
    found, lines = [], text.split("\n")
    for number, before in enumerate(lines, 1):
        code, _, comment = before.partition("//")
        if NOT_CODE.search(code) or '"' in code or "'" in code or not code.strip():
            continue
        tail = "  //" + comment if comment else ""
        code = code.rstrip()
        for pattern, instead, operator in SWAPS:
            for match in re.finditer(pattern, code):
                if isinstance(instead, int):
                    new = str(int(match[1]) + instead)
                else:
                    new = match.expand(instead)
                after = code[: match.start()] + new + code[match.end() :]
                found.append(Mutation(number, before, after + tail, operator))
        ended = number < 2 or re.search(r"([;{}:)]|//.*|else|^)$", lines[number - 2].rstrip())
        if STATEMENT.match(code) and ended and not code.lstrip().startswith(("return", "break")):
            empty = code[: len(code) - len(code.lstrip())] + ";"
            found.append(Mutation(number, before, empty + tail, "statement deleted"))
    return found
