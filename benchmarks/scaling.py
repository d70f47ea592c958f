"""What the results of other programs say about scale: the tables and plots of docs/scaling.md, and a projection.

python -m benchmarks.scaling            # after benchmarks.annotations, .streaming, .sharding and .large_scans

The projection is arithmetic on measured figures. A step of one process on n nodes takes a + b n seconds; an all-reduce
of s bytes between p processes takes log2(p) l + 2 (p - 1) / p s / w seconds. Nothing overlaps. The measurements of one
process give a and b, those of the all-reduce alone l and w, and the measured steps of two processes, which were not
used for either, say how far it is right.
"""

import argparse
import io
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child import ROOT
from benchmarks.options import RESULTS
from benchmarks.report import markdown_table
from latentgnn.errors import UserError, require
from latentgnn.files import write_bytes, write_text

PAGE = ROOT / "docs" / "scaling.md"
Results = Mapping[str, Mapping[str, Any]]
PROGRAMS = ("annotations", "streaming", "sharding", "large-scans")
"""Names that result files begin with."""


@dataclass(frozen=True)
class Line:
    """Seconds that grow with a size: ``fixed + each * size``.

    Args:
        fixed: seconds.
        each: seconds a node, or a byte.
    """

    fixed: float
    each: float

    @classmethod
    def through(cls, sizes: Sequence[float], seconds: Sequence[float]) -> "Line":
        """The line with the least squares of relative errors; neither of its parts is negative.

        Args:
            sizes: of the measurements, two or more different ones.
            seconds: that they took.

        Example:
            >>> line = Line.through([1000, 2000, 4000], [0.003, 0.005, 0.009])
            >>> round(line.fixed, 6), round(line.each, 9)
            (0.001, 2e-06)
        """
        x, y = np.array(sizes, np.float64), np.array(seconds, np.float64)
        # Each row is divided by its measurement, so that errors are relative; sizes are scaled for the arithmetic.
        scale = x.max()
        rows = np.stack([np.ones_like(x), x / scale], axis=1) / y[:, None]
        fixed, each = np.linalg.lstsq(rows, np.ones_like(y))[0]
        if fixed < 0:
            fixed, each = 0.0, float((x / scale / y).sum() / ((x / scale / y) ** 2).sum())
        return cls(float(fixed), float(each / scale))

    def seconds(self, size: float) -> float:
        """Of a size."""
        return self.fixed + self.each * size


def all_reduce_seconds(link: Line, size: float, processes: int) -> float:
    """Of one all-reduce: as many rounds as a tree has levels, and the bytes of a ring.

    Args:
        link: of an all-reduce of two processes.
        size: bytes that are added.
        processes: how many.

    Example:
        >>> link = Line(1e-3, 1e-9)
        >>> all_reduce_seconds(link, 1e6, 1), all_reduce_seconds(link, 1e6, 2), all_reduce_seconds(link, 1e6, 64)
        (0.0, 0.002, 0.00796875)
    """
    if processes == 1:
        return 0.0
    return math.ceil(math.log2(processes)) * link.fixed + 2 * (processes - 1) / processes * link.each * size


def step_seconds(step: Line, link: Line, sums: Sequence[float], nodes: float, processes: int) -> float:
    """Of a step whose nodes are spread evenly.

    Args:
        step: of one process.
        link: of an all-reduce of two processes.
        sums: bytes of the all-reduces of a step.
        nodes: of all processes together.
        processes: how many.
    """
    passed = sum(all_reduce_seconds(link, size, processes) for size in sums)
    return step.seconds(nodes / processes) + passed


def efficiency(step: Line, link: Line, sums: Sequence[float], nodes: float, processes: int) -> float:
    """How many times as fast as one process, over the number of processes; arguments as of `step_seconds`.

    Example:
        >>> efficiency(Line(0, 1e-6), Line(0, 0), [1000], 1e6, 64)
        1.0
        >>> efficiency(Line(0, 1e-6), Line(0.5, 0), [1000], 1e6, 2)  # half a second, and half a second to add
        0.5
    """
    alone = step_seconds(step, link, sums, nodes, 1)
    return alone / (processes * step_seconds(step, link, sums, nodes, processes))


@dataclass(frozen=True)
class Assumed:
    """What is not measured here. These are figures of data sheets, with how much of them a program gets.

    Args:
        name: of the machines.
        processes: how many.
        operations: a second, of one device in float32 products.
        bandwidth: bytes a second, of one device's memory.
        share: of both that the layer gets.
        fixed: seconds of a step beside its nodes.
        latency: seconds of an all-reduce of two devices of few bytes.
        link: bytes a second between devices.
    """

    name: str
    processes: int
    operations: float
    bandwidth: float
    share: float
    fixed: float
    latency: float
    link: float


GPUS = Assumed(
    name="64 GPUs of 67 TFLOP/s in float32 and 3.35 TB/s, 400 Gbit/s each between them",
    processes=64,
    operations=67e12,
    bandwidth=3.35e12,
    share=0.3,
    fixed=1e-3,
    latency=30e-6,
    link=50e9,
)
NODES = 10**9
# The layer reads and writes its input's size so often in a step: `latentgnn.cost`.
_PASSES = 8
_FLOAT = 4


@dataclass(frozen=True)
class Measured:
    """What the projection takes from `benchmarks.sharding`.

    Args:
        step: of one process of one thread.
        link: of an all-reduce of two.
        sums: bytes of a step's all-reduces.
        layer: its sizes.
    """

    step: Line
    link: Line
    sums: tuple[int, ...]
    layer: Mapping[str, Any]

    @classmethod
    def of(cls, sharding: Mapping[str, Any]) -> "Measured":
        """From the JSON.

        Args:
            sharding: as `benchmarks.sharding` wrote it.
        """
        alone = [row for row in sharding["throughput"] if (row["processes"], row["threads"]) == (1, 1)]
        messages = sharding["all_reduce"]
        return cls(
            step=Line.through([row["nodes"] for row in alone], [row["step_seconds"] for row in alone]),
            link=Line.through([row["bytes"] for row in messages], [row["seconds"] for row in messages]),
            sums=tuple(sharding["bytes"][-1]["step"]),
            layer=sharding["layer"],
        )

    def waiting(self, sharding: Mapping[str, Any]) -> "Measured":
        """The model with an all-reduce in a step as slow as the slowest that the steps of two processes can have had.

        There each waits until the other has come so far, which an all-reduce alone does not show.

        Args:
            sharding: as `benchmarks.sharding` wrote it.
        """
        rest = max(
            row["measured"] - self.step.seconds(row["nodes"] / 2) - self.link.each * sum(self.sums)
            for row in checked(sharding)
            if row["processes"] == 2
        )
        latency = max(self.link.fixed, rest / len(self.sums))
        return Measured(self.step, Line(latency, self.link.each), self.sums, self.layer)

    def on(self, assumed: Assumed) -> "Measured":
        """The same layer on other machines.

        Args:
            assumed: what they are.
        """
        computing = self.layer["step_operations_per_node"] / assumed.operations
        moving = _PASSES * _FLOAT * self.layer["channels"] / assumed.bandwidth
        step = Line(assumed.fixed, max(computing, moving) / assumed.share)
        return Measured(step, Line(assumed.latency, 1 / assumed.link), self.sums, self.layer)

    def efficiency(self, nodes: float, processes: int) -> float:
        """Of a step."""
        return efficiency(self.step, self.link, self.sums, nodes, processes)

    def seconds(self, nodes: float, processes: int) -> float:
        """Of a step."""
        return step_seconds(self.step, self.link, self.sums, nodes, processes)

    def nodes_for(self, wanted: float, processes: int) -> float:
        """Nodes of all processes together from which on a step has an efficiency.

        Args:
            wanted: below 1.
            processes: more than one.

        Raises:
            ValueError: no number of nodes is enough.
        """
        low, high = 1.0, 1e15
        if self.efficiency(high, processes) < wanted:
            raise ValueError(f"no number of nodes has an efficiency of {wanted}")
        while high / low > 1.01:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.efficiency(middle, processes) >= wanted else (middle, high)
        return high


def checked(sharding: Mapping[str, Any]) -> list[dict[str, float]]:
    """Steps of one and two processes of one thread each: measured, predicted, and the error of the prediction.

    Args:
        sharding: as `benchmarks.sharding` wrote it.
    """
    measured = Measured.of(sharding)
    rows = []
    for row in sharding["throughput"]:
        if row["threads"] == 1:
            predicted = measured.seconds(row["nodes"], row["processes"])
            error = predicted / row["step_seconds"] - 1
            known = {key: row[key] for key in ("nodes", "processes")}
            rows.append({**known, "measured": row["step_seconds"], "predicted": predicted, "error": error})
    return rows


def latest(folder: Path) -> dict[str, Any]:
    """The newest result of each of `PROGRAMS` that has one; of scans, all results of the newest day, as ``parts``.

    Args:
        folder: with result files.
    """
    found: dict[str, Any] = {}
    for name in PROGRAMS:
        paths = sorted(folder.glob(f"{name}-[0-9]*.json"))
        read = [{**json.loads(path.read_text()), "file": path.stem} for path in paths]
        if name == "large-scans" and read:
            day = max(result["date"][:10] for result in read)
            found[name] = {"parts": [result for result in read if result["date"][:10] == day]}
        elif read:
            found[name] = max(read, key=lambda result: result["date"])
    return found


def _time(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    for unit, factor in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _rounded(number: float) -> int:
    """To its first digit, upwards."""
    unit = 10 ** math.floor(math.log10(number))
    return math.ceil(number / unit) * unit


def _source(result: Mapping[str, Any]) -> str:
    # What a result says about how it was measured, where that is not plain.
    note = "".join(f"; {result[key]}" for key in ("code", "note") if key in result)
    commands = " and ".join(f"`{command}`" for command in [*result.get("before", []), result["command"]])
    threads = f"{result['threads']} thread{'s' if result['threads'] != 1 else ''}"
    return (
        f"{commands}, {result['processor']}, {threads}, torch {result['torch']}, "
        f"{result['date'][:10]}{note}: [results](../benchmarks/results/{result['file']}.md)."
    )


def annotations_table(results: Results) -> str:
    """Memory and time of annotations against the number of images.

    Args:
        results: of `latest`.
    """
    result = results["annotations"]
    rows = [
        [
            f"{one['images']:,}",
            f"{one['file_bytes'] / 1e9:.2f} GB",
            "now" if one["side"] == "this" else "as objects",
            one["start"],
            f"{one['open_seconds']:,.0f} s",
            f"{one['first_batch_seconds']:.1f} s",
            *(f"{one[key] / 1e6:,.0f} MB" for key in ("peak", "opened", "worker")),
        ]
        for one in result["measured"]
    ]
    titles = [
        "images",
        "file",
        "annotations",
        "start",
        "processor's time",
        "first batch after",
        "at most",
        "opened",
        "a worker",
    ]
    return f"{markdown_table(titles, rows)}\n\n{_source(result)}"


def streaming_table(results: Results) -> str:
    """Memory and time a node against the number of nodes.

    Args:
        results: of `latest`.
    """
    result = results["streaming"]
    rows = [
        [
            f"{case['nodes']:,}",
            "in chunks" if case["mode"] == "streaming" else "in memory",
            f"{case['resident']:,.0f} MiB",
            f"{case['nanoseconds']['all']:,.0f} ns",
        ]
        for case in result["cases"]
    ]
    return f"{markdown_table(['nodes', 'read', 'resident', 'time a node'], rows)}\n\n{_source(result)}"


def bytes_table(results: Results) -> str:
    """Bytes of each all-reduce of a step against the number of nodes.

    Args:
        results: of `latest`.
    """
    result = results["sharding"]
    rows = [[f"{one['nodes']:,}", " and ".join(f"{size:,}" for size in one["step"])] for one in result["bytes"]]
    return f"{markdown_table(['nodes', 'bytes of each all-reduce of a step'], rows)}\n\n{_source(result)}"


def checked_table(results: Results) -> str:
    """Predicted and measured steps of one and two processes.

    Args:
        results: of `latest`.
    """
    result = results["sharding"]
    rows: list[list[str]] = []
    alone: dict[int, float] = {}
    for row in checked(result):
        nodes, processes = int(row["nodes"]), int(row["processes"])
        alone.setdefault(nodes, row["measured"])
        share = alone[nodes] / row["measured"] / processes
        cells = [f"{nodes:,}", str(processes), _time(row["measured"]), f"{share:.0%}"]
        rows.append([*cells, _time(row["predicted"]), f"{row['error']:+.0%}"])
    titles = ["nodes", "processes", "step, measured", "efficiency", "step, predicted", "error"]
    model = Measured.of(result)
    return (
        f"{markdown_table(titles, rows)}\n\nThe line through the steps of one process: {_time(model.step.fixed)} and "
        f"{_time(model.step.each)} a node; through the all-reduces of two: {_time(model.link.fixed)} and "
        f"{1 / model.link.each / 1e9:.2g} GB/s. {_source(result)}"
    )


def projections(results: Results) -> list[tuple[str, int, Measured]]:
    """Machines, how many, and the model on them.

    Args:
        results: of `latest`.
    """
    here = Measured.of(results["sharding"])
    return [
        ("64 cores as this machine's, with all-reduces as between two processes of it", 64, here),
        ("the same, with all-reduces as slow as in the slowest step of two", 64, here.waiting(results["sharding"])),
        (GPUS.name, GPUS.processes, here.on(GPUS)),
    ]


def projection_table(results: Results) -> str:
    """A step of 10^9 nodes on 64 devices.

    Args:
        results: of `latest`.
    """
    rows = []
    for name, processes, model in projections(results):
        passed = sum(all_reduce_seconds(model.link, size, processes) for size in model.sums)
        input_bytes = NODES * model.layer["channels"] * _FLOAT / processes
        cells = [name, f"{processes}", _time(model.seconds(NODES, processes)), _time(passed)]
        cells += [f"{model.efficiency(NODES, processes):.1%}", f"{input_bytes / 1e9:,.0f} GB"]
        rows.append([*cells, f"{_rounded(model.nodes_for(0.9, processes)):,}"])
    titles = ["machines", "processes", "step", "of it all-reduces", "efficiency", "input of each", "nodes for 90%"]
    layer, gpu = results["sharding"]["layer"], GPUS
    assumed = (
        f"Assumed of a GPU, and not measured: {gpu.operations / 1e12:.0f} TFLOP/s and {gpu.bandwidth / 1e12:.2f} TB/s, "
        f"of which the layer gets {gpu.share:.0%}; {_time(gpu.fixed)} of a step beside its nodes; an all-reduce of two "
        f"takes {_time(gpu.latency)} and {gpu.link / 1e9:.0f} GB/s. Operations and bytes of the sums are those of the "
        f"measured layer: {layer['channels']} channels, {layer['latents']} latents, "
        f"{layer['step_operations_per_node'] / 1e3:,.0f} thousand operations a node and "
        f"{sum(Measured.of(results['sharding']).sums):,} bytes a step."
    )
    return f"{markdown_table(titles, rows)}\n\n{assumed}"


def scans_table(results: Results) -> str:
    """Prediction of scans by tiles and whole.

    Args:
        results: of `latest`.
    """
    rows = [
        [
            settings,
            f"{row['points']:,}",
            row["read"],
            f"{row['peak'] / 1e6:,.0f} MB",
            f"{row['seconds']:,.0f} s",
            f"{row['points'] / row['seconds']:,.0f}",
        ]
        for settings, of_settings in _scans(results).items()
        for row in of_settings
    ]
    titles = ["settings", "points", "read", "memory at most", "time", "points a second"]
    sources = "\n\n".join(_source(part) for part in results["large-scans"]["parts"])
    return f"{markdown_table(titles, rows)}\n\n{sources}"


def _scans(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by the settings that they are alike in."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for part in results["large-scans"]["parts"]:
        data = part["data"]
        settings = f"voxels of {data['voxel']:g} m, crops of {data['crop_size']:g} m"
        groups.setdefault(settings, []).extend(part["rows"])
    return {settings: sorted(rows, key=lambda row: (row["points"], row["read"])) for settings, rows in groups.items()}


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Args:
        program: whose results it shows.
        make: the Markdown.
        picture: the name of the plot below it, if there is one.
        shows: what the plot shows.
    """

    program: str
    make: Callable[[Results], str]
    picture: str = ""
    shows: str = ""


TABLES: Mapping[str, Table] = {
    "annotations": Table("annotations", annotations_table, "annotations", "Memory against the number of images"),
    "streaming": Table("streaming", streaming_table, "streaming", "Memory and time a node against the number of nodes"),
    "bytes": Table("sharding", bytes_table, "sharding", "Bytes between processes, and the efficiency of two"),
    "checked": Table("sharding", checked_table),
    "projection": Table("sharding", projection_table, "projection", "Efficiency against processes, computed"),
    "scans": Table("large-scans", scans_table, "scans", "Memory of predict against the number of points"),
}


def page_with_tables(page: str, results: Results) -> str:
    """The page with its tables as the results say: each between ``<!-- table NAME -->`` and ``<!-- end -->``.

    Args:
        page: the Markdown.
        results: of `latest`.

    Raises:
        UserError: a table that is not known.
    """

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise UserError(f"docs/scaling.md has a table {name!r}; expected one of {', '.join(TABLES)}")
        own = TABLES[name]
        if own.program in results:
            text = own.make(results)
            if own.picture:
                text += f"\n\n![{own.shows}]({PAGE.stem}-{own.picture}.svg)"
        else:
            module = own.program.replace("-", "_")
            text = f"Not measured yet: `python -m benchmarks.{module}`, and then `python -m benchmarks.scaling`."
        return f"<!-- table {name} -->\n\n{text}\n\n<!-- end -->"

    return re.sub(r"<!-- table (?P<name>[\w-]+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def plots(results: Results) -> dict[str, bytes]:
    """SVG pictures by name, of those programs that have results.

    Args:
        results: of `latest`.
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
        # Lines that end in spaces are no good in a repository.
        pictures[name] = re.sub(rb"[ \t]+\n", b"\n", stream.getvalue())

    if "annotations" in results:
        draw("annotations", 2, lambda axes: _draw_annotations(axes, results["annotations"]["measured"]))
    if "streaming" in results:
        draw("streaming", 2, lambda axes: _draw_streaming(axes, results["streaming"]["cases"]))
    if "sharding" in results:
        draw("sharding", 2, lambda axes: _draw_sharding(axes, results["sharding"]))
        draw("projection", 3, lambda axes: _draw_projection(axes, projections(results)))
    if "large-scans" in results:
        draw("scans", 1, lambda axes: _draw_scans(axes[0], _scans(results)))
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


def _draw_streaming(axes: Any, cases: Sequence[Mapping[str, Any]]) -> None:
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
    size = [_FLOAT * sharding["layer"]["channels"] * one for one in nodes]
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


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables into docs/scaling.md and the plots beside it.

    Args:
        argv: the arguments; ``None`` takes the process's.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="(benchmarks/results)")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="(docs/scaling.md)")
    given = parser.parse_args(argv)
    try:
        results = latest(given.results)
        page = page_with_tables(given.page.read_text(), results)
        pictures = plots(results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_text(given.page, page)
    for name, picture in pictures.items():
        write_bytes(given.page.with_name(f"{given.page.stem}-{name}.svg"), picture)
    print(f"written to {given.page}, with {len(pictures)} plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
