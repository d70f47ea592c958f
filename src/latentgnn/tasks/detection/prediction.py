"""A detector on image files: annotated pictures and COCO-results JSON."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from latentgnn.outputs import Results
from latentgnn.reading import regular_file
from latentgnn.tasks.detection.evaluation import records_of
from latentgnn.tasks.detection.pictures import draw_detections, png_bytes
from latentgnn.tasks.detection.tiles import Tiling, detect_in_tiles
from latentgnn.tasks.images import (
    IMAGE_SUFFIXES,
    MOST_PIXELS,
    MOST_PIXELS_IN_TILES,
    open_image,
    read_image,
    to_tensor,
)
from latentgnn.tasks.inputs import expand_inputs, in_their_order, noted, raise_faults, result_names
from latentgnn.training.processes import Processes


def expand_images(inputs: Sequence[str | Path], *, in_tiles: bool = False) -> list[Path]:
    """The image files that files, folders and patterns name (see `latentgnn.tasks.inputs.expand_inputs`).

    Args:
        inputs: what was named.
        in_tiles: images are looked at by tiles, and may be larger.
    """

    def check(path: Path) -> None:
        open_image(regular_file(path, "image"), most_pixels=_most_pixels(in_tiles)).close()

    return expand_inputs(inputs, suffixes=IMAGE_SUFFIXES, kind="image", check=check)


def _most_pixels(in_tiles: bool) -> int:
    return MOST_PIXELS_IN_TILES if in_tiles else MOST_PIXELS


def detect(
    model: nn.Module,
    image: Image.Image,
    image_id: int,
    *,
    category_of_label: Mapping[int, int],
    score_threshold: float,
    device: torch.device | str = "cpu",
    tiling: Tiling | None = None,
    nms_threshold: float = 0.5,
    on_tile: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """COCO-results records of what a detector finds in an image.

    Args:
        model: a detector with torchvision's interface, on ``device`` and in evaluation mode.
        image: RGB.
        image_id: of the records.
        category_of_label: the category id of each label.
        score_threshold: detections below it are left out.
        device: where to run.
        tiling: look at it by overlapping tiles (see `latentgnn.tasks.detection.tiles.detect_in_tiles`).
        nms_threshold: for what tiles have found.
        on_tile: called after each tile with the number of tiles done and of all.
    """

    def records(output: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        strong = output["scores"] >= score_threshold
        # Where all are, masks are not copied.
        kept = output if bool(strong.all()) else {name: value[strong] for name, value in output.items()}
        return records_of(kept, image_id, category_of_label)

    with torch.inference_mode():
        if tiling is None:
            return records(model([to_tensor(image).to(device)])[0])
        return detect_in_tiles(
            model, image, tiling, records, device=device, nms_threshold=nms_threshold, on_tile=on_tile
        )


def predict_paths(
    model: nn.Module,
    paths: Sequence[Path],
    *,
    out: Path,
    overwrite: bool = False,
    category_names: Sequence[tuple[int, str]],
    score_threshold: float = 0.5,
    device: torch.device | str = "cpu",
    pictures: bool = True,
    image_ids: Mapping[Path, int] | None = None,
    tiling: Tiling | None = None,
    nms_threshold: float = 0.5,
    on_image: Callable[[Path, int], None] | None = None,
    on_tile: Callable[[Path, int, int], None] | None = None,
    processes: Processes | None = None,
) -> int:
    """Run a detector on image files, one after the other, and write what it finds.

    Writes ``predictions.json``, a list of COCO-results records with a ``file_name`` each, and ``pictures/<name>.png``
    under the names of `latentgnn.tasks.inputs.result_names`. An image that cannot be read does not stop the others; the
    error comes after all of them. What ends the work early leaves all that was found in ``predictions.json.partial``.

    Args:
        model: a detector with torchvision's interface; it is put on ``device`` and in evaluation mode.
        paths: image files (see `expand_images`).
        out: folder to write to, new or empty.
        overwrite: replace the results of an earlier command in ``out``.
        category_names: id and name of each category, in the order of the labels from 1 on.
        score_threshold: detections below it are left out, from the pictures and from the file.
        device: where to run.
        pictures: write annotated pictures.
        image_ids: the records' ``image_id`` of each path; without it, its place in ``paths``, from 0.
        tiling: look at images by overlapping tiles (see `latentgnn.tasks.detection.tiles.detect_in_tiles`).
        nms_threshold: for what tiles have found.
        on_image: called after each image with its path and its number of detections.
        on_tile: called after each tile with the path and the number of the image's tiles done and of all.
        processes: share the images; each writes the pictures of its own, the first one all records.

    Returns:
        The number of objects, in the first process; records are in the file alone, for there may be any number.

    Raises:
        UserError: images could not be read, and it lists them; or ``out`` is not for results (see
            `latentgnn.outputs.Results`).
    """
    category_of_label = {label: category_id for label, (category_id, _) in enumerate(category_names, 1)}
    targets = [Path("pictures") / f"{name}.png" for name in result_names(paths)]
    names = ["predictions.json", *(targets if pictures else ())]
    processes = processes or Processes()
    objects = 0
    faults: dict[int, list[str]] = {}
    model.to(device).eval()

    def found_by_image(results: Results) -> Iterator[list[dict[str, Any]]]:
        for index in processes.mine(len(paths)):
            path, named, told = paths[index], list[dict[str, Any]](), faults.setdefault(index, [])
            with noted(told, path):
                image = read_image(path, most_pixels=_most_pixels(tiling is not None))
                detections = detect(
                    model,
                    image,
                    index if image_ids is None else image_ids[path],
                    category_of_label=category_of_label,
                    score_threshold=score_threshold,
                    device=device,
                    tiling=tiling,
                    nms_threshold=nms_threshold,
                    on_tile=None if on_tile is None else partial(on_tile, path),
                )
                named = [{"file_name": str(path), **record} for record in detections]
            # Kept before the picture, which may fail.
            yield named
            if not told:
                with noted(told, path):
                    if pictures:
                        results.write(targets[index], png_bytes(draw_detections(image, detections, category_names)))
                    if on_image is not None:
                        on_image(path, len(detections))

    with Results(out, names, reads=paths, overwrite=overwrite, first=processes.is_first) as results:
        if processes.world > 1 and processes.is_first:
            results.announce(targets[index] for index in processes.others(len(paths)) if pictures)
        processes.wait()
        with results.json_list("predictions.json") as found:
            for named in processes.in_order(found_by_image(results), len(paths)):
                found.add(named)
                objects += len(named)
    listed = in_their_order(processes.gathered(faults))
    processes.done()
    raise_faults(listed, inputs=len(paths), kind="image", out=out)
    return objects
