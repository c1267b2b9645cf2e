"""The dropout contract: known answers, statistics that catch known bugs, independence of layout."""

import math

import pytest
import torch

import fusedmlp
import fusedmlp.functional as FF
from fusedmlp.spec import philox

# Known answers of Philox 4x32-10, published with Random123 (kat_vectors): counter, key, words.
RANDOM123 = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), RANDOM123)
def test_philox_gives_the_published_words(counter, key, words):
    counter, key = ([torch.tensor(w) for w in ws] for ws in (counter, key))
    assert tuple(int(w) for w in philox.philox(counter, key)) == words


def test_rows_are_counted_from_0_or_from_the_offset():
    state = torch.tensor([1, 2])
    whole = philox.windows(state, 3, 5, 9)
    assert torch.equal(whole, philox.windows(state, 3, 5, 9, 0))
    assert torch.equal(whole[2:], philox.windows(state, 3, 3, 9, 2))


def test_layer_adds_to_the_stream_and_wraps():
    top = 2**63 - 1
    a = philox.windows(torch.tensor([1, top]), 3, 4, 9)
    b = philox.windows(torch.tensor([1, -(2**63) + 2]), 0, 4, 9)
    assert torch.equal(a, b)


def test_row_offset_shifts_rows():
    whole = philox.dropout_mask(1, 2, 32, 20, 0.5)
    part = philox.dropout_mask(1, 2, 10, 20, 0.5, row_offset=13)
    assert torch.equal(whole[13:23], part)


@pytest.mark.parametrize("p", [0.0, 1e-12, 2.0**-32, 0.1, 0.5, 1 - 2.0**-32, 1.0])
def test_threshold_and_scale_come_from_one_rounding_each(p):
    threshold, scale = philox.threshold_and_scale(p)
    assert threshold == round(p * 2**32)
    if 0 < threshold < 2**32:
        assert scale == torch.tensor(1 / (1 - p), dtype=torch.float64).float().item()
    else:
        assert scale == 1.0


# --- statistics ---------------------------------------------------------------------------------


def _scaled_mean(keep: torch.Tensor, scale: float, p: float) -> float:
    """Deviation of E[y] / x from 1, in standard errors."""
    mean = keep.double().mean().item() * scale
    return (mean - 1) / (math.sqrt(p * (1 - p) / keep.numel()) * scale)


def _correlation(keep: torch.Tensor, rows: int, columns: int, p: float) -> float:
    """Correlation of the mask with itself, shifted by (rows, columns), in standard errors."""
    k = keep.double() - (1 - p)
    a, b = k[rows:, columns:], k[: k.shape[0] - rows, : k.shape[1] - columns]
    return (a * b).sum().item() / (p * (1 - p) * math.sqrt(a.numel()))


LAGS = [(0, c) for c in range(1, 9)] + [(r, 0) for r in (1, 2, 8, 16, 31, 32, 33, 64)] + [(1, 1)]


def _suspicious(keep: torch.Tensor, scale: float, p: float) -> list[str]:
    """What is wrong with a mask at five standard errors, the threshold for 18 looks."""
    found = [] if abs(_scaled_mean(keep, scale, p)) < 5 else ["mean"]
    return found + [f"lag {lag}" for lag in LAGS if abs(_correlation(keep, *lag, p)) >= 5]


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.3, 0.5, 0.9])
def test_mask_is_unbiased_and_uncorrelated(p):
    keep = philox.dropout_mask(20, 22, 4096, 1024, p)
    assert _suspicious(keep, philox.threshold_and_scale(p)[1], p) == []


def test_a_mask_with_a_byte_wide_threshold_is_caught():
    """Negative control, shipped by a well-known library: dropped below floor(256 p) / 256."""
    p = 0.1
    byte = philox.windows(torch.tensor([20, 22]), 0, 4096, 1024) >> 24
    assert "mean" in _suspicious(byte >= math.floor(256 * p), 1 / (1 - p), p)


def test_a_mask_that_repeats_every_32_rows_is_caught():
    """Negative control, shipped by a well-known library: the row block is not in the counter."""
    p = 0.1
    keep = philox.dropout_mask(20, 22, 32, 1024, p).repeat(128, 1)
    assert "lag (32, 0)" in _suspicious(keep, philox.threshold_and_scale(p)[1], p)


# --- seeds --------------------------------------------------------------------------------------


def test_manual_seed_reproduces_and_two_draws_differ():
    x = torch.ones(16, 64)
    torch.manual_seed(7)
    a, b = FF.dropout(x), FF.dropout(x)
    torch.manual_seed(7)
    assert torch.equal(a, FF.dropout(x)) and torch.equal(b, FF.dropout(x))
    assert not torch.equal(a, b)


def test_a_one_dimensional_input_is_row_0():
    x = torch.ones(50)
    assert torch.equal(FF.dropout(x, seed=3) != 0, philox.dropout_mask(3, 0, 1, 50, 0.5)[0])
    assert torch.equal(FF.dropout(x[0], seed=3) != 0, philox.dropout_mask(3, 0, 1, 1, 0.5)[0, 0])


@pytest.mark.parametrize("numbers", [(3, 4), (-1, -(2**63)), (2**63 - 1, 0)])
def test_a_state_is_made_on_its_device_without_a_copy_from_the_host(numbers):
    """A copy would wait for the GPU and could not be captured into a graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Watch():
        x = torch.empty(4, 8, device="meta")
        made = [philox.state_of(*numbers, x.device)]
        made.append(FF._call_state("dropout", x, *numbers, 0)[0])
        with fusedmlp.dropout_state(*numbers):
            made.append(FF.draw_state(x)[0])
    for state in made:
        assert (state.device.type, state.dtype, state.shape) == ("meta", torch.int64, (2,))
    assert seen and not {n for n in seen if "copy" in n or "lift" in n or n == "aten::to"}, seen
    assert philox.state_of(*numbers, "cpu").tolist() == list(numbers)
