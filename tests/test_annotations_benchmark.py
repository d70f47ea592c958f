"""The program that measures annotations: its set, and what it counts. No test here looks at a time."""

import sys
from pathlib import Path

import pytest

from benchmarks import annotations
from latentgnn.tasks.detection.sound_sets import load_split


def test_the_made_up_set_is_sound_and_its_objects_do_not_lie_together(tmp_path: Path) -> None:
    made = load_split(annotations.write_set(tmp_path, 30), tmp_path)
    assert (len(made), made.objects) == (30, 30 * annotations.OBJECTS)
    assert made.has_masks
    assert all(len(made.annotations_of(image.id)) == annotations.OBJECTS for image in made.images)
    order = [record["image_id"] for record in made.dataset["annotations"]]
    assert order != sorted(order)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_measurement_counts_the_loading_processes(tmp_path: Path) -> None:
    path = annotations.write_set(tmp_path, 30)
    found = annotations.measure(path, "fork")
    assert found["file_bytes"] == path.stat().st_size
    # A process that was forked has memory of its own, and less than one that has loaded torch itself.
    assert 0 < found["worker"] < 200e6
    assert found["peak"] >= found["opened"]
    report = {"command": "x", "measured": [{"images": 30, "side": "this", "start": "fork", **found}]}
    assert "| 30 | 0.00 GB | this | fork |" in annotations.markdown(report)
