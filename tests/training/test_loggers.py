"""Figures and pictures in TensorBoard, MLflow and Weights & Biases, each read back with its own reader."""

import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentgnn.errors import UserError
from latentgnn.training.loop import fit
from tests.training.training_toy import ToyTask, config, new_run

COLOUR = (10, 200, 30)


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, COLOUR).save(buffer, "png")
    return buffer.getvalue()


class Pictures:
    """Six pictures, and how many of them were made."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> Iterator[tuple[Path, bytes]]:
        for number in range(6):
            self.made += 1
            yield Path("a") / f"{number}.png", png((2000, 500) if number == 0 else (20, 10))


def test_tensorboard_shows_some_pictures_of_each_validation(tmp_path: Path) -> None:
    run, pictures = new_run(tmp_path), Pictures()
    fit(ToyTask(), config(), run, pictures=pictures)
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert sorted(events.Tags()["images"]) == [f"pictures/a/{number}" for number in range(4)]
    # Validations after steps 4, 8 and 9; no more pictures are made than are shown.
    assert [event.step for event in events.Images("pictures/a/3")] == [4, 8, 9]
    assert pictures.made == 3 * 4
    shown = {event.tag if hasattr(event, "tag") else "": event for event in events.Images("pictures/a/0")}
    for event in shown.values():
        with Image.open(io.BytesIO(event.encoded_image_string)) as picture:
            assert picture.size == (1000, 250)
            assert picture.convert("RGB").getpixel((3, 3)) == COLOUR


def test_csv_alone_makes_no_pictures_and_no_other_log(tmp_path: Path) -> None:
    run, pictures = new_run(tmp_path), Pictures()
    fit(ToyTask(), config(logger="csv"), run, pictures=pictures)
    assert pictures.made == 0
    assert (run.path / "metrics.csv").is_file()
    assert not (run.path / "tensorboard").exists()


def test_a_resumed_run_may_log_elsewhere(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with pytest.raises(UserError, match="not finite"):
        fit(ToyTask(on_losses=lambda call: float("nan") if call == 15 else None), config(logger="csv"), run)
    fit(ToyTask(), config(), run, resume=True)
    assert (run.path / "tensorboard").is_dir()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line_before_the_first_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    task = ToyTask()
    with pytest.raises(
        UserError, match=f"training.logger is '{name}', which needs '{name}': pip install {name}"
    ) as told:
        fit(task, config(logger=name), new_run(tmp_path))
    assert "\n" not in str(told.value)
    assert task.calls == 0


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs the package 'mlflow'")
def test_mlflow_keeps_figures_and_pictures_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow.tracking import MlflowClient

    run = new_run(tmp_path / "run")
    fit(ToyTask(), config(logger="mlflow"), run, pictures=Pictures())
    client = MlflowClient(f"sqlite:///{run.path / 'mlflow' / 'mlflow.db'}")
    [experiment] = [found for found in client.search_experiments() if found.name == "latentgnn"]
    [kept] = client.search_runs([experiment.experiment_id])
    assert kept.info.status == "FINISHED"
    assert kept.info.run_name == "run"
    assert [point.step for point in client.get_metric_history(kept.info.run_id, "score")] == [4, 8, 9]
    images = {file.path for file in client.list_artifacts(kept.info.run_id, "images")}
    assert any("pictures" in name and name.endswith(".png") for name in images)


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the package 'wandb'")
def test_weights_and_biases_keeps_two_runs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    identities = set()
    for name in ("one", "two"):
        run = new_run(tmp_path / name)
        fit(ToyTask(), config(logger="wandb"), run, pictures=Pictures())
        [folder] = (run.path / "wandb").glob("offline-run-*")
        identities.add(folder.name.rpartition("-")[2])
        images = list(folder.rglob("pictures/a/*.png"))
        assert len(images) == 12
    assert len(identities) == 2
