"""Runs a segmenter on images of any size, whole or in overlapping windows; every original pixel gets a class."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from latentgnn.files.outputs import Results
from latentgnn.tasks.class_scores import Predicted
from latentgnn.tasks.images import IMAGE_SUFFIXES, open_image, png_bytes, read_image, to_tensor
from latentgnn.tasks.inputs import expand_inputs, in_their_order, noted, raise_faults, result_names
from latentgnn.tasks.segmentation.config import Color, ModelConfig, SegmentationConfig
from latentgnn.tasks.segmentation.datasets import scaled
from latentgnn.tasks.segmentation.pictures import overlay
from latentgnn.training.processes import Processes


def normalise(images: Tensor, config: ModelConfig) -> Tensor:
    """Normalise images in 0..1, (..., 3, H, W), for the network."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
    return (images - mean) / std


def network_input(image: Tensor, config: SegmentationConfig) -> Tensor:
    """Resize an image, (3, H, W) in 0..1, for the network, and normalise it; (1, 3, h, w)."""
    size = scaled(image.shape[-2:], config.data.scale)
    batch = normalise(image[None], config.model)
    if size == list(image.shape[-2:]):
        return batch
    return F.interpolate(batch, size=size, mode="bilinear", align_corners=False, antialias=True)


def predict_image(model: nn.Module, image: Tensor, config: SegmentationConfig) -> Tensor:
    """Return the class of every pixel of an image.

    Args:
        model: the network in evaluation mode.
        image: (3, H, W) in 0..1, on any device.
        config: the size at which the network sees images, and the windows.

    Returns:
        int64 (H, W), on the CPU.
    """
    device = next(model.parameters()).device
    with torch.inference_mode():
        batch = network_input(image.to(device), config)
        side, overlap = config.evaluation.tiles, config.evaluation.tile_overlap
        scores = model(batch)["out"] if side is None else _by_windows(model, batch, side, overlap)
        size = list(image.shape[-2:])
        if list(scores.shape[-2:]) != size:
            scores = F.interpolate(scores.float(), size=size, mode="bilinear", align_corners=False)
        return scores[0].argmax(dim=0).cpu()


def _by_windows(model: nn.Module, batch: Tensor, side: int, overlap: float) -> Tensor:
    """Scores of an image, averaged over the windows that contain a pixel, as in mmsegmentation's ``slide`` mode."""
    height, width = batch.shape[-2:]
    total: Tensor | None = None
    times = batch.new_zeros(height, width)
    for top in starts(height, side, overlap):
        for left in starts(width, side, overlap):
            place = (..., slice(top, top + side), slice(left, left + side))
            scores = model(batch[place])["out"].float()
            if total is None:
                total = scores.new_zeros(1, scores.shape[1], height, width)
            total[place] += scores
            times[place] += 1
    assert total is not None
    return total / times


def starts(length: int, side: int, overlap: float) -> list[int]:
    """Return the starts of windows along one axis; the last window ends at the end.

    Example:
        >>> starts(100, 40, 0.25), starts(30, 40, 0.25)
        ([0, 30, 60], [0])
        >>> starts(110, 40, 0.25)
        [0, 30, 60, 70]
    """
    step = max(1, round(side * (1 - overlap)))
    return [*range(0, max(length - side, 0), step), max(length - side, 0)]


def expand_images(inputs: Sequence[str | Path]) -> list[Path]:
    """Expand files, folders and patterns to image files (see `latentgnn.tasks.inputs.expand_inputs`)."""
    return expand_inputs(inputs, suffixes=IMAGE_SUFFIXES, kind="image", check=_check_image)


def predict_files(
    model: nn.Module,
    paths: Sequence[Path],
    config: SegmentationConfig,
    *,
    class_ids: Sequence[int],
    colors: Sequence[Color],
    out: Path,
    overwrite: bool = False,
    pictures: bool = True,
    on_image: Callable[[Predicted], None] | None = None,
    processes: Processes | None = None,
) -> list[Predicted]:
    """Predict image files one after the other, and write a label picture with the data set's own ids for each.

    Label pictures are gray PNG files of 8 bits, or of 16 bits if an id is above 255. A file that cannot be read does
    not stop the others; the error is raised after all of them.

    Args:
        model: the network in evaluation mode.
        paths: image files.
        config: see `predict_image`.
        class_ids: the id of each class.
        colors: colour of each class, in the pictures.
        out: output folder, new or empty, for ``labels/`` and, with ``pictures``, ``pictures/``.
        overwrite: replace the results of an earlier command in ``out``.
        pictures: draw the classes over each image.
        on_image: called after each image, in the first process.
        processes: processes that share the images; each writes its own.

    Returns:
        The predictions; in the first process those of all files.

    Raises:
        UserError: if files could not be read, which it lists; or ``out`` cannot be used for results (see
            `latentgnn.files.outputs.Results`).
    """
    names = result_names(paths)
    targets = [Path("labels") / f"{name}.png" for name in names]
    drawn = [Path("pictures") / f"{name}.png" for name in names]
    processes = processes or Processes()
    ids = np.array(class_ids, np.uint16 if max(class_ids) > 255 else np.uint8)
    done: list[Predicted] = []
    faults: dict[int, list[str]] = {}

    def predicted_by_image(results: Results) -> Iterator[Predicted | None]:
        for index in processes.mine(len(paths)):
            predicted = None
            with noted(faults.setdefault(index, []), paths[index]):
                image = read_image(paths[index])
                labels = predict_image(model, to_tensor(image), config).numpy()
                results.write(targets[index], png_bytes(Image.fromarray(ids[labels])))
                if pictures:
                    results.write(drawn[index], png_bytes(overlay(image, labels, colors)))
                counts = np.bincount(labels.ravel(), minlength=len(ids))
                predicted = Predicted(paths[index], out / targets[index], counts)
            yield predicted

    written = [*targets, *(drawn if pictures else ())]
    with Results(out, written, reads=paths, overwrite=overwrite, first=processes.is_first) as results:
        if processes.world > 1 and processes.is_first:
            others = processes.others(len(paths))
            results.announce(of[index] for index in others for of in ((targets, drawn) if pictures else (targets,)))
        processes.wait()
        for predicted in processes.in_order(predicted_by_image(results), len(paths)):
            if predicted is not None:
                done.append(predicted)
                if on_image is not None:
                    on_image(predicted)
    listed = in_their_order(processes.gathered(faults))
    processes.done()
    raise_faults(listed, inputs=len(paths), kind="image", out=out)
    return done


def _check_image(path: Path) -> None:
    open_image(path).close()
