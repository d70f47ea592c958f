import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import latentgnn
from latentgnn.cli import main
from latentgnn.configuration.recipes import load_recipe
from latentgnn.configuration.settings import parse_config
from latentgnn.errors import UserError
from latentgnn.files.outputs import LIST
from latentgnn.tasks.detection.commands import COMMANDS
from latentgnn.tasks.detection.config import DetectionConfig
from latentgnn.tasks.detection.task import DetectionTask
from latentgnn.training.runs import RunFolder
from tests.tasks.detection.tiny_sets import write_yolo
from tests.tasks.tiny_runs import DETECTION, check_resumed, stop, train, weights_of, write_recipe, write_split


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny") / "data"
    write_split(root, "train", 5)
    write_split(root, "val", 3)
    return root


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"), DETECTION)


@pytest.fixture(scope="module")
def run(data, recipe):
    """A finished run of two steps."""
    return train(recipe, data, data.parent / "run")


def test_a_run_folder_holds_everything(run):
    for name in ("config.yaml", "environment.json", "data.json", "metrics.json", "metrics.csv", "log.txt"):
        assert (run / name).is_file()
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert sorted(path.name for path in (run / "pictures").glob("*.png")) == ["val0.png", "val1.png"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["training"]["steps"] == 2
    assert config["data"]["categories"] == [[3, "red"], [7, "blue"]]
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    assert len(metrics) == 24
    assert all(-1 <= value <= 1 for value in metrics.values())


def test_a_run_has_a_report_that_can_be_written_again(run, capsys):
    report = run / "report.html"
    text = report.read_text()
    for title in ("Course", "Figures", "Precision and recall", "Categories", "Confusion", "Images", "How to reproduce"):
        assert f"<h2>{title}</h2>" in text
    data = json.loads((run / "data.json").read_text())
    assert {name: record["samples"] for name, record in data.items()} == {"training set": 5, "validation set": 3}
    assert all(record["digest"] in text for record in data.values())
    report.unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"written to {report}\n"
    assert report.read_text() == text


def test_evaluating_the_run_gives_the_figures_of_its_end(run, tmp_path, capsys):
    assert main(["evaluate", str(run), "--out", str(tmp_path / "out"), "--evaluation.per_category", "true"]) == 0
    shown = capsys.readouterr().out
    assert "APs" in shown
    assert "red" in shown
    assert "blue" in shown
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(written["per_category"]) == {"red", "blue"}
    end = json.loads((run / "metrics.json").read_text())["metrics"]
    assert written["metrics"] == pytest.approx(end, abs=1e-6)
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2

    # Its results, scored as a file and without a model, give the same.
    again = tmp_path / "again"
    argv = ["evaluate", "--results", str(tmp_path / "out" / "predictions.json"), "--out", str(again)]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert main([*argv, "--data.root", config["data"]["root"]]) == 0
    assert json.loads((again / "metrics.json").read_text())["metrics"] == pytest.approx(written["metrics"])


def test_settings_that_shape_a_trained_model_are_refused_and_others_taken(run, data, tmp_path, capsys):
    for command in (["evaluate", str(run)], ["predict", str(run), str(data / "val")]):
        argv = [*command, "--out", str(tmp_path / "out")]
        for name, text, trained in (
            ("model.block.reduction", "4", "8"),
            ("model.detector", "retinanet", "mask_rcnn"),
            ("model.blocks", "{}", "{'C4': 4}"),
        ):
            assert main([*argv, f"--{name}", text]) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"latentgnn: --{name} {text}: the model in {run} is trained with {trained}, ")
            assert f"--model.weights {run} --{name} {text}" in error
            assert error.count("\n") == 1
    assert main(["evaluate", str(run), "--data.categories", "[[3, blue], [7, red]]"]) == 2
    assert "its weights know these categories; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    same = ["--model.block.reduction", "8", "--model.detections_per_image", "3", "--model.score_threshold", "0"]
    assert main(["evaluate", str(run), "--out", str(tmp_path / "out"), *same]) == 0
    records = json.loads((tmp_path / "out" / "predictions.json").read_text())
    counts = Counter(record["image_id"] for record in records)
    assert set(counts.values()) == {3}


def test_a_run_is_loaded_in_python(run, data, tmp_path):
    for source in (run, run / "checkpoints" / "best.ckpt"):
        loaded = latentgnn.load_run(source)
        assert not loaded.model.training
        assert loaded.categories == ((3, "red"), (7, "blue"))
        assert loaded.config.model.blocks == {"C4": 4}
    image = data / "val" / "val1.png"
    argv = ["predict", str(run), str(image), "--score-threshold", "0", "--no-pictures", "--out", str(tmp_path)]
    assert main(argv) == 0
    records = json.loads((tmp_path / "predictions.json").read_text())
    assert records
    with Image.open(image) as opened:
        pixels = np.array(opened.convert("RGB"))
    for given in (image, str(image), Image.fromarray(pixels), pixels):
        found = loaded.predict(given)
        assert found["scores"].tolist() == pytest.approx([record["score"] for record in records])
        ids = [loaded.categories[label - 1][0] for label in found["labels"]]
        assert ids == [record["category_id"] for record in records]
    assert loaded.transform(pixels).shape == (3, *pixels.shape[:2])
    assert torch.equal(loaded.transform(image), loaded.transform(pixels))
    with pytest.raises(ValueError, match=r"expected an RGB array, uint8 \(H, W, 3\); got float64"):
        loaded.transform(pixels / 255)
    in_tiles = replace(loaded.config.evaluation, tiles=32)
    with pytest.raises(UserError, match="this run looks at images by tiles of 32 pixels"):
        loaded._replace(config=replace(loaded.config, evaluation=in_tiles)).predict(image)
    with pytest.raises(UserError, match="there is no checkpoint"):
        latentgnn.load_run(tmp_path / "nothing")


def test_an_evaluation_as_json_is_one_document_on_standard_output(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["evaluate", str(run), "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document.pop("folder") == str(out)
    assert document == json.loads((out / "metrics.json").read_text())
    assert f"written to {out}" in captured.err
    assert "AP50" in captured.err
    # A mistake leaves standard output empty.
    assert main(["evaluate", str(run), "--out", str(out), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--overwrite" in captured.err


def test_other_limits_of_detections(run, tmp_path):
    argv = ["evaluate", str(run), "--out", str(tmp_path), "--evaluation.max_detections", "[1, 2, 5]"]
    assert main(argv) == 0
    assert "bbox/AR_5" in json.loads((tmp_path / "metrics.json").read_text())["metrics"]


def test_predicting_needs_the_checkpoint_alone(run, data, tmp_path, monkeypatch):
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes((run / "checkpoints" / "best.ckpt").read_bytes())
    monkeypatch.chdir(tmp_path)
    inputs = [str(data / "val"), str(data / "train" / "train[01].png")]
    assert main(["predict", str(alone), *inputs, "--score-threshold", "0", "--out", "out"]) == 0
    records = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {Path(record["file_name"]).name for record in records} <= {f"val{i}.png" for i in range(3)} | {
        "train0.png",
        "train1.png",
    }
    assert {record["category_id"] for record in records} <= {3, 7}
    assert len(list((tmp_path / "out" / "pictures").rglob("*.png"))) == 5

    assert main(["predict", str(run), str(data / "val"), "--no-pictures", "--out", "bare"]) == 0
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == [LIST, "predictions.json"]


def test_a_stopped_run_resumes_to_the_same_weights(run, data, recipe, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "stopped"
    command = ["train", "--config", str(recipe), "--data.root", str(data)]
    stop(DetectionTask, command, folder, monkeypatch)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert f"continue with: latentgnn train --resume {folder}" in error
    check_resumed(folder, run)


def test_an_image_that_vanishes_ends_the_run_with_one_line(data, recipe, tmp_path, monkeypatch, capfd):
    root, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, root)
    losses = DetectionTask.losses

    def vanish(self, batch):
        (root / "train" / "train2.png").unlink(missing_ok=True)
        return losses(self, batch)

    monkeypatch.setattr(DetectionTask, "losses", vanish)
    argv = ["train", "--config", str(recipe), "--data.root", str(root), "--out", str(folder)]
    assert main([*argv, "--training.steps", "100", "--training.workers", "2"]) == 1
    assert capfd.readouterr().err == f"latentgnn: {root / 'train' / 'train2.png'}: there is no such image\n"


def test_resuming_with_another_course_is_refused_and_leaves_the_folder_as_it_was(run, capsys):
    before = (run / "config.yaml").read_text()
    assert main(["train", "--resume", str(run), "--training.optimizer.learning_rate", "0.5"]) == 1
    assert "learning_rate" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == before


def test_a_finished_run_is_shown_again(run, capsys):
    assert main(["train", "--resume", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "finished" in shown
    assert "APs" in shown


def test_a_folder_that_holds_a_run_is_not_written_into(run, data, recipe, capsys):
    assert main(["train", "--config", str(recipe), "--data.root", str(data), "--out", str(run)]) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_compare_trains_both_and_shows_the_difference(data, recipe, tmp_path, capsys):
    folder = tmp_path / "both"
    argv = ["train", "--compare", "--config", str(recipe), "--data.root", str(data), "--out", str(folder)]
    assert main(argv) == 0
    table = capsys.readouterr().out.split("box AP")[-1]
    assert [line.split("  ")[0] for line in table.splitlines()[1:4]] == ["with blocks", "without blocks", "difference"]
    comparison = json.loads((folder / "comparison.json").read_text())
    for name, value in comparison["difference"].items():
        assert value == pytest.approx(comparison["with_blocks"][name] - comparison["without_blocks"][name])
    configs = [
        yaml.safe_load((folder / name / "config.yaml").read_text()) for name in ("with_blocks", "without_blocks")
    ]
    assert [config["model"].pop("blocks") for config in configs] == [{"C4": 4}, {}]
    assert configs[0] == configs[1]

    assert main(["train", "--resume", str(folder)]) == 1
    assert "latentgnn train --compare --resume" in capsys.readouterr().err
    (folder / "comparison.json").unlink()
    assert main(["train", "--compare", "--resume", str(folder)]) == 0
    assert json.loads((folder / "comparison.json").read_text()) == comparison

    reports = [
        folder / "report.html",
        folder / "with_blocks" / "report.html",
        folder / "without_blocks" / "report.html",
    ]
    texts = [report.read_text() for report in reports]
    for report in reports:
        report.unlink()
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"written to {reports[0]}\n"
    assert [report.read_text() for report in reports] == texts


@pytest.mark.parametrize("trained", [False, True])
def test_both_models_of_a_comparison_start_from_the_same_weights(run, data, recipe, tmp_path, trained):
    config = parse_config(DetectionConfig, load_recipe(recipe))
    if trained:
        # Other categories, for which the last layers start anew, on both sides alike.
        config = replace(config, model=replace(config.model, weights=str(run), blocks={"C4": 8}))
    here = replace(config, data=replace(config.data, root=str(data)))
    data = COMMANDS.load(here, Path(), resume=False)
    if trained:
        data[0].categories = [(3, "green"), (7, "yellow")]

    def weights_of_side(config: DetectionConfig, name: str) -> dict[str, torch.Tensor]:
        folder = RunFolder.create(tmp_path / name, task=name)
        task = COMMANDS.task(config, folder, data, goes_on=False)
        assert (folder.trained_at_start() == task.trained) if trained else not task.trained
        return task.model.state_dict()

    with_blocks = weights_of_side(config, "with")
    without = weights_of_side(replace(config, model=replace(config.model, blocks={})), "without")
    assert len(with_blocks) > len(without)
    assert all(torch.equal(value, with_blocks[name]) for name, value in without.items())
    same = {name for name, value in weights_of(run).items() if name in without and torch.equal(value, without[name])}
    assert any(name.startswith("roi_heads.box_head") for name in same) == trained
    assert "roi_heads.box_predictor.cls_score.weight" not in same


def test_a_run_that_starts_from_another_tells_it_and_resumes(run, data, recipe, tmp_path, capsys):
    folder = tmp_path / "finetuned"
    argv = [
        "train",
        "--config",
        str(recipe),
        "--data.root",
        str(data),
        "--out",
        str(folder),
        "--model.weights",
        str(run),
    ]
    factors = ["--training.optimizer.trained_factor", "0.1", "--training.optimizer.block_factor", "0"]
    assert main([*argv, *factors]) == 0
    shown = capsys.readouterr().out
    assert f"tensors from {run / 'checkpoints' / 'best.ckpt'}" in shown
    start = json.loads((folder / "start.json").read_text())
    assert start["told"][0] in shown
    assert "rpn.head.cls_logits.weight" in start["trained"]
    optimizer = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["optimizer"]
    assert {group["name"] for group in optimizer["param_groups"]} >= {"trained/weights", "blocks/weights"}

    # The weights that it started from are not needed any more.
    (folder / "metrics.json").unlink()
    config = folder / "config.yaml"
    gone = config.read_text().replace(str(run), str(tmp_path / "gone"))
    assert main(["train", "--resume", str(folder)]) == 0
    assert "tensors from" not in capsys.readouterr().out
    assert main(["predict", str(folder), str(data / "val"), "--out", str(tmp_path / "found"), "--no-pictures"]) == 0
    config.write_text(gone)
    assert main(["evaluate", str(folder), "--out", str(tmp_path / "scores")]) == 0


def test_check_data_reports_faults_and_training_stops_or_skips(data, recipe, tmp_path, capsys):
    root = tmp_path / "faulty"
    write_split(root, "train", 4)
    write_split(root, "val", 2)
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][2]["bbox"] = [5, 5, 0, 9]
    path.write_text(json.dumps(content))
    (root / "train" / "train3.png").unlink()

    assert main(["check-data", "--data.root", str(data)]) == 0
    assert main(["check-data", "--data.root", str(root)]) == 1
    assert "faults 2" in capsys.readouterr().out

    argv = ["train", "--config", str(recipe), "--data.root", str(root), "--out"]
    assert main([*argv, str(tmp_path / "stops")]) == 1
    error = capsys.readouterr().err
    assert "train3.png" in error
    assert "--data.on_fault skip" in error
    assert "Traceback" not in error
    assert main([*argv, str(tmp_path / "skips"), "--data.on_fault", "skip"]) == 0
    shown = capsys.readouterr().out
    assert "left out: images 1, annotations 3" in shown
    assert "train: 3 images, 5 objects, 2 categories" in shown


def test_data_without_masks_train_another_detector(recipe, tmp_path, capsys):
    root = tmp_path / "boxes"
    write_split(root, "train", 3, masks=False)
    write_split(root, "val", 2, masks=False)
    argv = ["train", "--config", str(recipe), "--data.root", str(root), "--out"]
    assert main([*argv, str(tmp_path / "masks")]) == 1
    assert "--model.detector faster_rcnn" in capsys.readouterr().err
    assert main([*argv, str(tmp_path / "run"), "--model.detector", "faster_rcnn"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]
    assert {name.partition("/")[0] for name in metrics} == {"bbox"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--data.root", "nowhere"], r"there is no folder nowhere"),
        (["--model.backbone", "resnet19"], r"resnet18"),
        (["--model.weights_backbone", "missing.pth"], r"missing\.pth"),
        (["--model.block.reduction", "7"], r"model\.blocks"),
        (["--evaluation.max_detections", "[1, 10, 5]"], r"evaluation\.max_detections: expected three ascending"),
        (["--training.batch_size", "0"], r"training\.batch_size"),
        (["--data.categories", "[[1, cat]]"], r"data\.categories"),
    ],
)
def test_mistakes_fail_with_a_message(data, recipe, tmp_path, capsys, override, message):
    root = [] if "--data.root" in override else ["--data.root", str(data)]
    code = main(["train", "--config", str(recipe), *root, "--out", str(tmp_path / "run"), *override])
    # What makes no sense by itself is wrong usage.
    assert code == (2 if override[0] in ("--evaluation.max_detections", "--training.batch_size") else 1)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    with pytest.raises(UserError, match=message):
        raise UserError(error)


def test_categories_must_mean_the_same_in_both_splits(recipe, tmp_path, capsys):
    root = tmp_path / "renamed"
    write_split(root, "train", 2)
    write_split(root, "val", 2)
    path = root / "annotations" / "instances_val.json"
    path.write_text(path.read_text().replace('"blue"', '"green"'))
    assert main(["train", "--config", str(recipe), "--data.root", str(root), "--out", str(tmp_path / "run")]) == 1
    assert "category 7 is 'blue' in the training annotations, but 7 is 'green'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({3: "blue", 7: "red"}, "category 3 is 'red' for the model, but 3 is 'blue' in "),
        ({3: "red", 8: "blue"}, "category 7 is 'blue' for the model, but 8 is 'blue' in "),
        ({1: "horse"}, "has no category of the model, but 1 horse: "),
    ],
)
def test_a_set_with_other_categories_is_not_scored(run, data, tmp_path, capsys, names, message):
    root, out = tmp_path / "other", tmp_path / "out"
    shutil.copytree(data, root)
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": id, "name": name} for id, name in names.items()]
    for annotation in content["annotations"]:
        annotation["category_id"] = list(names)[-1]
    path.write_text(json.dumps(content))
    assert main(["evaluate", str(run), "--data.root", str(root), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert f"the set of {root / 'val'}" in error
    assert "the model's ids and names, 3 red, 7 blue" in error
    assert not out.exists()


def test_a_yolo_set_with_other_categories_is_not_scored(run, tmp_path, capsys):
    root = tmp_path / "yolo"
    root.mkdir()
    write_yolo(root)
    (root / "data.yaml").write_text((root / "data.yaml").read_text().replace("{0: dog, 1: cat}", "[red, blue]"))
    argv = ["evaluate", str(run), "--out", str(tmp_path / "out"), "--data.format", "yolo"]
    assert main([*argv, "--data.root", str(root)]) == 1
    assert "category 3 is 'red' for the model, but 0 is 'red' in " in capsys.readouterr().err


def test_the_program_as_a_process(data, recipe, tmp_path):
    program = [sys.executable, "-c", "import sys; from latentgnn.cli import main; sys.exit(main())"]
    argv = ["train", "--config", str(recipe), "--data.root", str(data), "--training.steps", "1"]
    done = subprocess.run([*program, *argv, "--out", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert f"written to {tmp_path / 'run'}" in done.stdout


def test_the_embedded_set_is_made_inside_the_run(recipe, tmp_path, capsys):
    folder = tmp_path / "run"
    argv = ["train", "--config", str(recipe), "--out", str(folder), "--data.embedded_train", "4"]
    assert main([*argv, "--data.embedded_val", "2", "--data.embedded_size", "64", "--training.steps", "1"]) == 0
    assert "val: 2 images" in capsys.readouterr().out
    assert (folder / "data" / "annotations" / "instances_train.json").is_file()
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["root"] is None
    assert main(["evaluate", str(folder)]) == 0
    end = json.loads((folder / "metrics.json").read_text())["metrics"]
    again = json.loads((folder / "evaluation" / "metrics.json").read_text())["metrics"]
    assert again == pytest.approx(end, abs=1e-6)
