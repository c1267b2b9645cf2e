"""The step by others on a CPU, each in its best form: PyTorch with coarser products, PyTorch
compiled whole, JAX, and NumPy by hand. As in ways.py; times nothing.

All get fp32 rows in memory and row numbers. What compiles (`compiles`) does so in its first call.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmlp.train.data import types

from .ways import SEED, Eager, Network, OursNative

PACKAGES = ("jax", "numpy", "scikit-learn")  # whose versions a table names


@contextlib.contextmanager
def _coarse_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Medium(Eager):
    """The loop with torch.set_float32_matmul_precision("medium")."""

    precision = "bf16"  # of its products: what it may be wrong by

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        _need_fp32(self.case)
        x = torch.randn(self.case.batch, self.case.dims[0])
        exact = x @ x.t()
        with _coarse_products():
            if torch.equal(x @ x.t(), exact):
                raise RuntimeError("it makes no difference on this processor")

    def steps(self, order: Tensor) -> None:
        with _coarse_products():
            super().steps(order)

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        with _coarse_products():
            return super().accuracy(x, y)


class CompiledStep(Eager):
    """Gather, forward, loss, backward and SGD's update as one function by torch.compile."""

    compiles = True

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.parameters = {name: p.detach() for name, p in self.net.named_parameters()}
        self.whole = torch.compile(self._whole, dynamic=False, fullgraph=True)

    def _whole(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            out = torch.func.functional_call(self.net, parameters, (x[rows],))
            return F.cross_entropy(out, y[rows])

        gradients, value = torch.func.grad_and_value(loss)(parameters)
        for name, p in parameters.items():
            p.sub_(gradients[name], alpha=self.case.rate)
        return value

    def step(self, rows: Tensor) -> None:
        self.total += self.whole(self.parameters, self.x, self.y, rows)


def _need_fp32(case: Network) -> None:
    if case.precision != "fp32":
        raise RuntimeError(f"it is written for fp32, not for {case.precision}")


class _ByArrays:
    """What JAX and NumPy share: arrays that are the memory of a torch network's parameters."""

    def __init__(
        self, case: Network, data: types.Data, net: nn.Module | None = None, x: Tensor | None = None
    ):
        _need_fp32(case)
        self.case, self.total = case, 0.0
        net = case.model() if net is None else net
        self.net = nn.Sequential(*copy.deepcopy(net).children())
        linears = [m for m in self.net if isinstance(m, nn.Linear)]
        self.layers = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in linears]
        self.x = (data.scaling(data.x_train) if x is None else x).numpy()
        self.y = data.y_train.numpy()
        self.dropout = (*case.dropout, 0.0)

    def read(self) -> float:
        """Mean losses of the steps since the last read, added up."""
        total, self.total = self.total, 0.0
        return total


class NumPy(_ByArrays):
    """Every line of the step by hand, products by NumPy's BLAS."""

    def __init__(self, *arguments, **more):
        import numpy
        from threadpoolctl import threadpool_limits

        super().__init__(*arguments, **more)
        threadpool_limits(torch.get_num_threads(), user_api="blas")
        self.np, self.random = numpy, numpy.random.Generator(numpy.random.SFC64(SEED))

    def steps(self, order: Tensor) -> None:
        for rows in order.split(self.case.batch):
            self.step(rows.numpy())

    def _logits(self, x, kept: list | None = None):
        """kept: the input of every layer is added to it, and units are dropped."""
        for (w, b), p in zip(self.layers, self.dropout, strict=True):
            if kept is not None:
                kept.append(x)
            x = x @ w.T
            x += b
            if w is self.layers[-1][0]:
                return x
            self.np.maximum(x, 0, out=x)
            if kept is not None and p:
                x *= self.random.random(x.shape, dtype=x.dtype) >= p
                x *= 1 / (1 - p)

    def step(self, rows) -> None:
        np, rate = self.np, self.case.rate
        inputs: list = []
        d = self._logits(self.x.take(rows, axis=0), inputs)
        at = np.arange(len(rows)), self.y[rows]
        d -= d.max(axis=1, keepdims=True)
        right = d[at]
        np.exp(d, out=d)
        sums = d.sum(axis=1, keepdims=True)
        self.total += float(np.mean(np.log(sums[:, 0]) - right))
        d /= sums
        d[at] -= 1
        d /= len(rows)
        # An input that is 0 was dropped or is on relu's flat side: either way no gradient passes.
        scales = [1 / (1 - p) for p in (0.0, *self.case.dropout)]
        for i in reversed(range(len(self.layers))):
            (w, b), x = self.layers[i], inputs[i]
            dw, db = d.T @ x, d.sum(axis=0)
            if i:
                d = d @ w
                d *= x > 0
                if scales[i] != 1:
                    d *= scales[i]
            dw *= rate
            w -= dw
            b -= rate * db

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        return float((self._logits(x.numpy()).argmax(axis=1) == y.numpy()).mean())


@functools.cache
def _jax_threads() -> int:
    """JAX makes its threads once in a process, as many as this variable says."""
    os.environ["NPROC"] = str(torch.get_num_threads())
    return torch.get_num_threads()


class Jax(_ByArrays):
    """An epoch as one jitted scan over its batches, which updates the parameters."""

    compiles = True

    def __init__(self, *arguments, **more):
        import jax

        super().__init__(*arguments, **more)
        if (threads := _jax_threads()) != torch.get_num_threads():
            raise RuntimeError(f"JAX keeps the {threads} threads of its first call")
        jax.config.update("jax_platforms", "cpu")
        self.jax, self.key = jax, jax.random.key(SEED, impl="unsafe_rbg")
        self.x, self.y = jax.numpy.asarray(self.x), jax.numpy.asarray(self.y.astype("int32"))
        self.epoch = jax.jit(self._epoch, donate_argnums=0)
        self.right = jax.jit(lambda layers, x, y: (self._logits(layers, x).argmax(1) == y).mean())

    def _logits(self, layers, x, key=None):
        """key: of the units that are dropped; None: none are."""
        *hidden, (last, bias) = layers
        for i, ((w, b), p) in enumerate(zip(hidden, self.case.dropout, strict=True)):
            x = self.jax.nn.relu(x @ w + b)
            if key is not None and p:
                own = self.jax.random.fold_in(key, i)
                keep = self.jax.random.bernoulli(own, 1 - p, x.shape)
                x = self.jax.numpy.where(keep, x / (1 - p), 0.0)
        return x @ last + bias

    def _loss(self, layers, x, y, key):
        of_rows = self.jax.nn.log_softmax(self._logits(layers, x, key))
        return -self.jax.numpy.take_along_axis(of_rows, y[:, None], axis=1).mean()

    def _epoch(self, layers, x, y, order, key):
        """Trained layers, and the sum of the losses."""
        jax, batch = self.jax, self.case.batch

        def step(layers, at):
            rows, key = at
            inputs = x.at[rows].get(mode="promise_in_bounds")
            loss, gradients = jax.value_and_grad(self._loss)(layers, inputs, y[rows], key)
            return jax.tree.map(lambda p, d: p - self.case.rate * d, layers, gradients), loss

        whole = len(order) // batch
        *keys, last = jax.random.split(key, whole + 1)
        total, rest = 0.0, order[whole * batch :]
        if whole:
            batches = order[: whole * batch].reshape(whole, batch)
            layers, losses = jax.lax.scan(step, layers, (batches, jax.numpy.stack(keys)))
            total = losses.sum()
        if len(rest):
            layers, loss = step(layers, (rest, last))
            total += loss
        return layers, total

    def _arrays(self):
        """Copies of the weights, in the orientation of the products."""
        array = functools.partial(self.jax.numpy.array, copy=True)
        return [(array(w.T), array(b)) for w, b in self.layers]

    def steps(self, order: Tensor) -> None:
        self.key, key = self.jax.random.split(self.key)
        rows = order.numpy().astype("int32")
        layers, total = self.epoch(self._arrays(), self.x, self.y, rows, key)
        for (w, b), (trained, bias) in zip(self.layers, layers, strict=True):
            w[:], b[:] = trained.T, bias
        self.total += float(total)

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        return float(self.right(self._arrays(), x.numpy(), y.numpy().astype("int32")))


WAYS = {
    "native": OursNative,
    "eager": Eager,
    "eager, medium": Medium,
    "compiled step": CompiledStep,
    "JAX": Jax,
    "NumPy": NumPy,
}
