"""Reading and writing video files with torchcodec and the system's FFmpeg."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from latentgnn.errors import UserError, first_line, is_lack_of_memory, require
from latentgnn.files.reading import regular_file
from latentgnn.files.writing import replacing

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"})
"""Suffixes in lower case that distinguish videos from images."""

# First bytes of such files. FFmpeg reads much more, including playlists that refer to other files and addresses.
_BEGINNINGS = (
    *((4, kind) for kind in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),
    (0, b"\x1a\x45\xdf\xa3"),  # Matroska, WebM
    (8, b"AVI "),
    (0, b"\x00\x00\x01\xba"),  # MPEG
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),  # Windows Media
)


def is_video(path: Path | str) -> bool:
    """Whether a name has the suffix of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def check_video(path: Path) -> None:
    """Check a file's first bytes.

    Raises:
        UserError: if it is missing, not a file, or not a video.
    """
    with regular_file(path, "video").open("rb") as file:
        beginning = file.read(32)
    if not any(beginning[place:].startswith(kind) for place, kind in _BEGINNINGS):
        raise UserError(f"{path}: not a video, or one in a format other than AVI, Matroska, MP4, MPEG, WebM or WMV")


def require_video() -> ModuleType:
    """Import the package that reads and writes videos.

    Raises:
        UserError: if it, or the FFmpeg that it needs, is missing.
    """
    torchcodec = require("torchcodec", extra="video")
    if torchcodec.ffmpeg_major_version is None:
        raise UserError(
            "videos need FFmpeg's libraries, of a version from 4 to 9, and torchcodec finds none: install them, for "
            "example with `apt-get install ffmpeg`, `brew install ffmpeg` or `conda install ffmpeg`"
        )
    return torchcodec


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A frame of a video.

    Args:
        index: its index, from 0.
        time: time at which it is shown, in seconds.
        image: RGB, upright.
    """

    index: int
    time: float
    image: Image.Image


class VideoReader:
    """A video file's frames, in order, one at a time.

    Args:
        path: the file.

    Attributes:
        frame_rate: frames per second; the mean if it varies.

    Raises:
        UserError: if it cannot be read, or the software for it is missing.
    """

    def __init__(self, path: Path) -> None:
        require_video()
        from torchcodec.decoders import VideoDecoder

        check_video(path)
        self.path = path
        with _told(path):
            # Exact mode first finds every frame, without decoding, whatever the file's header claims.
            self._decoder: Any = VideoDecoder(path, seek_mode="exact", device="cpu")
            frame_rate = self._decoder.metadata.average_fps
        if frame_rate is None:
            raise UserError(f"{path}: the video gives neither its length nor its frame rate")
        self.frame_rate = float(frame_rate)

    def __len__(self) -> int:
        return len(self._decoder)

    def __iter__(self) -> Iterator[Frame]:
        for index in range(len(self)):
            with _told(self.path):
                frame = self._decoder.get_frame_at(index)
                pixels = frame.data.permute(1, 2, 0).contiguous().numpy()
            yield Frame(index=index, time=float(frame.pts_seconds), image=Image.fromarray(pixels))


class VideoWriter:
    """Writes frames of one size to an MP4 file; see `writing_video`.

    Args:
        stream: torchcodec's stream.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def add(self, picture: Image.Image) -> None:
        """Append an RGB picture."""
        pixels = np.array(picture)
        # The usual codecs store colours for 2 x 2 pixels: odd sides are extended by one.
        pixels = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge")
        self._stream.add_frames(torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous())


@contextmanager
def writing_video(path: Path, size: tuple[int, int], frame_rate: float) -> Iterator[VideoWriter]:
    """Create an MP4 file that gets its name when the block ends without an error; otherwise it is removed.

    Args:
        path: the name.
        size: (width, height) of the frames.
        frame_rate: frames per second.

    Raises:
        UserError: if FFmpeg has no codec for it.
    """
    require_video()
    from torchcodec.encoders import Encoder

    width, height = size
    encoder = Encoder()
    stream = encoder.add_video(height=height + height % 2, width=width + width % 2, frame_rate=frame_rate, device="cpu")
    with replacing(path) as file:
        try:
            encoder.open_file_like(file, format="mp4")
        except RuntimeError as error:
            raise UserError(f"{path}: FFmpeg cannot write this MP4 file ({first_line(error)})") from error
        with encoder:
            yield VideoWriter(stream)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn errors of the decoder into messages."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if is_lack_of_memory(error):
            raise
        # Torchcodec's own messages begin with a function and its place in the source, and FFmpeg's with the path.
        what = re.sub(r"^.*\.cpp:\d+, ", "", first_line(error)).replace(f"Could not open input file: {path} ", "")
        raise UserError(f"{path}: the video cannot be read ({what}): it may be damaged or cut short") from error
