"""Each lesson runs, shows what it says, and leaves its picture."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fusedmlp.train.data.images import IMAGE_SETS, default_folder, find_files

pytest.importorskip("matplotlib", reason="the lessons draw: pip install 'fusedmlp[train]'")
pytest.importorskip("sklearn", reason="the lessons read its digits: pip install 'fusedmlp[train]'")

EXAMPLES = Path(__file__).parent.parent / "examples"
LESSONS = sorted(path.stem for path in EXAMPLES.glob("lesson*.py"))
TRUE = torch.tensor([5.0, 1.2, -3.4, 5.6])
DIGITS = ("--dataset", "digits")

_run_already = {}


@pytest.fixture
def lesson(monkeypatch, tmp_path_factory):
    """lesson(name, *arguments) -> the figures of main; a second call with the same runs nothing."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name, *arguments):
        key = (name, *arguments)
        if key not in _run_already:
            out = tmp_path_factory.mktemp(name)
            figures = import_module(name).main([*arguments, "--out", str(out)])
            picture = (out / f"{name}.png").read_bytes()
            assert picture.startswith(b"\x89PNG") and len(picture) < 120_000
            _run_already[key] = figures
        return _run_already[key]

    return run


@pytest.fixture(params=["digits", "fashion_mnist"])
def images(request):
    """Arguments for a lesson on images: all of the digits, a short run on Fashion-MNIST."""
    if request.param == "digits":
        return DIGITS
    if find_files(IMAGE_SETS["fashion_mnist"], default_folder()) is None:
        pytest.skip("Fashion-MNIST is not on this machine; FUSEDMLP_DATA names its folder")
    return "--dataset", "fashion_mnist", "--epochs", "2"


def test_there_is_one_script_for_each_lesson():
    assert [name[:7] for name in LESSONS] == [f"lesson{i}" for i in range(1, 8)]


def test_a_lesson_runs_by_itself_from_any_folder(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    script = EXAMPLES / "lesson1_activations.py"
    subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "runs" / "examples" / "lesson1_activations.png").exists()


def test_gradients_of_sigmoid_and_tanh_have_their_peaks_at_zero(lesson):
    figures = lesson("lesson1_activations")
    assert figures["sigmoid"] == {"peak": 0.25, "at": 0.0, "at 0": 0.25}
    assert figures["tanh"] == {"peak": 1.0, "at": 0.0, "at 0": 1.0}
    assert figures["relu"]["at 0"] == 0
    assert figures["prelu"]["at 0"] == 0.25


def test_linear_layers_without_activation_are_one_linear_layer(lesson):
    figures = lesson("lesson1_activations")
    assert figures["collapse"] < 1e-5
    assert figures["missed"] > 0.1


def test_the_ops_give_the_numbers_of_the_network_from_scratch(lesson, images):
    figures = lesson("lesson2_scratch", *images)
    assert figures["difference"] < 1e-5
    scratch, ops = (torch.tensor(history) for history in figures["histories"].values())
    torch.testing.assert_close(ops[:, 0], scratch[:, 0], rtol=1e-3, atol=0)
    assert (ops[:, 1] - scratch[:, 1]).abs().max() < 0.01


def test_scratch_and_concise_are_equally_good(lesson, images):
    scratch = lesson("lesson2_scratch", *images)["histories"]["from scratch"][-1][1]
    concise = lesson("lesson3_concise", *images)
    assert abs(scratch - concise["accuracy"]) < 0.01
    # An op a layer, or one of the whole network, by what is measured on a CPU of this kind.
    assert [part.op for part in concise["report"].fused] in (["linear_act"], ["mlp"])


def test_four_features_find_the_true_weights(lesson):
    figures = lesson("lesson4_polynomial")
    normal = figures["normal"]
    assert (normal["weights"] - TRUE).abs().max() < 0.15
    assert normal["test"].max() < 0.03
    assert (figures["concise"]["weights"] - TRUE).abs().max() < 0.15
    assert figures["concise"]["test"] < 0.03


def test_two_features_underfit_and_twenty_overfit(lesson):
    figures = lesson("lesson4_polynomial")
    normal, under, over = (figures[n]["test"] for n in ("normal", "underfitting", "overfitting"))
    assert len(normal) == 5
    assert (under > 10 * normal).all()
    assert over.mean() > normal.mean()
    assert figures["underfitting"]["train"].mean() > 1


def test_weight_decay_shrinks_the_weights_and_the_test_loss(lesson):
    figures = lesson("lesson5_weight_decay")
    assert figures[3]["norm"] < figures[0]["norm"] / 10
    assert figures[3]["test"] < figures[0]["test"]
    assert figures[3]["train"] > figures[0]["train"]


def test_a_penalty_in_the_loss_is_the_weight_decay_of_the_optimiser(lesson):
    figures = lesson("lesson5_weight_decay")
    assert all(figures[strength]["difference"] < 1e-5 for strength in (0, 3))


def test_dropout_from_scratch_keeps_all_half_or_nothing(lesson):
    lesson("lesson6_dropout", *DIGITS)
    dropout = import_module("lesson6_dropout").dropout
    h = torch.arange(1.0, 1001)
    assert torch.equal(dropout(h, 0.0), h)
    assert torch.equal(dropout(h, 1.0), torch.zeros(1000))
    half = dropout(h, 0.5)
    assert torch.equal(half[half != 0], 2 * h[half != 0])
    assert 400 < int((half == 0).sum()) < 600


def test_dropout_and_gaussian_noise_leave_the_mean_where_it_was(lesson):
    """The largest of 1000 normal deviations is above 5 once in 1700 seeds; this is one seed."""
    figures = lesson("lesson6_dropout", *DIGITS)
    for name in ("our dropout", "fusedmlp's dropout", "Gaussian noise"):
        assert figures[name] < 5


def test_net_with_dropout_from_scratch_and_concise_are_equally_good(lesson, images):
    figures = lesson("lesson6_dropout", *images)
    assert abs(figures["Net, from scratch"] - figures["concise, fused"]) < 0.01


def test_generalisation_hangs_on_parameters_weights_and_rows(lesson):
    figures = lesson("lesson7_model_selection", "--epochs", "30")
    sizes, norms, rows = (
        figures[name] for name in ("parameters", "squared norm of the weights", "training rows")
    )
    # 18 % of the labels are wrong: below 9 % more than half of those are learnt by heart.
    assert sizes[-1][1] < 0.09 < sizes[0][1]
    assert min(error for _, _, error in sizes[1:-1]) < sizes[-1][2]
    assert min(error for _, _, error in norms[1:-1]) < norms[-1][2]
    assert [error for _, _, error in rows] == sorted((e for _, _, e in rows), reverse=True)


def test_the_chosen_model_has_the_lowest_validation_error(lesson):
    figures = lesson("lesson7_model_selection", "--epochs", "30")
    assert len(figures["results"]) == 12
    assert figures["validation"] == min(error for error, _ in figures["results"])
    assert figures["test"] < 0.2


@pytest.mark.parametrize("name", LESSONS)
def test_the_first_page_shows_the_picture_of_each_lesson(name):
    page = (EXAMPLES / "README.md").read_text()
    assert f"({name}.py)" in page and f"(pictures/{name}.png)" in page
    assert (EXAMPLES / "pictures" / f"{name}.png").stat().st_size < 120_000
