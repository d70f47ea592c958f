"""Programs and functions of this package run in a process of their own.

A program starts normally and prints its result as JSON. A function runs in a process forked from a server that has
imported what it needs and computed nothing: it starts in milliseconds, and is just as isolated.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any, TypeVar

from latentgnn.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")
_SHOWN = 2000
# Default limit of a process in seconds, and the seconds it has to end after its answer.
MOST_SECONDS = 600.0
_TO_END = 10.0
# Seconds between two looks at processes that run together.
_TO_LOOK = 0.1

# What pairs import, and what compiling imports. Modules that a server imports must not compute or call CUDA when they
# are imported: thread pools and CUDA do not survive a fork.
PAIR = "benchmarks.pair"
COMPILERS = "benchmarks.compilers"

_FORKS = multiprocessing.get_context("forkserver")
# For programs that do not call `start_server`; the server then starts with the first process.
_FORKS.set_forkserver_preload([PAIR])


def run_child(module: str, arguments: Sequence[str], *, source: Path | None = None) -> dict[str, Any]:
    """Run ``python -m module arguments`` from the repository's root, and read the JSON object that it prints last.

    Args:
        module: a module of this package with a command line.
        arguments: for it.
        source: folder that the library is taken from, before all others.

    Raises:
        UserError: it failed; with the end of its output.
    """
    done = subprocess.run(
        _command(module, arguments), cwd=ROOT, env=_environment(source), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise _ended(module, arguments, done.returncode, done.stderr or done.stdout)
    return _answered(done.stdout)


def run_together(
    module: str, arguments: Sequence[str], environments: Sequence[Mapping[str, str]]
) -> list[dict[str, Any]]:
    """Run a program in several processes at once, and read the JSON object that each prints last.

    When one fails, the others are ended: they would wait for it.

    Args:
        module: a module of this package with a command line.
        arguments: the arguments of all processes.
        environments: the variables of each process, beside those of this one.

    Raises:
        UserError: one failed; with the end of its output.
    """
    command = _command(module, arguments)
    with ExitStack() as stack:
        started: list[tuple[subprocess.Popen[str], IO[str], IO[str]]] = []
        for variables in environments:
            said: IO[str] = stack.enter_context(tempfile.TemporaryFile("w+"))
            errors: IO[str] = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                command, cwd=ROOT, env={**_environment(), **variables}, stdout=said, stderr=errors, text=True
            )
            stack.callback(_end, process)
            started.append((process, said, errors))
        while any(process.poll() is None for process, _, _ in started):
            if any(process.poll() for process, _, _ in started):
                break
            sleep(_TO_LOOK)
        for process, said, errors in started:
            if process.poll():
                raise _ended(module, arguments, process.returncode, _read(errors) or _read(said))
        return [_answered(_read(said)) for _, said, _ in started]


def _command(module: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _environment(source: Path | None = None) -> dict[str, str]:
    # The root, so that the package is found from any working directory.
    path = os.pathsep.join(filter(None, [str(source or ""), str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def _ended(module: str, arguments: Sequence[str], code: int, said: str) -> UserError:
    end = said.strip()[-_SHOWN:]
    return UserError(f"python -m {module} {' '.join(arguments)} ended with code {code}:\n{end}")


def _answered(said: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return result


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def start_server(modules: Sequence[str]) -> None:
    """Start the process that others are forked from, unless it is running; it imports in the background.

    Args:
        modules: what the functions need, such as `PAIR`; `COMPILERS` comes first.
    """
    _FORKS.set_forkserver_preload(sorted(modules, key=lambda module: module != COMPILERS))
    forkserver.ensure_running()


def run_forked(function: Callable[..., T], *arguments: object, seconds: float = MOST_SECONDS) -> T:
    """Call a function in a process of its own, forked from the server.

    Args:
        function: of a module, by whose name the process finds it.
        arguments: for it; they travel by pickle, as the result does.
        seconds: after which the process is ended.

    Raises:
        UserError: it raised one; or it raised another error, died or took too long, with the end of its output.
    """
    receiving, sending = _FORKS.Pipe(duplex=False)
    with receiving, tempfile.NamedTemporaryFile() as file:
        process = _FORKS.Process(target=_answer, args=(sending, file.name, function, arguments), daemon=True)
        end = monotonic() + seconds
        # This waits for the server, which may still be importing.
        process.start()
        sending.close()
        try:
            # `poll` is also true if the other end has died; `recv` then raises EOFError.
            answer = (
                receiving.recv()
                if receiving.poll(max(end - monotonic(), 0))
                else _Failed(f"was ended after {seconds:.0f} seconds")
            )
            process.join(_TO_END)
        except EOFError:
            process.join()
            answer = _Failed(f"ended with code {process.exitcode}")
        finally:
            process.kill()
            process.join()
        said = file.read().decode(errors="replace").strip()[-_SHOWN:]
    if isinstance(answer, UserError):
        raise answer
    if isinstance(answer, _Failed):
        raise UserError(f"{function.__module__}.{function.__qualname__} {answer.how}:\n{said}".strip())
    result: T = answer
    return result


@dataclass(frozen=True)
class _Failed:
    how: str


def _answer(sending: Connection, said: str, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """In the new process: send its output to a file, and its result or error to the process that waits."""
    descriptor = os.open(said, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    answer: object
    try:
        answer = function(*arguments)
    except UserError as error:
        answer = UserError(str(error))
    except Exception as error:
        traceback.print_exc()
        answer = _Failed(f"raised {type(error).__name__}")
    sys.stdout.flush()
    sys.stderr.flush()
    sending.send(answer)
