"""The table of cases that the ops are checked on: op, activation, p, dtype, shape, layout, which
gradients, which numbers. `fusedmlp verify`, `make numerics` and the tests take theirs from here."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, cycle, product

import torch
from torch import Tensor

from ..spec import activations, dtypes

DTYPES = {dtypes.SHORT[d]: d for d in dtypes.KERNEL}
OPS = ("linear_act", "bias_act_dropout", "mlp")

# Activations with (alpha, number of slopes); 0 slopes: N for prelu.
ACTS = (
    *((act, None, 0) for act in activations.NAMES),
    ("prelu", None, 1),
    *(("leaky_relu", alpha, 0) for alpha in (0.25, 0.0, -0.25)),
)
PS = (0.0, 0.3, 0.5, 1.0)
LAYOUTS = (
    "contiguous", "transposed", "rows apart", "every second", "odd address", "expanded", "3-D",
)  # fmt: skip
# Which of x, w, b and slope need gradients.
NEEDS = ("x w b slope", "", "x", "w b slope", "x b", "w", "slope")

# Sizes at which a kernel begins another tile, vector or block: tests/commands/test_cases.py holds
# them against the sources.
ROWS = (4, 6, 8, 14, 16, 32, 64, 128, 256)
INNER = (16, 32, 64, 128)
COLUMNS = (8, 16, 32, 64, 128, 256)
WIDE = (1024, 2048, 4096)  # columns of elementwise tiles only
# (M, K, N): primes, few columns, one row of many, and the first layer of a classifier.
USUAL = ((61, 53, 77), (509, 20, 10), (1, 33, 1031), (130, 784, 100))
# Sizes that several threads share, columns that are summed over many rows among them.
SHARED = ((350, 64, 300), (3, 4, 20_000), (40_000, 3, 1), (9_000, 5, 10))


def _edges(tiles: Iterable[int]) -> list[int]:
    """0, 1, and one less and one more than each tile, and it itself."""
    return sorted({0, 1} | {tile + i for tile in tiles for i in (-1, 0, 1)})


def shapes(op: str) -> list[tuple[int, int, int]]:
    """(M, K, N): every edge of every tile in each dimension, beside small sizes of the others."""
    others = cycle(product((5, 37, 64), (3, 33, 64), (10, 29, 64)))
    has_product = op != "bias_act_dropout"
    edges = _edges(ROWS), _edges(INNER), _edges((*COLUMNS, *(() if has_product else WIDE)))
    found = list(USUAL)
    for dimension, sizes in enumerate(edges):
        for size in sizes if has_product or dimension != 1 else ():
            shape = list(next(others))
            shape[dimension] = size
            found.append(tuple(shape))
    return found


@dataclass(frozen=True)
class Case:
    """One call, and what of it is asked for.

    slope_elements  of prelu; 0: N
    alpha           of leaky_relu; None: its default
    layout          how the tensors lie in memory
    needs           the inputs that need gradients, where the call has them; "": under no_grad
    integers        small ones, whose sums and products are exact in every order, so that results
                    must be equal to the truth
    """

    op: str
    m: int
    k: int
    n: int
    act: str
    p: float
    dtype: torch.dtype
    device: str = "cpu"
    bias: bool = True
    slope_elements: int = 0
    alpha: float | None = None
    layout: str = "contiguous"
    needs: str = NEEDS[0]
    integers: bool = False

    @property
    def axes(self) -> tuple:
        """What the table is made of, without op, dtype, device and sizes."""
        act = self.act, self.alpha, self.slope_elements
        return act, self.p, self.layout, self.needs, self.integers, self.bias

    @property
    def independent(self) -> int:
        """How many of the numbers of an output or gradient are, at most."""
        return self.n if self.layout == "expanded" else self.m * self.n

    @property
    def terms(self) -> dict[str, int]:
        """How many terms of a size about 1 each number of an output or gradient is the sum of."""
        slopes = self.slope_elements or self.n
        of_slope = self.m * self.n // max(slopes, 1)
        return {"y": 1, "dx": self.n, "dw": self.m, "db": self.m, "dslope": of_slope}

    @property
    def products(self) -> int:
        """How many are added up to an element of x w^T."""
        return 0 if self.op == "bias_act_dropout" else self.k

    def __str__(self) -> str:
        options = [
            self.layout,
            "without bias" * (not self.bias),
            "integers" * self.integers,
            f"alpha {self.alpha:g}" if self.alpha is not None else "",
            "one slope" * (self.slope_elements == 1),
            f"gradients of {self.needs}" if self.needs else "no gradients",
        ]
        sizes = f"{self.m}x{self.k}x{self.n}"
        return f"{self.act}, p = {self.p:g}, {sizes}, {', '.join(filter(None, options))}"

    def inputs(self) -> dict[str, Tensor]:
        """Leaves, and `dy`; the same numbers for the same case."""
        g = torch.Generator().manual_seed(1)

        def made(*shape: int, most: int = 2, scale: float = 1.0) -> Tensor:
            """Integers from -most to most, or normal."""
            if self.integers:
                return torch.randint(-most, most + 1, shape, generator=g).double()
            return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

        has_product = self.op != "bias_act_dropout"
        k, most = (self.k, 2) if has_product else (self.n, 8)
        found = {"x": made(self.m, k, most=most)}
        if has_product:
            found["w"] = made(self.n, self.k, scale=max(self.k, 1) ** -0.5)
        if self.bias:
            found["b"] = made(self.n, most=8)
        if self.act == "prelu":
            slope = made(self.slope_elements or self.n).abs()
            found["slope"] = 0.25 * (slope + 1) if self.integers else slope * 0.5
        found["dy"] = made(self.m, self.n, most=4)
        found = {name: t.to(self.device, self.dtype) for name, t in found.items()}
        if self.layout == "expanded" and self.m:
            found["x"] = found["x"][:1].expand(self.m, -1)
        if has_kink(self.act, self.alpha) and not self.integers:
            found["dy"][_near_kink(found)] = 0
        elif self.layout == "expanded" and self.m:
            found["dy"] = found["dy"][:1].expand(self.m, -1)
        # NaN, so that a kernel shows that it reads between the rows. PyTorch's own bf16 products do
        # on CPUs with AMX (verify.plain), and multiply by 0.
        between = 3.0 if has_product and self.dtype == torch.bfloat16 else torch.nan
        return {
            name: _laid_out(t, self.layout, name in ("x", "dy"), between)
            for name, t in found.items()
        }


def _laid_out(t: Tensor, layout: str, has_rows: bool, between: float) -> Tensor:
    """The same values in another layout of memory."""
    if layout == "3-D" and has_rows:
        m, n = t.shape
        return t.view(n) if m == 1 else t.view(m // 2, 2, n) if m % 2 == 0 else t.view(1, m, n)
    if layout == "odd address":
        return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)
    if layout == "every second":
        return torch.stack((t, t + 1), -1)[..., 0]
    if layout == "transposed" and t.dim() == 2:
        return t.t().contiguous().t()
    if layout == "rows apart":
        return torch.cat([t, t.new_full((*t.shape[:-1], 3), between)], -1)[..., : t.shape[-1]]
    return t


def has_kink(act: str, alpha: float | None = None) -> bool:
    """Whether the derivative jumps at 0."""
    tiny = torch.tensor([-1e-30, 1e-30], dtype=torch.float64)
    slope = 0.5 if alpha is None else alpha
    below, above = activations.TABLE[activations.IDS[act]].from_z(tiny, slope).tolist()
    return abs(below - above) > 0.1


def _near_kink(inputs: dict[str, Tensor]) -> Tensor:
    """(M, N) bool: where rounding can put z on either side of 0, and so decide the derivative.

    Either derivative is right there, but the difference is as large as the gradient itself.
    """
    x, w, b = (inputs[n].double() if n in inputs else None for n in ("x", "w", "b"))
    z, size = (x, x.abs()) if w is None else (x @ w.T, x.abs() @ w.abs().T)
    if b is not None:
        z, size = z + b, size + b.abs()
    return z.abs() < 2 * torch.finfo(inputs["x"].dtype).eps * size


def _is_exact(act: str, alpha: float | None, p: float, dtype: torch.dtype) -> bool:
    """Whether small integers give exact results: no exp, and factors that are powers of two."""
    exact = act in ("none", "relu", "prelu") or (act == "leaky_relu" and alpha is not None)
    # In 16 bits the derivative is read off a square that was rounded.
    return p != 0.3 and (exact or (act == "relu_squared" and dtype == torch.float32))


def table(op: str, dtype: torch.dtype, device: str = "cpu") -> Iterator[Case]:
    """Every activation with every p and shape. Layout, gradients, bias and kind of numbers are
    drawn, so that any two values of two axes meet."""
    draw = random.Random(f"{op} {dtypes.SHORT[dtype]}")
    for (act, alpha, slopes), p, (m, k, n) in product(ACTS, PS, shapes(op)):
        layout, needs, bias = draw.choice(LAYOUTS), draw.choice(NEEDS), draw.random() < 0.8
        integers = draw.random() < 0.5 and _is_exact(act, alpha, p, dtype)
        yield Case(
            op, m, k, n, act, p, dtype, device, bias, slopes, alpha, layout, needs, integers
        )  # fmt: skip


def spread(cases: Iterable[Case], pairs: bool = True) -> list[Case]:
    """Few of them, with every shape, and every two values of two axes that any of them has.

    pairs  False: fewer, with every value of each axis
    """
    cases, met, found = list(cases), set(), []
    random.Random(0).shuffle(cases)
    for case in cases:
        values = enumerate(case.axes)
        new = {*(combinations(values, 2) if pairs else values), (case.m, case.k, case.n)}
        if not new <= met:
            met |= new
            found.append(case)
    return found


def shared(op: str, dtype: torch.dtype) -> list[Case]:
    """Calls that several threads share: one way of saving and summing each, at each size."""
    acts = ("relu", 0), ("gelu", 0), ("prelu", 0), ("prelu", 1)
    return [
        Case(op, m, k, n, act, 0.5, dtype, slope_elements=slopes)
        for (m, k, n), (act, slopes) in product(SHARED, acts)
    ]
