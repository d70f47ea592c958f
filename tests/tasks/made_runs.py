"""Folders of runs that nobody trained: a model with random weights, its configuration and figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn

from latentgnn.configuration.settings import parse_config, plain_data
from latentgnn.tasks.detection.config import DetectionConfig
from latentgnn.tasks.detection.model import build_detector
from latentgnn.tasks.pointcloud.config import PointCloudConfig
from latentgnn.tasks.pointcloud.model import build_point_network
from latentgnn.tasks.pointcloud.scans import RawScan, write_scan
from latentgnn.tasks.segmentation.config import SegmentationConfig
from latentgnn.tasks.segmentation.model import build_segmenter
from latentgnn.training.checkpoints import write_checkpoint

DETECTOR: dict[str, Any] = {
    "model": {
        "backbone": "resnet18",
        "norm": "batch_norm",
        "blocks": {"C4": 4},
        "fpn_channels": 16,
        "block": {"norm": "batch_norm", "gamma_init": 0.5},
        "min_size": [64],
        "max_size": 96,
        "anchor_sizes": [8, 16, 32, 64, 128],
        "box_head_channels": 16,
        "mask_head_layers": 1,
        "mask_head_channels": 8,
        "score_threshold": 0.0,
        "detections_per_image": 5,
    },
    "data": {"root": "/home/somebody/photos", "categories": [[3, "red"], [7, "a|blue"]]},
    "training": {"steps": 40, "accelerator": "cpu"},
}
NETWORK = {
    "task": "pointcloud",
    "model": {
        "widths": [8, 16],
        "depths": [1, 1],
        "grids": [1.0],
        "neighbors": 6,
        "blocks": {"L1": 4},
        "block": {"norm": "batch_norm", "gamma_init": 0.5, "reduction": 4, "node_scale": "mean"},
    },
    "data": {"classes": {2: "ground", 6: "building"}, "features": ["height"], "voxel": 0.3},
    "training": {"steps": 40, "accelerator": "cpu"},
}
SEGMENTER: dict[str, Any] = {
    "task": "segmentation",
    "model": {
        "backbone": "test_resnet",
        "output_stride": 16,
        "blocks": {"backbone.network.layer3": 4},
        "block": {"norm": "batch_norm", "gamma_init": 0.5, "node_scale": "mean"},
    },
    "data": {
        "classes": {3: "road", 7: "sky", 9: "car"},
        "colors": {3: [250, 0, 0], 7: [0, 250, 0], 9: [0, 0, 250]},
        "scale": 0.5,
    },
    "training": {"steps": 40, "accelerator": "cpu"},
}
METRICS = {
    "bbox/AP": 0.25,
    "bbox/AP50": 0.5,
    "bbox/AP_large": -1.0,
    "segm/AP": 0.125,
    "segm/AP50": 0.75,
    "segm/AP_large": -1.0,
}


def _norms_have_seen(model: nn.Module) -> None:
    """Statistics other than those of a new network, as training leaves them; the same ones at every call."""
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.2 - 0.1)
        if name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


def write_run(folder: Path, config: Any, model: nn.Module) -> Path:
    """A run's folder with a model whose norms have seen something."""
    _norms_have_seen(model)
    values = plain_data(config)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (folder / "validations.json").write_text(
        json.dumps([{"step": 20, "best": True, "metrics": METRICS}, {"step": 40, "best": False, "metrics": {}}])
    )
    about = {"step": 20, "config": values, "course": {"training.steps": 40}, "data": {}}
    content = {"latentgnn": about, "state_dict": model.state_dict(), "optimizer": {}}
    write_checkpoint(folder / "checkpoints" / "best.ckpt", content)
    return folder


def write_detector(folder: Path, values: dict[str, Any] = DETECTOR) -> Path:
    """A run of a detector."""
    config = parse_config(DetectionConfig, values)
    torch.manual_seed(0)
    return write_run(folder, config, build_detector(config.model, 2))


def write_network(folder: Path, values: dict[str, Any] = NETWORK) -> Path:
    """A run of a point network."""
    config = parse_config(PointCloudConfig, values)
    torch.manual_seed(0)
    return write_run(folder, config, build_point_network(config.model, num_features=1, num_classes=2))


def write_segmenter(folder: Path, values: dict[str, Any] = SEGMENTER) -> Path:
    """A run of a segmenter of images."""
    config = parse_config(SegmentationConfig, values)
    torch.manual_seed(0)
    model = build_segmenter(config.model, num_classes=3, auxiliary=False)
    last = model.get_submodule("classifier.4")
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    _norms_have_seen(model)
    with torch.no_grad():
        # With random weights, all pixels have the class of the largest bias: bring the classes level.
        noise = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
        last.bias -= model.eval()(noise)["out"].mean(dim=(0, 2, 3))
    return write_run(folder, config, model)


def write_labelled(root: Path, count: int) -> Path:
    """Images of noise with labels of noise, as a val split of `SEGMENTER`."""
    random = np.random.default_rng(0)
    for kind, values in (("images", np.arange(256)), ("labels", np.array(sorted(SEGMENTER["data"]["classes"])))):
        (root / kind / "val").mkdir(parents=True)
        for number in range(count):
            size = (96, 128, 3) if kind == "images" else (96, 128)
            pixels = random.choice(values, size).astype(np.uint8)
            Image.fromarray(pixels).save(root / kind / "val" / f"{number}.png")
    return root


def write_images(root: Path, count: int, categories: list[list[Any]]) -> Path:
    """A set in COCO's form with a val split of noise alone; each image has one object."""
    random = np.random.default_rng(0)
    (root / "val").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations = [], []
    for index in range(count):
        Image.fromarray(random.integers(0, 255, (48, 64, 3), np.uint8)).save(root / "val" / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": 64, "height": 48})
        shape: dict[str, Any] = {"bbox": [4, 4, 20, 20], "area": 400, "segmentation": [[4, 4, 24, 4, 24, 24, 4, 24]]}
        annotations.append({"id": index + 1, "image_id": index, "category_id": categories[0][0], "iscrowd": 0, **shape})
    listed = [{"id": id, "name": name} for id, name in categories]
    content = {"images": images, "annotations": annotations, "categories": listed}
    (root / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return root


def write_scans(root: Path, names: str) -> Path:
    """Scans of a plane with a box on it, in map coordinates, as a val split."""
    random = np.random.default_rng(0)
    (root / "val").mkdir(parents=True)
    for name in names:
        points = random.random((900, 3)) * [9, 9, 0.1]
        roof = (np.abs(points[:, :2] - 4) < 1.5).all(axis=1)
        points[roof, 2] += 3
        points += [770_000, 6_277_000, 50]
        write_scan(root / "val" / f"{name}.laz", RawScan(points=points, columns={}, classes=np.where(roof, 6, 2)))
    return root
