"""Runs a detector on image files: annotated pictures and COCO-results JSON."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from latentgnn.files.outputs import Results
from latentgnn.files.reading import regular_file
from latentgnn.tasks.detection.finder import Finder
from latentgnn.tasks.detection.pictures import draw_detections
from latentgnn.tasks.images import (
    IMAGE_SUFFIXES,
    MOST_PIXELS,
    MOST_PIXELS_IN_TILES,
    open_image,
    png_bytes,
    read_image,
)
from latentgnn.tasks.inputs import expand_inputs, in_their_order, noted, raise_faults, result_names
from latentgnn.training.processes import Processes


def expand_images(inputs: Sequence[str | Path], *, in_tiles: bool = False) -> list[Path]:
    """Expand files, folders and patterns to image files (see `latentgnn.tasks.inputs.expand_inputs`).

    Args:
        inputs: files, folders and patterns.
        in_tiles: images are processed in tiles, and may be larger.
    """

    def check(path: Path) -> None:
        open_image(regular_file(path, "image"), most_pixels=_most_pixels(in_tiles)).close()

    return expand_inputs(inputs, suffixes=IMAGE_SUFFIXES, kind="image", check=check)


def _most_pixels(in_tiles: bool) -> int:
    return MOST_PIXELS_IN_TILES if in_tiles else MOST_PIXELS


def predict_paths(
    finder: Finder,
    paths: Sequence[Path],
    *,
    out: Path,
    overwrite: bool = False,
    pictures: bool = True,
    on_tile: Callable[[Path, int, int], None] | None = None,
    processes: Processes | None = None,
) -> int:
    """Run a detector on image files, one after the other, and write its detections.

    Writes ``predictions.json``, a list of COCO-results records with a ``file_name`` each, whose ``image_id`` is the
    file's index in ``paths``, and ``pictures/<name>.png`` under the names of `latentgnn.tasks.inputs.result_names`. An
    image that cannot be read does not stop the others; the error is raised after all of them. If the work ends early,
    the records so far are in ``predictions.json.partial``.

    Args:
        finder: the detector.
        paths: image files (see `expand_images`).
        out: output folder, new or empty.
        overwrite: replace the results of an earlier command in ``out``.
        pictures: write annotated pictures.
        on_tile: called after each tile with the path, the number of the image's tiles done, and their total.
        processes: processes that share the images; each writes its own pictures, and the first one all records.

    Returns:
        The number of objects, in the first process; the records are only in the file, as there may be very many.

    Raises:
        UserError: if images could not be read, which it lists; or ``out`` cannot be used for results (see
            `latentgnn.files.outputs.Results`).
    """
    targets = [Path("pictures") / f"{name}.png" for name in result_names(paths)]
    names = ["predictions.json", *(targets if pictures else ())]
    processes = processes or Processes()
    objects = 0
    faults: dict[int, list[str]] = {}

    def found_by_image(results: Results) -> Iterator[list[dict[str, Any]]]:
        for index in processes.mine(len(paths)):
            path, named, told = paths[index], list[dict[str, Any]](), faults.setdefault(index, [])
            with noted(told, path):
                image = read_image(path, most_pixels=_most_pixels(finder.tiling is not None))
                detections = finder.find(image, index, on_tile=None if on_tile is None else partial(on_tile, path))
                named = [{"file_name": str(path), **record} for record in detections]
            # Written before the picture is drawn, which may fail.
            yield named
            if pictures and not told:
                with noted(told, path):
                    results.write(targets[index], png_bytes(draw_detections(image, detections, finder.categories)))

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
