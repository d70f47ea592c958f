"""A detector to explore, and a browser for tests."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import latentgnn
from benchmarks import explore_page
from latentgnn.errors import UserError
from latentgnn.tasks.detection.exploring import DetectorExplorer
from tests.tasks.made_runs import DETECTOR, write_detector, write_images

CATEGORIES = [[3, "red"], [7, "blue"]]


def detector_explorer(folder: Path) -> DetectorExplorer:
    """Of a detector with blocks at two stages, one of two kernels, and two images."""
    values = {**DETECTOR, "model": {**DETECTOR["model"], "blocks": {"C3": 4, "C5": [3, 2]}}}
    run = write_detector(folder / "run", values)
    images = sorted((write_images(folder / "data", 2, CATEGORIES) / "val").glob("*.png"))
    return DetectorExplorer(latentgnn.load_run(run), "run", images)


@contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium, or a skip that says what is missing."""
    with ExitStack() as stack:
        try:
            chromium = stack.enter_context(explore_page.browser())
        except UserError as error:
            pytest.skip(str(error))
        yield chromium
