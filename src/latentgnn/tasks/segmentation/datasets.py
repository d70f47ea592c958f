"""Labelled images, unchanged or with random changes for training."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from latentgnn.errors import UserError
from latentgnn.tasks.classes import IGNORE, class_names, first_ids
from latentgnn.tasks.images import read_image, to_tensor
from latentgnn.tasks.segmentation.config import AugmentConfig, DataConfig
from latentgnn.tasks.segmentation.labels import read_ids, to_labels, unknown_ids
from latentgnn.tasks.segmentation.layouts import Source
from latentgnn.training.randomness import stream_of


class Sample(NamedTuple):
    """An image and its labels.

    Args:
        number: its index in its set.
        name: name shown to the user.
        image: float32 (3, height, width) in 0..1.
        labels: classes or `IGNORE`, int64 (height, width).
    """

    number: int
    name: str
    image: Tensor
    labels: Tensor


class Changed(NamedTuple):
    """A training image after random changes.

    Args:
        name: name shown to the user.
        image: float32 (3, height, width) in 0..1.
        labels: classes or `IGNORE`, int64 (height, width).
    """

    name: str
    image: Tensor
    labels: Tensor


class LabelledImages:
    """The sound images of a split, in order.

    Args:
        sources: the files.
        config: configuration from `latentgnn.tasks.segmentation.layouts.resolve`.
        counts: number of pixels of each class, int64 (K,).
        skipped: message about images that were left out; empty if none was.
    """

    def __init__(self, sources: list[Source], config: DataConfig, *, counts: NDArray[np.int64], skipped: str = ""):
        self.sources = sources
        self.config = config
        self.counts = counts
        self.skipped = skipped
        self.class_names = class_names(config.classes)
        self.class_ids = first_ids(config.classes)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int, /) -> Sample:
        name, image, label = self.sources[index]
        assert image is not None
        assert label is not None
        ids = read_ids(label, self.config)
        labels, strange = to_labels(ids, self.config)
        if strange:
            raise UserError(f"{label}: {unknown_ids(strange)}")
        pixels = to_tensor(read_image(image, size=(ids.shape[1], ids.shape[0])))
        return Sample(index, name, pixels, torch.from_numpy(labels))

    @property
    def images(self) -> list[Path]:
        """Return the image files, in order."""
        return [source.image for source in self.sources if source.image is not None]

    @property
    def files(self) -> list[Path]:
        """Return the files that are read repeatedly."""
        return [path for source in self.sources for path in source[1:] if path is not None]


class TrainingImages:
    """Images with random changes that depend only on the seed, the epoch and the index.

    Args:
        images: the original images.
        seed: seed of everything that is drawn.
    """

    def __init__(self, images: LabelledImages, *, seed: int) -> None:
        self._images = images
        self._seed = seed
        self._transform = Augment(images.config.augment, scale=images.config.scale)

    def __len__(self) -> int:
        return len(self._images)

    def group_of(self, index: int) -> int:
        """Return 0: images of different sizes can share a batch, with padding."""
        return 0

    def __getitem__(self, key: tuple[int, int], /) -> Changed:
        epoch, index = key
        sample = self._images[index]
        with stream_of(self._seed, epoch, index):
            image, labels = self._transform(sample.image, sample.labels)
        return Changed(sample.name, image, labels)


class Augment:
    """torchvision's transforms of an image and its labels, in the usual order: size, crop, mirroring, colour.

    All randomness comes from torch's default CPU generator.

    Args:
        config: the changes.
        scale: factor on the size, in addition to the random one.
    """

    def __init__(self, config: AugmentConfig, *, scale: float) -> None:
        self._scale = scale
        self._range = config.scale
        steps: list[v2.Transform] = []
        if config.crop is not None:
            fill = {tv_tensors.Image: 0.0, tv_tensors.Mask: IGNORE}
            steps.append(v2.RandomCrop(list(config.crop), pad_if_needed=True, fill=fill))
        steps += [v2.RandomHorizontalFlip(config.flip), v2.RandomPhotometricDistort(p=config.color)]
        self._steps = v2.Compose(steps)

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return a changed image in 0..1, and its labels."""
        factor = self._scale
        if self._range is not None:
            factor *= float(torch.empty(()).uniform_(*self._range))
        size = scaled(image.shape[-2:], factor)
        picture, mask = tv_tensors.Image(image), tv_tensors.Mask(labels)
        if size != list(image.shape[-2:]):
            picture, mask = v2.functional.resize(picture, size), v2.functional.resize(mask, size)
        picture, mask = self._steps(picture, mask)
        return picture.as_subclass(Tensor).clamp(0, 1), mask.as_subclass(Tensor)


def scaled(size: tuple[int, ...] | torch.Size, factor: float) -> list[int]:
    """Return height and width scaled by a factor.

    Example:
        >>> scaled((360, 481), 0.5)
        [180, 240]
    """
    return [max(1, round(side * factor)) for side in size]


def padded(samples: list[Changed]) -> tuple[Tensor, Tensor]:
    """Pad and stack samples of any sizes to images (B, 3, H, W) and labels (B, H, W); padding is black and `IGNORE`."""
    height, width = (max(sample.labels.shape[side] for sample in samples) for side in (0, 1))
    images = torch.zeros(len(samples), 3, height, width)
    labels = torch.full((len(samples), height, width), IGNORE, dtype=torch.int64)
    for place, sample in enumerate(samples):
        rows, columns = sample.labels.shape
        images[place, :, :rows, :columns] = sample.image
        labels[place, :rows, :columns] = sample.labels
    return images, labels
