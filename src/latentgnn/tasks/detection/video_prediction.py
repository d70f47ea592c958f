"""Runs a detector on video files: annotated videos and COCO-results JSON."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from latentgnn.errors import UserError
from latentgnn.files.outputs import Results
from latentgnn.tasks.detection.finder import Finder
from latentgnn.tasks.detection.pictures import draw_detections
from latentgnn.tasks.detection.video import VIDEO_SUFFIXES, VideoReader, check_video, is_video, writing_video
from latentgnn.tasks.inputs import expand_inputs, noted, raise_faults, result_names


def names_videos(inputs: Sequence[str | Path]) -> bool:
    """Whether inputs are videos, according to their names.

    Raises:
        UserError: if only some of them are.
    """
    videos = [entry for entry in inputs if is_video(entry)]
    if videos and len(videos) < len(inputs):
        other = next(entry for entry in inputs if not is_video(entry))
        raise UserError(f"{videos[0]} is a video and {other} is not: give videos and images to two commands")
    return bool(videos)


def expand_videos(inputs: Sequence[str | Path]) -> list[Path]:
    """Expand files and patterns to video files (see `latentgnn.tasks.inputs.expand_inputs`)."""
    return expand_inputs(inputs, suffixes=VIDEO_SUFFIXES, kind="video", check=check_video)


def predict_videos(
    finder: Finder,
    paths: Sequence[Path],
    *,
    out: Path,
    overwrite: bool = False,
    pictures: bool = True,
    on_frame: Callable[[Path, int, int], None] | None = None,
) -> tuple[int, int]:
    """Run a detector on video files, frame by frame, and write its detections.

    Writes ``predictions.json``, a list of COCO-results records, and ``videos/<name>.mp4`` under the names of
    `latentgnn.tasks.inputs.result_names`. A record has ``file_name``, ``frame`` (its index in the video, from 0),
    ``time`` in seconds, and an ``image_id`` that counts the frames of all videos. Only one frame is kept in memory at a
    time, and no records. A video that cannot be read to its end does not stop the others; it gets no annotated video,
    but its records so far are kept.

    Args:
        finder: the detector.
        paths: video files (see `expand_videos`).
        out: output folder, new or empty.
        overwrite: replace the results of an earlier command in ``out``.
        pictures: write annotated videos.
        on_frame: called after each frame with the video, the number of frames done, and their total.

    Returns:
        The numbers of objects and of frames.

    Raises:
        UserError: if videos could not be read, which it lists; or ``out`` cannot be used for results (see
            `latentgnn.files.outputs.Results`).
    """
    targets = [Path("videos") / f"{name}.mp4" for name in result_names(paths)]
    names = ["predictions.json", *(targets if pictures else ())]
    faults: list[str] = []
    objects = frames = 0
    with (
        Results(out, names, reads=paths, overwrite=overwrite) as results,
        results.json_list("predictions.json") as found,
    ):
        for path, target in zip(paths, targets, strict=True):
            with noted(faults, path), ExitStack() as stack:
                video = VideoReader(path)
                writer = None
                for frame in video:
                    detections = finder.find(frame.image, frames)
                    about = {"file_name": str(path), "frame": frame.index, "time": round(frame.time, 6)}
                    found.add([{**about, **record} for record in detections])
                    objects, frames = objects + len(detections), frames + 1
                    if pictures:
                        # Not enlarged, so that the video keeps its size.
                        picture = draw_detections(frame.image, detections, finder.categories, min_side=1)
                        if writer is None:
                            writer = stack.enter_context(
                                writing_video(results.place(target), picture.size, video.frame_rate)
                            )
                        writer.add(picture)
                    if on_frame is not None:
                        on_frame(path, frame.index + 1, len(video))
    raise_faults(faults, inputs=len(paths), kind="video", out=out)
    return objects, frames
