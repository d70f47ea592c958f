"""COCO's own format: one JSON file per split."""

from pathlib import Path

from latentgnn.files.json_lists import read_json_lists
from latentgnn.files.plain_values import shown
from latentgnn.files.reading import UnreadableError
from latentgnn.files.stored_lists import StoredList
from latentgnn.tasks.detection.formats.folders import SPLIT_NAMES
from latentgnn.tasks.detection.formats.records import Reading

# Roboflow puts a file of this name into each split's image folder.
_IN_FOLDERS = "_annotations.coco.json"
_WHOLE = (
    *("annotations/instances_default.json", "annotations/instances.json", "annotations/annotations.json"),
    *("annotations.json", "instances.json", "instances_default.json", _IN_FOLDERS, "coco.json", "result.json"),
)
_IMAGE_FOLDERS = ("images/default", "images", "")


def other_files(root: Path) -> dict[str, tuple[Path, Path]]:
    """Find the annotation file and the image folder of each split that do not have COCO's own names.

    Returns:
        ``train`` and ``val`` if folders have an ``_annotations.coco.json``; ``all`` if one file is for all images; or
        an empty dict.
    """
    files: dict[str, tuple[Path, Path]] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        split = SPLIT_NAMES.get(folder.name.lower())
        if split in ("train", "val") and (folder / _IN_FOLDERS).is_file():
            files.setdefault(split, (folder / _IN_FOLDERS, folder))
    if files:
        return files
    whole = next((root / name for name in _WHOLE if (root / name).is_file()), None)
    if whole is None:
        return {}
    return {"all": (whole, next(root / name for name in _IMAGE_FOLDERS if (root / name).is_dir()))}


def read_coco(path: Path, image_folder: Path) -> Reading:
    """Read the JSON object of a file with its three lists; anything else is a fatal fault.

    Images and annotations stay in the file, and are read from it on each access.
    """
    reading = Reading(file=path, image_folder=image_folder, format="coco")
    try:
        dataset = read_json_lists(path, ("images", "annotations"), "annotation file")
    except UnreadableError as error:
        reading.fatal(error.message, record=error.place)
        return reading
    if not isinstance(dataset, dict):
        reading.fatal(f"expected a JSON object at the top, but it is {shown(dataset)}")
        return reading
    for name in ("images", "annotations", "categories"):
        if name not in dataset:
            reading.fatal(f"the list {name!r} is missing at the top level")
        elif not isinstance(dataset[name], list | StoredList):
            reading.fatal(f"expected a list, but it is {shown(dataset[name])}", record=name)
        elif not dataset[name] and name != "annotations":
            reading.fatal("the list is empty", record=name)
    reading.dataset = dataset
    return reading
