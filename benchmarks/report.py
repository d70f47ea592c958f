"""Results as Markdown; those of pairs also pooled and averaged."""

import io
import json
from collections.abc import Collection, Mapping, Sequence
from math import prod
from statistics import geometric_mean, mean, median
from typing import Any

from latentgnn.errors import UserError

# A row is refused if the literal peer is this many times slower than another form of the same arithmetic.
LITERAL_MARGIN = 1.1


def pooled(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same pair measured in several processes, as one result.

    Args:
        results: of the processes, alike in their keys.

    Returns:
        Of ratios the median of the medians, the least and the largest; of other numbers the median.

    Example:
        >>> pooled([{"ratio": {"median": 2.0, "least": 1.0, "largest": 3.0}}, {"ratio":
        ...     {"median": 4.0, "least": 2.0, "largest": 9.0}}])
        {'ratio': {'median': 3.0, 'least': 1.0, 'largest': 9.0}}
    """
    choose = {"least": min, "largest": max}
    joined: dict[str, Any] = {}
    for key, value in results[0].items():
        values = [result[key] for result in results]
        if isinstance(value, Mapping):
            joined[key] = pooled(values)
        else:
            joined[key] = value if isinstance(value, str) else choose.get(key, median)(values)
    return joined


class SlowPeer(UserError):
    """The literal peer is slower than another literal form, so that ratios to it would flatter the layer."""


def check_literal(name: str, measured: Mapping[str, Any]) -> None:
    """Refuse a row whose literal peer is not the fastest literal form.

    Args:
        name: of the input.
        measured: the pair (published, reference).

    Raises:
        SlowPeer: the published peer is slower than the reference, forward or in a step, by more than `LITERAL_MARGIN`.
    """
    for what in ("forward", "step"):
        slower = 1 / measured[f"{what}_ratio"]["median"]
        if slower > LITERAL_MARGIN:
            raise SlowPeer(
                f"{name}: the peer `published` takes {slower:.2f} times as long as `reference` ({what}), so "
                f"ratios to it would flatter the layer. Measure again on a quiet machine; if it stays so, make "
                f"benchmarks/published.py as fast as latentgnn.reference first"
            )


def is_measured(pair: Mapping[str, Any]) -> bool:
    """Whether a row has figures: it was not refused, and its process did not fail."""
    return "refused" not in pair and "failed" not in pair


def means(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means of the ratios over the everyday shapes, for each peer, layout and norm.

    Args:
        pairs: as `benchmarks.layer` keeps them. Evaluation and training of batch norm count together.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for pair in pairs:
        if pair["everyday"] and is_measured(pair):
            groups.setdefault((pair["peer"], pair["norm"], pair["layout"]), []).append(pair)
    return [
        {
            "peer": peer,
            "norm": norm,
            "layout": layout,
            "rows": len(group),
            "forward": geometric_mean(pair["forward_ratio"]["median"] for pair in group),
            "step": geometric_mean(pair["step_ratio"]["median"] for pair in group),
        }
        for (peer, norm, layout), group in groups.items()
    ]


def table_row(cells: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> str:
    """A table in Markdown.

    Args:
        head: the columns' titles.
        rows: rows of as many cells.
        right: the titles of the columns that are aligned right.

    Example:
        >>> print(markdown_table(["a", "b"], [["1", "2"]]))
        | a | b |
        | --- | --- |
        | 1 | 2 |
    """
    titles = "|" + "".join(f" {title} |" if title else " |" for title in head)
    alignment = table_row(["---:" if title in right else "---" for title in head])
    return "\n".join([titles, alignment, *map(table_row, rows)])


def header_block(report: Mapping[str, Any], without: Collection[str] = ()) -> str:
    """A report's values as a block of JSON in Markdown.

    Args:
        report: the values.
        without: the keys that are left out.
    """
    shown = {key: value for key, value in report.items() if key not in without}
    return f"```json\n{json.dumps(shown, indent=2)}\n```"


def mean_and_range(values: Sequence[float]) -> str:
    """The mean of values, with the least and the largest in brackets.

    Example:
        >>> mean_and_range([0.1, 0.2, 0.6])
        '0.300 (0.100 to 0.600)'
    """
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def png(figure: Any) -> bytes:
    """A figure of matplotlib as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def detection_title(figure: str) -> str:
    """The title of a column with a detector's figure.

    Example:
        >>> detection_title("segm/AP50")
        'mask AP50'
    """
    return figure.replace("bbox/", "box ").replace("segm/", "mask ")


def spread(ratio: Mapping[str, float]) -> str:
    """A ratio's median, with least and largest in brackets."""
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['largest']:.2f})"


def pair_head(gpu: bool) -> list[str]:
    """The titles of `pair_row`'s cells.

    Args:
        gpu: whether the table is of a GPU.
    """
    head = ["input", "norm", "mode", "layout", "peer", "forward ratio", "step ratio", "forward", "step"]
    head += ["GPU time forward", "GPU time step"] if gpu else []
    return [*head, "over floor", "held / input", "peak / input"]


def pair_row(pair: Mapping[str, Any]) -> list[str]:
    """The cells of one pair: the ratios, then the layer's own figures with the peer's in brackets."""
    named = [pair[key] for key in ("shape", "norm", "mode", "layout", "peer")]
    gpu = pair["device"] == "cuda"
    if not is_measured(pair):
        # Only the first line of an error fits a cell; the JSON file has all of it.
        why = f"not run: {pair['refused']}" if "refused" in pair else f"failed: {pair['failed'].splitlines()[0]}"
        return [*named, why, *[""] * (len(pair_head(gpu)) - len(named) - 1)]
    layer, peer = pair["sides"].values()

    def both(key: str, scale: float, unit: str = "") -> str:
        return f"{layer[key] * scale:.2f} ({peer[key] * scale:.2f}){unit}"

    floors = f"{layer['over_floor']['median']:.2f} ({peer['over_floor']['median']:.2f})"
    times = [both("forward_seconds", 1e3, " ms"), both("step_seconds", 1e3, " ms")]
    if gpu:
        times += [both("forward_device_seconds", 1e3, " ms"), both("step_device_seconds", 1e3, " ms")]
    memory = [both("held", 1), both("peak", 1)]
    return [*named, spread(pair["forward_ratio"]), spread(pair["step_ratio"]), *times, floors, *memory]


def mean_rows(averages: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The cells of `means`."""
    return [
        [one["peer"], one["norm"], one["layout"], str(one["rows"]), f"{one['forward']:.2f}", f"{one['step']:.2f}"]
        for one in averages
    ]


MEAN_HEAD = ("peer", "norm", "layout", "rows", "forward", "step")


def floor_lines(pairs: Sequence[Mapping[str, Any]]) -> str:
    """The best rates, which the floors are computed from, and the routine that reached them most often."""
    measured = [pair for pair in pairs if is_measured(pair)]
    if not measured:
        return ""
    winners = [max(pair["products_per_second"].items(), key=lambda item: item[1]) for pair in measured]
    names = [name for name, _ in winners]
    best = max(set(names), key=names.count)
    rate, copy = median(rate for _, rate in winners), median(pair["bandwidth"] for pair in measured)
    return (
        f"Floors: operations at the best routine's rate, {best} in {names.count(best)} of {len(names)} processes "
        f"(median {rate / 1e9:.0f} GFLOP/s), or bytes at a large copy's {copy / 1e9:.0f} GB/s, whichever takes longer."
    )


def layer_markdown(report: Mapping[str, Any]) -> str:
    """The table of `benchmarks.layer`, for reading.

    Args:
        report: as written to JSON.
    """
    shapes = {
        pair["shape"]: f"{tuple(pair['size'])} with {' + '.join(map(str, pair['latents']))} latents"
        + (", graph convolution" if pair["graph_conv"] else "")
        + (f", {pair['kind']}" if pair["kind"] != "map" else "")
        for pair in report["pairs"]
    }
    gpu = report["gpu"] is not None
    parts = [
        "# The layer beside its peers",
        header_block(report, ("pairs", "means", "literal", "not_begun")),
        "Ratios are the peer's time over the layer's, the median of the rounds (least to largest): above 1 the layer "
        "is faster. Times, floors and memory are the layer's, with the peer's in brackets."
        + (" GPU time is what the GPU is busy for a call; the rest waits for launches." if gpu else ""),
        markdown_table(pair_head(gpu), [pair_row(pair) for pair in report["pairs"]]),
    ]
    if report.get("not_begun"):
        parts += [f"{report['not_begun']} more rows were not begun."]
    if report["means"]:
        parts += ["Geometric means over the everyday inputs, all modes together:"]
        parts += [markdown_table(MEAN_HEAD, mean_rows(report["means"]))]
    parts += ["The inputs:", markdown_table(["input", "size"], [list(item) for item in shapes.items()])]
    parts += [floor_lines(report["pairs"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def input_mebibytes(pair: Mapping[str, Any]) -> float:
    """The input's size in float32."""
    return 4 * prod(pair["size"]) / 2**20
