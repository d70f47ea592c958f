"""The part of a detector that can be a program without Python: everything that does not depend on detections."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from latentgnn.errors import UserError
from latentgnn.tasks.exporting import Program

# The pyramid's coarsest level needs two cells per side, and the body has a stride of 32.
_STRIDE = 32
_LARGEST = 512  # multiple of the stride
_OUTPUTS = {
    "objectness": "of the proposal head, a logit an anchor, (B, A, h, w)",
    "deltas": "of the proposal head, four an anchor, (B, 4 A, h, w)",
}


class DenseDetector(nn.Module):
    """The part of a detector that does not depend on detections: normalisation, body with blocks, pyramid, dense heads.

    Args:
        detector: a torchvision-style detector in evaluation mode.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone: nn.Module = detector.backbone
        self.is_retinanet = hasattr(detector, "head")
        self.head: nn.Module = detector.head if self.is_retinanet else detector.rpn.head
        for name in ("mean", "std"):
            values = torch.tensor(getattr(detector.transform, f"image_{name}"))
            self.register_buffer(name, values[:, None, None], persistent=False)

    def forward(self, images: Tensor, mask: Tensor) -> tuple[list[Tensor], ...]:
        """Return the maps of the pyramid, and the outputs of the dense heads on them.

        Args:
            images: (B, 3, H, W) in 0..1, resized, H and W multiples of 32.
            mask: (B, H, W), bool, True on an image's own pixels and not on padding.
        """
        own = mask[:, None]
        images = torch.where(own, (images - self.mean) / self.std, 0)
        maps = list(self.backbone(torch.cat((images, own.to(images)), dim=1)).values())
        found = self.head(maps)
        if self.is_retinanet:
            return maps, [found["cls_logits"]], [found["bbox_regression"]]
        return maps, *map(list, found)


def detector_program(model: nn.Module, detector: str) -> Program:
    """Return the dense part of a detector.

    Args:
        model: the detector in evaluation mode, on the CPU.
        detector: kind of detector, ``model.detector``.

    Raises:
        UserError: if its backbone does not accept images of the size that is tried.
    """
    network = DenseDetector(model).eval()
    generator = torch.Generator().manual_seed(0)

    def sample(batch: int, height: int, width: int, own: int) -> dict[str, Tensor]:
        mask = torch.zeros(batch, height, width, dtype=torch.bool)
        mask[..., :own] = True
        return {"images": torch.rand(batch, 3, height, width, generator=generator), "mask": mask}

    # At the coarsest level, of stride 64 or 128, the exporter would specialise on a single row or column.
    least = 5 if network.is_retinanet else 3
    samples = [sample(2, 256, 288, 270), sample(1, _STRIDE * least, 224, 224)]
    batch, height, width = Dim("batch", max=1024), *(Dim(name, min=least, max=_LARGEST) for name in ("rows", "columns"))
    try:
        with torch.no_grad():
            levels = list(network.backbone(torch.cat((samples[0]["images"], samples[0]["images"][:, :1]), dim=1)))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"the backbone takes no image of 256 x 288 pixels ({error}): take --to safetensors") from error
    outputs = {f"map_{level}": "a level of the pyramid, (B, C, h, w)" for level in levels}
    if network.is_retinanet:
        outputs |= {
            "class_logits": "of all anchors, level after level, (B, anchors, classes)",
            "box_regression": "likewise, (B, anchors, 4)",
        }
        rest = "the choice among the anchors: decoding of boxes, thresholds and non-maximum suppression"
    else:
        outputs |= {f"{name}_{level}": text for name, text in _OUTPUTS.items() for level in levels}
        rest = "proposals and what is done with each: boxes, scores and masks of objects"
    pixels = _STRIDE * least
    return Program(
        network=network,
        samples=samples,
        dynamic={
            "images": {0: batch, 2: _STRIDE * height, 3: _STRIDE * width},
            "mask": {0: batch, 1: _STRIDE * height, 2: _STRIDE * width},
        },
        inputs={
            "images": f"float32 (B, 3, H, W) in 0..1, resized; H and W multiples of {_STRIDE}, {pixels} or more",
            "mask": "bool (B, H, W), True on an image's own pixels and not on padding",
        },
        outputs=outputs,
        part=f"the dense part of a {detector}: normalisation, backbone with its blocks, pyramid and dense heads",
        left_out=f"{rest}, because their sizes depend on the detections, which torch.export does not support for "
        "torchvision's detectors; for the whole detector, take --to safetensors and latentgnn.load_run",
    )
