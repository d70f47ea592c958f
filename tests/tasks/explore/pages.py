"""A page that is served to tests, and a browser that looks at it."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from uvicorn import Server

import latentgnn
from latentgnn.tasks.detection.exploring import DetectorExplorer
from latentgnn.tasks.explore.server import application, configured
from latentgnn.tasks.explore.views import Explorer
from tests.tasks.made_runs import DETECTOR, write_detector, write_images

CATEGORIES = [[3, "red"], [7, "blue"]]
_SECONDS = 10


def detector_explorer(folder: Path) -> DetectorExplorer:
    """Of a detector with blocks at two stages, one of two kernels, and two images."""
    values = {**DETECTOR, "model": {**DETECTOR["model"], "blocks": {"C3": 4, "C5": [3, 2]}}}
    run = write_detector(folder / "run", values)
    images = sorted((write_images(folder / "data", 2, CATEGORIES) / "val").glob("*.png"))
    return DetectorExplorer(latentgnn.load_run(run), "run", images)


@contextmanager
def served(explorer: Explorer, *, token: str | None = None) -> Iterator[int]:
    """The port of this machine at which the page is answered."""
    config = configured(application(explorer, token=token))
    config.port = 0
    server = Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + _SECONDS
        while not server.started:
            assert time.monotonic() < until, "the server has not started"
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium, or a skip that says what is missing."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A container has no user of its own for the sandbox.
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()
