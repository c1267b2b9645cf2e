"""The native step engine with products in bf16: operands rounded, all else as in fp32."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fusedmlp.backends import native
from fusedmlp.train import fit
from fusedmlp.train.data.types import permutation
from fusedmlp.train.engines import native_evaluate, native_op
from fusedmlp.train.errors import TrainError
from fusedmlp.train.many import Member, fit_many, reasons_against_many

from .. import made_data
from ..engines import (
    NATIVE_OPTIMIZERS,
    SEED,
    Plain,
    config,
    engine_of,
    errors,
    need_native,
    network,
    orders,
    state_equal,
)
from ..native import library

made_data.need("safetensors", "matplotlib")
need_native()


@pytest.fixture(params=["avx512_bf16", "amx"])
def isa(request):
    """The products of one instruction set."""
    opened = library()
    has = opened.fusedmlp_set_cpu_isa(request.param.encode())
    yield request.param if has else pytest.skip(f"this processor has no {request.param}")
    opened.fusedmlp_set_cpu_isa(None)


@pytest.fixture
def without_bf16():
    opened = library()
    opened.fusedmlp_set_cpu_isa(b"avx2")
    yield native.cpu_isa()
    opened.fusedmlp_set_cpu_isa(None)


def rounded(x):
    return x.float().bfloat16().to(x.dtype)


class RoundedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return rounded(x) @ rounded(w).T

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return rounded(dy) @ rounded(w), rounded(dy).T @ rounded(x)


class RoundedLinear(nn.Linear):
    def forward(self, x):
        return RoundedProducts.apply(x, self.weight) + self.bias


def rounding(loop: Plain) -> Plain:
    for module in loop.modules:
        if isinstance(module, nn.Linear):
            module.__class__ = RoundedLinear
    return loop


SHAPES = {
    "even": (64, 32, 4),
    "odd": (64, 33, 47, 4),
    "wide": (64, 300, 130, 4),
    "in two parts": (576, 96, 64, 4),
}


@pytest.mark.parametrize("rows", [1, 7, 64, 300])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_a_step_is_that_of_rounded_operands_and_exact_sums(sizes, rows, isa):
    """In fp64; the same masks as in fp32. What is left is fp32's own error, and the few values that
    it puts on the other side of a middle between two bf16."""
    data = made_data.pictures(rows=400, side=math.isqrt(sizes[0]))
    optimizer = NATIVE_OPTIMIZERS["momentum"]
    net = network(sizes=sizes, dropout=(0.2, 0.5, 0.3)[: len(sizes) - 2])
    exact = Plain(net, data, optimizer, torch.float64)
    wanted = rounding(Plain(net, data, optimizer, torch.float64))
    engine = engine_of("native", net, data, optimizer, precision="bf16")
    [batch] = orders(data, 1, rows)
    for loop in (exact, wanted):
        loop.run([batch])
    engine.step(batch)
    near, apart = errors(net, wanted.modules), errors(wanted.modules, exact.modules)
    assert near[1] < 0.1 * apart[1] and near[0] < 0.5 * apart[0], (near, apart)


@pytest.mark.parametrize("name", NATIVE_OPTIMIZERS)
def test_many_steps_stay_as_near_to_fp64_as_rounded_operands_do(name, isa):
    data = made_data.pictures(rows=400)
    optimizer, net = NATIVE_OPTIMIZERS[name], network(dropout=(0.2, 0.5))
    truth = Plain(net, data, optimizer, torch.float64)
    loop = rounding(Plain(net, data, optimizer, torch.float32))
    engine = engine_of("native", net, data, optimizer, precision="bf16")
    batches = orders(data, 50)
    for each in (truth, loop):
        each.run(batches)
    for batch in batches:
        engine.step(batch)
    found, budget = errors(net, truth.modules), errors(loop.modules, truth.modules)
    assert found[1] < 1.5 * budget[1] and found[0] < 2 * budget[0], (found, budget)


def trained(threads: int, precision: str = "bf16"):
    torch.set_num_threads(threads)
    data, sizes = made_data.pictures(rows=400, side=24), (576, 64, 96, 48, 4)
    net = network(sizes=sizes, dropout=(0.2, 0.5, 0.0))
    engine = engine_of("native", net, data, NATIVE_OPTIMIZERS["adamw"], precision=precision)
    for epoch in range(3):
        engine.steps(permutation(SEED, epoch, len(data.x_train)), 64)
    return net, engine.read(), engine.evaluate(data.x_test, data.y_test).tolist()


def test_equal_runs_have_equal_bits_for_any_number_of_threads(isa):
    before = torch.get_num_threads()
    try:
        (net, *sums), *others = trained(1), trained(2), trained(3)
    finally:
        torch.set_num_threads(before)
    for other, *more in others:
        assert state_equal(net, other) and more == sums
    assert not state_equal(net, trained(1, "fp32")[0])


def test_evaluation_rounds_as_training_does(isa):
    data, net = made_data.pictures(rows=400), network().eval()
    sums = native_evaluate.evaluate(
        [net],
        data.x_test,
        data.y_test,
        [[torch.arange(len(data.x_test))]],
        loss="cross_entropy",
        scaling=data.scaling,
        precision="bf16",
    )[0, 0]
    loop = rounding(Plain(net, data, NATIVE_OPTIMIZERS["sgd"], torch.float64))
    outputs = loop.forward(data.x_test.double() / data.scaling.divisor)
    wanted = nn.functional.cross_entropy(outputs, data.y_test, reduction="sum")
    assert sums[0].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_fit_in_bf16_takes_the_engine_and_learns(isa):
    data = made_data.pictures(rows=400)
    results = {}
    for precision in ("fp32", "bf16"):
        net = network(sizes=(64, 32, 4))
        result = fit(net, data, config(precision=precision, epochs=8, engine="native"))
        results[precision] = result.history[-1]
    assert results["bf16"]["train_loss"] == pytest.approx(results["fp32"]["train_loss"], rel=0.05)


def test_networks_of_one_precision_are_trained_in_one_call_and_others_are_not(isa):
    data = made_data.pictures(rows=200)
    rows = torch.arange(len(data.x_train))

    def members(*precisions):
        return [
            Member(network(sizes=(64, 40, 4)), config(precision=p, lr=0.05), rows)
            for p in precisions
        ]

    given = data.x_train, data.y_train
    both = members("bf16", "fp32")
    assert reasons_against_many(both, *given, "cross_entropy") == [
        "one call has one precision, got bf16 and fp32"
    ]
    together = members("bf16", "bf16")
    assert reasons_against_many(together, *given, "cross_entropy") == []
    for each in (both, together):
        fit_many(each, *given, loss="cross_entropy", scaling=data.scaling)
    assert state_equal(both[0].model, together[0].model)
    assert not state_equal(both[0].model, both[1].model)


def test_a_processor_without_bf16_is_named_and_the_run_goes_on(without_bf16):
    reason = (
        f"its bf16 needs AVX512-BF16 or AMX, and this processor or FUSEDMLP_CPU_ISA has no more "
        f"than {without_bf16}"
    )
    assert native_op.reason_against("bf16") == reason
    data = made_data.pictures(rows=100)
    with pytest.raises(TrainError) as error:
        fit(network(), data, config(precision="bf16", engine="native"))
    assert reason in str(error.value)
    assert fit(network(), data, config(precision="bf16")).history[-1]["train_loss"] < 3


def test_the_op_refuses_bf16_where_there_is_none(without_bf16):
    data, net = made_data.pictures(rows=100), network()
    engine = engine_of("native", net, data, NATIVE_OPTIMIZERS["sgd"])
    engine.task.precision = "bf16"
    with pytest.raises(RuntimeError, match="train: bf16 must be false where the processor has no"):
        engine.step(torch.arange(10))
