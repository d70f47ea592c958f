"""A layer over an array that may be larger than memory: ``apply``."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from latentgnn.cli.parsing import Overrides, UsageError
from latentgnn.errors import UserError
from latentgnn.outputs import quoted, say_end

if TYPE_CHECKING:
    from latentgnn.points import PackedLatentGNN

_SECONDS = 10.0  # between lines, where there is no bar


def apply_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("layer", type=Path, metavar="LAYER", help="the folder or file that save_pretrained wrote")
    parser.add_argument("source", type=Path, metavar="ARRAY", help="a .npy file, (N, C): the nodes of one scene")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new .npy file, (N, C)")
    parser.add_argument(
        "--dtype", choices=("float16", "float32", "float64"), help="of the numbers in --out (those of ARRAY)"
    )
    parser.add_argument("--device", default="cpu", help="where the layer runs, such as cuda (cpu)")
    parser.add_argument("--chunk", type=int, metavar="N", help="nodes that are in memory at a time (chosen)")


def apply(arguments: argparse.Namespace, overrides: Overrides) -> int:
    if arguments.chunk is not None and arguments.chunk < 1:
        raise UsageError(f"--chunk: expected a number from 1 on; got {arguments.chunk}")
    from latentgnn.arrays import NpyFile, apply_to_file, work_folder
    from latentgnn.training.locks import LOCK, sole_use

    layer, nodes = _layer(arguments.layer, arguments.device), NpyFile.open(arguments.source).nodes
    work = work_folder(arguments.out)
    work.mkdir(parents=True, exist_ok=True)
    try:
        with sole_use(work), _progress(nodes) as progress:
            apply_to_file(
                layer,
                arguments.source,
                arguments.out,
                chunk_nodes=arguments.chunk,
                dtype=arguments.dtype,
                progress=progress,
            )
            (work / LOCK).unlink(missing_ok=True)
    except KeyboardInterrupt:
        raise UserError(f"interrupted; the same command goes on from what is kept in {quoted(work)}") from None
    finally:
        if work.is_dir() and {path.name for path in work.iterdir()} <= {LOCK}:
            (work / LOCK).unlink(missing_ok=True)
            with suppress(OSError):
                work.rmdir()
    say_end(arguments.out)
    return 0


def _layer(source: Path, device: str) -> "PackedLatentGNN":
    """A layer for points with the weights of a saved one, which may be one for maps."""
    import torch

    from latentgnn.layer import LatentGNN
    from latentgnn.points import PackedLatentGNN
    from latentgnn.saved import read_record

    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if read_record(source)["kind"] != LatentGNN.__name__:
        return PackedLatentGNN.from_pretrained(source, device=place)
    maps = LatentGNN.from_pretrained(source, device=place)
    layer = PackedLatentGNN.from_config(maps.config, device="meta")
    layer.load_state_dict(maps.state_dict(), assign=True)
    return layer.eval()


@contextmanager
def _progress(nodes: int) -> Iterator[Callable[[str, int], None]]:
    """A bar with the remaining time for each sweep on a terminal, and elsewhere a line from time to time."""
    if sys.stdout.isatty() and find_spec("rich") is not None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        with Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        ) as bar:
            tasks = {sweep: bar.add_task(sweep, total=nodes) for sweep in ("gather", "scatter")}

            def advance(sweep: str, done: int) -> None:
                if sweep == "scatter":
                    bar.update(tasks["gather"], completed=nodes)
                bar.update(tasks[sweep], completed=done)

            yield advance
        return
    yield _Lines(nodes)


class _Lines:
    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._sweep = ""
        self._began = self._told = time.monotonic()
        self._first = 0

    def __call__(self, sweep: str, done: int) -> None:
        now = time.monotonic()
        if sweep != self._sweep:
            self._sweep, self._began, self._first = sweep, now, done
        if now - self._told < _SECONDS and done < self._nodes:
            return
        self._told, rate = now, (done - self._first) / max(now - self._began, 1e-9)
        left = f"  left {(self._nodes - done) / rate:.0f} s" if rate and done < self._nodes else ""
        print(f"{sweep} {done:,} of {self._nodes:,} nodes{left}", flush=True)
