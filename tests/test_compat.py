"""The private names of torch in fusedmlp/compat.py still do what this package takes them to do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from fusedmlp import compat

PACKAGE = Path(__file__).parent.parent / "fusedmlp"
PRIVATE = re.compile(
    r"torch\._(?!_)|_C\._|forward_ad\._|\._functorch\b|_inductor|import.*_dynamo|_guards\.|_subclasses"
    r"|_has_any_global_hook|(?<!\")_compiled_call_impl"
)


def test_no_other_file_uses_a_private_name_of_torch():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "compat.py":
            found = [line for line in path.read_text().splitlines() if PRIVATE.search(line)]
            assert not found, f"{path}: {found}"


def test_transforms_and_forward_mode_are_seen():
    seen = []

    def f(x):
        seen.append((compat.in_functorch(), compat.is_transformed(), compat.is_batched(x)))
        return x.sum()

    x = torch.ones(3)
    f(x)
    torch.func.grad(f)(x)
    torch.vmap(f)(x[None])
    with forward_ad.dual_level():
        f(x)
    assert seen == [(False,) * 3, (True,) * 3, (True,) * 3, (False, True, False)]


def test_gradients_that_are_batched_the_older_way_are_seen():
    seen = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append(compat.is_batched(g))
            return g

    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad(Identity.apply(x), x, torch.eye(3), is_grads_batched=True)
    torch.autograd.grad(Identity.apply(x), x, torch.ones(3))
    assert seen == [True, False]


def test_autocast_is_seen():
    assert not compat.is_any_autocast_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert compat.is_any_autocast_enabled()


def test_the_dispatcher_knows_registered_kernels():
    assert compat.has_kernel("aten::add.Tensor", "CPU")
    assert "fusedmlp::linear_act_fwd.reference" in compat.all_op_names()


def test_hooks_of_all_modules_and_compiled_modules_are_seen():
    m = nn.Linear(2, 2)
    assert not compat.has_any_global_hook() and not compat.is_compiled(m)
    hook = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert compat.has_any_global_hook()
    finally:
        hook.remove()
    m.compile(backend="eager")
    assert compat.is_compiled(m)


def test_what_is_stashed_comes_back_inside_backward_only():
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append(compat.stashed_by_backward("fusedmlp test"))
            return g

    compat.stash("fusedmlp test", "value")
    assert compat.stashed_by_backward("fusedmlp test") is None
    Look.apply(torch.ones(1, requires_grad=True)).backward()
    assert seen == ["value"]


def test_compilers_are_found_and_constants_are_constants():
    ran = []

    def answer():
        ran.append(1)
        return 3

    compat.mark_constant(answer)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x * answer(), backend="eager", fullgraph=True)
    assert compiled(torch.ones(1)).item() == compiled(torch.ones(1)).item() == 3
    assert len(ran) == 1
    assert callable(compat.compiler_backend("aot_eager")) and callable(compat.inductor(None, {}))
    assert compat.detect_fake_mode([torch.ones(1)]) is None


def test_kernels_for_lists_of_tensors():
    a, b = [torch.ones(2), torch.ones(3)], [torch.zeros(2), torch.zeros(3)]
    compat.foreach_copy_(b, a)
    compat.foreach_add_(b, 1)
    compat.foreach_mul_(b, 2.0)
    assert [t.sum().item() for t in b] == [8, 12]
    norms = [n.item() for n in compat.foreach_norm(b)]
    assert norms == pytest.approx([32**0.5, 48**0.5])
    p, g = [torch.ones(2)], [torch.ones(2)]
    options = dict(weight_decay=0.0, maximize=False, grad_scale=None, found_inf=None)
    compat.fused_sgd_(
        p, g, [], momentum=0.0, lr=0.5, dampening=0.0, nesterov=False, is_first_step=False,
        **options,
    )  # fmt: skip
    assert p[0].tolist() == [0.5, 0.5]
    for update in (compat.fused_adam_, compat.fused_adamw_):
        p, m, v, step = [torch.ones(2)], [torch.zeros(2)], [torch.zeros(2)], [torch.ones(())]
        update(
            p, g, m, v, [], step, lr=0.5, beta1=0.9, beta2=0.999, eps=1e-8, amsgrad=False,
            **options,
        )  # fmt: skip
        torch.testing.assert_close(p[0], torch.full((2,), 0.5))


def test_an_optimizer_is_made_saved_and_loaded_as_by_torch():
    weights = [nn.Parameter(torch.ones(2))]
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        ours, plain = compat.make_optimizer(kind, weights, lr=0.5), kind(weights, lr=0.5)
        assert type(ours) is kind and vars(ours).keys() == vars(plain).keys()
        weights[0].grad = torch.ones(2)
        ours.step()
        assert str(compat.optimizer_state_dict(ours)) == str(ours.state_dict())
        compat.load_optimizer_state_dict(plain, ours.state_dict())
        assert str(plain.state_dict()) == str(ours.state_dict())


def test_an_optimizer_is_made_saved_and_loaded_without_dynamo():
    code = (
        "import sys, torch; from fusedmlp import compat\n"
        "o = compat.make_optimizer(torch.optim.AdamW, [torch.nn.Parameter(torch.ones(2))])\n"
        "compat.load_optimizer_state_dict(o, compat.optimizer_state_dict(o))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
