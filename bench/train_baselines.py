"""What the trainer is compared with: other ways to train a network. Each returns its test accuracy.

All begin with data that is read and unpacked, train as many epochs and test after each of them.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fusedmlp.train import TrainConfig, build, fit
from fusedmlp.train.data import types
from fusedmlp.train.task import autocast


@dataclass(frozen=True)
class Job:
    """One network on Fashion-MNIST, and how long."""

    name: str
    config: TrainConfig
    epochs: int

    @property
    def rate(self) -> float:
        return self.config.learning_rate("cross_entropy")


def jobs(data_dir: Path | None, epochs: int, device: str) -> list[Job]:
    """The two networks that the project is measured by."""
    base = TrainConfig(dataset="fashion_mnist", data_dir=data_dir, batch_size=256, epochs=epochs)
    first = base.replace(device=device)
    second = first.replace(hidden=(256, 256), dropout=(0.2, 0.5), lr=0.5)
    return [
        Job("784-256-10", first, epochs),
        Job("784-256-256-10, dropout 0.2, 0.5", second, epochs),
    ]


def plain_network(job: Job, loaded: types.Data, seed: int) -> nn.Sequential:
    """nn.Sequential with the weights that the trainer begins with."""
    config = job.config.replace(seed=seed)
    layers: list[nn.Module] = []
    sizes = [loaded.in_features, *config.hidden]
    for wide, narrow, p in zip(sizes, config.hidden, config.dropout_per_layer(), strict=False):
        layers += [nn.Linear(wide, narrow), nn.ReLU(), *([nn.Dropout(p)] if p else [])]
    net = nn.Sequential(*layers, nn.Linear(sizes[-1], loaded.out_features))
    net.load_state_dict(build.build_network(config, loaded).state_dict())
    return net.to(loaded.x_train.device)


def accuracy(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    net.eval()
    with torch.inference_mode():
        right = (net(x).argmax(1) == y).float().mean().item()
    net.train()
    return right


class Ours:
    """fusedmlp.train.fit, the work of `fusedmlp train` without its files."""

    name = "fusedmlp"

    def __init__(self, job: Job, loaded: types.Data):
        self.job, self.data = job, loaded

    def run(self, seed: int) -> float:
        config = self.job.config.replace(seed=seed)
        result = fit(build.build_network(config, self.data), self.data, config)
        if result.interrupted:
            raise KeyboardInterrupt
        return result.history[-1]["test_accuracy"]


class InMemory:
    """A careful eager loop: fp32 images in memory, one permutation an epoch, nothing else; bf16
    by autocast."""

    name = "PyTorch, in-memory loop"

    def __init__(self, job: Job, loaded: types.Data):
        self.job, self.data = job, loaded
        self.x, self.x_test = loaded.scaling(loaded.x_train), loaded.scaling(loaded.x_test)

    def run(self, seed: int) -> float:
        torch.manual_seed(seed)
        net, batch = plain_network(self.job, self.data, seed), self.job.config.batch_size
        optimizer = torch.optim.SGD(net.parameters(), lr=self.job.rate)
        total = torch.zeros((), device=self.x.device)
        for _ in range(self.job.epochs):
            order = torch.randperm(len(self.x), device=self.x.device)
            for rows in order.split(batch):
                with autocast(self.x.device, self.job.config.precision):
                    loss = F.cross_entropy(net(self.x[rows]), self.data.y_train[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach()
            with autocast(self.x.device, self.job.config.precision):
                right = accuracy(net, self.x_test, self.data.y_test)
        return right


class DataLoaders:
    """The usual script: torchvision's data set, ToTensor, a shuffling DataLoader."""

    name = "PyTorch, torchvision + DataLoader"

    def __init__(self, job: Job, loaded: types.Data, folder: Path, workers: int = 0):
        from torchvision import datasets, transforms

        self.job, self.data, self.workers = job, loaded, workers
        unpack(job.config.data_dir, folder)
        to_tensor = transforms.ToTensor()
        self.sets = [datasets.FashionMNIST(folder, part, to_tensor) for part in (True, False)]

    def run(self, seed: int) -> float:
        from torch.utils.data import DataLoader

        torch.manual_seed(seed)
        batch = self.job.config.batch_size
        train = DataLoader(self.sets[0], batch, shuffle=True, num_workers=self.workers)
        test = DataLoader(self.sets[1], batch, num_workers=self.workers)
        device = self.data.x_train.device
        net = nn.Sequential(nn.Flatten(), plain_network(self.job, self.data, seed))
        optimizer = torch.optim.SGD(net.parameters(), lr=self.job.rate)
        for _ in range(self.job.epochs):
            net.train()
            for x, y in train:
                loss = F.cross_entropy(net(x.to(device)), y.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            net.eval()
            right = 0
            with torch.no_grad():
                for x, y in test:
                    right += (net(x.to(device)).argmax(1) == y.to(device)).sum().item()
        return right / len(self.sets[1])


class ScikitLearn:
    """MLPClassifier of the same sizes; it knows no dropout, and tests once at the end."""

    name = "scikit-learn MLPClassifier"

    def __init__(self, job: Job, loaded: types.Data):
        self.job = job
        parts = loaded.scaling(loaded.x_train), loaded.y_train
        parts += loaded.scaling(loaded.x_test), loaded.y_test
        self.x, self.y, self.x_test, self.y_test = (t.cpu().numpy() for t in parts)

    def run(self, seed: int) -> float:
        import warnings

        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPClassifier

        net = MLPClassifier(
            self.job.config.hidden,
            solver="sgd",
            learning_rate_init=self.job.rate,
            momentum=0.0,
            alpha=0.0,
            batch_size=self.job.config.batch_size,
            max_iter=self.job.epochs,
            tol=0.0,
            n_iter_no_change=self.job.epochs + 1,
            random_state=seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it is to stop after max_iter
            net.fit(self.x, self.y)
        return float(net.score(self.x_test, self.y_test))


def unpack(data_dir: Path | None, folder: Path) -> None:
    """The four files where torchvision wants them, unpacked."""
    from fusedmlp.train.data import images

    root = data_dir if data_dir is not None else images.default_folder()
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for path in images.find_files(images.IMAGE_SETS["fashion_mnist"], root):
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        (raw / path.name.removesuffix(".gz")).write_bytes(content)
