"""A layer on arrays larger than memory, from disk to disk, compared with in memory: resident memory, time per node.

python -m benchmarks.streaming [--nodes 100000,1000000,10000000,100000000]

At 10^8 nodes of 32 channels two float16 arrays of 6.4 GB are on the disk for some minutes.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.child import run_child
from benchmarks.options import header, positive, positives, program, result_stem, run, write_results
from benchmarks.report import header_block, markdown_table, png
from benchmarks.scaling_plots import draw_streaming
from benchmarks.streaming_case import CHANNELS, LATENTS, MODES, REDUCTION
from latentgnn.errors import require
from latentgnn.files.writing import write_bytes

COUNTS = (100_000, 1_000_000, 10_000_000, 100_000_000)
MOST_IN_MEMORY = 10_000_000
# The goals: MiB of resident memory, and time per node relative to that of `BESIDE` nodes in memory.
BAR_RESIDENT, BAR_TIME, BESIDE = 2048, 1.3, 1_000_000


def plot(cases: Sequence[Mapping[str, Any]]) -> bytes:
    """Resident memory and time a node against the number of nodes, as PNG.

    Args:
        cases: as `benchmarks.streaming_case` gives them.
    """
    require("matplotlib", extra="viz")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    memory, times = figure.subplots(1, 2)
    draw_streaming((memory, times), cases)
    memory.axhline(BAR_RESIDENT, color="black", lw=1, ls=":")
    for axes in (memory, times):
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend(fontsize=8)
    return png(figure)


def bars(cases: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The goals and what was measured: memory at the most nodes, and time per node there relative to in memory.

    Args:
        cases: as `benchmarks.streaming_case` gives them.
    """
    largest = max((case for case in cases if case["mode"] == "streaming"), key=lambda case: case["nodes"])
    found = {"nodes": largest["nodes"], "resident": largest["resident"], "most_resident": BAR_RESIDENT}
    for case in cases:
        if case["mode"] == "memory" and case["nodes"] == BESIDE:
            found["time_ratio"] = largest["nanoseconds"]["all"] / case["nanoseconds"]["all"]
            found["most_time_ratio"] = BAR_TIME
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """A report for reading.

    Args:
        report: as written to JSON.
    """
    rows = [
        [
            f"{case['nodes']:,}",
            "in chunks" if case["mode"] == "streaming" else "in memory",
            *(f"{case['nanoseconds'][part]:.0f}" if part in case["nanoseconds"] else "" for part in PARTS),
            f"{case['resident']:.0f} ({case['before']:.0f} before)",
        ]
        for case in report["cases"]
    ]
    return "\n\n".join(
        [
            "# A layer over arrays larger than memory",
            header_block(report, ["cases"]),
            f"{CHANNELS} channels, {LATENTS} latents, reduction {REDUCTION}, float32 with frozen norms; arrays are "
            "float16. In chunks: both sweeps, from a file to a file. In memory: from an array to an array, with the "
            "conversions.",
            markdown_table(["nodes", "how", "ns a node", "gather", "scatter", "MiB resident"], rows) + "\n",
        ]
    )


PARTS = ("all", "gather", "scatter")


def main(argv: list[str]) -> None:
    """Measure, and write ``streaming-DATE-cpu`` as JSON, Markdown and PNG.

    Args:
        argv: command-line arguments.
    """
    parser = program("streaming", __doc__, out=True)
    parser.add_argument(
        "--nodes",
        type=positives,
        default=list(COUNTS),
        metavar="N,..",
        help="10^5 to 10^8",
    )
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="measurements up to 10^7 nodes (3)")
    parser.add_argument("--threads", type=positive, metavar="N", help="number of torch threads (torch's default)")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="for the arrays, which stay (a temporary one)")
    parser.add_argument("--add-to", type=Path, metavar="FILE", help="put new cases to those of this JSON file")
    given = parser.parse_args(argv)
    report = header("benchmarks.streaming", argv, device="cpu", dtype="float32", threads=given.threads)
    cases: list[dict[str, Any]] = []
    if given.add_to is not None:
        earlier = json.loads(given.add_to.read_text())
        cases, report["before"] = earlier["cases"], [*earlier.get("before", []), earlier["command"]]
    threads = [] if given.threads is None else ["--threads", str(given.threads)]
    with tempfile.TemporaryDirectory() if given.folder is None else nullcontext(given.folder.resolve()) as folder:
        for nodes in given.nodes:
            rounds = given.rounds if nodes <= MOST_IN_MEMORY else 1
            for mode in MODES if nodes <= MOST_IN_MEMORY else MODES[:1]:
                arguments = [mode, str(nodes), "--folder", str(folder), "--rounds", str(rounds), *threads]
                cases.append(run_child("benchmarks.streaming_case", arguments))
                print(json.dumps(cases[-1]), flush=True)
    cases.sort(key=lambda case: (case["mode"], case["nodes"]))
    report |= {"bars": bars(cases), "cases": cases}
    stem = result_stem(given.out, "streaming", report, "cpu")
    write_bytes(stem.with_suffix(".png"), plot(cases))
    print(markdown(report))
    write_results(stem, report, markdown(report))


if __name__ == "__main__":
    sys.exit(run(main))
