import json
import shlex
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
import yaml

from latentgnn.cli import main
from latentgnn.configuration.recipes import list_recipes, load_recipe, to_yaml
from latentgnn.configuration.settings import parse_config, plain_data
from latentgnn.errors import UserError
from latentgnn.files.outputs import LIST
from latentgnn.tasks.pointcloud.commands import COMMANDS
from latentgnn.tasks.pointcloud.config import PointCloudConfig
from latentgnn.tasks.pointcloud.layouts import Source
from latentgnn.tasks.pointcloud.loading import load_segmenter
from latentgnn.tasks.pointcloud.model import build_point_network
from latentgnn.tasks.pointcloud.scans import RawScan, read_scan, write_scan
from latentgnn.tasks.pointcloud.task import PointCloudTask
from latentgnn.training.checkpoints import write_checkpoint
from latentgnn.training.commands import trained_weights
from latentgnn.training.fingerprint import changes
from latentgnn.training.runs import RunFolder
from tests.tasks.tiny_runs import POINTCLOUD, TOWN, check_resumed, stop, train, weights_of, write_recipe, write_town


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("town")
    for split, names in (("train", "abc"), ("val", "xy")):
        (root / split).mkdir()
        for name in names:
            write_town(root / split / f"{name}.laz", ord(name))
    (root / "dataset.yaml").write_text(TOWN)
    return root


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"), POINTCLOUD)


@pytest.fixture(scope="module")
def run(data, recipe, tmp_path_factory):
    return train(recipe, data, tmp_path_factory.mktemp("runs") / "run")


def test_a_run_folder_holds_everything(run):
    for name in ("config.yaml", "environment.json", "metrics.json", "scores.json", "metrics.csv", "log.txt"):
        assert (run / name).is_file()
    assert [path.name for path in (run / "pictures").iterdir()] == ["x.png"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["classes"] == {2: "ground", 6: "building"}
    assert config["data"]["features"] == ["log_intensity", "height"]
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    assert set(metrics) == {"mIoU", "OA", "mAcc", "IoU/ground", "IoU/building"}
    confusion = np.array(json.loads((run / "scores.json").read_text())["confusion"])
    # Every labelled original point of both scans is scored.
    assert confusion.sum() == 2 * 1500 - 2 * 30
    assert "gamma/encoder.1.latentgnn" in (run / "metrics.csv").read_text()


def test_evaluating_the_run_gives_the_figures_of_its_end(run, tmp_path, capsys):
    assert main(["evaluate", str(run), "--out", str(tmp_path)]) == 0
    assert "building" in capsys.readouterr().out
    end = json.loads((run / "metrics.json").read_text())["metrics"]
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"] == pytest.approx(end, abs=1e-6)
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["x.png"]


def test_a_loaded_run_computes_what_the_commands_do(run, data, tmp_path):
    config = parse_config(PointCloudConfig, load_recipe(run / "config.yaml"))
    loaded = load_segmenter(config, trained_weights(run))
    assert not loaded.model.training
    assert (loaded.class_names, loaded.class_ids) == (("ground", "building"), (2, 6))
    scan = read_scan(data / "val" / "x.laz")
    assert (
        main(["predict", str(run), str(data / "val" / "x.laz"), "--out", str(tmp_path / "out"), "--no-pictures"]) == 0
    )
    ids = np.array(loaded.class_ids)
    for source in (scan, data / "val" / "x.laz"):
        probabilities = loaded.predict(source)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_array_equal(ids[probabilities.argmax(axis=1)], read_scan(tmp_path / "out" / "x.laz").classes)
    # All at once, it is what is predicted of one crop.
    inputs = loaded.transform(scan)
    with torch.no_grad():
        scores = loaded.model(inputs.features, inputs.hierarchy)[inputs.voxel_of_point]
    whole = loaded._replace(config=replace(config, data=replace(config.data, crop="scan")))
    np.testing.assert_allclose(scores.softmax(dim=1).numpy(), whole.predict(scan), atol=1e-6)
    with pytest.raises(UserError, match="the scan: it has no intensity"):
        loaded.transform(RawScan(points=scan.points))


def test_predictions_are_scans_with_classes(run, data, tmp_path, capsys):
    assert main(["predict", str(run), str(data / "val"), "--out", str(tmp_path / "out"), "--no-pictures"]) == 0
    assert "1,500 points" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [LIST, "x.laz", "y.laz"]
    written, source = read_scan(tmp_path / "out" / "x.laz"), read_scan(data / "val" / "x.laz")
    np.testing.assert_array_equal(written.points, source.points)
    assert set(np.unique(written.classes)) <= {2, 6}
    # The figures of the run are those of these files.
    right = sum(
        (read_scan(tmp_path / "out" / name).classes == (truth := read_scan(data / "val" / name).classes))[
            truth != 0
        ].sum()
        for name in ("x.laz", "y.laz")
    )
    overall = json.loads((run / "metrics.json").read_text())["metrics"]["OA"]
    assert right / (2 * 1470) == pytest.approx(overall, abs=2e-3)


def test_a_stopped_run_resumes_to_the_same_weights(run, data, recipe, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "stopped"
    stop(PointCloudTask, ["train", "--config", str(recipe), "--data.root", str(data)], folder, monkeypatch)
    assert f"continue with: latentgnn train --resume {folder}" in capsys.readouterr().err
    check_resumed(folder, run)


def as_recorded_before(settings):
    """The configuration of a run as the first versions wrote it."""
    data = settings["data"]
    data["classes"] = [list(pair) for pair in data["classes"].items()]
    for old, new in (("block", "crop"), ("block_size", "crop_size"), ("blocks_per_scan", "crops_per_scan")):
        data[old] = data.pop(new)
    del data["dataset_yaml"]
    return settings


def test_a_run_of_an_earlier_version_is_used_and_resumed(run, data, recipe, tmp_path, capsys):
    folder = tmp_path / "old"
    argv = ["train", "--config", str(recipe), "--data.root", str(data), "--out", str(folder)]
    assert main([*argv, "--training.checkpoint_every", "1"]) == 0
    # Stopped after its second step, under the names of that time.
    for name in ("metrics.json", "validations.json", "checkpoints/best.ckpt"):
        (folder / name).unlink()
    (folder / "checkpoints/previous.ckpt").rename(folder / "checkpoints/last.ckpt")
    content = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    record = content["latentgnn"]
    assert record["step"] == 2
    settings = as_recorded_before(record["config"])
    record["course"] = {"processes": 1, "training.steps": 3, "data.block": "column"}
    (folder / "config.yaml").write_text(to_yaml(settings))
    write_checkpoint(folder / "checkpoints/last.ckpt", content)
    assert main(["train", "--resume", str(folder), "--data.crop_size", "6"]) == 1
    assert "other settings: data.crop_size was 5.0, is 6.0. " in capsys.readouterr().err
    assert main(["evaluate", str(folder), "--out", str(tmp_path / "scores")]) == 0
    assert main(["evaluate", str(folder / "checkpoints/last.ckpt"), "--out", str(tmp_path / "alone")]) == 0
    assert main(["train", "--resume", str(folder)]) == 0
    whole, resumed = weights_of(run), weights_of(folder)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["crop_size"] == 5.0


def test_scans_that_changed_are_told(data, recipe, tmp_path):
    root = shutil.copytree(data, tmp_path / "town")
    config = parse_config(PointCloudConfig, load_recipe(recipe))
    config = replace(config, data=replace(config.data, root=str(root)))

    def fingerprints():
        loaded = COMMANDS.load(config, tmp_path, resume=False)
        here = replace(config, data=loaded[0].config)
        return COMMANDS.task(here, RunFolder(tmp_path), *loaded, goes_on=False).fingerprints()

    before = fingerprints()
    assert all(changes(kept, now) == [] for kept, now in zip(before.values(), fingerprints().values(), strict=True))
    scan = read_scan(root / "train" / "b.laz")
    number = int((scan.classes == 6).sum())
    write_scan(root / "train" / "b.laz", replace(scan, classes=np.where(scan.classes == 6, 2, scan.classes)))
    write_town(root / "train" / "d.laz", 3)
    (root / "val" / "y.laz").unlink()
    now = fingerprints()
    told = changes(before["training set"], now["training set"])
    assert told[0] == "1 added (train/d.laz)"
    assert told[1] in (
        "1 with files of another size (train/b.laz)",
        "1 with files that were written since (train/b.laz)",
    )
    kept, there = (sets["training set"].totals for sets in (before, now))
    added = (read_scan(root / "train" / "d.laz").classes == 6).sum()
    assert there["points of building"] == kept["points of building"] - number + added
    assert told[2:] == [f"{name}: was {kept[name]}, is {there[name]}" for name in kept]
    assert changes(before["validation set"], now["validation set"])[0] == "1 removed (val/y.laz)"


def test_the_files_of_a_scan_are_all_that_is_read(tmp_path):
    for name in ("scene_vh_clean_2.ply", "scene_vh_clean_2.labels.ply", "alone.ply"):
        (tmp_path / name).touch()
    room = tmp_path / "office_1" / "Annotations"
    room.mkdir(parents=True)
    for name in ("chair_1.txt", "wall_1.txt", "notes.md"):
        (room / name).touch()

    def files_of(name):
        path = tmp_path / name
        return [file.name for file in Source(name=name, path=path, read=lambda: None).files]

    assert files_of("scene_vh_clean_2.ply") == ["scene_vh_clean_2.ply", "scene_vh_clean_2.labels.ply"]
    assert files_of("alone.ply") == ["alone.ply"]
    assert files_of("office_1") == ["chair_1.txt", "wall_1.txt"]


def test_a_comparison_trains_with_and_without_blocks(data, recipe, tmp_path, capsys):
    argv = ["train", "--compare", "--config", str(recipe), "--data.root", str(data), "--training.steps", "1"]
    assert main([*argv, "--out", str(tmp_path / "both")]) == 0
    shown = capsys.readouterr().out
    assert "without blocks" in shown
    comparison = json.loads((tmp_path / "both" / "comparison.json").read_text())
    assert set(comparison) == {"with_blocks", "without_blocks", "difference"}
    names = weights_of(tmp_path / "both" / "with_blocks").keys() - weights_of(tmp_path / "both" / "without_blocks")
    assert names
    assert all(".latentgnn." in name for name in names)
    # What works on one run says which two there are.
    both = tmp_path / "both"
    for argv in (["evaluate", str(both)], ["predict", str(both), str(data / "val")]):
        assert main([*argv, "--out", str(tmp_path / "out")]) == 1
        shown = capsys.readouterr().err
        assert f"holds a comparison of two runs; name one of them: {both}/with_blocks or {both}/without" in shown


def test_both_sides_of_a_comparison_start_from_the_same_weights(run, data, recipe, tmp_path):
    argv = ["train", "--compare", "--config", str(recipe), "--data.root", str(data), "--training.steps", "1"]
    # Nothing moves, so that the last weights are the first.
    argv += ["--model.weights", str(run), "--training.optimizer.learning_rate", "0", "--model.blocks", "{L0: 4}"]
    assert main([*argv, "--out", str(tmp_path / "both")]) == 0
    source = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    sides = [tmp_path / "both" / side for side in ("with_blocks", "without_blocks")]
    for side in sides:
        start, weights = json.loads((side / "start.json").read_text()), weights_of(side)
        assert "head.4.weight" in start["trained"]
        assert all(torch.equal(weights[name], source[name]) for name in start["trained"])
    told = [json.loads((side / "start.json").read_text())["told"] for side in sides]
    assert "started anew: encoder.0.latentgnn" in told[0][1]
    assert not any("started anew" in line for line in told[1])
    assert all("left out: encoder.1.latentgnn" in lines[-1] for lines in told)


def test_training_learns_what_height_and_intensity_tell(data, recipe, tmp_path):
    argv = ["train", "--config", str(recipe), "--data.root", str(data), "--out", str(tmp_path / "run")]
    assert main([*argv, "--training.steps", "40"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]
    assert metrics["mIoU"] > 0.9


def test_settings_that_the_folder_replaces_are_told(data, recipe, tmp_path, capsys):
    argv = ["train", "--config", str(recipe), "--data.root", str(data), "--training.steps", "1"]
    own = ["--data.classes", "{2: flat, 6: high}", "--data.features", "[height]"]
    assert main([*argv, *own, "--out", str(tmp_path / "a")]) == 0
    told = f"data.classes, data.features: as {data}/dataset.yaml says; to have your own settings win"
    assert told in capsys.readouterr().out
    assert main([*argv, *own, "--data.dataset_yaml", "fills", "--out", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "dataset.yaml says" not in shown
    assert "flat" in shown
    settings = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())["data"]
    assert (settings["classes"], settings["features"], settings["ignored"]) == ({2: "flat", 6: "high"}, ["height"], [0])


def test_bad_data_is_told_before_training(recipe, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        write_town(tmp_path / split / f"{split}.laz", 1)
    argv = ["--config", str(recipe), "--data.root", str(tmp_path)]
    settings = ["--data.classes", "{2: ground}", "--data.features", "[intensity]"]
    assert main(["check-data", *argv, *settings]) == 1
    shown = capsys.readouterr().out
    assert "unknown class ids: 0 (30 points), 6" in shown
    assert main(["train", *argv, *settings, "--out", str(tmp_path / "run")]) == 1
    assert "unknown class ids" in capsys.readouterr().err
    settings = ["--data.classes", "{2: ground, 6: building}", "--data.ignored", "[0]"]
    assert main(["check-data", *argv, *settings]) == 0
    given = shlex.join([*argv, *settings])
    assert capsys.readouterr().out.splitlines()[-1] == f"next: latentgnn train {given}"


def test_checks_of_scans_speak_to_programs(data, recipe, capsys):
    argv = ["check-data", "--config", str(recipe), "--data.root", str(data)]
    assert main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["faultless"]
    assert {split: part["counts"]["scans"] for split, part in told["splits"].items()} == {"train": 3, "val": 2}
    assert all(part["faults"] == [] for part in told["splits"].values())
    assert main([*argv, "--out", str(data / "pictures")]) == 1
    assert "leave out --out" in capsys.readouterr().err


def test_options_of_detections_are_refused(run, data, tmp_path, capsys):
    assert main(["predict", str(run), str(data / "val"), "--score-threshold", "0.4"]) == 1
    assert "every point of a scan gets a class" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--results", str(tmp_path / "r.json")]) == 1
    assert "scores detections" in capsys.readouterr().err
    assert main(["train", "--config", "lidar_small", "--model.fpn_channels", "4"]) == 2
    assert "model.fpn_channels" in capsys.readouterr().err


@pytest.mark.parametrize(("was", "is_now"), [("ground", "floor"), ("log_intensity", "intensity")])
def test_a_model_is_not_scored_on_other_classes_or_features(run, tmp_path, capsys, was, is_now):
    other = tmp_path / "other"
    (other / "val").mkdir(parents=True)
    write_town(other / "val" / "val.laz", 3)
    (other / "dataset.yaml").write_text(TOWN.replace(was, is_now))
    assert main(["evaluate", str(run), "--data.root", str(other), "--out", str(tmp_path / "out")]) == 1
    assert "was trained for the" in capsys.readouterr().err
    # Validation scans alone are enough, of the model's own kind.
    (other / "dataset.yaml").write_text(TOWN)
    assert main(["evaluate", str(run), "--data.root", str(other), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("setting", "value"),
    [("evaluation.votes", "0"), ("loss.label_smoothing", "1.5"), ("loss.lovasz", "-1"), ("data.overlap", "1")],
)
def test_settings_out_of_range_are_refused(run, data, recipe, tmp_path, capsys, setting, value):
    for number, argv in enumerate(
        (
            ["train", "--config", str(recipe), "--data.root", str(data)],
            ["evaluate", str(run)],
            ["predict", str(run), str(data / "val")],
        )
    ):
        assert main([*argv, "--out", str(tmp_path / str(number)), f"--{setting}", value]) == 2
        assert f"{setting}: expected" in capsys.readouterr().err


def test_a_single_block_of_one_coarse_point_is_learnt_from(data, recipe, tmp_path):
    argv = ["train", "--config", str(recipe), "--data.root", str(data), "--out", str(tmp_path / "run")]
    assert (
        main(
            [
                *argv,
                "--training.batch_size",
                "1",
                "--data.crop_size",
                "0.4",
                "--data.overlap",
                "0",
                "--training.steps",
                "2",
            ]
        )
        == 0
    )


@pytest.mark.parametrize("name", ["lidar_small", "scannet"])
def test_the_recipes_build_their_networks(name):
    assert name in list_recipes()
    config = parse_config(PointCloudConfig, load_recipe(name))
    assert parse_config(PointCloudConfig, plain_data(config)) == config
    classes = len(config.data.classes or range(20))
    model = build_point_network(config.model, num_features=6, num_classes=classes)
    blocks = [module for name, module in model.named_modules() if name.endswith(".latentgnn")]
    assert len(blocks) == len(config.model.blocks) > 0
    bare = build_point_network(replace(config.model, blocks={}), num_features=6, num_classes=classes)
    assert len(bare.state_dict()) < len(model.state_dict())


def test_the_scannet_recipe_runs_on_files_in_scannets_layout(tmp_path, capsys):
    root = tmp_path / "scannet"
    for number, scene in enumerate(("scene0000_00", "scene0001_00", "scene0002_00")):
        room = trimesh.creation.box((4, 3, 2.5)).subdivide().subdivide().subdivide().subdivide()
        room.visual.vertex_colors = np.random.default_rng(number).integers(0, 256, (len(room.vertices), 4))
        folder = root / "scans" / scene
        folder.mkdir(parents=True)
        (folder / f"{scene}_vh_clean_2.ply").write_bytes(room.export(file_type="ply"))
        classes = np.where(room.vertices[:, 2] < -1.2, 2, 1)
        write_scan(folder / f"{scene}_vh_clean_2.labels.ply", RawScan(points=room.vertices, classes=classes))
    (root / "scannetv2_train.txt").write_text("scene0000_00\nscene0001_00\n")
    (root / "scannetv2_val.txt").write_text("scene0002_00\n")
    argv = ["train", "--config", "scannet", "--data.root", str(root), "--out", str(tmp_path / "run")]
    size = ["--model.widths", "[16, 16, 32, 32, 32]", "--model.depths", "[1, 0, 0, 0, 1]"]
    size += ["--model.blocks", "{L3: 8, L4: 4}", "--model.grids", "[0.3, 0.6, 1.2, 2.4]", "--data.voxel", "0.1"]
    short = ["--training.steps", "2", "--training.batch_size", "2", "--training.schedule.warmup_steps", "1"]
    short += ["--training.workers", "0", "--training.accelerator", "cpu", "--training.validate_every", "null"]
    assert main([*argv, *size, *short]) == 0
    assert "refrigerator" in capsys.readouterr().out
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert len(scores["classes"]) == 20
    assert np.sum(scores["confusion"]) == len(room.vertices)
