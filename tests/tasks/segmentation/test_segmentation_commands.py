"""A segmenter of images from its folder of data to label pictures, on small made-up sets."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from latentgnn import load_run
from latentgnn.cli import main
from tests.tasks.tiny_runs import train, write_recipe

TINY = """
task: segmentation
model:
  backbone: resnet18
  output_stride: 16
  blocks: {backbone.network.layer3: 4}
  block: {norm: batch_norm, gamma_init: 0.5, node_scale: mean}
loss: {auxiliary: 0.4}
data:
  classes: {3: road, 7: sky, 8: sky}
  ignored: [300]
  scale: 0.5
  augment: {scale: [0.8, 1.2], crop: [32, 32]}
training:
  steps: 2
  batch_size: 2
  workers: 0
  accelerator: cpu
  log_every: 1
  optimizer: {name: adamw, learning_rate: 0.01}
  schedule: {name: polynomial, warmup_steps: 0}
evaluation: {sample_pictures: 1}
"""


def write_street(root, split, name, seed, size=(60, 44)):
    """Sky above road, with some pixels without a label; ids above 255 need 16 bits."""
    rng = np.random.default_rng(seed)
    width, height = size
    ids = np.full((height, width), 3, np.uint16)
    horizon = int(rng.integers(10, height - 10))
    ids[:horizon, : width // 2], ids[:horizon, width // 2 :] = 7, 8
    ids[:3, :5] = 300
    pixels = np.where((ids == 3)[..., None], (90, 80, 80), (120, 160, 230)) + rng.integers(-20, 20, (height, width, 3))
    for folder in ("images", "labels"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / split / f"{name}.png")
    Image.fromarray(ids).save(root / "labels" / split / f"{name}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("streets")
    for seed, name in enumerate("abc"):
        write_street(root, "train", name, seed)
    write_street(root, "val", "x", 10)
    write_street(root, "val", "y", 11, size=(51, 40))
    return root


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"), TINY)


@pytest.fixture(scope="module")
def run(data, recipe, tmp_path_factory):
    return train(recipe, data, tmp_path_factory.mktemp("runs") / "run")


def figures(truth, predicted, ids):
    """mIoU, overall accuracy and the IoU of classes, of all pixels at once, written without a confusion matrix."""
    iou = [((truth == id) & (predicted == id)).sum() / ((truth == id) | (predicted == id)).sum() for id in ids]
    return float(np.mean(iou)), float((truth == predicted).mean()), iou


def test_figures_are_those_of_the_label_pictures_over_original_pixels(run, data, tmp_path):
    assert main(["predict", str(run), str(data / "images" / "val"), "--out", str(tmp_path / "found")]) == 0
    truth, predicted = [], []
    for name in "xy":
        ids = np.asarray(Image.open(data / "labels" / "val" / f"{name}.png")).astype(int)
        found = np.asarray(Image.open(tmp_path / "found" / "labels" / f"{name}.png"))
        assert found.shape == ids.shape
        assert set(np.unique(found)) <= {3, 7}
        ids[ids == 8] = 7
        truth.append(ids[ids != 300])
        predicted.append(found[ids != 300])
        with Image.open(tmp_path / "found" / "pictures" / f"{name}.png") as picture:
            assert picture.size == ids.shape[::-1]
    mean, overall, iou = figures(np.concatenate(truth), np.concatenate(predicted), (3, 7))
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    assert metrics["mIoU"] == pytest.approx(mean, abs=1e-9)
    assert metrics["OA"] == pytest.approx(overall, abs=1e-9)
    assert [metrics["IoU/road"], metrics["IoU/sky"]] == pytest.approx(iou, abs=1e-9)
    assert main(["evaluate", str(run), "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["metrics"] == pytest.approx(metrics, abs=1e-9)
    assert np.sum(again["confusion"]) == sum(map(len, truth))


def test_a_run_folder_holds_everything(run):
    for name in ("config.yaml", "metrics.json", "scores.json", "metrics.csv", "report.html", "analysis.json"):
        assert (run / name).is_file()
    assert [path.name for path in (run / "pictures").iterdir()] == ["x.png"]
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["layout"] == "folders"
    assert "gamma/backbone.network.layer3.latentgnn" in (run / "metrics.csv").read_text()


def test_a_run_is_loaded_and_saved(run, data, tmp_path):
    trained = load_run(run)
    assert (trained.class_names, trained.class_ids) == (("road", "sky"), (3, 7))
    image = data / "images" / "val" / "y.png"
    labels = trained.predict(image)
    assert labels.shape == (40, 51)
    assert trained.transform(image).shape == (1, 3, 20, 26)
    trained.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_run(tmp_path / "saved").predict(image), labels)


def test_diagnose_reports_the_block(run, capsys):
    assert main(["diagnose", str(run), "--samples", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"][0]["name"] == "backbone.network.layer3.latentgnn"


@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_exports_compute_the_same(run, data, tmp_path, to):
    out = tmp_path / to
    assert main(["export", str(run), "--to", to, "--out", str(out)]) == 0
    trained, image = load_run(run), torch.rand(1, 3, 64, 90)
    if to == "safetensors":
        photo = data / "images" / "val" / "x.png"
        assert torch.equal(load_run(out).predict(photo), trained.predict(photo))
        return
    program = torch.export.load(out / "model.pt2").module()
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = trained.model((image - mean) / std)["out"]
        torch.testing.assert_close(program(images=image), expected, rtol=1e-4, atol=1e-4)


def test_explain_draws_the_block(run, data, tmp_path, capsys):
    image = str(data / "images" / "val" / "y.png")
    assert main(["explain", str(run), image, "--node", "50,39", "--out", str(tmp_path / "shown")]) == 0
    with Image.open(tmp_path / "shown" / "pictures" / "y-backbone.network.layer3.latentgnn.png") as picture:
        assert picture.width > 1000
    assert main(["explain", str(run), image, "--node", "51,39", "--out", str(tmp_path / "no")]) == 1
    assert "is outside the image, which is 51 x 40 pixels" in capsys.readouterr().err


def test_another_run_begins_with_the_weights_of_this_one(run, data, recipe, tmp_path, capsys):
    command = ["train", "--config", str(recipe), "--data.root", str(data), "--model.weights", str(run)]
    # At a rate of 0 the weights stay, the classes change places.
    changed = ["--data.classes", "{7: sky, 3: road, 8: sky}", "--training.optimizer.learning_rate", "0"]
    assert main([*command, *changed, "--out", str(tmp_path / "next")]) == 0
    old, new = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (run, tmp_path / "next")
    )
    assert torch.equal(new["classifier.4.weight"], old["classifier.4.weight"].flip(0))
    assert torch.equal(new["backbone.network.conv1.weight"], old["backbone.network.conv1.weight"])


def test_faults_are_found_before_training(data, recipe, tmp_path, capsys):
    root = tmp_path / "faulty"
    for name, size in (("good", (60, 44)), ("small", (60, 44)), ("alone", (60, 44)), ("strange", (60, 44))):
        write_street(root, "train", name, 3, size)
    write_street(root, "val", "damaged", 4)
    write_street(root, "val", "sound", 4)
    labels, images = root / "labels", root / "images"
    Image.open(labels / "train" / "small.png").resize((30, 22), Image.Resampling.NEAREST).save(
        labels / "train" / "small.png"
    )
    (labels / "train" / "alone.png").unlink()
    ids = np.asarray(Image.open(labels / "train" / "strange.png")).copy()
    ids[0, :4] = 9
    Image.fromarray(ids).save(labels / "train" / "strange.png")
    content = (images / "val" / "damaged.png").read_bytes()
    (images / "val" / "damaged.png").write_bytes(content[: len(content) // 2])
    assert main(["check-data", "--config", str(recipe), "--data.root", str(root)]) == 1
    told = capsys.readouterr().out
    assert f"{images / 'train' / 'alone.png'}: there is no label picture for alone" in told
    assert f"{images / 'train' / 'small.png'}: the image is 60 x 44 pixels" in told
    assert (
        f"{labels / 'train' / 'strange.png'}: ids that are neither in data.classes nor in data.ignored: 9 (4 pix"
        in told
    )
    assert f"{images / 'val' / 'damaged.png'}: the image cannot be read" in told
    assert "train: images 4" in told
    assert "faults 3" in told
    assert main(["train", "--config", str(recipe), "--data.root", str(root), "--out", str(tmp_path / "no")]) == 1
    assert "mend these images, or leave them out with --data.on_fault skip" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.blocks", "{backbone.layer9: 4}"], "model.blocks: no submodule 'backbone.layer9'"),
        (["--model.backbone", "resnet5"], "there is no fcn on resnet5"),
        (["--data.classes", "{3: road, 7: sky}"], "neither in data.classes nor in data.ignored: 8"),
        (["--data.train", "fit"], "there is no folder"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, expected, data, recipe, tmp_path, capsys):
    command = ["train", "--config", str(recipe), "--data.root", str(data), "--out", str(tmp_path / "run")]
    assert main([*command, *arguments]) == 1
    assert expected in capsys.readouterr().err
