"""Every name of torch that is not public and that this package uses; test_compat.py checks each.

torch.func levels, forward mode   where an autograd.Function will not do
autograd threads                  settings that go with a backward pass
the dispatcher                    which kernels the extension has registered
modules                           hooks for all modules; a module that was compiled by itself
Dynamo, Inductor                  what a backend of torch.compile needs
torch._foreach_*, torch._fused_*  one kernel for a list of tensors
torch.optim                       optimizers without Dynamo, whose import takes more than a second
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as _module

__all__ = ["FakeTensor", "FunctionalTensor"]

is_any_autocast_enabled = torch._C._is_any_autocast_enabled
# True for a tensor of is_grads_batched and jacobian(vectorize=True).
is_legacy_batchedtensor = torch._C._functorch.is_legacy_batchedtensor
# (op with overload, dispatch key) -> whether a kernel is registered.
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
all_op_names = torch._C._dispatch_get_all_op_names
# True where a hook is registered for all modules.
has_any_global_hook = _module._has_any_global_hook

foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
fused_adam_, fused_adamw_, fused_sgd_ = torch._fused_adam_, torch._fused_adamw_, torch._fused_sgd_


def make_optimizer(kind: type[torch.optim.Optimizer], *args, **settings) -> torch.optim.Optimizer:
    """kind(*args, **settings). The constructor itself calls a method that imports torch._dynamo
    only in order to be left alone by it."""
    optimizer = kind.__new__(kind)
    optimizer.add_param_group = MethodType(_undecorated(kind.add_param_group), optimizer)
    kind.__init__(optimizer, *args, **settings)
    del optimizer.add_param_group
    return optimizer


def optimizer_state_dict(optimizer: torch.optim.Optimizer) -> dict:
    return _undecorated(type(optimizer).state_dict)(optimizer)


def load_optimizer_state_dict(optimizer: torch.optim.Optimizer, state: dict) -> None:
    _undecorated(type(optimizer).load_state_dict)(optimizer, state)


def _undecorated(method: Callable) -> Callable:
    is_of_torch = method.__module__ == "torch.optim.optimizer"
    return getattr(method, "__wrapped__", method) if is_of_torch else method


def in_functorch() -> bool:
    """True inside torch.func's transforms (vmap, grad, ...)."""
    return torch._C._functorch.maybe_current_level() is not None


def is_transformed() -> bool:
    """True inside torch.func's transforms, and in forward mode without them."""
    return in_functorch() or forward_ad._current_level >= 0


def is_compiled(module: nn.Module) -> bool:
    """True where module.compile() was called."""
    return module._compiled_call_impl is not None


def stash(key: str, value: object) -> None:
    """Keeps a value that autograd hands on to the threads of its backward passes."""
    torch._C._stash_obj_in_tls(key, value)


def stashed_by_backward(key: str) -> object | None:
    """Inside a backward pass, what was stashed in the thread that called it; else None."""
    c = torch._C
    if c._current_graph_task_id() != -1 and c._is_key_in_tls(key):
        return c._get_obj_in_tls(key)
    return None


def mark_constant(function: Callable) -> None:
    """Dynamo runs the function while it traces, and takes the result for a constant.

    What `torch.compiler.assume_constant_result` does, without its import of the whole compiler.
    """
    function._dynamo_marked_constant = True


def detect_fake_mode(inputs: list):
    """The mode of the fake tensors among inputs, or None."""
    return torch._guards.detect_fake_mode(inputs)


def inductor(mode: str | None, options: dict) -> Callable:
    """Inductor as a backend of torch.compile, with a mode and options as torch.compile has them."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    settings = (list_mode_options(mode) if mode else {}) | options
    return lambda gm, inputs: compile_fx(gm, inputs, config_patches=settings or None)


def compiler_backend(name: str) -> Callable:
    """A backend of torch.compile by its name."""
    from torch._dynamo import lookup_backend

    return lookup_backend(name)


def is_batched(t: Tensor) -> bool:
    """True inside what is mapped: torch.func.vmap, is_grads_batched, jacobian(vectorize=True)."""
    return in_functorch() or is_legacy_batchedtensor(t)
