"""The tables of docs/scaling.md, in Markdown."""

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.projection import FLOAT, GPUS, NODES, Measured, Results, all_reduce_seconds, checked, projections
from benchmarks.report import markdown_table


def annotations_table(results: Results) -> str:
    """Memory and time of annotations against the number of images.

    Args:
        results: of `benchmarks.scaling.latest`.
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
        results: of `benchmarks.scaling.latest`.
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
        results: of `benchmarks.scaling.latest`.
    """
    result = results["sharding"]
    rows = [[f"{one['nodes']:,}", " and ".join(f"{size:,}" for size in one["step"])] for one in result["bytes"]]
    return f"{markdown_table(['nodes', 'bytes of each all-reduce of a step'], rows)}\n\n{_source(result)}"


def checked_table(results: Results) -> str:
    """Predicted and measured steps of one and two processes.

    Args:
        results: of `benchmarks.scaling.latest`.
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


def projection_table(results: Results) -> str:
    """A step of 10^9 nodes on 64 devices.

    Args:
        results: of `benchmarks.scaling.latest`.
    """
    rows = []
    for name, processes, model in projections(results):
        passed = sum(all_reduce_seconds(model.link, size, processes) for size in model.sums)
        input_bytes = NODES * model.layer["channels"] * FLOAT / processes
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
        results: of `benchmarks.scaling.latest`.
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
        for settings, of_settings in scans_by_settings(results).items()
        for row in of_settings
    ]
    titles = ["settings", "points", "read", "memory at most", "time", "points a second"]
    sources = "\n\n".join(_source(part) for part in results["large-scans"]["parts"])
    return f"{markdown_table(titles, rows)}\n\n{sources}"


def scans_by_settings(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """Rows grouped by their settings."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for part in results["large-scans"]["parts"]:
        data = part["data"]
        settings = f"voxels of {data['voxel']:g} m, crops of {data['crop_size']:g} m"
        groups.setdefault(settings, []).extend(part["rows"])
    return {settings: sorted(rows, key=lambda row: (row["points"], row["read"])) for settings, rows in groups.items()}


def _time(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    for unit, factor in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _rounded(number: float) -> int:
    """Rounded up to one significant digit."""
    unit = 10 ** math.floor(math.log10(number))
    return math.ceil(number / unit) * unit


def _source(result: Mapping[str, Any]) -> str:
    # Remarks on how a result was measured, if it has any.
    note = "".join(f"; {result[key]}" for key in ("code", "note") if key in result)
    commands = " and ".join(f"`{command}`" for command in [*result.get("before", []), result["command"]])
    threads = f"{result['threads']} thread{'s' if result['threads'] != 1 else ''}"
    return (
        f"{commands}, {result['processor']}, {threads}, torch {result['torch']}, "
        f"{result['date'][:10]}{note}: [results](../benchmarks/results/{result['file']}.md)."
    )
