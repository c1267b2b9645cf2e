"""The end of a run: model file, summary, and then pictures. Also what the run folder says about
itself at its start."""

import functools
import importlib.util
import json
import platform
from collections.abc import Callable

import torch
from torch import nn

from ..backends import choice
from ..nn import FusedMLP
from ..spec import activations
from . import plots
from .build import dims_of, predict, regression, shape_of
from .config import TrainConfig
from .data.types import Data
from .errors import TrainError
from .run_folder import RunFolder


def need_packages() -> None:
    """Raise at the start of a run, not at its end, when a package is missing that its results
    need."""
    if importlib.util.find_spec("safetensors") is None:
        raise TrainError(
            "a run folder needs safetensors, which is not installed: pip install 'fusedmlp[train]'"
        )


def config_json(config: TrainConfig) -> str:
    return config.replace(resume=None, overwrite=False, debug=False).to_json()


def describe(model: nn.Module, data) -> dict:
    """{"model": ..., "data": ...} in plain values, as checkpoint.pt and model.safetensors hold
    it."""
    about = {"kind": type(model).__name__, "dims": dims_of(model)}
    # Read off the layers, not the config: fit may have been given a network of its own.
    about |= (shape_of(model) if type(model) is FusedMLP else None) or {}
    return {
        "model": about,
        "data": data.describe() if isinstance(data, Data) else {"name": data.name},
    }


def summary(run) -> dict:
    config, history, position = run.config, run.history, run.position
    last = history[-1] if history else {}
    about = run.about["model"]
    content = {
        "dataset": run.data.name,
        "dims": about["dims"],
        "activation": about.get("activation"),
        "dropout": about.get("dropout"),
        "epochs": position.epoch,
        "seed": config.seed,
        "test_accuracy": last.get("test_accuracy"),
        "test_loss": last.get("test_loss"),
        "train_loss": last.get("train_loss"),
        "train_accuracy": last.get("train_accuracy"),
        "val_accuracy": last.get("val_accuracy"),
        "val_loss": last.get("val_loss"),
        "train_seconds": round(position.total_seconds, 4),
        "samples_per_second": round(position.total_rows / position.total_seconds, 1)
        if position.total_seconds
        else None,
        "batch_size": config.batch_size if run.task.x is not None else None,  # a loader decides
        "optimizer": config.optimizer,
        "lr": config.lr,
        "standardize": config.standardize,
        "precision": config.precision,
        "backend": _backend(run),
        "engine": run.engine.name,
        "device": _device_name(run.task.device),
        "threads": torch.get_num_threads(),
        "processes": run.world.size,
        "torch": str(torch.__version__),
    }
    return content | _regression(run)


def _regression(run) -> dict:
    """{"test_rmse", "test_r2"} where there is a target to predict and rows to test it on."""
    if not isinstance(run.data, Data) or run.data.is_classes or run.data.x_test is None:
        return {}
    outputs = predict(run.task.model, run.data.x_test, run.task.scaling, run.task.precision)
    return regression(outputs, run.data)


def _backend(run) -> str:
    """What the first hidden layer runs on; `eager` where PyTorch's own kernels are the fastest
    known."""
    dims = run.about["model"]["dims"]
    name = run.about["model"].get("activation")
    if len(dims) < 2 or name is None:
        return "eager"
    if run.config.backend != "auto":
        return run.config.backend
    if run.engine.name == "graph":
        return run.engine.calls.backend(run.config.batch_size)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
        run.config.precision, run.task.scaling.dtype
    )
    dropout = any(run.about["model"]["dropout"])
    act = activations.IDS[name]
    return choice.select(
        "linear_act",
        run.task.device.type,
        dtype,
        act,
        dropout,
        run.config.batch_size,
        dims[0],
        dims[1],
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"


def write(run, content: dict) -> None:
    """The results, and last of all the summary: a folder that has one is complete."""
    folder = run.folder
    folder.write("config.json", config_json(run.config.replace(out=folder.path)))
    folder.write_metrics(run.history)
    folder.write("model.safetensors", model_bytes(run.task.model, run.about))
    folder.write_json("summary.json", content)


def draw(run) -> None:
    """The pictures of a run whose results are written."""
    task, data = run.task, run.data
    outputs = None
    if isinstance(data, Data) and data.x_test is not None:
        outputs = functools.cache(
            lambda: predict(task.model, data.x_test, task.scaling, task.precision).cpu()
        )
    write_pictures(run.folder, plots.all_of(run.history, data, outputs), run.progress.warn)


def write_pictures(
    folder: RunFolder, pictures: dict[str, Callable[[], bytes]], warn: Callable[[str], None]
) -> None:
    """Those that can be drawn, and a line of warning about those that cannot."""
    failed: dict[str, list[str]] = {}
    for name, picture in pictures.items():
        try:
            folder.write(name, picture())
        except Exception as error:  # whatever it is, it costs a picture and not the run
            lines = str(error).strip().splitlines()
            failed.setdefault(lines[0] if lines else type(error).__name__, []).append(name)
    for reason, names in failed.items():
        warn(f"{folder.path}: no {', '.join(names)}: {reason}")


def model_bytes(model: nn.Module, about: dict) -> bytes:
    """The weights under the plain nn.Sequential's names; what the model and its data are goes
    into the metadata. The same bytes for the same weights."""
    from safetensors.torch import save

    weights, seen = {}, {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            tensor = tensor.clone()  # shared weights: the format wants each name to own its bytes
        seen[tensor.data_ptr()] = name
        weights[name] = tensor.detach().cpu().contiguous()
    return _ordered(save(weights, metadata={"format": "pt", "fusedmlp": json.dumps(about)}))


def _ordered(content: bytes) -> bytes:
    """A safetensors file with its header in one order: the library leaves the order of metadata to
    chance. The header is JSON after its length in 8 bytes, filled up with spaces to a multiple of
    8."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]
