"""Fixtures shared by all tests. Must come before any import of triton."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is first imported; its kernels then run on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"

from fusedmlp.backends import registry


def _skip_unless_usable(name: str, device_type: str) -> None:
    reasons = registry._BY_NAME[name].reasons_against(device_type, torch.float32)
    if reasons:
        pytest.skip(f"{name} on {device_type}: {'; '.join(reasons)}")


_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", _GPU])
def device(request) -> str:
    """Every device that a test can run on; 'cuda' where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU is available to torch")
    return request.param


@pytest.fixture(params=["reference", "native"])
def backend(request, device) -> str:
    """Backends that run in compiled or plain code; Triton's interpreter has tests of its own."""
    _skip_unless_usable(request.param, device)
    return request.param


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN, so that an output which a kernel does not write is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
