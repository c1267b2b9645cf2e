"""fp32 results of the Triton kernels on a GPU whose approximations are as wrong as they may be.

The kernels run in the interpreter, which computes exp, roots and quotients exactly; here these are
too large, or too small, by the limit that NVIDIA gives for its instructions.
"""

import pytest
import torch

from fusedmlp.spec.budget import excess

from .. import check_op, interpreter
from ..check_op import Case
from ..conftest import _skip_unless_usable
from .test_triton import _cross_entropy_by_torch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

SMOOTH = ("elu", "sigmoid", "tanh", "softplus", "gelu", "gelu_tanh", "silu", "relu_squared")


@pytest.fixture(params=[1, -1], ids=["too large", "too small"])
def approximate(request, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("Triton is not interpreted where there is a GPU")
    _skip_unless_usable("triton", "cpu")
    interpreter.use_triton(monkeypatch)
    interpreter.approximate(monkeypatch, request.param)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("act", SMOOTH)
def test_activations_stay_within_the_error_budget(act, p, approximate):
    case = Case("bias_act_dropout", 128, 1, 64, act, p, torch.float32)
    check_op.assert_within_budget(case, check_op.run(case, "triton"))


@pytest.mark.parametrize("classes", [10, 5003])
def test_cross_entropy_stays_within_the_error_budget(classes, approximate):
    from fusedmlp.backends import triton

    logits = 3 * torch.randn(7, classes)
    args = logits, torch.arange(7), 0.1, -1, 1.0
    for got, plain, truth in zip(
        triton.cross_entropy(*args),
        _cross_entropy_by_torch(*args),
        _cross_entropy_by_torch(logits.double(), *args[1:]),
        strict=True,
    ):
        assert excess(got, plain, truth, torch.float32) <= 1
