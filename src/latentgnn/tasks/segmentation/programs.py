"""A segmenter of images as a program without Python."""

import torch
from torch import Tensor, nn
from torch.export import Dim

from latentgnn.tasks.exporting import Program
from latentgnn.tasks.segmentation.config import SegmentationConfig
from latentgnn.tasks.segmentation.prediction import normalise


class Logits(nn.Module):
    """A segmenter that takes pixels in 0..1 and returns a tensor.

    Args:
        network: the network in evaluation mode.
        config: the run's configuration.
    """

    def __init__(self, network: nn.Module, config: SegmentationConfig) -> None:
        super().__init__()
        self.network = network
        self._model = config.model

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K, H, W) of images (B, 3, H, W)."""
        logits: Tensor = self.network(normalise(images, self._model))["out"]
        return logits


def segmenter_program(model: nn.Module, config: SegmentationConfig) -> Program:
    """Return the network, from pixels to logits, including normalisation.

    Args:
        model: the network in evaluation mode, on the CPU.
        config: the run's configuration.
    """
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"images": torch.rand(batch, 3, *size, generator=generator)} for batch, size in ((2, (96, 128)), (3, (128, 80)))
    ]
    factor = config.data.scale
    resized = f"; images are resized by {factor:g} before, and logits to the image's size behind" if factor != 1 else ""
    return Program(
        network=Logits(model, config).eval(),
        samples=samples,
        dynamic={"images": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}},
        inputs={"images": "float32 (B, 3, H, W), red, green and blue in 0..1"},
        outputs={"logits": "float32 (B, K, H, W); the class of a pixel is that of its largest"},
        part=f"the whole network, from pixels to the logits of every pixel{resized}",
    )
