import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from latentgnn.errors import UserError
from latentgnn.files.outputs import LIST
from latentgnn.tasks.detection.evaluation import CocoEvaluator
from latentgnn.tasks.detection.finder import Finder
from latentgnn.tasks.detection.pictures import colour_of
from latentgnn.tasks.detection.prediction import expand_images, predict_paths
from latentgnn.tasks.detection.results import load_results
from latentgnn.tasks.detection.segmentations import decode_masks

NAMES = [(3, "cat"), (8, "dog")]


def write_image(path, size=(40, 30), colour=(50, 60, 70), **extra):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **extra)
    return path


class Fixed(nn.Module):
    """A detector that finds a dog and, less surely, a cat; and keeps what it was given."""

    def __init__(self, masks=True):
        super().__init__()
        self.masks = masks
        self.seen = []

    def forward(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        (image,) = images
        self.seen.append(image)
        output = {
            "boxes": torch.tensor([[10.0, 5, 30, 20], [0, 0, 5, 5]]),
            "labels": torch.tensor([2, 1]),
            "scores": torch.tensor([0.75, 0.25]),
        }
        if self.masks:
            output["masks"] = torch.zeros(2, 1, *image.shape[1:])
            output["masks"][0, 0, 5:20, 10:30] = 0.9
        return [output]


def test_files_folders_and_patterns(tmp_path):
    for name in ("b.png", "a.JPG", "deep/c.webp", "deep/deeper/d.tif"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")

    def names(*inputs):
        return [str(path.relative_to(tmp_path)) for path in expand_images(inputs)]

    assert names(tmp_path) == ["a.JPG", "b.png"]
    assert names(tmp_path / "deep") == ["deep/c.webp"]
    assert names(str(tmp_path / "*")) == ["a.JPG", "b.png"]
    assert names(str(tmp_path / "**" / "*")) == ["a.JPG", "b.png", "deep/c.webp", "deep/deeper/d.tif"]
    assert names(str(tmp_path / "[b-c].*")) == ["b.png"]
    # In the order given, each once, whatever way it is named.
    twice = (tmp_path / "deep" / ".." / "b.png", tmp_path / "b.png", str(tmp_path))
    assert [p.name for p in expand_images(twice)] == ["b.png", "a.JPG"]


def test_a_file_may_have_a_pattern_for_a_name_or_no_suffix(tmp_path):
    bracket = write_image(tmp_path / "cell[1].png")
    write_image(tmp_path / "cell1.png")
    assert expand_images([bracket]) == [bracket]
    bare = tmp_path / "scan"
    shutil.copy(bracket, bare)
    assert expand_images([str(bare)]) == [bare]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("absent.png", "no such file or folder"),
        ("*.gif", "the pattern matches no image"),
        ("*.txt", "it matches 1 other"),
        ("notes.txt", "not an image"),
        ("empty", "the folder contains no images"),
    ],
)
def test_inputs_without_images_are_named(tmp_path, entry, message):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as error:
        expand_images([str(tmp_path / entry)])
    assert entry in str(error.value)
    with pytest.raises(UserError, match="no input"):
        expand_images([])


def test_pictures_and_results_are_written(tmp_path):
    paths = [write_image(tmp_path / "in" / "a.png"), write_image(tmp_path / "in" / "b.png")]
    out = tmp_path / "out"
    model = Fixed().train()
    assert predict_paths(Finder(model, NAMES), paths, out=out) == 2
    records = json.loads((out / "predictions.json").read_text())
    assert [(r["image_id"], r["file_name"], r["category_id"], r["score"], r["bbox"]) for r in records] == [
        (index, str(path), 8, 0.75, [10, 5, 20, 15]) for index, path in enumerate(paths)
    ]
    mask = decode_masks([records[1]["segmentation"]], 30, 40)[0]
    assert mask[5:20, 10:30].all()
    assert mask.sum() == 300
    assert torch.allclose(model.seen[0][:, 0, 0], torch.tensor([50.0, 60, 70]) / 255)
    assert sorted(p.name for p in out.rglob("*") if p.is_file()) == [LIST, "a.png", "b.png", "predictions.json"]
    with Image.open(out / "pictures" / "a.png") as picture:
        assert picture.size == (800, 600)
        assert picture.getpixel((200, 300)) == colour_of(1)
        assert picture.getpixel((700, 550)) == (50, 60, 70)


def test_the_threshold_and_the_options(tmp_path):
    path = write_image(tmp_path / "a.png")
    finder = Finder(Fixed(masks=False), NAMES, score_threshold=0.25)
    assert predict_paths(finder, [path], out=tmp_path / "out", pictures=False) == 2
    records = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [(r["image_id"], r["category_id"]) for r in records] == [(0, 8), (0, 3)]
    assert "segmentation" not in records[0]
    finder = Finder(Fixed(), NAMES, score_threshold=0.8)
    assert predict_paths(finder, [path], out=tmp_path / "none", pictures=False) == 0
    assert json.loads((tmp_path / "none" / "predictions.json").read_text()) == []
    assert not (tmp_path / "none" / "pictures").exists()


def test_the_file_can_be_scored(tmp_path):
    path = write_image(tmp_path / "a.png")
    out = tmp_path / "out"
    predict_paths(Finder(Fixed(), NAMES, score_threshold=0), [path], out=out)
    dataset = {
        "images": [{"id": 0, "width": 40, "height": 30, "file_name": "a.png"}],
        "categories": [{"id": i, "name": name} for i, name in NAMES],
        "annotations": [
            {
                "id": 1,
                "image_id": 0,
                "category_id": 8,
                "bbox": [10, 5, 20, 15],
                "area": 300,
                "iscrowd": 0,
                "segmentation": [[10, 5, 30, 5, 30, 20, 10, 20]],
            }
        ],
    }
    metrics = CocoEvaluator(dataset).score(load_results(out / "predictions.json", dataset)).metrics
    assert metrics["bbox/AP"] == metrics["segm/AP"] == pytest.approx(1)


def test_pictures_lie_as_their_images_do(tmp_path):
    names = ("x/a.png", "y/A.png", "y/a.jpg", "z/a-2.png")
    paths = [write_image(tmp_path / name) for name in names]
    predict_paths(Finder(Fixed(), NAMES), paths, out=tmp_path / "out")
    folder = tmp_path / "out" / "pictures"
    pictures = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    assert pictures == ["x/a.png", "y/A.png", "y/a-2.png", "z/a-2.png"]


def test_images_turn_as_in_training(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write_image(tmp_path / "turned.jpg", exif=exif)
    model = Fixed()
    predict_paths(Finder(model, NAMES), [path], out=tmp_path / "out")
    assert model.seen[0].shape == (3, 40, 30)
    with Image.open(tmp_path / "out" / "pictures" / "turned.png") as picture:
        assert picture.size == (600, 800)


def test_a_broken_image_does_not_stop_the_others(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    cut = tmp_path / "b.png"
    Image.fromarray(noise).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    paths = [write_image(tmp_path / "a.png"), cut, write_image(tmp_path / "c.png")]
    with pytest.raises(UserError, match=r"1 of 3 images failed.*\n.*b\.png"):
        predict_paths(Finder(Fixed(), NAMES), paths, out=tmp_path / "out")
    records = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [r["image_id"] for r in records] == [0, 2]
    assert sorted(p.name for p in (tmp_path / "out" / "pictures").iterdir()) == ["a.png", "c.png"]


def test_an_image_that_takes_too_much_memory_does_not_stop_the_others(tmp_path):
    class Large(Fixed):
        def forward(self, images):
            if images[0].shape[2] > 40:
                torch.empty(2**46)
            return super().forward(images)

    paths = [write_image(tmp_path / f"{width}.png", size=(width, 30)) for width in (40, 41, 39)]
    with pytest.raises(UserError, match=r"1 of 3 images failed.*\n  .*41\.png: out of memory \(.*allocate memory"):
        predict_paths(Finder(Large(), NAMES), paths, out=tmp_path / "out")
    records = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [record["file_name"] for record in records] == [str(paths[0]), str(paths[2])]


def test_an_output_that_is_a_file_is_refused(tmp_path):
    path = write_image(tmp_path / "a.png")
    with pytest.raises(UserError, match="this is a file"):
        predict_paths(Finder(Fixed(), NAMES), [path], out=path)
