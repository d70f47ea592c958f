"""A point network starts from another run: classes, features and blocks that are the same are taken over and told."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentgnn.cli import main
from latentgnn.configuration.settings import plain_data
from latentgnn.errors import UserError
from latentgnn.tasks.blocks import BlockConfig
from latentgnn.tasks.classes import class_names
from latentgnn.tasks.pointcloud.config import DataConfig, ModelConfig, PointCloudConfig
from latentgnn.tasks.pointcloud.features import feature_columns
from latentgnn.tasks.pointcloud.model import PointNetwork, build_point_network
from latentgnn.tasks.pointcloud.scans import RawScan, write_scan
from latentgnn.tasks.pointcloud.start import start_from
from latentgnn.tasks.starting import Start
from latentgnn.training.checkpoints import write_checkpoint
from latentgnn.training.config import TrainingConfig

SMALL = ModelConfig(widths=(8, 12), depths=(1, 1), grids=(0.5,), neighbors=6)
BLOCK = BlockConfig(norm="batch_norm", reduction=4)
CLASSES = {1: "ground", 2: "tree", 5: "roof"}


def configuration(*, classes: dict[int, str] = CLASSES, features: Any = ("intensity",), **model: Any) -> Any:
    return PointCloudConfig(
        model=replace(SMALL, block=BLOCK, **model),
        data=DataConfig(classes=classes, features=features, voxel=0.1),
        training=TrainingConfig(steps=5),
    )


def network(config: PointCloudConfig, *, seed: int) -> PointNetwork:
    """With statistics of norms that are not those of the beginning."""
    torch.manual_seed(seed)
    columns, names = feature_columns(config.data.features), class_names(config.data.classes)
    model = build_point_network(config.model, num_features=len(columns), num_classes=len(names))
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def kept(path: Path, config: PointCloudConfig, model: PointNetwork, **record: Any) -> str:
    """A checkpoint of a network that was not trained."""
    course = {"training.steps": 5}
    whole = {"step": 3, "config": {**plain_data(config), **record}, "course": course, "data": {}}
    write_checkpoint(path, {"latentgnn": whole, "state_dict": model.state_dict(), "optimizer": {}})
    return str(path)


def started(config: PointCloudConfig, weights: str, *, seed: int = 7) -> tuple[PointNetwork, Start]:
    model = network(config, seed=seed)
    start = start_from(model, replace(config, model=replace(config.model, weights=weights)))
    return model, start


def logits(model: PointNetwork, features: torch.Tensor) -> torch.Tensor:
    points = torch.rand(200, 3, generator=torch.Generator().manual_seed(3)) * 3
    with torch.no_grad():
        return model(features, model.hierarchy(points))


def rows(number: int = 1) -> torch.Tensor:
    return torch.rand(200, number, generator=torch.Generator().manual_seed(4))


def test_the_same_network_computes_the_same(tmp_path: Path) -> None:
    config = configuration(blocks={"L1": 4})
    there = network(config, seed=1)
    model, start = started(config, kept(tmp_path / "a.ckpt", config, there))
    assert torch.equal(logits(model, rows()), logits(there, rows()))
    number = len(model.state_dict())
    assert start.lines == (f"weights: {number} of the model's {number} tensors from {tmp_path / 'a.ckpt'}",)
    learning = {name for name, _ in model.named_parameters()}
    assert start.trained == {name for name in learning if ".latentgnn." not in name}


def test_classes_of_the_same_name_are_taken_over(tmp_path: Path) -> None:
    config = configuration()
    there = network(config, seed=1)
    weights = kept(tmp_path / "a.ckpt", config, there)
    other = configuration(classes={6: "roof", 2: "ground", 9: "water", 3: "shrub", 4: "shrub"})
    model, start = started(other, weights)
    old, new = logits(there, rows()), logits(model, rows())
    assert torch.equal(new[:, 0], old[:, 2])
    assert torch.equal(new[:, 1], old[:, 0])
    fresh = network(other, seed=7).head[-1].weight
    assert torch.equal(model.head[-1].weight[2:], fresh[2:])
    assert "  classes: taken over: roof, ground; new: water, shrub; left out: tree" in start.lines
    assert "  in part: head.4.weight (2 of 4 rows), head.4.bias (2 of 4 rows)" in start.lines
    assert "head.0.weight" in start.trained
    assert not {"head.4.weight", "head.4.bias"} & start.trained
    # As many classes, and none of them the same: nothing of the classifier means anything here.
    strange = configuration(classes={1: "a", 2: "b", 3: "c"})
    model, start = started(strange, weights)
    assert torch.equal(model.head[-1].weight, network(strange, seed=7).head[-1].weight)
    assert any("started anew: head.4 (2 tensors)" in line for line in start.lines)


def test_features_of_the_same_name_are_taken_over(tmp_path: Path) -> None:
    config = configuration(features=("intensity", "height"))
    there = network(config, seed=1)
    other = configuration(features=("color", "height", "intensity"))
    model, start = started(other, kept(tmp_path / "a.ckpt", config, there))
    assert "  features: taken over: height, intensity; new: red, green, blue" in start.lines
    # Where the colours have no weight, the networks compute the same.
    with torch.no_grad():
        model.encoder[0].abstraction.features.weight[:, :3] = 0
    known = rows(2)
    mixed = torch.cat([torch.rand(200, 3), known[:, 1:], known[:, :1]], dim=1)
    torch.testing.assert_close(logits(model, mixed), logits(there, known))


def test_blocks_are_added_as_identities_replaced_and_left_out(tmp_path: Path) -> None:
    bare, with_block = configuration(), configuration(blocks={"L1": 4})
    there = network(bare, seed=1)
    model, start = started(with_block, kept(tmp_path / "bare.ckpt", bare, there))
    torch.testing.assert_close(logits(model, rows()), logits(there, rows()))
    assert any("started anew: encoder.1.latentgnn" in line for line in start.lines)

    trained = network(with_block, seed=2)
    with torch.no_grad():
        trained.encoder[1].latentgnn.gamma.fill_(0.5)
    weights = kept(tmp_path / "blocks.ckpt", with_block, trained)
    wider, start = started(configuration(blocks={"L1": 6}), weights)
    assert wider.encoder[1].latentgnn.gamma.item() == 0
    assert any("only a part of encoder.1.latentgnn fits" in line for line in start.lines)
    without, start = started(bare, weights)
    assert any("left out: encoder.1.latentgnn" in line for line in start.lines)
    torch.testing.assert_close(logits(without, rows()), logits(wider, rows()))


def test_what_changes_what_the_weights_see_is_told(tmp_path: Path) -> None:
    config = configuration()
    weights = kept(tmp_path / "a.ckpt", config, network(config, seed=1))
    other = replace(configuration(grids=(0.8,)), data=replace(config.data, voxel=0.2, height_radius=3.0))
    _, start = started(other, weights)
    assert start.lines[-1] == "  note: trained with model.grids [0.5] (here [0.8]), data.voxel 0.1 (here 0.2)"


def test_what_cannot_be_started_from(tmp_path: Path) -> None:
    config = configuration()
    model = network(config, seed=1)
    weights = kept(tmp_path / "a.ckpt", config, model)
    with pytest.raises(UserError, match=r"the widths \[8, 12\], this one \[8, 16\]; take --model.widths '\[8, 12\]'"):
        started(configuration(widths=(8, 16)), weights)
    with pytest.raises(UserError, match=r"model.weights: there is no run folder or checkpoint .*nowhere"):
        started(config, str(tmp_path / "nowhere"))
    detector = kept(tmp_path / "b.ckpt", config, model, task="detection")
    with pytest.raises(UserError, match=r"b.ckpt is of task 'detection', but this run is of task 'pointcloud'"):
        started(config, detector)
    torch.save(model.state_dict(), tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"model.weights: .*c.pt is not an intact checkpoint"):
        started(config, str(tmp_path / "c.pt"))
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"model.weights: .*run is not a run's folder"):
        started(config, str(tmp_path / "run"))


RECIPE = """
task: pointcloud
model: {widths: [8, 12], depths: [1, 1], grids: [0.5], neighbors: 6, block: {norm: batch_norm, reduction: 4}}
data:
  classes: {1: ground, 5: roof}
  features: [intensity]
  voxel: 0.1
  crop: scan
training:
  steps: 2
  batch_size: 2
  workers: 0
  accelerator: cpu
  optimizer: {name: adamw, learning_rate: 0.1, trained_factor: 0.0}
  schedule: {name: constant, warmup_steps: 0}
evaluation: {sample_pictures: 0}
"""


def test_a_run_starts_from_another_and_goes_on_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        points, roof = rng.random((300, 3)) * 4, rng.random(300) < 0.5
        points[roof, 2] += 3
        scan = RawScan(points=points, columns={"intensity": rng.random(300)}, classes=np.where(roof, 5, 1))
        write_scan(tmp_path / "data" / split / f"{split}.npz", scan)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    config = configuration()
    there = network(config, seed=1)
    (tmp_path / "source").mkdir()
    weights = kept(tmp_path / "source" / "a.ckpt", config, there)
    run = tmp_path / "run"
    argv = ["train", "--config", str(tmp_path / "recipe.yaml"), "--data.root", str(tmp_path / "data")]
    argv += ["--model.weights", weights, "--model.blocks", "{L1: 4}", "--training.checkpoint_every", "1"]
    assert main([*argv, "--out", str(run)]) == 0
    told = "  classes: taken over: ground, roof; left out: tree"
    assert told in capsys.readouterr().out
    start = json.loads((run / "start.json").read_text())
    assert told in start["told"]
    # A factor of 0 keeps what was taken over; the rows of the classifier and the block learn.
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    before = there.state_dict()
    assert len(start["trained"]) > 20
    assert all(torch.equal(state[name], before[name]) for name in start["trained"])
    assert not torch.equal(state["head.4.weight"], before["head.4.weight"][[0, 2]])
    assert state["encoder.1.latentgnn.gamma"].item() != 0

    Path(weights).unlink()
    (run / "metrics.json").unlink()
    (run / "checkpoints/best.ckpt").unlink()
    (run / "checkpoints/previous.ckpt").replace(run / "checkpoints/last.ckpt")
    (run / "validations.json").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    resumed = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in resumed.items())
    assert main(["evaluate", str(run), "--out", str(tmp_path / "scores")]) == 0
