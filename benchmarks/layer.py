"""The layer compared with its peers: one table, each pair measured alone in its own process.

python -m benchmarks.layer [--shapes C3,C4] [--norms batch,frozen] [--peers published,attention]
"""

import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks import report
from benchmarks.child import COMPILERS, PAIR, run_forked, start_server
from benchmarks.options import (
    add_names_option,
    add_run_options,
    header,
    minutes,
    positive,
    program,
    require_device,
    result_stem,
    run,
    save_results,
)
from benchmarks.pair import compare_alone
from benchmarks.peer_checks import is_compiled
from benchmarks.peers import SIDES
from benchmarks.prepare import job_name
from benchmarks.report import SlowPeer
from benchmarks.shapes import MODES, SHAPES, Case, cases
from latentgnn.errors import UserError
from latentgnn.files.reading import read_json

LAYERS = ("latentgnn", "compiled latentgnn")

# A row is refused if the literal peer is slower in this many processes.
LITERAL_ATTEMPTS = 3


def run_pair(case: Case, sides: tuple[str, str], *, rounds: int, threads: int | None) -> dict[str, Any]:
    """What `benchmarks.pair` measures, in a process of its own.

    Args:
        case: what is compared.
        sides: two names of `benchmarks.peers.SIDES`.
        rounds: measurements of each side.
        threads: number of torch threads; ``None`` for torch's default.

    Raises:
        UserError: a side is wrong, or the process failed.
    """
    return run_forked(compare_alone, case, sides, rounds, threads)


class Literal:
    """Checks that the published peer is the fastest literal form, and keeps its ratios to the reference.

    Args:
        rounds: measurements of each side.
        threads: number of torch threads.
        once: whether the first case of an input is checked for all of that input's.
    """

    def __init__(self, *, rounds: int, threads: int | None, once: bool = False) -> None:
        self.rounds, self.threads, self.once = rounds, threads, once
        self.ratios: dict[str, Any] = {}
        self._refused: dict[str, str] = {}

    def check(self, case: Case) -> None:
        """Measure both, unless that was done for this case.

        Args:
            case: a map.

        Raises:
            SlowPeer: the published peer is slower, in each of several processes.
            UserError: a process failed.
        """
        key = case.shape if self.once else case.name
        if key in self._refused:
            raise SlowPeer(self._refused[key])
        if key not in self.ratios:
            try:
                self.ratios[key] = self._measure(case)
            except SlowPeer as error:
                self._refused[key] = str(error)
                raise

    def _measure(self, case: Case) -> dict[str, Any]:
        for attempt in range(LITERAL_ATTEMPTS):
            measured = run_pair(case, ("published", "reference"), rounds=self.rounds, threads=self.threads)
            try:
                report.check_literal(case.name, measured)
                break
            except SlowPeer:
                # May be chance: another program may have used a core.
                if attempt == LITERAL_ATTEMPTS - 1:
                    raise
        return {key: measured[key] for key in ("forward_ratio", "step_ratio")}


def rows_of(
    chosen: Sequence[Case], *, first: str, peers: Sequence[str], compiled: Collection[str]
) -> list[tuple[Case, str]]:
    """The rows of a table: each case with each peer; compiled sides only for some inputs.

    Args:
        chosen: the cases.
        first: the layer's side, one of `LAYERS`.
        peers: the other sides.
        compiled: names of the inputs at which compiled sides run.

    Example:
        >>> peers = ["published", "compiled published"]
        >>> rows = rows_of([Case("C3"), Case("C4")], first="latentgnn", peers=peers, compiled=["C4"])
        >>> [(case.shape, peer) for case, peer in rows]
        [('C3', 'published'), ('C4', 'published'), ('C4', 'compiled published')]
    """
    return [
        (case, peer)
        for case in chosen
        for peer in peers
        if case.shape in compiled or not (is_compiled(first) or is_compiled(peer))
    ]


def prepared_rows(rows: Sequence[tuple[Case, str]], *, first: str, prepared: Collection[str]) -> list[tuple[Case, str]]:
    """The rows that compile nothing while they are timed.

    Args:
        rows: from `rows_of`.
        first: the layer's side, one of `LAYERS`.
        prepared: names from `benchmarks.prepare.job_name`.

    Example:
        >>> rows = [(Case("C3"), "compiled published"), (Case("C4"), "compiled published"), (Case("C5"), "published")]
        >>> prepared = ["C4 batch evaluation contiguous cpu float32, compiled published"]
        >>> [case.shape for case, _ in prepared_rows(rows, first="latentgnn", prepared=prepared)]
        ['C4', 'C5']
    """
    return [
        (case, peer)
        for case, peer in rows
        if all(job_name(case, side) in prepared for side in (first, peer) if is_compiled(side))
    ]


def measure(
    rows: Sequence[tuple[Case, str]],
    *,
    first: str,
    rounds: int,
    processes: int,
    threads: int | None,
    head: dict[str, Any],
    stem: Path,
    literal_once: bool,
    limit: float,
    left_out: int,
) -> dict[str, Any]:
    """Measure a table, print its rows, and write it after each of them.

    A row whose process fails says so, and the rest goes on.

    Args:
        rows: from `rows_of`.
        first: the layer's side, one of `LAYERS`.
        rounds: measurements of each side in each process.
        processes: for each pair.
        threads: number of torch threads.
        head: header of the result files.
        stem: path of the result files without their ending.
        literal_once: whether the literal peer is checked once an input, not in each case.
        limit: seconds after which no row is begun.
        left_out: rows left out of ``rows``, which also count as not begun.

    Returns:
        What was written as JSON.
    """
    start = monotonic()
    literal = Literal(rounds=rounds, threads=threads, once=literal_once)
    pairs: list[dict[str, Any]] = []
    result: dict[str, Any] = {**head, "literal": literal.ratios, "pairs": pairs, "means": []}
    result["not_begun"] = total = len(rows) + left_out
    print(report.markdown_table(report.pair_head(head["gpu"] is not None), []), flush=True)
    for case, peer in rows:
        began = monotonic()
        if began - start > limit:
            break
        shape = case.input
        told = {key: getattr(shape, key) for key in ("size", "latents", "graph_conv", "kind", "everyday")}
        try:
            if peer == "published" and shape.kind == "map":
                literal.check(case)
            pair = (first, peer)
            found = [run_pair(case, pair, rounds=rounds, threads=threads) for _ in range(processes)]
        except SlowPeer as error:
            found = [{"refused": str(error)}]
        except UserError as error:
            print(f"{case.name}, {peer}: {error}", file=sys.stderr, flush=True)
            found = [{"failed": str(error)}]
        took = monotonic() - began
        pairs.append({**asdict(case), **told, "peer": peer, "took": took, **report.pooled(found)})
        print(report.table_row(report.pair_row(pairs[-1])), flush=True)
        result["means"] = report.means(pairs)
        result["not_begun"] = total - len(pairs)
        # After every row, so that a stopped run keeps its results.
        save_results(stem, result, report.layer_markdown(result))
    if result["means"]:
        print("\ngeometric means over the everyday inputs, all modes together:\n")
        print(report.markdown_table(report.MEAN_HEAD, report.mean_rows(result["means"])))
    written = f"written to {stem}.json and .md" if pairs else "nothing written"
    print(f"\n{len(pairs)} of {total} rows in {monotonic() - start:.0f} s, {written}", flush=True)
    return result


def main(argv: list[str]) -> int:
    """Measure the chosen inputs.

    Args:
        argv: command-line arguments.

    Returns:
        The exit code: 1 where something failed.
    """
    parser = program("layer", __doc__, out=True)
    others = [side for side in SIDES if side not in LAYERS]
    add_names_option(parser, "--shapes", SHAPES)
    add_names_option(parser, "--norms", MODES, ", ".join(MODES))
    add_names_option(parser, "--modes", MODES["batch"], "of batch norm")
    add_names_option(parser, "--layouts", ("contiguous", "channels-last"), "of maps", default="contiguous")
    add_names_option(parser, "--peers", others, ", ".join(others), default="published")
    parser.add_argument(
        "--first", default=LAYERS[0], choices=LAYERS, help=f"what peers are compared with ({LAYERS[0]})"
    )
    parser.add_argument(
        "--processes", type=positive, default=1, metavar="N", help="for each pair, one after another (1)"
    )
    add_names_option(parser, "--compiled", SHAPES, "inputs at which compiled sides run, or none", or_none=True)
    parser.add_argument(
        "--literal",
        default="every",
        choices=["every", "once"],
        help="whether the literal peer is checked in every case, or to save time in the first of each input (every)",
    )
    parser.add_argument(
        "--prepared",
        type=Path,
        metavar="FILE",
        help="leave out rows whose compiled sides `benchmarks.prepare --record FILE` did not list there (none)",
    )
    parser.add_argument("--limit", type=minutes, default=inf, metavar="MINUTES", help="begin no row after them (none)")
    parser.add_argument("--label", default="", metavar="WORD", help="in the result files' names, to keep tables apart")
    add_run_options(parser)
    given = parser.parse_args(argv)
    require_device(given.device)
    head = header("benchmarks.layer", argv, device=given.device, dtype=given.dtype, threads=given.threads)
    dtype = given.dtype if given.dtype != "float32" else ""
    compiled = "compiled" if given.first != LAYERS[0] else ""
    stem = result_stem(given.out, "layer", head, given.device, given.label, dtype, compiled)
    chosen = cases(given.shapes, given.norms, given.modes, given.layouts, device=given.device, dtype=given.dtype)
    rows = rows_of(chosen, first=given.first, peers=given.peers, compiled=given.compiled)
    total = len(rows)
    if given.prepared is not None:
        rows = prepared_rows(rows, first=given.first, prepared=set(read_json(given.prepared, "list")))
    start_server([PAIR, COMPILERS] if any(map(is_compiled, (given.first, *given.peers))) else [PAIR])
    result = measure(
        rows,
        first=given.first,
        rounds=given.rounds,
        processes=given.processes,
        threads=given.threads,
        head=head,
        stem=stem,
        literal_once=given.literal == "once",
        limit=given.limit,
        left_out=total - len(rows),
    )
    return int(any("failed" in pair for pair in result["pairs"]))


if __name__ == "__main__":
    sys.exit(run(main))
