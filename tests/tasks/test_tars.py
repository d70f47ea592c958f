"""Images in tar files, beside the same images in folders."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from latentgnn.errors import UserError
from latentgnn.tasks.detection.check import check_split
from latentgnn.tasks.detection.coco import CocoTrainingSet, CocoValidationSet, find_split
from latentgnn.tasks.detection.config import AugmentConfig, DataConfig, DetectionConfig
from latentgnn.tasks.detection.convert import convert
from latentgnn.tasks.detection.overview import check_data
from latentgnn.tasks.detection.sound_sets import load_split
from latentgnn.tasks.images import read_image
from latentgnn.tasks.tars import file_of, open_file
from latentgnn.training.fingerprint import Fingerprint, Record, changes

NAMES = ("a.png", "b.jpg", "käfer.png", "deep/d.png")


@pytest.fixture
def root(tmp_path):
    """A set of four images of noise in a folder, and the same in ``packed`` with a tar file."""
    generator = np.random.default_rng(0)
    folder, packed = tmp_path / "loose" / "train", tmp_path / "packed"
    (folder / "deep").mkdir(parents=True)
    for name in NAMES:
        Image.fromarray(generator.integers(0, 255, (16, 20, 3), np.uint8)).save(folder / name)
    dataset = {
        "images": [{"id": id, "file_name": name, "width": 20, "height": 16} for id, name in enumerate(NAMES)],
        "annotations": [
            {"id": 1 + id, "image_id": id, "category_id": 4, "bbox": [2, 2, 6, 6], "area": 36, "iscrowd": 0}
            for id in range(len(NAMES))
        ],
        "categories": [{"id": 4, "name": "cat"}],
    }
    for place in (folder.parent, packed):
        (place / "annotations").mkdir(parents=True)
        (place / "annotations" / "instances_train.json").write_text(json.dumps(dataset))
    # As `tar -cf ../../packed/train.tar .` names them.
    pack(packed / "train.tar", {f"./{name}": (folder / name).read_bytes() for name in NAMES})
    return tmp_path


def pack(path, files, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def load(root):
    return load_split(*find_split(DataConfig(root=str(root)), "train"))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_file_is_as_its_folder(root, format):
    folder = root / "loose" / "train"
    pack(root / "packed" / "train.tar", {name: (folder / name).read_bytes() for name in NAMES}, format=format)
    loose, packed = load(root / "loose"), load(root / "packed")
    augment = AugmentConfig()
    sets = [
        [make(annotations) for annotations in (loose, packed)]
        for make in (lambda a: CocoTrainingSet(a, augment=augment, seed=3), CocoValidationSet)
    ]
    for index in range(len(NAMES)):
        assert torch.equal(sets[0][0][2, index][0], sets[0][1][2, index][0])
        assert torch.equal(sets[1][0][index][0], sets[1][1][index][0])


def test_shards_are_named_by_the_records(root):
    folder = root / "loose" / "train"
    shards = root / "packed" / "train"
    shards.mkdir()
    path = root / "packed" / "annotations" / "instances_train.json"
    dataset = json.loads(path.read_text())
    for number, image in enumerate(dataset["images"]):
        shard, name = f"{number % 2:06}.tar", image["file_name"]
        if number < 2:
            names = NAMES[number::2]
            pack(shards / shard, {name: (folder / name).read_bytes() for name in names})
        image["file_name"] = f"{shard}/{name}"
    path.write_text(json.dumps(dataset))
    annotations = load(root / "packed")
    assert [file_of(image.path).name for image in annotations.images] == ["000000.tar", "000001.tar"] * 2
    for image, name in zip(annotations.images, NAMES, strict=True):
        assert np.array_equal(read_image(image.path), read_image(folder / name))


def test_commands_take_tar_files(root, capsys):
    config = DetectionConfig(data=DataConfig(root=str(root / "packed"), val_fraction=0.5))
    assert check_data(config, recipe="x", out=root / "looked_at", overwrite=False)["faultless"]
    assert (root / "looked_at" / "samples_train.png").is_file()
    convert(config, out=root / "converted", overwrite=False, with_images=True)
    again = load(root / "converted")
    assert len(again) == 2
    for image in again.images:
        there = root / "loose" / "train" / image.file_name
        names = [name for name in NAMES if (root / "loose" / "train" / name).read_bytes() == image.path.read_bytes()]
        assert names, there


def fingerprint(root):
    annotations = load(root)
    records = [Record(name=image.file_name, files=[file_of(image.path)]) for image in annotations.images]
    return Fingerprint.of(annotations.folder, records)


def test_a_tar_file_that_changed_is_seen_and_read_anew(root):
    path = root / "packed" / "train.tar"
    before = fingerprint(root / "packed")
    black = Image.new("RGB", (20, 16))
    black.save(root / "black.png")
    folder = root / "loose" / "train"
    content = {name: (folder / name).read_bytes() for name in NAMES[::-1]}
    pack(path, {"another": bytes(100_000), **content, "a.png": (root / "black.png").read_bytes()})
    assert np.array_equal(read_image(path / "a.png"), np.array(black))
    assert np.array_equal(read_image(path / "deep/d.png"), read_image(folder / "deep/d.png"))
    assert changes(before, fingerprint(root / "packed")) == ["all 4 with files of another size (first a.png)"]


def test_the_last_of_a_name_counts(root):
    path = root / "two.tar"
    pack(path, {"a": b"first", "b": b"other"})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("a")
        member.size = 6
        tar.addfile(member, io.BytesIO(b"second"))
    assert open_file(path / "a").read() == b"second"
    assert open_file(path / "b").read() == b"other"


def test_what_is_missing_or_damaged_is_named(root):
    folder, path = root / "packed", root / "packed" / "train.tar"
    good = path.read_bytes()

    def faults():
        return [str(fault) for fault in check_split(*find_split(DataConfig(root=str(folder)), "train")).faults]

    pack(path, {name: (root / "loose" / "train" / name).read_bytes() for name in NAMES[1:]})
    assert faults() == [f"{path / 'a.png'}: images[0], id 0: there is no such image in train.tar"]
    path.write_bytes(b"no tar file at all" * 100)
    assert len(faults()) == 4
    assert "train.tar cannot be read as a tar file" in faults()[0]
    assert "without compression (tar -cf)" in faults()[0]
    path.write_bytes(good[:2000])
    assert faults()
    assert all("train.tar" in fault and "\n" not in fault for fault in faults())
    (folder / "train.tar").unlink()
    with pytest.raises(UserError, match=r"no image folder; looked for .*train\.tar"):
        load(folder)
