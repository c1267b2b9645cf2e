"""The network of a run folder: loading it, testing it, and predicting new pictures, rows or tables.
Nothing is written; whole files of tables are read in table_files.py."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import build as models
from .config import FRAME, TrainConfig
from .data import datasets
from .data.columns import Column
from .data.frame_data import raw_rows
from .data.frames import is_frame, open_table
from .data.preparation import Preparation
from .data.types import Data, Scaling
from .errors import TrainError, UsageError, first_line
from .losses import loss_sums
from .run_folder import check_model_file, check_same_model, load_checkpoint, load_config

MOST_PIXELS = 1 << 26  # of a picture
# Not all that the library knows: for PostScript it starts another program.
PICTURES = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
BLOCK_ROWS = 65_536  # of a table that are made inputs and predicted at once


@dataclass(frozen=True)
class Trained:
    """A network of a run folder, on its device and in evaluation mode, and how rows become its
    inputs.

    scaling         of rows as the data file has them
    preparation     of the columns of a table; None where the data are no table
    target_scaling  of a target as the data file has it; does nothing where it was not scaled
    """

    folder: Path
    model: nn.Module  # a FusedMLP, or an Ensemble of several
    config: TrainConfig
    about: dict
    scaling: Scaling
    target_scaling: Scaling
    preparation: Preparation | None = None

    @property
    def classes(self) -> list[str] | None:
        return self.about["data"]["classes"]

    @property
    def image_shape(self) -> tuple[int, int] | None:
        shape = self.about["data"]["image_shape"]
        return tuple(shape) if shape else None

    def outputs(self, rows: Tensor, columns: tuple[Column, ...] | None = None) -> Tensor:
        """(n, C) fp32 on the CPU of rows (n, K) as stored.

        columns  of rows that are those of a table
        """
        device = next(self.model.parameters()).device
        if columns is not None:
            rows = self.preparation(rows, columns)
        return models.predict(
            self.model, rows.to(device), self.scaling, self.config.precision
        ).cpu()

    def predict(self, frame, proba: bool = False):
        """A DataFrame with the column `prediction`, class names or numbers in the target's own
        units, for each row of a table; with `proba` one `probability_<class>` each beside it.

        frame    a DataFrame, whose columns are matched by name; its index is kept
        raises   TrainError for columns that are missing or hold something else than in training
        """
        preparation = self.need_table()
        if not is_frame(frame):
            raise TypeError(f"predict: frame must be a DataFrame, got {type(frame).__name__}")
        table = open_table(frame)
        import pandas as pd

        found = []
        for block in table.blocks(BLOCK_ROWS):
            raw, _, _ = raw_rows(block, preparation.columns, preparation.left_out, table.where)
            outputs = self.outputs(raw, preparation.columns)
            found.append(self.predictions(outputs, proba).set_axis(block.index))
        return pd.concat(found)

    def predictions(self, outputs: Tensor, proba: bool = False):
        """The DataFrame of `predict`, of the network's outputs (n, C)."""
        import pandas as pd

        if self.classes is None:
            if proba:
                raise UsageError(
                    f"--proba needs a run with classes, but {self.folder} predicts a number"
                )
            return pd.DataFrame({"prediction": self.target_scaling.undo(outputs)[:, 0].numpy()})
        names = pd.Series(self.classes, dtype=object)
        found = {"prediction": names.take(outputs.argmax(1).numpy()).to_numpy()}
        if proba:
            shares = outputs.double().softmax(1).numpy()
            found |= {f"probability_{c}": shares[:, i] for i, c in enumerate(self.classes)}
        return pd.DataFrame(found)

    def need_table(self) -> Preparation:
        """raises  UsageError where the run was not trained on a table"""
        if self.preparation is None:
            raise UsageError(
                f"a table needs a run on a table with named columns, but {self.folder} was trained "
                f"on {self.about['data']['name']}"
            )
        return self.preparation


def load(folder: Path, device: torch.device | str = "cpu") -> Trained:
    """The network of a run folder: from model.safetensors, or from the checkpoint where the run is
    not finished."""
    folder = Path(folder)
    config = load_config(folder)
    weights, about = _weights(folder)
    try:
        return _assembled(folder, config, weights, about, torch.device(device))
    except TrainError:
        raise
    except Exception as error:  # what a damaged file says of its network can be anything
        raise TrainError(
            f"{folder}: what is said there of its network is damaged "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _assembled(
    folder: Path, config: TrainConfig, weights: dict, about: dict, device: torch.device
) -> Trained:
    shape = about["model"]
    if shape.get("kind") != "FusedMLP" or shape.get("activation") is None or not shape.get("dims"):
        raise TrainError(
            f"{folder} holds a model of kind {shape.get('kind')}, which only its own code can "
            f"make; load {folder / 'model.safetensors'} into it"
        )
    dims = shape["dims"]
    network = _network(shape, about, weights, folder)
    network.load_state_dict(weights)
    network.to(device).eval()
    data = about["data"]
    _check_described(data, dims)
    scaling = Scaling.from_dict(data["scaling"]).to(device)
    of_target = Scaling.from_dict(data["target_scaling"] or {"divisor": 1.0})
    listed = data.get("preparation")
    preparation = None if listed is None else _preparation(listed, dims, about, folder)
    return Trained(folder, network, config, about, scaling, of_target, preparation)


def _network(shape: dict, about: dict, weights: dict[str, Tensor], folder: Path) -> nn.Module:
    """The network that the weights belong to, with its memory as it comes.

    raises  TrainError or what a damaged description leads to, before that takes memory
    """
    count, dims = shape.get("networks", 1), shape["dims"]
    if count * (len(dims) - 1) > len(weights):
        raise ValueError(f"it has only {len(weights)} tensors")
    with torch.device("meta"):
        network = models.network_of_shape(shape)
        if count > 1:
            others = [models.network_of_shape(shape) for _ in range(count - 1)]
            network = models.Ensemble([network, *others], about["data"]["classes"] is not None)
    check_same_model(network, weights, str(folder))
    return network.to_empty(device="cpu")


def _check_described(data: dict, dims: list[int]) -> None:
    """raises  ValueError where what is said of the data does not belong to the network"""
    classes, shape = data["classes"], data["image_shape"]
    if classes is not None and not (
        isinstance(classes, list) and [type(c) for c in classes] == [str] * dims[-1]
    ):
        raise ValueError(f"classes must be {dims[-1]} names")
    if shape and not (len(shape) == 2 and min(shape) > 0 and shape[0] * shape[1] == dims[0]):
        raise ValueError(f"image_shape must be two sizes of {dims[0]} pixels, got {shape}")
    if not isinstance(data["name"], str):
        raise ValueError(f"name must be a word, got {data['name']!r}")


def _preparation(listed: dict, dims: list[int], about: dict, folder: Path) -> Preparation:
    """raises  TrainError where it does not belong to the network"""
    found = Preparation.from_dict(listed, str(folder))
    classes = about["data"]["classes"]
    outputs = 1 if classes is None else len(classes)
    is_same = list(found.target.levels) == (classes or [])
    if found.width != dims[0] or outputs != dims[-1] or not is_same:
        raise TrainError(
            f"{folder}: the preparation of its table belongs to another network: it makes "
            f"{found.width} inputs for {outputs} outputs, and the network has {dims[0]} and "
            f"{dims[-1]}"
        )
    return found


def _weights(folder: Path) -> tuple[dict[str, Tensor], dict]:
    path = folder / "model.safetensors"
    if not path.is_file():
        content = load_checkpoint(folder)
        best = content.get("best")
        weights = best["weights"] if best and best["epoch"] else content["model"]
        return weights, content["about"]
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise TrainError(
            f"reading {path} needs safetensors: pip install 'fusedmlp[train]'"
        ) from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            check_model_file(path, metadata.get("crc32"))
            about = json.loads(metadata.get("fusedmlp", "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise TrainError(
            f"{path} is truncated, corrupted or no safetensors file ({error})"
        ) from error
    if about is None:
        raise TrainError(f"{path} must be written by fusedmlp, but its metadata do not say so")
    return weights, about


def test_data(trained: Trained, data_dir: Path | None = None) -> Data:
    """The data set that the run was trained on, with the same split and not scaled."""
    config = trained.config
    if config.dataset in ("tensors", FRAME) or trained.about["data"].get("digest") is None:
        raise TrainError(
            f"{trained.folder} was trained on data of its caller's, which only the caller can load"
        )
    config = config.replace(data_dir=data_dir) if data_dir is not None else config
    loaded = datasets.read(config, several=True)
    if loaded.digest() != trained.about["data"]["digest"]:
        raise TrainError(
            f"the data must be those that {trained.folder} was trained on, but {config.dataset} "
            "has other training rows now"
        )
    return loaded


def columns_of(data: Data) -> tuple[Column, ...] | None:
    return None if data.schema is None else data.schema.columns


def evaluate(trained: Trained, data: Data) -> dict:
    """{rows, test_loss, test_accuracy, test_rmse, test_r2, per_class: {name: (right, rows)}} over
    the test rows of data that are not scaled; the loss is in the units of training."""
    loss = "cross_entropy" if data.is_classes else "mse"
    outputs = trained.outputs(data.x_test, columns_of(data))
    y = data.y_test if data.is_classes else trained.target_scaling(data.y_test)
    loss_sum, right, rows = loss_sums(loss, outputs, y).tolist()
    result = {
        "rows": int(rows),
        "test_loss": loss_sum / rows,
        "test_accuracy": None,
        "test_rmse": None,
        "test_r2": None,
        "per_class": {},
    }
    if not data.is_classes:
        result |= models.regression(trained.target_scaling.undo(outputs), data)
    if data.is_classes:
        result["test_accuracy"] = right / rows
        hits = outputs.argmax(1) == data.y_test
        for number, name in enumerate(data.classes):
            of_class = data.y_test == number
            result["per_class"][name] = (int((hits & of_class).sum()), int(of_class.sum()))
    return result


def read_images(
    trained: Trained, files: list[Path], invert: bool = False
) -> tuple[Tensor, list[str]]:
    """((n, K) fp32 rows in the units of the training images, notes): grey, resized to the
    network's input."""
    if trained.image_shape is None:
        raise UsageError(
            f"--images needs a run on images, but {trained.folder} was trained on "
            f"{trained.about['data']['name']}"
        )
    try:
        from PIL import Image
    except ImportError as error:
        raise TrainError(
            "reading images needs Pillow, which matplotlib brings: pip install 'fusedmlp[train]'"
        ) from error
    height, width = trained.image_shape
    top = Scaling.from_dict(trained.about["data"]["scaling"]).divisor
    rows, notes = [], []
    for file in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                opened = Image.open(file, formats=PICTURES)
            with opened as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} are too many pixels")
                grey = _flattened(image).convert("L").resize((width, height), Image.Resampling.BOX)
        except FileNotFoundError as error:
            raise TrainError(f"{file} does not exist") from error
        except Exception as error:  # Pillow's readers of damaged files raise whatever they like
            raise TrainError(
                f"{file} is truncated, corrupted or no image ({first_line(error)})"
            ) from error
        pixels = torch.tensor(list(grey.tobytes()), dtype=torch.float32).view(height, width) / 255
        pixels = 1 - pixels if invert else pixels
        if _border(pixels) > 0.5:
            notes.append(
                f"{file} has a light background, and the training images have a dark one; "
                + ("leave out --invert" if invert else "--invert turns it round")
            )
        rows.append(pixels.flatten() * top)
    return torch.stack(rows), notes


def _flattened(image):
    """The image on black, the training images' background, where it is transparent."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        from PIL import Image

        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image


def _border(pixels: Tensor) -> float:
    edge = torch.cat([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return edge.mean().item()
