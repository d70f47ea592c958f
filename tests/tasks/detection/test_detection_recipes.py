import subprocess
import sys
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torchvision.models import get_model

from latentgnn import LatentGNN
from latentgnn.configuration.recipes import list_recipes, load_recipe
from latentgnn.configuration.settings import parse_config, plain_data
from latentgnn.tasks.detection.config import DetectionConfig
from latentgnn.tasks.detection.model import build_detector
from latentgnn.tasks.detection.weights.published import published_detector

BACKBONES = {"r50": "resnet50", "r101": "resnet101", "x101_32x8d": "resnext101_32x8d"}
BLOCKS = {
    "": ({}, 1),
    "_c3": ({"C3": 150}, 1),
    "_c4": ({"C4": 100}, 1),
    "_c5": ({"C5": 50}, 1),
    "_c345": ({"C3": 150, "C4": 100, "C5": 50}, 1),
    "_c345_group": ({"C3": 150, "C4": 100, "C5": 50}, 8),
}
PUBLISHED = [
    (f"mask_rcnn_{short}{suffix}", backbone, blocks, groups)
    for short, backbone in BACKBONES.items()
    for suffix, (blocks, groups) in BLOCKS.items()
]


FINETUNED = {
    "finetune_mask_rcnn_r50": "maskrcnn_resnet50_fpn",
    "finetune_faster_rcnn_r50": "fasterrcnn_resnet50_fpn",
    "finetune_retinanet_r50": "retinanet_resnet50_fpn",
    "finetune_faster_rcnn_mobilenet": "fasterrcnn_mobilenet_v3_large_320_fpn",
}
# What the recipes' comments say for the second generation, and for larger images.
ALTERNATIVES = {
    "finetune_mask_rcnn_r50": ("MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1", {"heads": "v2", "norm_eps": 0.00001}),
    "finetune_faster_rcnn_r50": ("FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1", {"heads": "v2", "norm_eps": 0.00001}),
    "finetune_retinanet_r50": ("RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1", {"heads": "v2", "norm_eps": 0.00001}),
    "finetune_faster_rcnn_mobilenet": (
        "FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1",
        {"min_size": (800,), "max_size": 1333, "rpn_pre_nms": (2000, 1000), "rpn_post_nms": (2000, 1000)},
    ),
}

DETECTORS = [name for name in list_recipes() if load_recipe(name).get("task", "detection") == "detection"]


def resolved(name: str) -> DetectionConfig:
    return parse_config(DetectionConfig, load_recipe(name))


def test_the_recipes_are_these():
    assert set(DETECTORS) == {name for name, *_ in PUBLISHED} | {"nuclei_small", "context"} | set(FINETUNED)


@pytest.mark.parametrize("name", DETECTORS)
def test_every_recipe_resolves_and_survives_being_printed(name):
    config = resolved(name)
    assert parse_config(DetectionConfig, plain_data(config)) == config


@pytest.mark.parametrize(("name", "backbone", "blocks", "groups"), PUBLISHED)
def test_published_settings(name, backbone, blocks, groups):
    config = resolved(name)
    model, training = config.model, config.training
    assert model.detector == "mask_rcnn"
    assert model.backbone == backbone
    assert model.weights_backbone == "IMAGENET1K_V1"
    assert model.norm == "frozen_batch_norm"
    assert model.trainable_stages == 3
    assert model.blocks == blocks
    assert model.block.num_groups == groups
    assert model.block.reduction == 8
    assert model.block.symmetric is False
    assert model.block.graph_conv is True
    assert model.block.norm == "frozen_batch_norm"
    assert model.block.node_scale == "published"
    assert model.block.gamma_init == 0.0
    assert (model.min_size, model.max_size) == ((800,), 1333)
    assert model.anchor_sizes == (32, 64, 128, 256, 512)
    assert model.fpn_channels == 256
    assert (training.steps, training.batch_size) == (90_000, 16)
    assert training.optimizer.name == "sgd"
    assert training.optimizer.learning_rate == 0.02
    assert training.optimizer.momentum == 0.9
    assert training.optimizer.weight_decay == 1e-4
    assert training.optimizer.block_factor == 1.0
    assert training.schedule.name == "steps"
    assert training.schedule.milestones == (60_000, 80_000)
    assert training.schedule.decay == 0.1
    assert training.schedule.warmup_steps == 500
    assert training.schedule.warmup_factor == pytest.approx(1 / 3)
    assert config.data.augment.horizontal_flip == 0.5
    assert config.evaluation.max_detections == (1, 10, 100)


@pytest.mark.parametrize(("name", "backbone", "blocks", "groups"), PUBLISHED)
def test_published_models_are_built_with_their_blocks(name, backbone, blocks, groups):
    config = replace(resolved(name).model, weights_backbone=None)
    with torch.device("meta"):
        model = build_detector(config, 80)
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, LatentGNN)}
    stages = {"C3": ("layer2", 512), "C4": ("layer3", 1024), "C5": ("layer4", 2048)}
    assert len(layers) == len(blocks)
    for stage in blocks:
        place, channels = stages[stage]
        (layer,) = (layer for key, layer in layers.items() if place in key)
        assert layer.config.channels == channels
        assert layer.config.num_groups == groups
        assert layer.config.num_latents == (blocks[stage],)


@pytest.mark.parametrize("name", FINETUNED)
def test_recipes_that_fine_tune_have_the_settings_of_their_weights(name):
    model = resolved(name).model
    assert model.blocks
    assert model.block.gamma_init == 0
    free = {"weights", "blocks", "detections_per_image", "trainable_stages", "norm"}
    alternative, changes = ALTERNATIVES[name]
    for weights, settings in ((model.weights, model), (alternative, replace(model, weights=alternative, **changes))):
        detector = published_detector(weights)
        assert detector is not None
        for field in fields(settings):
            value, trained = getattr(settings, field.name), getattr(detector.config, field.name)
            if field.name not in free:
                assert value == trained, field.name
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in build_detector(settings, 90).state_dict().items()}
            reference = get_model(detector.builder, weights=None, weights_backbone=None).state_dict()
        assert {key for key in shapes if "latentgnn" not in key} == {
            key for key in reference if "num_batches_tracked" not in key or key in shapes
        }
        assert all(shapes[key] == value.shape for key, value in reference.items() if key in shapes)
    assert published_detector(resolved(name).model.weights).builder == FINETUNED[name]


def test_the_nuclei_recipe_needs_no_download_and_scores_many_objects():
    config = resolved("nuclei_small")
    assert config.model.weights_backbone is None
    assert config.model.blocks
    assert config.evaluation.max_detections[-1] == config.model.detections_per_image >= 200


@pytest.mark.slow
def test_the_wheel_holds_the_recipes(tmp_path):
    root = Path(__file__).resolve().parents[3]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", tmp_path, root], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    packaged = {Path(name).stem for name in zipfile.ZipFile(wheel).namelist() if "/recipes/" in name}
    assert set(list_recipes()) <= packaged
