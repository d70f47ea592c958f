"""A detector on image files: annotated pictures and COCO-results JSON."""

import glob
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from latentgnn.errors import UserError
from latentgnn.files import write_bytes, write_json
from latentgnn.tasks.detection.evaluation import records_of
from latentgnn.tasks.detection.images import IMAGE_SUFFIXES, read_image, to_tensor
from latentgnn.tasks.detection.pictures import draw_detections, png_bytes


def expand_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """The image files that files, folders and patterns name, each once, in the order given.

    A folder gives the images that lie in it, not those of folders within it. A pattern (``*``, ``?``, ``[...]``, and
    ``**`` for folders at any depth) gives the images that it matches. Both are sorted and pass over other files; a file
    that is named outright must be an image.

    Args:
        inputs: files, folders and patterns; a pattern must be quoted in a shell that would expand it.

    Raises:
        UserError: an input does not exist, is not an image, or names no image.
    """
    if not inputs:
        raise UserError("no input: give image files, folders or quoted patterns")
    found: dict[Path, Path] = {}
    for entry in inputs:
        for path in _expand(entry):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _expand(entry: str | Path) -> list[Path]:
    path = Path(entry)
    if path.is_dir():
        images = sorted(p for p in path.iterdir() if _named_as_image(p))
        if not images:
            raise UserError(
                f"{entry}: the folder has no images ({_suffixes()}); for those of its folders: '{path}/**/*'"
            )
        return images
    # A file is a file, also with a bracket in its name.
    if path.exists():
        try:
            with Image.open(path):
                return [path]
        except OSError:
            raise UserError(f"{entry}: not an image, or one in a format that Pillow cannot read") from None
    if not glob.has_magic(str(entry)):
        raise UserError(f"{entry}: no such file or folder")
    matches = sorted(Path(match) for match in glob.glob(str(entry), recursive=True))
    images = [match for match in matches if _named_as_image(match)]
    if not images:
        but = f"; it matches {len(matches)} other files or folders" if matches else ""
        raise UserError(f"{entry}: the pattern matches no image ({_suffixes()}){but}")
    return images


def _named_as_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))


def predict_paths(
    model: nn.Module,
    paths: Sequence[Path],
    *,
    out: Path,
    category_names: Sequence[tuple[int, str]],
    score_threshold: float = 0.5,
    device: torch.device | str = "cpu",
    pictures: bool = True,
    image_ids: Mapping[Path, int] | None = None,
    on_image: Callable[[Path, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Run a detector on image files, one after the other, and write what it finds.

    Writes ``predictions.json``, a list of COCO-results records with a ``file_name`` each, and ``pictures/<name>.png``;
    where several images have one name, the later pictures get ``-2``, ``-3`` and so on. An image that cannot be read
    does not stop the others: all that were read are written before the error is raised.

    Args:
        model: a detector with torchvision's interface; it is put on ``device`` and in evaluation mode.
        paths: image files (see `expand_inputs`).
        out: folder to write to.
        category_names: id and name of each category, in the order of the labels from 1 on.
        score_threshold: detections below it are left out, from the pictures and from the file.
        device: where to run.
        pictures: write annotated pictures.
        image_ids: the records' ``image_id`` of each path; without it, its place in ``paths``, from 0.
        on_image: called after each image with its path and its number of detections.

    Returns:
        The records.

    Raises:
        UserError: images could not be read, and it lists them; or ``out`` is a file.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a folder to write to is needed, but this is a file")
    category_of_label = {label: category_id for label, (category_id, _) in enumerate(category_names, 1)}
    stems = _unique_stems(paths)
    records: list[dict[str, Any]] = []
    faults: list[str] = []
    model.to(device).eval()
    for index, path in enumerate(paths):
        try:
            image = read_image(path)
        except UserError as error:
            faults.append(str(error))
            continue
        with torch.inference_mode():
            (output,) = model([to_tensor(image).to(device)])
        kept = output["scores"] >= score_threshold
        found = records_of(
            {name: value[kept] for name, value in output.items()},
            index if image_ids is None else image_ids[path],
            category_of_label,
        )
        records += [{"file_name": str(path), **record} for record in found]
        if pictures:
            picture = draw_detections(image, found, category_names)
            write_bytes(out / "pictures" / f"{stems[index]}.png", png_bytes(picture))
        if on_image is not None:
            on_image(path, len(found))
    write_json(out / "predictions.json", records)
    if faults:
        raise UserError(
            f"{len(faults)} of {len(paths)} images could not be read; the others are done, in {out}:\n  "
            + "\n  ".join(faults)
        )
    return records


def _unique_stems(paths: Sequence[Path]) -> list[str]:
    """Each path's stem, numbered where it was taken, as file systems that ignore case see it too."""
    stems: list[str] = []
    taken: set[str] = set()
    for path in paths:
        stem, number = path.stem, 1
        while stem.casefold() in taken:
            number += 1
            stem = f"{path.stem}-{number}"
        taken.add(stem.casefold())
        stems.append(stem)
    return stems
