"""Runs one group of fuzzing cases within limits of memory and time: ``python -m tests.fuzzing.child GROUP CASES HOW``.

A case ends in success or in the project's own error; anything else fails the property, which hypothesis then shrinks. A
case that takes too long ends this process with the place where it stands; one that takes too much memory meets a
MemoryError, or ends it.
"""

import contextlib
import faulthandler
import importlib
import io
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from latentgnn.cli import main as command_line
from latentgnn.errors import UserError

SECONDS = 20
"""Of one case; a busy machine has a core for several of them."""

LAST_CASE = Path(os.environ.get("LATENTGNN_LAST_CASE", os.devnull))
"""Where each case is written before it runs: some end the process."""

BYTES = 3 * 2**30
"""That the cases may take beyond what the imports have."""


def command(*argv: str) -> tuple[int, str]:
    """The exit code and the output of a command, which ends without a traceback and says something if it fails."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command_line(list(argv))
    note(f"{argv}\n{code}\n{err.getvalue()[-2000:]}")
    assert code in (0, 1, 2)
    assert "Traceback" not in err.getvalue()
    assert code == 0 or out.getvalue().strip() or err.getvalue().strip()
    return code, out.getvalue()


def outcome(read: Callable[[Path], Any], path: Path) -> Any:
    """What a file holds, or ``None`` where it is refused by its name."""
    try:
        return read(path)
    except UserError as error:
        told = str(error)
    assert str(path) in told
    return None


Case = Callable[[Any, Path], None]


def property_of(case: Case, strategy: st.SearchStrategy[Any], cases: int, repeatable: bool) -> Callable[[], None]:
    """A case as a property of everything that a strategy makes; each gets an empty folder, which it works in."""

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=repeatable,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def limited(content: Any) -> None:
        LAST_CASE.write_text(repr(content), encoding="utf-8", errors="backslashreplace")
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                case(content, Path(folder))
        finally:
            faulthandler.cancel_dump_traceback_later()

    run_all: Callable[[], None] = limited
    return run_all


def run(group: str, cases: int, repeatable: bool) -> None:
    # What a command imports must not count, nor fail for want of memory.
    for task in ("detection", "pointcloud", "segmentation"):
        importlib.import_module(f"latentgnn.tasks.{task}.commands")
    module = importlib.import_module(f"tests.fuzzing.{group}")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    properties: Sequence[tuple[Case, st.SearchStrategy[Any], float]] = module.PROPERTIES
    for case, strategy, share in properties:
        number = max(1, round(cases * share))
        start = time.perf_counter()
        property_of(case, strategy, number, repeatable)()
        print(f"{group}: {case.__name__}: {number} cases, {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    # Warnings of damaged files, such as Pillow's, are no errors for those who run the commands.
    warnings.simplefilter("ignore")
    run(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "repeatable")
