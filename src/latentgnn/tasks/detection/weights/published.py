"""Torchvision's trained detectors: their names, and the settings that make the same detector here."""

import difflib
from dataclasses import dataclass
from typing import Any

from torchvision.models import WeightsEnum, get_model_weights

from latentgnn.errors import UserError
from latentgnn.tasks.detection.config import ModelConfig

_MOBILENET = {"detector": "faster_rcnn", "backbone": "mobilenet_v3_large", "rpn_score_threshold": 0.05}
_RETINANET = {"detector": "retinanet", "detections_per_image": 300}

# Differences to `ModelConfig`'s defaults, which are those of torchvision's first Mask R-CNN.
_SETTINGS: dict[str, dict[str, Any]] = {
    "maskrcnn_resnet50_fpn": {"detector": "mask_rcnn", "norm_eps": 0.0},
    "maskrcnn_resnet50_fpn_v2": {"detector": "mask_rcnn", "heads": "v2", "norm": "batch_norm"},
    "fasterrcnn_resnet50_fpn": {"detector": "faster_rcnn", "norm_eps": 0.0},
    "fasterrcnn_resnet50_fpn_v2": {"detector": "faster_rcnn", "heads": "v2", "norm": "batch_norm"},
    "fasterrcnn_mobilenet_v3_large_fpn": _MOBILENET,
    "fasterrcnn_mobilenet_v3_large_320_fpn": {
        **_MOBILENET,
        "min_size": (320,),
        "max_size": 640,
        "rpn_pre_nms": (2000, 150),
        "rpn_post_nms": (2000, 150),
    },
    "retinanet_resnet50_fpn": {**_RETINANET, "norm_eps": 0.0},
    "retinanet_resnet50_fpn_v2": {**_RETINANET, "heads": "v2", "norm": "batch_norm"},
}


@dataclass(frozen=True)
class PublishedDetector:
    """One of torchvision's trained detectors.

    Args:
        builder: the function in ``torchvision.models.detection`` that makes it.
        weights: its weights.
    """

    builder: str
    weights: WeightsEnum

    @property
    def config(self) -> ModelConfig:
        """The settings that make the same detector, without its weights."""
        return ModelConfig(**_SETTINGS[self.builder])

    @property
    def categories(self) -> list[str]:
        """The names of the rows of its last layers, background first; ids that COCO does not use are ``N/A``."""
        return list(self.weights.meta["categories"])


def published_detector(name: str) -> PublishedDetector | None:
    """Return a detector by the name of its weights, ``FasterRCNN_ResNet50_FPN_Weights.COCO_V1``, or of its builder."""
    return _published().get(name)


def unknown(name: str) -> UserError:
    """Return the error for a name that is neither a file nor a trained detector."""
    known = _published()
    full = [other for other in known if other.endswith("COCO_V1")]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or full
    return UserError(
        f"model.weights: there is no file or folder {name!r}, and none of torchvision's trained detectors has this "
        f"name; nearest: {', '.join(near)}"
    )


def _published() -> dict[str, PublishedDetector]:
    found: dict[str, PublishedDetector] = {}
    for builder in _SETTINGS:
        enumeration = get_model_weights(builder)
        for member, weights in enumeration.__members__.items():
            found[f"{enumeration.__name__}.{member}"] = PublishedDetector(builder, weights)
        found[builder] = PublishedDetector(builder, enumeration["DEFAULT"])
    return found
