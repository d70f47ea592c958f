"""The layer beside its peers: one table, each pair alone in a process of its own.

python -m benchmarks.layer [--shapes C3,C4] [--norms batch,frozen] [--peers published,attention]
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.child import run_child
from benchmarks.options import RESULTS, add_run_options, header, names_of, positive, require_device
from benchmarks.peers import SIDES
from benchmarks.report import SlowPeer
from benchmarks.shapes import MODES, SHAPES, Case, cases
from latentgnn.errors import UserError
from latentgnn.files import write_json, write_text

LAYERS = ("latentgnn", "compiled latentgnn")

# Processes in which the literal peer must be the slower one before a row is refused.
LITERAL_ATTEMPTS = 3


def run_pair(case: Case, sides: tuple[str, str], *, rounds: int, threads: int | None) -> dict[str, Any]:
    """What `benchmarks.pair` measures, in a process of its own.

    Args:
        case: what is compared.
        sides: two names of `benchmarks.peers.SIDES`.
        rounds: measurements of each side.
        threads: of torch; ``None`` for torch's default.
    """
    arguments = [text for key, value in asdict(case).items() for text in (f"--{key}", value)]
    arguments += ["--sides", ",".join(sides), "--rounds", str(rounds)]
    arguments += [] if threads is None else ["--threads", str(threads)]
    return run_child("benchmarks.pair", arguments)


def literal_ratios(case: Case, *, rounds: int, threads: int | None) -> dict[str, Any]:
    """The reference's time over the published peer's, after a check that the latter is the fastest literal form.

    Args:
        case: a map.
        rounds: measurements of each side.
        threads: of torch.

    Raises:
        SlowPeer: it is slower, in each of several processes.
    """
    for attempt in range(LITERAL_ATTEMPTS):
        measured = run_pair(case, ("published", "reference"), rounds=rounds, threads=threads)
        try:
            report.check_literal(case.name, measured)
            break
        except SlowPeer:
            # Once may be chance: another program may have taken a core.
            if attempt == LITERAL_ATTEMPTS - 1:
                raise
    return {key: measured[key] for key in ("forward_ratio", "step_ratio")}


def measure(
    chosen: Sequence[Case],
    *,
    first: str,
    peers: Sequence[str],
    rounds: int,
    processes: int,
    threads: int | None,
    head: dict[str, Any],
    stem: Path,
) -> dict[str, Any]:
    """Measure a table, print its rows, and write it after each of them.

    Args:
        chosen: the cases.
        first: the layer's side, one of `LAYERS`.
        peers: the other sides.
        rounds: measurements of each side in each process.
        processes: for each pair.
        threads: of torch.
        head: what the files say of their making.
        stem: path of the result files without their ending.

    Returns:
        What was written as JSON.

    Raises:
        UserError: a side is wrong.
    """
    literal: dict[str, Any] = {}
    pairs: list[dict[str, Any]] = []
    result: dict[str, Any] = {**head, "literal": literal, "pairs": pairs, "means": []}
    print(report.markdown_table(report.PAIR_HEAD, []), flush=True)
    for case in chosen:
        for peer in peers:
            shape = case.input
            told = {key: getattr(shape, key) for key in ("size", "latents", "graph_conv", "kind", "everyday")}
            try:
                if peer == "published" and shape.kind == "map":
                    literal[case.name] = literal_ratios(case, rounds=rounds, threads=threads)
                found = [run_pair(case, (first, peer), rounds=rounds, threads=threads) for _ in range(processes)]
            except SlowPeer as error:
                found = [{"refused": str(error)}]
            pairs.append({**asdict(case), **told, "peer": peer, **report.pooled(found)})
            print(report.markdown_table(report.pair_row(pairs[-1]), []).splitlines()[0], flush=True)
            result["means"] = report.means(pairs)
            # After every row: a long run that is stopped has not been in vain.
            write_json(stem.with_suffix(".json"), result)
            write_text(stem.with_suffix(".md"), report.layer_markdown(result))
    if result["means"]:
        print("\ngeometric means over the everyday inputs, all modes together:\n")
        print(report.markdown_table(report.MEAN_HEAD, report.mean_rows(result["means"])))
    print(f"\nwritten to {stem}.json and .md")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the chosen inputs.

    Args:
        argv: the arguments; ``None`` takes the process's.

    Returns:
        The exit code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__, allow_abbrev=False)
    names = partial(partial, names_of)
    others = [side for side in SIDES if side not in LAYERS]
    parser.add_argument("--shapes", type=names(SHAPES), default="all", metavar="NAME,..", help="(all)")
    parser.add_argument(
        "--norms", type=names(MODES), default="all", metavar="NAME,..", help=f"{', '.join(MODES)} (all)"
    )
    parser.add_argument(
        "--modes", type=names(MODES["batch"]), default="all", metavar="NAME,..", help="of batch norm (all)"
    )
    layouts = ("contiguous", "channels-last")
    parser.add_argument(
        "--layouts", type=names(layouts), default="contiguous", metavar="NAME,..", help="of maps (contiguous)"
    )
    parser.add_argument(
        "--peers", type=names(others), default="published", metavar="NAME,..", help=f"{', '.join(others)} (published)"
    )
    parser.add_argument(
        "--first", default=LAYERS[0], choices=LAYERS, help=f"what peers are compared with ({LAYERS[0]})"
    )
    parser.add_argument(
        "--processes", type=positive, default=1, metavar="N", help="for each pair, one after another (1)"
    )
    parser.add_argument("--label", default="", metavar="WORD", help="in the result files' names, to keep tables apart")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="(benchmarks/results)")
    add_run_options(parser)
    given = parser.parse_args(argv)
    try:
        require_device(given.device)
        head = header("benchmarks.layer", argv, device=given.device, dtype=given.dtype, threads=given.threads)
        parts = ["layer", head["date"][:10], given.device]
        parts += [given.label] if given.label else []
        parts += [given.dtype] if given.dtype != "float32" else []
        parts += ["compiled"] if given.first != LAYERS[0] else []
        parts += ["triton"] if head["triton"] else []
        measure(
            cases(given.shapes, given.norms, given.modes, given.layouts, device=given.device, dtype=given.dtype),
            first=given.first,
            peers=given.peers,
            rounds=given.rounds,
            processes=given.processes,
            threads=given.threads,
            head=head,
            stem=given.out / "-".join(parts),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
