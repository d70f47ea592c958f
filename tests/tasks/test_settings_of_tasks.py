"""What tasks say of their settings; settings of sound types and no sense are refused by their whole names."""

import re
from importlib import import_module
from typing import Any

import pytest

from latentgnn.configuration.settings import options, parse_config
from latentgnn.errors import UserError
from latentgnn.tasks.commands import Commands
from latentgnn.tasks.detection.config import DetectionConfig
from latentgnn.tasks.pointcloud.config import PointCloudConfig
from latentgnn.tasks.segmentation.config import SegmentationConfig
from latentgnn.tasks.settings import TASKS, settings_of


@pytest.mark.parametrize(
    ("task", "name", "text", "expected"),
    [
        (DetectionConfig, "model.blocks", "{C4: 1000000000}", "1 to 16,384 latents a kernel"),
        (DetectionConfig, "model.blocks", "{C4: []}", "1 to 16,384 latents a kernel"),
        (DetectionConfig, "model.detections_per_image", "1000000000", "1 to 10,000"),
        (DetectionConfig, "model.fpn_channels", "-1", "1 to 65,536"),
        (DetectionConfig, "model.max_size", "8", "64 to 16,384"),
        (DetectionConfig, "model.image_std", "[1, 0, 1]", "numbers above 0"),
        (DetectionConfig, "model.block.reduction", "0", "1 to 65536"),
        (DetectionConfig, "evaluation.max_detections", "[1, 10, 1000000000]", "three ascending limits of 1 to 10,000"),
        (DetectionConfig, "evaluation.max_detections", "[10, 10, 100]", "three ascending limits"),
        (DetectionConfig, "evaluation.sample_pictures", "-1", "0 or more"),
        (DetectionConfig, "data.root", "", "a folder, or null"),
        (DetectionConfig, "data.embedded_train", "3", "an even number"),
        (DetectionConfig, "data.embedded_size", "1000000", "64 to 4096 pixels"),
        (DetectionConfig, "data.categories", "[[1, cat], [1, dog]]", "ids of 0 or more, each once"),
        (DetectionConfig, "data.augment.crop", "0", "a side of 1 pixel or more"),
        (PointCloudConfig, "model.blocks", "{L7: 4}", "levels among L0, L1, L2, L3, L4"),
        (PointCloudConfig, "model.neighbors", "1000000000", "1 to 1000"),
        (PointCloudConfig, "model.depths", "[1, 1, 1, 1, -1]", "5 numbers of 0 to 100"),
        (PointCloudConfig, "data.overlap", "1.0", "0 or more and less than 1"),
        (PointCloudConfig, "data.augment.jitter", "-0.1", "0 or more"),
        (PointCloudConfig, "loss.lovasz", "-1", "0 or more"),
        (PointCloudConfig, "loss.label_smoothing", "2", "from 0 to 1"),
        (PointCloudConfig, "evaluation.votes", "0", "1 to 1000"),
        (SegmentationConfig, "model.output_stride", "12", "8, 16 or 32"),
        (SegmentationConfig, "model.blocks", "{backbone.layer3: 0}", "1 to 16,384 latents a kernel"),
        (SegmentationConfig, "data.classes", "{}", "ids of 0 to 65,535"),
        (SegmentationConfig, "data.colors", "{1: [0, 0, 256]}", "0 to 255"),
        (SegmentationConfig, "data.augment.crop", "[8, 64]", "16 to 16,384 pixels"),
        (SegmentationConfig, "evaluation.tiles", "8", "32 to 16,384 pixels"),
        (SegmentationConfig, "training.schedule.power", "0", "more than 0"),
    ],
)
def test_settings_without_sense(task: type, name: str, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(name)}: expected .*{re.escape(expected)}.*; got "):
        parse_config(task, {}, [(name, text)])


@pytest.mark.parametrize("task", TASKS)
def test_what_a_task_says_of_its_settings_is_there(task: str) -> None:
    settings = settings_of(task)
    known = options(settings.config)
    assert known["task"].default == task
    alone = settings.without_effect_alone
    for names in (settings.places, settings.checked, settings.explained, settings.diagnosed, settings.converted):
        assert set(names) <= set(known)
    assert {*settings.free_when_trained, *alone, *alone.values()} <= set(known)
    # Whatever tells how a block looks may be told where it is looked at over a set.
    assert set(settings.explained) <= set(settings.diagnosed)
    assert callable(getattr(import_module(f"latentgnn.tasks.{task}.loading"), settings.loader))
    assert isinstance(import_module(f"latentgnn.tasks.{task}.commands").COMMANDS, Commands)


@pytest.mark.parametrize("task", [DetectionConfig, PointCloudConfig, SegmentationConfig])
def test_what_is_said_by_default_has_sense(task: Any) -> None:
    assert parse_config(task, {}) == task()
