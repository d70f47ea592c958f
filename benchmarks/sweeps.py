"""The layer and its peers by number of nodes, packed scenes compared with padded ones, and time per node.

python -m benchmarks.sweeps [--parts nodes,packed,per-node]
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.child import run_child
from benchmarks.layer import run_pair
from benchmarks.options import (
    add_names_option,
    header,
    positive,
    program,
    result_stem,
    run,
    save_results,
    write_results,
)
from benchmarks.points import CHANNELS, COUNTS, LATENTS, SCENES
from benchmarks.report import header_block, input_mebibytes, markdown_table, png, spread
from benchmarks.shapes import SQUARES, Case
from latentgnn.errors import require
from latentgnn.files.writing import write_bytes

PARTS = ("nodes", "packed", "per-node")
PEERS = ("published", "attention", "latent queries")


def by_nodes(*, rounds: int, threads: int | None) -> list[dict[str, Any]]:
    """Each of `PEERS` beside the layer at square maps of growing size, with frozen norms.

    Args:
        rounds: measurements of each side.
        threads: number of torch threads.
    """
    results = []
    for name, shape in SQUARES.items():
        case = Case(name, norm="frozen", mode="training")
        for peer in PEERS:
            measured = run_pair(case, ("latentgnn", peer), rounds=rounds, threads=threads)
            results.append({"nodes": shape.nodes, "size": shape.size, "peer": peer, **measured})
    return results


def plot(pairs: Sequence[Mapping[str, Any]]) -> bytes:
    """Times over the layer's, and memory, against the number of nodes, on logarithmic axes, as PNG.

    Args:
        pairs: from `by_nodes`.
    """
    require("matplotlib", extra="viz")
    from matplotlib.figure import Figure

    measured = [pair for pair in pairs if "refused" not in pair]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    forward, step, held = figure.subplots(1, 3)
    for peer in dict.fromkeys(pair["peer"] for pair in measured):
        of_peer = [pair for pair in measured if pair["peer"] == peer]
        nodes = [pair["nodes"] for pair in of_peer]
        forward.loglog(nodes, [pair["forward_ratio"]["median"] for pair in of_peer], marker="o", label=peer)
        step.loglog(nodes, [pair["step_ratio"]["median"] for pair in of_peer], marker="o", label=peer)
        mebibytes = [pair["sides"][peer]["held"] * input_mebibytes(pair) for pair in of_peer]
        held.loglog(nodes, mebibytes, marker="o", label=peer)
    layer = {pair["nodes"]: pair["sides"]["latentgnn"]["held"] * input_mebibytes(pair) for pair in measured}
    held.loglog(list(layer), list(layer.values()), marker="o", lw=2.5, color="black", label="latentgnn")
    for axes, title in (
        (forward, "forward, over latentgnn's"),
        (step, "step, over latentgnn's"),
        (held, "held for backward, MiB"),
    ):
        axes.set_title(title)
        axes.set_xlabel("nodes")
        axes.grid(visible=True, which="major", alpha=0.3)
    for axes in (forward, step):
        axes.axhline(1, color="black", lw=1)
    held.legend(fontsize=8)
    return png(figure)


def markdown(report: Mapping[str, Any]) -> str:
    """A report for reading.

    Args:
        report: as written to JSON.
    """
    parts = ["# The layer over the number of nodes", header_block(report, PARTS)]
    if "nodes" in report:
        rows = []
        for pair in report["nodes"]:
            name = [f"{pair['nodes']:,}", pair["peer"]]
            if "refused" in pair:
                rows.append([*name, f"not run: {pair['refused']}", "", ""])
                continue
            milliseconds = f"{1e3 * pair['sides']['latentgnn']['forward_seconds']:.2f} ms"
            rows.append([*name, spread(pair["forward_ratio"]), spread(pair["step_ratio"]), milliseconds])
        head_row = ["nodes", "peer", "forward ratio", "step ratio", "latentgnn forward"]
        parts += [
            "Square maps of 256 channels, 64 latents, frozen norms; the peer's time over the layer's:",
            markdown_table(head_row, rows),
        ]
    if "packed" in report:
        rows = [
            [
                *(f"{one[key]:,}" for key in ("scenes", "points", "largest")),
                f"{1e3 * one['packed_seconds']:.0f} ms",
                spread(one["padded_over_packed"]),
            ]
            for one in report["packed"]
        ]
        parts += [
            "Scenes packed against padded to the largest, forward:",
            markdown_table(["scenes", "points", "largest", "packed", "padded over packed"], rows),
        ]
    if "per-node" in report:
        rows = [[f"{one['nodes']:,}", f"{one['nanoseconds']:.0f} ns"] for one in report["per-node"]]
        parts += [
            f"Forward time a node, {CHANNELS} channels, {LATENTS} latents:",
            markdown_table(["nodes", "each"], rows),
        ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> None:
    """Measure the chosen parts on the CPU, and write ``sweeps-DATE-cpu`` as JSON, Markdown and PNG.

    Args:
        argv: command-line arguments.
    """
    parser = program("sweeps", __doc__, out=True)
    add_names_option(parser, "--parts", PARTS, ", ".join(PARTS))
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="measurements of each side (5)")
    parser.add_argument("--threads", type=positive, metavar="N", help="number of torch threads (torch's default)")
    parser.add_argument(
        "--most", type=positive, default=COUNTS[-1], metavar="NODES", help="of time a node; 10,000,000 need 8 GB (all)"
    )
    given = parser.parse_args(argv)
    report = header("benchmarks.sweeps", argv, device="cpu", dtype="float32", threads=given.threads)
    stem = result_stem(given.out, "sweeps", report, "cpu")
    common = ["--rounds", str(given.rounds)]
    common += [] if given.threads is None else ["--threads", str(given.threads)]
    for part in given.parts:
        if part == "nodes":
            report[part] = by_nodes(rounds=given.rounds, threads=given.threads)
            write_bytes(stem.with_suffix(".png"), plot(report[part]))
        elif part == "packed":
            report[part] = [run_child("benchmarks.points", ["packed", name, *common]) for name in SCENES]
        else:
            counts = [count for count in COUNTS if count <= given.most]
            report[part] = [run_child("benchmarks.points", ["per-node", str(count), *common]) for count in counts]
        save_results(stem, report, markdown(report))
    print(markdown(report))
    write_results(stem, report, markdown(report))


if __name__ == "__main__":
    sys.exit(run(main))
