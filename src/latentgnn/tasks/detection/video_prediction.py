"""A detector on video files: annotated videos and COCO-results JSON."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from latentgnn.errors import UserError
from latentgnn.outputs import Results
from latentgnn.tasks.detection.pictures import draw_detections
from latentgnn.tasks.detection.prediction import detect
from latentgnn.tasks.detection.tiles import Tiling
from latentgnn.tasks.detection.video import VIDEO_SUFFIXES, VideoReader, check_video, is_video, writing_video
from latentgnn.tasks.inputs import expand_inputs, noted, raise_faults, result_names


def names_videos(inputs: Sequence[str | Path]) -> bool:
    """Whether inputs are videos, by their names.

    Raises:
        UserError: some are, and others are not.
    """
    videos = [entry for entry in inputs if is_video(entry)]
    if videos and len(videos) < len(inputs):
        other = next(entry for entry in inputs if not is_video(entry))
        raise UserError(f"{videos[0]} is a video and {other} is not: give videos and images to two commands")
    return bool(videos)


def expand_videos(inputs: Sequence[str | Path]) -> list[Path]:
    """The video files that files and patterns name (see `latentgnn.tasks.inputs.expand_inputs`)."""
    return expand_inputs(inputs, suffixes=VIDEO_SUFFIXES, kind="video", check=check_video)


def predict_videos(
    model: nn.Module,
    paths: Sequence[Path],
    *,
    out: Path,
    overwrite: bool = False,
    category_names: Sequence[tuple[int, str]],
    score_threshold: float = 0.5,
    device: torch.device | str = "cpu",
    pictures: bool = True,
    tiling: Tiling | None = None,
    nms_threshold: float = 0.5,
    on_frame: Callable[[Path, int, int], None] | None = None,
) -> tuple[int, int]:
    """Run a detector on video files, frame after frame, and write what it finds.

    Writes ``predictions.json``, a list of COCO-results records, and ``videos/<name>.mp4`` under the names of
    `latentgnn.tasks.inputs.result_names`. A record has ``file_name``, ``frame`` (its number in the video, from 0),
    ``time`` in seconds, and an ``image_id`` that counts the frames of all videos. Only one frame is held at a time, and
    no records. A video that cannot be read to its end does not stop the others; it gets no annotated video, and
    its records so far stay.

    Args:
        model: a detector with torchvision's interface; it is put on ``device`` and in evaluation mode.
        paths: video files (see `expand_videos`).
        out: folder to write to, new or empty.
        overwrite: replace the results of an earlier command in ``out``.
        category_names: id and name of each category, in the order of the labels from 1 on.
        score_threshold: detections below it are left out.
        device: where to run.
        pictures: write annotated videos.
        tiling: look at frames by overlapping tiles.
        nms_threshold: for what tiles have found.
        on_frame: called after each frame with the video, the number of frames done and of all its frames.

    Returns:
        The numbers of objects and of frames.

    Raises:
        UserError: videos could not be read, and it lists them; or ``out`` is not for results (see
            `latentgnn.outputs.Results`).
    """
    category_of_label = {label: category_id for label, (category_id, _) in enumerate(category_names, 1)}
    targets = [Path("videos") / f"{name}.mp4" for name in result_names(paths)]
    names = ["predictions.json", *(targets if pictures else ())]
    faults: list[str] = []
    objects = frames = 0
    model.to(device).eval()
    with (
        Results(out, names, reads=paths, overwrite=overwrite) as results,
        results.json_list("predictions.json") as found,
    ):
        for path, target in zip(paths, targets, strict=True):
            with noted(faults, path), ExitStack() as stack:
                video = VideoReader(path)
                writer = None
                for frame in video:
                    detections = detect(
                        model,
                        frame.image,
                        frames,
                        category_of_label=category_of_label,
                        score_threshold=score_threshold,
                        device=device,
                        tiling=tiling,
                        nms_threshold=nms_threshold,
                    )
                    about = {"file_name": str(path), "frame": frame.index, "time": round(frame.time, 6)}
                    found.add([{**about, **record} for record in detections])
                    objects, frames = objects + len(detections), frames + 1
                    if pictures:
                        # Not enlarged: a video keeps its size.
                        picture = draw_detections(frame.image, detections, category_names, min_side=1)
                        if writer is None:
                            writer = stack.enter_context(
                                writing_video(results.place(target), picture.size, video.frame_rate)
                            )
                        writer.add(picture)
                    if on_frame is not None:
                        on_frame(path, frame.index + 1, len(video))
    raise_faults(faults, inputs=len(paths), kind="video", out=out)
    return objects, frames
