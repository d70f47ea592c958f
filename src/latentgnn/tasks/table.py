"""The tasks: adding one is a folder beside this file and a line here."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """The names in a task's folder that differ with the task.

    Args:
        config: of its configuration's class, in ``config.py``.
        loader: of what loads its trained model, in ``loading.py``.
    """

    config: str
    loader: str


TASKS: Mapping[str, Entry] = {
    "detection": Entry("DetectionConfig", "load_detector"),
    "pointcloud": Entry("PointCloudConfig", "load_segmenter"),
    "segmentation": Entry("SegmentationConfig", "load_segmenter"),
}
"""Every task by the name of its folder."""
