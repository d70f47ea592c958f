"""The page of ``latentgnn explore``, served on a port of this machine, and a browser to look at it."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from uvicorn import Server

from latentgnn.errors import UserError
from latentgnn.tasks.explore.server import application, configured
from latentgnn.tasks.explore.views import Explorer

# Seconds that the server has to start.
_SECONDS = 10


@contextmanager
def served(explorer: Explorer, *, token: str | None = None) -> Iterator[int]:
    """Serve an explorer's page within a ``with`` block; gives the port.

    Args:
        explorer: what is explored.
        token: what a request must have; ``None`` for nothing.
    """
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
    """Run headless Chromium within a ``with`` block.

    Raises:
        UserError: it is not installed.
    """
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        raise UserError("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A container has no user of its own for the sandbox.
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()
