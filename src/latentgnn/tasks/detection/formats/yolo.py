"""YOLO: one text file per image, one object per line, in fractions of the image's size; ``data.yaml`` has the rest.

A line is a class and its box (centre x, centre y, width, height), or a class and an outline (x1, y1, x2, y2, ...).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentgnn.errors import UserError
from latentgnn.files.plain_values import shown
from latentgnn.files.reading import UnreadableError, read_lines, read_yaml, regular_file
from latentgnn.tasks.detection.formats.folders import by_split, files_below
from latentgnn.tasks.detection.formats.records import Categories, Fault, Place, Reading, box_of
from latentgnn.tasks.detection.formats.sheets import Item, Sheet, assemble
from latentgnn.tasks.images import IMAGE_SUFFIXES, upright_size

_YAML = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_LISTS_OF_NAMES = ("classes.txt", "obj.names", "labels/classes.txt")
_SPLITS = ("train", "val")


def sign(root: Path) -> str | None:
    """Return the file or folder that identifies a folder as this format, relative to it."""
    if (found := _yaml(root)) is not None:
        return found.name
    for folder in (root, *(path for path in sorted(root.iterdir()) if path.is_dir())):
        if (folder / "labels").is_dir() and files_below(folder / "labels", {".txt"}):
            return f"{(folder / 'labels').relative_to(root)}/"
    return None


def read(root: Path, categories: Categories) -> dict[str, Reading]:
    """Read the splits: ``train`` and ``val``, or ``all`` if there are no splits."""
    yaml = _yaml(root)
    settings = read_yaml(yaml, "file of classes and splits") if yaml is not None else {}
    file = yaml or root
    faults: list[str] = []
    if "kpt_shape" in settings:
        faults.append("it is a set of key points (kpt_shape), which no detector here learns")
    names = _names(root, settings, faults)
    if names is None and not categories.are_known:
        faults.append("nothing names the classes: write a data.yaml with names, or a classes.txt")
    elif names is not None:
        categories = Categories(enumerate(names))
    files_of: dict[str, list[Path]] = {}
    notes: list[str] = []
    if any(split in settings for split in _SPLITS):
        for split in _SPLITS:
            if settings.get(split):
                files_of[split] = _listed(split, settings, yaml or root, faults)
    else:
        files_of, notes = by_split(files_below(root, IMAGE_SUFFIXES), root)
    if faults:
        return {
            split: Reading(
                file=file,
                image_folder=root,
                format="yolo",
                faults=[Fault(file=file, record="", message=message, fatal=True) for message in faults],
            )
            for split in files_of or _SPLITS
        }
    names_of = {record["id"]: record["name"] for record in categories.records()}
    sheets = {split: [_sheet(image, names_of) for image in files] for split, files in files_of.items()}
    unlabelled = [sheet.file for some in sheets.values() for sheet in some if sheet.file == sheet.image]
    if unlabelled:
        notes.append(
            f"{len(unlabelled)} images have no file of labels and count as images without objects "
            f"(such as {unlabelled[0]})"
        )
    readings = assemble(sheets, categories, file=file, root=root, format="yolo", notes=notes)
    _lose_orphans(readings, files_of)
    return readings


def _yaml(root: Path) -> Path | None:
    for name in _YAML:
        if (root / name).is_file() and "names" in read_yaml(root / name):
            return root / name
    for path in sorted(root.glob("*.yaml")):
        try:
            if "names" in read_yaml(path):
                return path
        except UnreadableError:
            continue  # some other file, which is not needed
    return None


def _names(root: Path, settings: Mapping[str, Any], faults: list[str]) -> list[str] | None:
    """The names of the classes, by number; ``None`` if they are not given."""
    if "names" not in settings:
        path = next((root / name for name in _LISTS_OF_NAMES if (root / name).is_file()), None)
        if path is None:
            return None
        names: Any = [line.strip() for line in read_lines(path, "list of classes") if line.strip()]
    else:
        names = settings["names"]
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            faults.append(f"names: expected a class for each number from 0 on; got {shown(list(names))}")
            return []
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        faults.append(f"names: expected a list of classes; got {shown(names)}")
        return []
    # A class may be called 1 or yes, which YAML does not read as strings.
    names = [str(name) for name in names]
    if len(set(names)) != len(names) or "" in names:
        faults.append(f"names: expected each class once; got {shown(names)}")
    if settings.get("nc", len(names)) != len(names):
        faults.append(f"nc is {shown(settings['nc'])}, but names has {len(names)} classes")
    return names


def _listed(split: str, settings: Mapping[str, Any], yaml: Path, faults: list[str]) -> list[Path]:
    """The images of a split, from folders or from lists of images."""
    entries = settings[split] if isinstance(settings[split], list) else [settings[split]]
    images: list[Path] = []
    # The path is from the machine where the set was made; the set may have been moved since.
    top = settings.get("path")
    bases = [*([yaml.parent / top] if isinstance(top, str) else []), yaml.parent]
    for entry in entries:
        if not isinstance(entry, str):
            faults.append(f"{split}: expected a folder or a list of images; got {shown(entry)}")
            continue
        looked_for = [base / name for base in bases for name in (entry, entry.removeprefix("../"))]
        found = next((path for path in looked_for if path.exists()), None)
        if found is None:
            faults.append(f"{split}: there is no {' or '.join(str(path) for path in dict.fromkeys(looked_for))}")
        elif found.is_dir():
            images += files_below(found, IMAGE_SUFFIXES)
        else:
            lines = [line.strip() for line in read_lines(regular_file(found), "list of images")]
            images += [
                _first_present([found.parent / line, *(base / line for base in bases)]) for line in lines if line
            ]
    return list(dict.fromkeys(images))


def _first_present(paths: Sequence[Path]) -> Path:
    return next((path for path in paths if path.exists()), paths[0])


def _labels_of(image: Path) -> Path:
    """The path of an image's labels: in ``labels`` instead of ``images``, or beside it."""
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            moved = Path(*parts).with_suffix(".txt")
            return moved if moved.exists() or not image.with_suffix(".txt").exists() else image.with_suffix(".txt")
    return image.with_suffix(".txt")


def _sheet(image: Path, names: Mapping[int, str]) -> Sheet:
    labels = _labels_of(image)
    sheet = Sheet(file=labels if labels.exists() else image, image=image)
    try:
        sheet.size = upright_size(image)
    except UserError as error:
        sheet.file = image
        sheet.lose("", str(error).removeprefix(f"{image}: "), "images")
        return sheet
    try:
        lines = read_lines(labels, "file of labels") if sheet.file == labels else []
    except UnreadableError as error:
        sheet.lose(error.place, error.message, "images")
        return sheet
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                sheet.items.append(_item(line.split(), sheet.size, names, f"line {number}"))
            except ValueError as error:
                sheet.lose(f"line {number}", str(error))
    return sheet


def _item(fields: Sequence[str], size: tuple[int, int], names: Mapping[int, str], record: str) -> Item:
    label, *coordinates = (_number(field) for field in fields)
    if label not in names:
        raise ValueError(f"unknown class {fields[0][:40]}; expected one of {_span(names)}")
    if len(coordinates) != 4 and (len(coordinates) < 6 or len(coordinates) % 2):
        raise ValueError(
            f"{len(fields)} numbers; expected a class and a box (centre x, centre y, width, height), or a class and "
            "the x and y of 3 points or more"
        )
    far = next((value for value in coordinates if not -1 <= value <= 2), None)
    if far is not None:
        raise ValueError(f"expected fractions of the image's size, from 0 to 1, but one is {far:g}")
    width, height = size
    name = names[int(label)]
    if len(coordinates) == 4:
        x, y, w, h = coordinates
        box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        return Item(name=name, record=record, box=box)
    xs, ys = [x * width for x in coordinates[::2]], [y * height for y in coordinates[1::2]]
    outline = [value for point in zip(xs, ys, strict=True) for value in point]
    return Item(name=name, record=record, box=box_of(xs, ys), segmentation=[outline])


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"expected numbers, but one is {text[:40]!r}")
    return number


def _span(numbers: Iterable[int]) -> str:
    some = sorted(numbers)
    return f"{some[0]} to {some[-1]}"


def _lose_orphans(readings: Mapping[str, Reading], files_of: Mapping[str, Sequence[Path]]) -> None:
    """Add a fault for each label file without an image."""
    folders: dict[Path, tuple[Path, Reading]] = {}
    for split, images in files_of.items():
        for image in images:
            labels = _labels_of(image)
            if labels.parent != image.parent:
                folders.setdefault(labels.parent, (image.parent, readings[split]))
    for folder, (images_folder, reading) in folders.items():
        present = {path.stem for path in images_folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES}
        for labels in sorted(folder.glob("*.txt")):
            if labels.stem not in present and labels.name != "classes.txt":
                reading.lose("images", Place(labels), f"there is no image {labels.stem}.* in {images_folder}")
