"""What a config leaves to the data: presets, and the defaults of each kind of data set."""

import math

from ..config import TrainConfig
from ..errors import UsageError
from .types import Data

COURSE_HIDDEN = (256, 256)  # the one network of several hidden layers with the course's weights
SMALL_TABLE = 20_000  # training rows up to which several networks take seconds
HELD_OUT = 0.125  # share of the rows that tell which epoch is the best

# The network and the loop that did best on tables that are in none of the published figures.
_TABLE = {
    "hidden": (256, 256, 256),
    "dropout": (0.1,),
    "optimizer": "adamw",
    "lr": 2e-3,
    "weight_decay": 0.02,
    "lr_schedule": "cosine",
    "clip_norm": 1.0,
    "batch_size": 256,
}
_ENSEMBLE = _TABLE | {"hidden": (128, 128, 128), "lr": 1e-2, "networks": 8}
_EPOCHS, _NUMBER_EPOCHS, _NUMBER_ROWS = 50, 100, 2_000  # numbers of larger tables take longer
_LEAST_STEPS = 200  # of a run: small tables take more epochs
_SMOOTHING = 0.1
_WARMUP_EPOCHS = 2.0


def resolved(config: TrainConfig, data, several: bool = False) -> TrainConfig:
    """The config with every setting filled in that it left to the data.

    data     a Data, or Loaders, which are taken as images are
    several  whether several networks may be trained, as `run` does
    """
    if config.time_limit is not None:
        _check_one_network(config)
        several = False
    preset = config.preset or _preset(data, several)
    networks = config.networks or (_ENSEMBLE["networks"] if preset == "ensemble" else 1)
    if networks > 1 and not several:
        flag = "--preset ensemble" if preset == "ensemble" else "--networks"
        raise UsageError(
            f"{flag} belongs to a new run of fusedmlp train in one process; here one network is "
            "trained"
        )
    is_table = isinstance(data, Data) and data.is_table
    found = _plain(config, data)
    if preset != "plain":
        found |= _of_preset(preset, config, data)
    if is_table and config.momentum and (config.optimizer or found["optimizer"]) != "sgd":
        raise UsageError(
            f"--momentum belongs to --optimizer sgd, and for a table as {data.name} the default is "
            f"{found['optimizer']}; give --optimizer sgd too"
        )
    filled = config.replace(preset=preset).filled(found)
    if filled.keep is None:
        # Rows that are still raw are split after this.
        is_split = isinstance(data, Data) and (data.x_val is not None or data.schema is not None)
        is_best = preset != "plain" and is_split and _rows(data) * HELD_OUT >= 1
        is_best = is_best or config.patience is not None
        filled = filled.replace(keep="best" if is_best else "last")
    filled = filled.replace(val_split=filled.validation_share())
    if filled.lr is None and isinstance(data, Data):
        filled = filled.replace(
            lr=filled.learning_rate("cross_entropy" if data.is_classes else "mse")
        )
    return filled.check()


def _check_one_network(config: TrainConfig) -> None:
    flag = f"--networks {config.networks}" if (config.networks or 1) > 1 else None
    flag = "--preset ensemble" if flag is None and config.preset == "ensemble" else flag
    if flag is not None and config.networks != 1:
        raise UsageError(f"--time-limit belongs to one network; {flag} trains several")


def preset_notes(config: TrainConfig, given: TrainConfig, data: Data) -> list[str]:
    """Which preset a resolved config has, and why; empty where it follows from no data."""
    if given.preset is not None or config.preset == "plain":
        return []
    networks = f"{config.networks} networks" if config.networks > 1 else "one network"
    why = f"a table of {_rows(data):,} training rows"
    if config.time_limit is not None:
        why += ", and --time-limit trains one network"
    elif config.preset == "ensemble" or _rows(data) > SMALL_TABLE:
        why += f", {'at most' if config.preset == 'ensemble' else 'more than'} {SMALL_TABLE:,}"
    return [f"preset {config.preset} ({networks}): {data.name} is {why}; --preset decides over it"]


def _preset(data, several: bool) -> str:
    if not isinstance(data, Data) or (data.schema or data.preparation) is None:
        return "plain"
    return "ensemble" if several and _rows(data) <= SMALL_TABLE else "table"


def _rows(data: Data) -> int:
    """Training rows, before some were held out for validation."""
    return len(data.x_train) + (0 if data.x_val is None else len(data.x_val))


def _plain(config: TrainConfig, data) -> dict:
    is_table = isinstance(data, Data) and data.is_table
    batch, epochs = 256, 10
    if is_table:
        # Small tables take small steps: about 60 an epoch.
        rows = _rows(data)
        batch = min(256, max(16, 1 << (rows // 64).bit_length()))
        epochs = 50 if rows < 10_000 else 30
    elif isinstance(data, Data) and data.name == "digits":
        batch, epochs = 32, 30
    hidden, init = config.hidden if config.hidden is not None else (256,), config.init
    if init is None:
        is_normal = not is_table and (len(hidden) < 2 or hidden == COURSE_HIDDEN)
        init = "normal" if is_normal or config.init_std is not None else "default"
    return {
        "networks": 1,
        "hidden": (256,),
        "dropout": (0.0,),
        "init": init,
        "init_std": 0.01 if init == "normal" else None,
        "optimizer": "adam" if is_table else "sgd",
        "lr_schedule": "constant",
        "warmup_epochs": 0.0,
        "weight_decay": 0.0,
        "label_smoothing": 0.0,
        "clip_norm": 0.0,
        "standardize": is_table,
        "epochs": epochs,
        "batch_size": batch,
    }


def _of_preset(preset: str, config: TrainConfig, data) -> dict:
    is_classes = not isinstance(data, Data) or data.is_classes
    found = dict(_ENSEMBLE if preset == "ensemble" else _TABLE)
    if config.init is None and config.init_std is None:
        found |= {"init": "default", "init_std": None}
    found["epochs"] = _EPOCHS
    if isinstance(data, Data):
        if not is_classes and _rows(data) >= _NUMBER_ROWS:
            found["epochs"] = _NUMBER_EPOCHS
        steps = math.ceil(_rows(data) * (1 - HELD_OUT) / (config.batch_size or found["batch_size"]))
        found["epochs"] = max(found["epochs"], math.ceil(_LEAST_STEPS / steps))
    found["label_smoothing"] = _SMOOTHING if is_classes else 0.0
    found["warmup_epochs"] = min(_WARMUP_EPOCHS, (config.epochs or found["epochs"]) / 4)
    if config.optimizer not in (None, "adamw"):
        # Rates and decay of another rule are other numbers.
        found = {k: v for k, v in found.items() if k not in ("lr", "weight_decay")}
    if (config.networks or found.get("networks", 1)) == 1:
        found["val_split"] = HELD_OUT
    return found
