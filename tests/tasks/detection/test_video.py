import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from latentgnn.errors import UserError
from latentgnn.files.outputs import LIST
from latentgnn.tasks.detection.finder import Finder
from latentgnn.tasks.detection.pictures import colour_of
from latentgnn.tasks.detection.video import VideoReader, check_video, require_video, writing_video
from latentgnn.tasks.detection.video_prediction import expand_videos, names_videos, predict_videos


def can_read_videos():
    try:
        require_video()
    except UserError:
        return False
    return True


needs_video = pytest.mark.skipif(not can_read_videos(), reason="torchcodec or FFmpeg is not installed")

NAMES = [(3, "cat"), (8, "dog")]
GRAYS = [20, 60, 100, 140, 180, 220]


def write_video(path, grays=GRAYS, size=(96, 64), rate=5.0):
    with writing_video(path, size, rate) as writer:
        for gray in grays:
            writer.add(Image.new("RGB", size, (gray, gray, gray)))
    return path


def grays_of(path):
    return [np.asarray(frame.image).mean() for frame in VideoReader(path)]


class Gray(nn.Module):
    """Finds one dog in each frame, whose box and score say how bright the frame is."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.seen = 0
        self.fails_at = fails_at

    def forward(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        (image,) = images
        self.seen += 1
        if self.seen == self.fails_at:
            raise KeyboardInterrupt
        return [
            {
                "boxes": torch.tensor([[10.0, 10, 50, 40]]),
                "labels": torch.tensor([2]),
                "scores": image.mean().reshape(1),
            }
        ]


@needs_video
def test_frames_come_back_in_order_with_their_times(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    reader = VideoReader(path)
    assert len(reader) == 6
    assert reader.frame_rate == 5
    frames = list(reader)
    assert [frame.index for frame in frames] == list(range(6))
    assert np.allclose([frame.time for frame in frames], np.arange(6) / 5)
    assert {frame.image.size for frame in frames} == {(96, 64)}
    assert np.allclose(grays_of(path), GRAYS, atol=3)


@needs_video
def test_odd_sides_get_one_pixel_more(tmp_path):
    path = write_video(tmp_path / "odd.mp4", size=(97, 65))
    assert {frame.image.size for frame in VideoReader(path)} == {(98, 66)}
    assert np.allclose(grays_of(path), GRAYS, atol=3)


@needs_video
def test_a_video_that_is_not_finished_is_absent(tmp_path):
    def interrupted():
        with writing_video(tmp_path / "a.mp4", (96, 64), 5.0) as writer:
            writer.add(Image.new("RGB", (96, 64)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@needs_video
def test_records_and_videos_are_written(tmp_path):
    paths = [write_video(tmp_path / "in" / "a.mp4"), write_video(tmp_path / "in" / "b.mp4", GRAYS[::-1])]
    out, seen = tmp_path / "out", []
    counted = predict_videos(
        Finder(Gray().train(), NAMES),
        paths,
        out=out,
        on_frame=lambda *progress: seen.append(progress),
    )
    # Brighter than a half are three frames of each.
    assert counted == (6, 12)
    records = json.loads((out / "predictions.json").read_text())
    assert [(r["file_name"], r["frame"], r["time"], r["image_id"]) for r in records] == [
        *((str(paths[0]), frame, frame / 5, frame) for frame in (3, 4, 5)),
        *((str(paths[1]), frame, frame / 5, 6 + frame) for frame in (0, 1, 2)),
    ]
    assert np.allclose([r["score"] for r in records], np.array([140, 180, 220, 220, 180, 140]) / 255, atol=0.02)
    assert {(r["category_id"], *r["bbox"]) for r in records} == {(8, 10, 10, 40, 30)}
    assert sorted(p.name for p in out.rglob("*") if p.is_file()) == [LIST, "a.mp4", "b.mp4", "predictions.json"]
    drawn = list(VideoReader(out / "videos" / "a.mp4"))
    assert [frame.time for frame in drawn] == [frame.time for frame in VideoReader(paths[0])]
    edges = np.array([frame.image.getpixel((10, 35)) for frame in drawn], float)
    # The box's edge is coloured, where there is one; codecs blur colours.
    assert max(colour_of(1)) - min(colour_of(1)) > 150
    assert (np.ptp(edges, axis=1)[3:] > 60).all()
    assert np.abs(edges[:3] - np.array(GRAYS[:3])[:, None]).max() < 5
    assert seen[:2] == [(paths[0], 1, 6), (paths[0], 2, 6)]
    assert seen[-1] == (paths[1], 6, 6)


@needs_video
def test_results_alone(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    predict_videos(Finder(Gray(), NAMES), [path], out=tmp_path / "out", pictures=False)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [LIST, "predictions.json"]


@needs_video
def test_a_damaged_video_does_not_stop_the_others(tmp_path):
    good, bad = write_video(tmp_path / "good.mp4"), tmp_path / "bad.mp4"
    bad.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    with pytest.raises(UserError, match=r"1 of 2 videos failed") as error:
        predict_videos(Finder(Gray(), NAMES), [bad, good], out=tmp_path / "out")
    assert f"{bad}: the video cannot be read" in str(error.value)
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 3
    assert [p.name for p in (tmp_path / "out" / "videos").iterdir()] == ["good.mp4"]


@needs_video
def test_what_was_found_before_ctrl_c_is_kept_and_no_half_video(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="interrupted"):
        predict_videos(Finder(Gray(fails_at=6), NAMES), [path], out=tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / "predictions.json.partial").read_text())) == 2
    assert not list((tmp_path / "out").rglob("*.mp4"))


PEAK = """
import resource, sys
import torch
from torch import nn
from pathlib import Path
from latentgnn.tasks.detection.finder import Finder
from latentgnn.tasks.detection.video_prediction import predict_videos

class Nothing(nn.Module):
    def forward(self, images):
        return [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}]

torch.set_num_threads(1)
for path in sys.argv[2:]:
    predict_videos(Finder(Nothing(), [(1, "a")]), [Path(path)], out=Path(sys.argv[1]) / Path(path).stem)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@needs_video
def test_memory_does_not_grow_with_the_length(tmp_path):
    """300 frames of 640 x 480 are 276 MB; after 60 frames, 300 take less than a tenth of that more."""
    short, long = (
        write_video(tmp_path / f"{number}.mp4", (number % 256 for number in range(number)), (640, 480), 25.0)
        for number in (60, 300)
    )
    command = [sys.executable, "-c", PEAK, str(tmp_path / "out"), str(short), str(long)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    first, second = (int(line) * unit for line in done.stdout.split())
    assert second - first < 28e6


def test_inputs_are_all_videos_or_none(tmp_path):
    assert names_videos(["a.mp4", "b.MKV", "in/*.mov"])
    assert not names_videos(["a.jpg", "folder"])
    with pytest.raises(UserError, match=r"a\.mp4 is a video and b\.jpg is not"):
        names_videos(["a.mp4", "b.jpg"])


@pytest.mark.parametrize(
    "content", [b"", b"#EXTM3U\nhttp://example.org/a.ts\n", b"ffconcat version 1.0\nfile /etc/passwd\n", b"GIF89a" * 9]
)
def test_what_is_no_video_is_refused_before_ffmpeg_sees_it(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.mp4: not a video"):
        check_video(path)
    with pytest.raises(UserError, match=r"a\.mp4: not a video"):
        expand_videos([path])


@pytest.mark.skipif(os.name != "posix", reason="needs named pipes")
def test_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(UserError, match=r"a\.mp4"):
        check_video(tmp_path / "a.mp4")


def test_what_is_missing_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(UserError, match=r"^this needs 'torchcodec', .* pip install 'latentgnn\[video\]'$"):
        require_video()


def test_a_system_without_ffmpeg_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", type(sys)("torchcodec"))
    sys.modules["torchcodec"].ffmpeg_major_version = None
    with pytest.raises(UserError, match=r"^videos need FFmpeg's libraries.*apt-get install ffmpeg"):
        require_video()
