"""The same two images and objects in each format, written by hand: a cat on both, a dog on the first.

The cat lies in columns 2 to 7 and rows 3 to 8 of an image of 20 x 10 pixels: its box is (2, 3, 6, 6). The dog lies in
columns 10 to 13 and rows 0 to 9: (10, 0, 4, 10).
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 20, 10
CAT, DOG = [2.0, 3.0, 6.0, 6.0], [10.0, 0.0, 4.0, 10.0]
BOXES = {"a.png": {("cat", *CAT), ("dog", *DOG)}, "b.png": {("cat", *CAT)}}

XML = """<annotation>
  <filename>{name}</filename>
  <size><width>20</width><height>10</height><depth>3</depth></size>
{objects}</annotation>
"""
OBJECT = """  <object>
    <name>{name}</name>
    <difficult>{difficult}</difficult>
    <bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>
  </object>
"""


def write_image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path)


def voc_xml(name: str, *objects: tuple[str, tuple[object, ...], int]) -> str:
    texts = [OBJECT.format(name=label, box=box, difficult=difficult) for label, box, difficult in objects]
    return XML.format(name=name, objects="".join(texts))


def write_voc(root: Path) -> None:
    """VOC counts from 1 and includes the last pixel: columns 2 to 7 from 0 are 3 to 8."""
    for name in ("a", "b"):
        write_image(root / "JPEGImages" / f"{name}.png")
    (root / "Annotations").mkdir()
    cat, dog = ("cat", (3, 4, 8, 9), 0), ("dog", (11, 1, 14, 10), 0)
    (root / "Annotations" / "a.xml").write_text(voc_xml("a.png", cat, dog))
    (root / "Annotations" / "b.xml").write_text(voc_xml("b.png", cat))


def write_yolo(root: Path) -> None:
    """Centre and size over 20 and 10: the cat's are (5, 6) and (6, 6), the dog's (12, 5) and (4, 10)."""
    write_image(root / "images/train/a.png")
    write_image(root / "images/val/b.png")
    for name in ("train/a", "val/b"):
        (root / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
        lines = ["1 0.25 0.6 0.3 0.6", "0 0.6 0.5 0.2 1.0"]
        (root / "labels" / f"{name}.txt").write_text("\n".join(lines[: 2 if name == "train/a" else 1]) + "\n")
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: {0: dog, 1: cat}\n")


def labelme_json(name: str, *shapes: dict[str, object]) -> str:
    return json.dumps(
        {
            "version": "5.5.0",
            "flags": {},
            "shapes": [{"group_id": None, "flags": {}, **shape} for shape in shapes],
            "imagePath": name,
            "imageData": None,
            "imageHeight": HEIGHT,
            "imageWidth": WIDTH,
        }
    )


def write_labelme(root: Path) -> None:
    cat = {"label": "cat", "shape_type": "rectangle", "points": [[8, 9], [2, 3]]}
    dog = {"label": "dog", "shape_type": "rectangle", "points": [[10, 0], [14, 10]]}
    for name, shapes in (("a", [cat, dog]), ("b", [cat])):
        write_image(root / f"{name}.png")
        (root / f"{name}.json").write_text(labelme_json(f"{name}.png", *shapes))


def write_voc_masks(root: Path) -> None:
    """VOC's palette: class 8 is the cat, 12 the dog; 255 is an edge."""
    palette = [0] * 768
    for index, colour in {8: (64, 0, 0), 12: (64, 0, 128), 1: (128, 0, 0), 2: (0, 128, 0)}.items():
        palette[3 * index : 3 * index + 3] = colour
    palette[765:768] = [224, 224, 192]
    for name in ("a", "b"):
        write_image(root / "JPEGImages" / f"{name}.png")
        objects, classes = np.zeros((2, HEIGHT, WIDTH), np.uint8)
        objects[3:9, 2:8], classes[3:9, 2:8] = 1, 8
        objects[0, 0] = classes[0, 0] = 255
        if name == "a":
            objects[:, 10:14], classes[:, 10:14] = 2, 12
        for kind, values in (("SegmentationObject", objects), ("SegmentationClass", classes)):
            picture = Image.new("P", (WIDTH, HEIGHT))
            picture.putpalette(palette)
            picture.putdata(values.ravel().tolist())
            (root / kind).mkdir(exist_ok=True)
            picture.save(root / kind / f"{name}.png")


def write_coco(root: Path) -> None:
    write_image(root / "images/a.png")
    write_image(root / "images/b.png")
    records = [(1, 2, CAT), (1, 5, DOG), (2, 2, CAT)]
    dataset = {
        "images": [
            {"id": id, "file_name": f"{name}.png", "width": WIDTH, "height": HEIGHT}
            for id, name in ((1, "a"), (2, "b"))
        ],
        "annotations": [
            {"id": id, "image_id": image, "category_id": category, "bbox": box}
            for id, (image, category, box) in enumerate(records, 1)
        ],
        "categories": [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}],
    }
    (root / "annotations.json").write_text(json.dumps(dataset))


WRITERS = {
    "coco": write_coco,
    "voc": write_voc,
    "voc_masks": write_voc_masks,
    "yolo": write_yolo,
    "labelme": write_labelme,
}
