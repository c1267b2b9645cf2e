"""What is measured: the cases, and the suites of run.py and `make gpu`. Times nothing itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product

import torch

OPS = ("dropout", "bias_act_dropout", "linear_act", "layer", "net")
MODES = {
    "infer": "forward, without gradients",
    "fwd": "forward as in training",
    "bwd": "backward alone",
    "fwd+bwd": "forward and backward",
    "step": "forward, loss, backward and SGD",
}
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True)
class Case:
    """One thing to measure with several providers.

    group   which table and which part of a suite it belongs to
    op      dropout, bias_act_dropout: elementwise on (M, N); linear_act: the functional op;
            layer: fuse(nn.Sequential(Linear, act, Dropout)); net: the same for a whole MLP, whose
            last layer is a bare Linear
    mode    a key of MODES
    m       rows, the batch
    dims    (N,) elementwise, (K, N) for one layer, (in, hidden..., out) for a net
    p       probability of dropping, one per layer that has a dropout
    cache   'warm' or 'cold'
    """

    group: str
    op: str
    mode: str
    m: int
    dims: tuple[int, ...]
    act: str = "relu"
    p: tuple[float, ...] = (0.0,)
    dtype: str = "fp32"
    device: str = "cpu"
    cache: str = "warm"

    def __post_init__(self):
        if self.op not in OPS:
            raise ValueError(f"bench: unknown op {self.op!r}; known: {', '.join(OPS)}")
        if self.mode not in MODES:
            raise ValueError(f"bench: unknown mode {self.mode!r}; known: {', '.join(MODES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"bench: unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        dims, ps = (1, 1) if self.elementwise else (len(self.dims), max(1, len(self.dims) - 2))
        if len(self.dims) != dims or dims < 1 + (not self.elementwise) or len(self.p) != ps:
            raise ValueError(f"bench: sizes {self.dims} and p {self.p} do not fit op {self.op!r}")
        if self.mode == "step" and self.op != "net":
            raise ValueError(f"bench: mode 'step' is for op 'net', got {self.op!r}")

    @property
    def elementwise(self) -> bool:
        return self.op in ("dropout", "bias_act_dropout")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def layers(self) -> list[tuple[int, int, str, float]]:
        """(K, N, activation, p) of each layer; K is 0 for an elementwise op."""
        if self.elementwise:
            return [(0, self.dims[0], "none" if self.op == "dropout" else self.act, self.p[0])]
        pairs = list(zip(self.dims, self.dims[1:], strict=False))
        if self.op != "net":
            return [(k, n, self.act, self.p[0]) for k, n in pairs]
        hidden = [(k, n, self.act, p) for (k, n), p in zip(pairs[:-1], self.p, strict=True)]
        return [*hidden, (*pairs[-1], "none", 0.0)]

    @property
    def shape(self) -> str:
        return f"{self.m} x {'-'.join(map(str, self.dims))}"

    def __str__(self) -> str:
        act = "" if self.op == "dropout" else f" {self.act}"
        p = "/".join(f"{p:g}" for p in self.p)
        cold = " cold" if self.cache == "cold" else ""
        return f"{self.op} {self.shape}{act} p={p} {self.dtype} {self.mode}{cold}"

    def columns(self) -> dict:
        """The case as the first columns of a row."""
        k = 0 if self.elementwise else self.dims[0]
        row = asdict(self) | {"M": self.m, "K": k, "N": self.dims[-1]}
        del row["m"]
        if self.op == "dropout":
            del row["act"]
        return row | {"dims": list(self.dims), "p": list(self.p)}


def _passes(case: Case, forward: int, backward: int) -> int:
    """What a mode does, of what forward and backward do."""
    alone = {"infer": forward, "fwd": forward, "bwd": backward}
    return alone.get(case.mode, forward + backward)


def flops(case: Case) -> int:
    """Floating-point operations of the GEMMs; the input's gradient counts, except in a step."""
    total = 0
    for i, (k, n, _, _) in enumerate(case.layers):
        gemm, needs_dx = 2 * case.m * k * n, i > 0 or case.mode != "step"
        total += _passes(case, gemm, gemm * (1 + needs_dx))
    return total


def bytes_moved(case: Case) -> int:
    """Fewest bytes of an elementwise op: each tensor it must read or write, once. 0 for GEMMs."""
    if not case.elementwise:
        return 0
    tensor = case.m * case.dims[0] * case.torch_dtype.itemsize
    return _passes(case, 2 * tensor, (2 if case.op == "dropout" else 3) * tensor)


# Layers (M, K, N) of the never-slower grid: small, wide, tall, ragged, with N or K of a few.
GRID_SHAPES = (
    (1, 1, 1), (1, 4, 8), (1, 784, 256), (1, 4096, 4096), (2, 4096, 1024), (8, 8, 8),
    (16, 1024, 4096), (32, 20, 64), (32, 64, 64), (32, 64, 10), (37, 129, 65), (64, 16, 1),
    (64, 2, 8192), (64, 4096, 1024), (128, 512, 512), (256, 13, 32), (256, 784, 10),
    (256, 256, 10), (256, 256, 256), (256, 784, 256), (256, 8, 4096), (256, 1024, 1024),
    (256, 2048, 256), (512, 128, 512), (1000, 1000, 100), (1024, 64, 64), (1024, 256, 10),
    (1024, 784, 256), (1024, 1024, 1024), (4096, 16, 16), (4096, 64, 64), (4096, 256, 1),
    (4096, 128, 7), (8192, 32, 128), (16384, 8, 8), (16384, 64, 2), (65536, 4, 4), (100000, 3, 1),
)  # fmt: skip
GRID_NETS = (  # (batch, dims, p)
    (32, (20, 64, 64, 10), (0.0, 0.0)),
    (32, (20, 64, 64, 10), (0.2, 0.5)),
    (256, (784, 256, 10), (0.0,)),
    (256, (784, 256, 256, 10), (0.2, 0.5)),
    (256, (784, 1024, 1024, 10), (0.2, 0.5)),
    (1, (784, 256, 10), (0.0,)),
    (4096, (16, 32, 32, 1), (0.0, 0.0)),
)
GRID_ACTS = ("relu", "gelu", "tanh")


def grid(device: str = "cpu", dtype: str = "fp32") -> list[Case]:
    """Where fused must never be slower than plain PyTorch."""
    common = dict(device=device, dtype=dtype)
    modes = (("fwd+bwd", 0.0), ("fwd+bwd", 0.5), ("infer", 0.0))
    layers = [
        Case("grid", "layer", mode, m, (k, n), act, (p,), **common)
        for (m, k, n), act, (mode, p) in product(GRID_SHAPES, GRID_ACTS, modes)
    ]
    return layers + [
        Case("grid", "net", "step", m, dims, act, p, **common)
        for (m, dims, p), act in product(GRID_NETS, GRID_ACTS)
    ]


def cpu() -> list[Case]:
    """The figures of README and docs for a CPU."""

    def elementwise(mode: str, n: int, act: str = "relu", op: str = "bias_act_dropout", **more):
        return Case("elementwise", op, mode, n, (n,), act, (0.5,), **more)

    def step(m: int, dims: tuple[int, ...], p: tuple[float, ...]):
        return Case("step", "net", "step", m, dims, p=p)

    sizes, modes = (256, 1024, 4096), ("fwd+bwd", "fwd", "infer", "bwd")
    return [
        *(elementwise(mode, n) for n, mode in product(sizes, modes)),
        *(elementwise("fwd+bwd", 1024, act) for act in ("gelu", "tanh", "silu")),
        elementwise("fwd+bwd", 1024, dtype="bf16"),
        elementwise("infer", 1024, cache="cold"),
        elementwise("fwd+bwd", 1024, op="dropout"),
        step(256, (784, 256, 10), (0.0,)),
        step(256, (784, 256, 256, 10), (0.2, 0.5)),
        step(256, (784, 1024, 1024, 10), (0.2, 0.5)),
        step(32, (20, 64, 64, 10), (0.2, 0.5)),
        *(
            Case("linear", "linear_act", mode, 256, (784, 256), act, (p,))
            for act, p, mode in product(("relu", "gelu"), (0.0, 0.5), ("infer", "fwd+bwd"))
        ),
    ]


def gpu() -> list[Case]:
    """For an NVIDIA GPU, the most wanted figures first: a run ends when its time is spent."""

    def case(group: str, op: str, mode: str, m: int, dims, p, dtype: str, cache: str = "warm"):
        return Case(group, op, mode, m, dims, "relu", p, dtype, "cuda", cache)

    ops, modes, precisions = OPS[:2], ("infer", "fwd+bwd"), ("bf16", "tf32", "fp32")
    blocks = ((4096, 16384, 4096), (1024, 4096, 1024))
    nets = (((784, 256, 10), (0.0,)), ((784, 256, 256, 10), (0.2, 0.5)))
    narrow = ((784, 256), (256, 10))
    shapes = (*narrow, (1024, 4096), (4096, 16384), (16384, 4096))

    def linear(group: str, p: float, m: int, dims, dtype: str = "bf16"):
        return case(group, "linear_act", "fwd+bwd", m, dims, (p,), dtype)

    return [
        *(
            case("elementwise", op, mode, n, (n,), (0.5,), dtype, "cold")
            for op, dtype, n, mode in product(ops, ("bf16", "fp32"), (16384, 4096), modes)
        ),
        *(case("block", "net", "fwd+bwd", 8192, dims, (0.1,), "bf16") for dims in blocks),
        *(
            case("step", "net", "step", 256, dims, p, dtype)
            for dtype, (dims, p) in product(precisions, nets)
        ),
        *(
            linear("narrow", p, m, dims)
            for p, m, dims in product((0.1, 0.5), (256, 4096, 16384, 64), narrow)
        ),
        *(
            linear("shapes", p, m, dims, dtype)
            for dtype, p, m, dims in product(
                precisions, (0.0, 0.1, 0.5), (64, 256, 4096, 16384), shapes
            )
        ),
    ]


SUITES = {
    "cpu": cpu,
    "grid": grid,
    "gpu": lambda: [*gpu(), *grid("cuda", "bf16")],
    "gpu-grid": lambda: grid("cuda", "bf16"),
}
