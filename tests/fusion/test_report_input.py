"""fuse(model).report(input): what it measures, and that it changes nothing."""

import copy

import pytest
import torch
from torch import nn

import fusedmlp
from fusedmlp import fuse
from fusedmlp.fusion import measure

from ..class_nets import Functional, Net, as_sequential


@pytest.mark.parametrize("drops", [True, False])
def test_the_report_on_an_input_measures_and_leaves_everything_as_it_was(drops):
    plain = nn.Sequential(nn.Linear(784, 64), nn.BatchNorm1d(64), nn.ReLU())
    fused = fuse(as_sequential(Net()) if drops else plain).eval()
    x = torch.randn(64, 784)
    before, state = copy.deepcopy(fused.state_dict()), torch.get_rng_state()
    with fusedmlp.use_backend("reference"):
        report = fusedmlp.report(fused, x)
    measured = report.measured
    assert measured.milliseconds_plain > 0 and measured.milliseconds_fused > 0
    assert str(measured) in str(report) and "kept for backward" in str(measured)
    if drops:
        # Each activation and mask besides: 64 rows of 512 hidden units, 4 bytes each.
        assert measured.bytes_plain - measured.bytes_fused >= 64 * 512 * 4
    assert not any(m.training for m in fused.modules())
    assert all(p.grad is None for p in fused.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in fused.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_report_says_what_it_needs_where_nothing_depends_on_a_parameter():
    class Detached(Functional):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(ValueError, match="report: the module must give a tensor"):
        fusedmlp.report(Detached(), torch.randn(4, 6))


def test_what_was_measured_is_told_as_how_many_times_as_fast():
    told = str(measure.Measured(10.0, 4.0, 3_000_000, 1500))
    assert "10 ms to 4 ms (2.5 times as fast), 3 MB to 1.5 kB kept" in told
