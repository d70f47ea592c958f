"""The plots of docs/scaling.md, as SVG."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.projection import FLOAT, NODES, Measured, Results, checked, projections
from benchmarks.scaling_tables import scans_by_settings
from latentgnn.errors import require


def plots(results: Results) -> dict[str, bytes]:
    """SVG pictures by name, of those programs that have results.

    Args:
        results: of `benchmarks.scaling.latest`.
    """
    require("matplotlib", extra="viz")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The same picture is the same file.
    mpl.rcParams["svg.hashsalt"] = "latentgnn"
    pictures: dict[str, bytes] = {}

    def draw(name: str, count: int, fill: Callable[[Any], None]) -> None:
        figure = Figure(figsize=(4.6 * count, 3.4), layout="constrained")
        axes = figure.subplots(1, count, squeeze=False)[0]
        fill(axes)
        for one in axes:
            one.grid(visible=True, which="major", alpha=0.3)
            one.legend(fontsize=7)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        # Strip trailing spaces, which a repository should not have.
        pictures[name] = re.sub(rb"[ \t]+\n", b"\n", stream.getvalue())

    if "annotations" in results:
        draw("annotations", 2, lambda axes: _draw_annotations(axes, results["annotations"]["measured"]))
    if "streaming" in results:
        draw("streaming", 2, lambda axes: draw_streaming(axes, results["streaming"]["cases"]))
    if "sharding" in results:
        draw("sharding", 2, lambda axes: _draw_sharding(axes, results["sharding"]))
        draw("projection", 3, lambda axes: _draw_projection(axes, projections(results)))
    if "large-scans" in results:
        draw("scans", 1, lambda axes: _draw_scans(axes[0], scans_by_settings(results)))
    return pictures


def _draw_annotations(axes: Any, measured: Sequence[Mapping[str, Any]]) -> None:
    for place, (key, title) in enumerate((("opened", "main process, opened"), ("worker", "a loading process"))):
        for side, label in (("this", "now"), ("beside", "as Python's objects")):
            for start in dict.fromkeys(one["start"] for one in measured):
                own = [one for one in measured if (one["side"], one["start"]) == (side, start)]
                if own and (key == "worker" or start == measured[0]["start"]):
                    name = f"{label}, {start}" if key == "worker" else label
                    axes[place].loglog([o["images"] for o in own], [o[key] / 1e6 for o in own], marker="o", label=name)
        axes[place].set(title=f"{title}, MB", xlabel="images")


def draw_streaming(axes: Any, cases: Sequence[Mapping[str, Any]]) -> None:
    """Draw resident memory, and time per node, against the number of nodes.

    Args:
        axes: two axes of matplotlib.
        cases: the cases, as `benchmarks.streaming_case` gives them.
    """
    for mode, label in (("streaming", "in chunks, from disk to disk"), ("memory", "in memory")):
        own = [case for case in cases if case["mode"] == mode]
        nodes = [case["nodes"] for case in own]
        axes[0].loglog(nodes, [case["resident"] for case in own], marker="o", label=label)
        axes[1].loglog(nodes, [case["nanoseconds"]["all"] for case in own], marker="o", label=label)
    axes[0].set(title="resident memory, MiB", xlabel="nodes")
    axes[1].set(title="time a node, ns", xlabel="nodes")


def _draw_sharding(axes: Any, sharding: Mapping[str, Any]) -> None:
    nodes = [one["nodes"] for one in sharding["bytes"]]
    axes[0].loglog(nodes, [sum(one["step"]) for one in sharding["bytes"]], marker="o", label="all-reduces of a step")
    size = [FLOAT * sharding["layer"]["channels"] * one for one in nodes]
    axes[0].loglog(nodes, size, ls=":", color="black", label="the input itself")
    axes[0].set(title="bytes between processes", xlabel="nodes")
    rows = [row for row in checked(sharding) if row["processes"] == 2]
    alone = {row["nodes"]: row["measured"] for row in checked(sharding) if row["processes"] == 1}
    for key in ("measured", "predicted"):
        times = [alone[row["nodes"]] / row[key] / 2 for row in rows]
        axes[1].semilogx([row["nodes"] for row in rows], times, marker="o", label=key)
    axes[1].axhline(1, color="black", lw=1, ls=":")
    axes[1].set(title="efficiency of 2 processes", xlabel="nodes", ylim=(0, 1.1))


def _draw_projection(axes: Any, machines: Sequence[tuple[str, int, Measured]]) -> None:
    counts = [2**power for power in range(9)]
    titles = ("cores as here", "cores as here, slowest", "GPUs as assumed")
    for one, title, (_, _, model) in zip(axes, titles, machines, strict=True):
        for nodes in (10**5, 10**6, 10**7, NODES):
            shares = [model.efficiency(nodes, count) for count in counts]
            one.semilogx(counts, shares, base=2, marker=".", label=f"10^{round(math.log10(nodes))} nodes")
        one.set(title=f"efficiency, {title}", xlabel="processes", ylim=(0, 1.05))


def _draw_scans(axes: Any, groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for settings, rows in groups.items():
        for read in dict.fromkeys(row["read"] for row in rows):
            own = [row for row in rows if row["read"] == read]
            peaks = [row["peak"] / 1e6 for row in own]
            axes.loglog([row["points"] for row in own], peaks, marker="o", label=f"{read}, {settings}")
    axes.set(title="predict: memory at most, MB", xlabel="points")
