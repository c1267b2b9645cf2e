"""Fused models inside what people already use, each against the real package (extra
`integrations`). The lines that each test rests on are those of docs/guide.md."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fusedmlp


def need(*packages: str):
    """The first of the packages, or a skip that says what is missing."""
    found = []
    for package in packages:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(
                pytest.importorskip(
                    package, reason=f"{package} is not installed: pip install '.[integrations]'"
                )
            )
    return found[0]


def plain(dropout: float = 0.2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 16), nn.GELU(),
        nn.Linear(16, 3),
    )  # fmt: skip


def made(rows: int = 256):
    """Three classes that a linear map of the inputs decides."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 20, generator=generator)
    y = (x @ torch.randn(20, 3, generator=generator)).argmax(1)
    return x, y


def accuracy(net: nn.Module, x, y) -> float:
    with torch.no_grad():
        return float((net.eval()(x).argmax(1) == y).float().mean())


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_a_fused_model(tmp_path):
    lightning = need("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = fusedmlp.fuse(plain())

        def training_step(self, batch, index):
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    x, y = made()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)
    model = Classifier()
    before = accuracy(model.net, x, y)
    trainer = lightning.Trainer(
        max_epochs=10, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, loader)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    assert accuracy(model.net, x, y) > max(0.9, before)
    again = Classifier.load_from_checkpoint(tmp_path / "net.ckpt")
    assert torch.equal(again.net.eval()(x), model.net.eval()(x))
    # The checkpoint is the plain network's too.
    unfused = plain().eval()
    unfused.load_state_dict(
        {k.removeprefix("net."): v for k, v in again.state_dict().items()}, strict=True
    )
    assert torch.allclose(unfused(x), model.net(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_skorch_searches_over_a_fused_model():
    skorch = need("skorch", "sklearn")
    from sklearn.model_selection import GridSearchCV

    x, y = made()
    net = skorch.NeuralNetClassifier(
        fusedmlp.FusedMLP,
        module__in_features=20,
        module__hidden=[32],
        module__out_features=3,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=0.01,
        max_epochs=30,
        train_split=None,
        verbose=0,
    )
    search = GridSearchCV(net, {"module__dropout": [0.0, 0.3]}, cv=3).fit(x.numpy(), y.numpy())
    assert search.best_score_ > 0.8
    assert search.best_estimator_.predict_proba(x.numpy()).shape == (256, 3)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=20),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
    ],
    ids=["step", "one-cycle", "cosine"],
)
def test_schedulers_step_a_fused_model_as_the_plain_one(schedule):
    x, y = made()
    ends = []
    for net in (plain(0.0), fusedmlp.fuse(plain(0.0))):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        scheduler = schedule(optimizer)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            scheduler.step()
        ends.append((scheduler.get_last_lr(), nn.utils.parameters_to_vector(net.parameters())))
    assert ends[0][0] == ends[1][0] and ends[0][0] != [0.1]
    assert torch.allclose(ends[0][1], ends[1][1], atol=1e-5)


def test_torch_export_keeps_the_numbers_for_any_batch(tmp_path):
    net = fusedmlp.fuse(plain()).eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(net, (torch.randn(8, 20),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for rows in (2, 8, 33):
        x = torch.randn(rows, 20)
        assert torch.allclose(loaded(x), net(x), atol=1e-6)


def trained():
    from fusedmlp.train import TrainConfig, fit

    x, y = made()
    net = fusedmlp.FusedMLP(20, [32, 16], 3, activation="gelu", dropout=0.1)
    fit(net, (x, y), TrainConfig(epochs=30, batch_size=32, lr=0.1, device="cpu"))
    return net, x, y


def layers_by_themselves():
    x, y = made()
    torch.manual_seed(0)
    net = nn.Sequential(
        fusedmlp.FusedLinear(20, 32, activation="prelu", dropout=0.1),
        fusedmlp.FusedLinear(32, 16, activation="relu_squared"),
        fusedmlp.FusedDropout(0.1),
        fusedmlp.FusedLinear(16, 3),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        fusedmlp.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net, x, y


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("train", [trained, layers_by_themselves])
def test_onnxruntime_runs_a_trained_model(tmp_path, train):
    onnxruntime = need("onnxruntime", "onnx", "onnxscript")
    net, x, y = train()
    batch = torch.export.Dim("batch", min=2)
    torch.onnx.export(
        fusedmlp.unfuse(net).eval(), (x[:2],), tmp_path / "net.onnx", input_names=["x"],
        dynamic_shapes=({0: batch},), dynamo=True, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for rows in (2, 100):
        (found,) = session.run(None, {"x": x[:rows].numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, net.eval()(x[:rows]).numpy(), atol=1e-4)
    assert accuracy(net, x, y) > 0.9


@pytest.mark.filterwarnings("ignore")
def test_peft_adapts_plain_layers_and_refuses_what_computes_more():
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    x, _ = made()

    def change_by_merging(net, targets):
        config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, r=2)
        adapted = peft.get_peft_model(net, config).eval()
        before = adapted(x)
        return (adapted.merge_and_unload()(x) - before).abs().max().item()

    assert change_by_merging(fusedmlp.fuse(plain()), ["0", "3"]) < 1e-4

    def fused():
        layer = fusedmlp.FusedLinear(20, 32, activation="relu")
        return nn.Sequential(layer, nn.Linear(32, 3))

    with pytest.raises(ValueError, match="Target module FusedLinear.* is not supported"):
        change_by_merging(fused(), ["0"])
    assert change_by_merging(fused(), "all-linear") < 1e-4
    assert change_by_merging(fusedmlp.unfuse(fused()), ["0.0"]) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_grid_search_runs_on_dask():
    """Two worker processes, as on two machines: the estimator crosses as a pickle and comes back
    fitted."""
    distributed = need("distributed", "joblib", "sklearn")
    import joblib
    from sklearn.model_selection import GridSearchCV

    from fusedmlp.sklearn import FusedMLPClassifier

    x, y = (a.numpy() for a in made())
    grid = {"alpha": [1e-4, 1.0], "dropout": [0.0, 0.2]}
    estimator = FusedMLPClassifier((16,), max_iter=8, random_state=0, learning_rate_init=0.02)
    here = GridSearchCV(estimator, grid, cv=2).fit(x, y)
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    )
    with cluster, distributed.Client(cluster), joblib.parallel_backend("dask"):
        there = GridSearchCV(estimator, grid, cv=2).fit(x, y)
    assert there.best_params_ == here.best_params_
    np.testing.assert_allclose(
        there.cv_results_["mean_test_score"], here.cv_results_["mean_test_score"]
    )
    assert np.array_equal(there.predict(x), here.predict(x))
