"""Loggers for a run's figures and pictures besides its own files: TensorBoard, Weights & Biases or MLflow."""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.loggers.logger import Logger

from latentgnn.errors import UserError, require
from latentgnn.training.config import TrainingConfig
from latentgnn.training.progress import CsvLog
from latentgnn.training.run_files import Damaged, check_mapping, read_json
from latentgnn.training.runs import RunFolder

# Per validation: a log that grows by megabytes each time would soon be larger than the checkpoints.
_MOST_PICTURES = 4
_WIDEST = 1000

Pictures = Callable[[], Iterable[tuple[Path, bytes]]]


def make_loggers(config: TrainingConfig, run: RunFolder, *, first_step: int) -> list[Logger]:
    """Return the logger of ``metrics.csv``, and the one that ``training.logger`` names.

    Weights & Biases and MLflow take servers and keys from their own environment variables. MLflow writes into
    ``mlflow/`` in the run's folder if ``MLFLOW_TRACKING_URI`` is not set, and Weights & Biases stays on this machine
    with ``WANDB_MODE=offline``.

    Args:
        config: the configuration, which names the logger.
        run: the folder.
        first_step: the step that the run resumes from; later entries are dropped if the logger supports it.

    Raises:
        UserError: if the package is not installed.
    """
    return [CsvLog(run, first_step=first_step), *_named(config.logger, run, first_step)]


def log_pictures(loggers: Sequence[Logger], pictures: Iterable[tuple[Path, bytes]], *, step: int) -> None:
    """Send some pictures, reduced in size, to the loggers that show pictures.

    Args:
        loggers: the run's loggers.
        pictures: names and PNG files; only those that are logged are made.
        step: the step that the pictures belong to.
    """
    shown = [(logger, log) for logger in loggers if (log := _SHOWN.get(type(logger).__name__)) is not None]
    if not shown:
        return
    for name, content in islice(pictures, _MOST_PICTURES):
        array = _pixels(content)
        for logger, log in shown:
            log(logger, f"pictures/{name.with_suffix('').as_posix()}", array, step)


def finish(logger: Logger, *, failed: bool) -> None:
    """Tell a logger that the run has ended, for now or for good."""
    logger.finalize("failed" if failed else "success")
    if type(logger).__name__ == "WandbLogger":
        # Otherwise, the next run in this process, as in a comparison, would be logged under the same run.
        logger.experiment.finish(exit_code=int(failed))  # type: ignore[attr-defined]


def _named(name: str, run: RunFolder, first_step: int) -> list[Logger]:
    if name == "tensorboard":
        require("tensorboard", extra="train")
        from lightning.fabric.loggers.tensorboard import TensorBoardLogger

        # A resumed run repeats the steps after its first one: their old points are dropped.
        purge_step = first_step + 1 if first_step else None
        return [TensorBoardLogger(run.path, name="", version="tensorboard", purge_step=purge_step)]
    title = run.path.resolve().name
    if name == "wandb":
        _needs("wandb", name)
        from lightning.pytorch.loggers import WandbLogger

        # Resumed under the same id; the folder's name alone might be that of another run.
        logger = WandbLogger(
            name=title,
            project=os.environ.get("WANDB_PROJECT", "latentgnn"),
            save_dir=run.path,
            version=_identity(run),
            config=run.config,
        )
        return [logger]
    if name == "mlflow":
        _needs("mlflow", name)
        from lightning.pytorch.loggers import MLFlowLogger

        server, folder = os.environ.get("MLFLOW_TRACKING_URI"), (run.path / "mlflow").resolve()
        if server is None:
            folder.mkdir(exist_ok=True)
        return [
            MLFlowLogger(
                experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", "latentgnn"),
                run_name=title,
                tracking_uri=server or f"sqlite:///{folder / 'mlflow.db'}",
                artifact_location=None if server else (folder / "artifacts").as_uri(),
            )
        ]
    return []


def _identity(run: RunFolder) -> str:
    """An id that is the same for all starts of a run, and different for a new run in the same folder."""
    try:
        record = read_json(run.path / "environment.json", check_mapping)
    except (Damaged, FileNotFoundError):
        record = {}
    first = [*record.get("earlier", []), record][0]
    begun = first.get("date") if isinstance(first, dict) else None
    return hashlib.sha256(f"{run.path.resolve()} {begun}".encode()).hexdigest()[:16]


def _needs(package: str, name: str) -> None:
    try:
        __import__(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise UserError(
            f"training.logger is {name!r}, which needs {package!r}: pip install {package}, or take another logger"
        ) from None


def _pixels(content: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture's RGB values, (height, width, 3)."""
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
        small = picture.convert("RGB")
    small.thumbnail((_WIDEST, _WIDEST))
    return np.asarray(small)


def _to_tensorboard(logger: Any, name: str, pixels: Any, step: int) -> None:
    logger.experiment.add_image(name, pixels, step, dataformats="HWC")


def _to_wandb(logger: Any, name: str, pixels: Any, step: int) -> None:
    logger.log_image(name, [pixels], step=step)


def _to_mlflow(logger: Any, name: str, pixels: Any, step: int) -> None:
    logger.experiment.log_image(logger.run_id, pixels, key=name, step=step)


_SHOWN = {"TensorBoardLogger": _to_tensorboard, "WandbLogger": _to_wandb, "MLFlowLogger": _to_mlflow}
