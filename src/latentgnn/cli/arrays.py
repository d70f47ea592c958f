"""The command ``apply``: a layer on an array that may be larger than memory."""

import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from latentgnn.cli.parsing import Overrides, UsageError
from latentgnn.errors import UserError
from latentgnn.files.outputs import quoted, say_end
from latentgnn.progress import parts_done

if TYPE_CHECKING:
    from latentgnn.points import PackedLatentGNN


def apply_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("layer", type=Path, metavar="LAYER", help="the folder or file that save_pretrained wrote")
    parser.add_argument("source", type=Path, metavar="ARRAY", help="a .npy file, (N, C): the nodes of one scene")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new .npy file, (N, C)")
    parser.add_argument("--dtype", choices=("float16", "float32", "float64"), help="dtype of --out (that of ARRAY)")
    parser.add_argument("--device", default="cpu", help="where the layer runs, such as cuda (cpu)")
    parser.add_argument("--chunk", type=int, metavar="N", help="nodes that are in memory at a time (chosen)")


def apply(arguments: argparse.Namespace, overrides: Overrides) -> int:
    if arguments.chunk is not None and arguments.chunk < 1:
        raise UsageError(f"--chunk: expected a number of at least 1; got {arguments.chunk}")
    from latentgnn.arrays import apply_to_file, work_folder
    from latentgnn.files.npy_files import NpyFile
    from latentgnn.training.locks import LOCK, sole_use

    layer, nodes = _layer(arguments.layer, arguments.device), NpyFile.open(arguments.source).nodes
    work = work_folder(arguments.out)
    work.mkdir(parents=True, exist_ok=True)
    try:
        with sole_use(work), parts_done(lines="nodes") as update:
            apply_to_file(
                layer,
                arguments.source,
                arguments.out,
                chunk_nodes=arguments.chunk,
                dtype=arguments.dtype,
                progress=lambda sweep, done: update(sweep, done, nodes),
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
    """A layer for points with the weights of a saved one, which may be a layer for maps."""
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
