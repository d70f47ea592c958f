"""The report of a study: means and spread, paired differences with intervals, costs; as tables and plots."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import header_block, markdown_table
from latentgnn.errors import require
from latentgnn.files.writing import replacing

Runs = Mapping[str, Sequence[Mapping[str, Any]]]

# Of the intervals.
LEVEL = 0.95


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """The mean of paired differences, and Student's confidence interval of it, of `LEVEL`.

    Args:
        differences: one a pair, at least two.

    Returns:
        Mean, lower and upper end.

    Example:
        >>> mean, low, high = interval([1.0, 2.0, 3.0])
        >>> round(mean, 2), round(low, 2), round(high, 2)
        (2.0, -0.48, 4.48)
    """
    require("scipy", extra="pointcloud")
    from scipy.stats import t

    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    reach = float(t.ppf((1 + LEVEL) / 2, len(differences) - 1)) * error
    return mean, mean - reach, mean + reach


def difference(runs: Runs, variant: str, other: str, score: str) -> dict[str, Any] | None:
    """A variant minus another in a score, over the seeds that both have; ``None`` for fewer than two.

    Args:
        runs: of every variant.
        variant: from which is taken.
        other: what is taken.
        score: its name.
    """
    first, second = (
        {run["seed"]: run["scores"][score] for run in runs[name] if score in run["scores"]} for name in (variant, other)
    )
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2 or variant == other:
        return None
    mean, low, high = interval([first[seed] - second[seed] for seed in seeds])
    return {"seeds": seeds, "mean": mean, "low": low, "high": high}


def compare(runs: Runs, against: Sequence[str], scores: Sequence[str]) -> dict[str, Any]:
    """Every score of every variant that has it in a run: mean, spread and differences.

    Args:
        runs: of every variant.
        against: variants that the others are compared with.
        scores: their names.
    """
    compared: dict[str, Any] = {}
    for score in scores:
        compared[score] = {}
        for variant, made in runs.items():
            values = [run["scores"][score] for run in made if score in run["scores"]]
            if not values:
                continue
            compared[score][variant] = {
                "values": values,
                "mean": statistics.mean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "differences": {other: difference(runs, variant, other, score) for other in against},
            }
    return compared


def _difference_cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    text = f"{found['mean']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"
    return text if found["low"] <= 0 <= found["high"] else f"**{text}**"


def _seconds_a_step(taken: Mapping[str, Any] | None, variant: str, made: Sequence[Mapping[str, Any]]) -> float:
    if taken is None:
        return statistics.median(run["seconds_a_step"] for run in made)
    median: float = taken["seconds"][variant]["step"]["median"]
    return median


def tables(report: Mapping[str, Any]) -> str:
    """The report's tables in Markdown; differences whose interval leaves out 0 are bold."""
    against, parts, taken = report["against"], [], report["times"]
    for score, variants in report["compared"].items():
        rows = []
        for variant, found in variants.items():
            spread = "" if found["deviation"] is None else f" ± {found['deviation']:.4f}"
            made = report["runs"][variant]
            rows.append(
                [
                    variant,
                    f"{found['mean']:.4f}{spread}",
                    str(len(made)),
                    *(_difference_cell(found["differences"][other]) for other in against),
                    f"{made[0]['parameters']:,}",
                    f"{made[0]['operations'] / 1e6:.1f}",
                    f"{_seconds_a_step(taken, variant, made) * 1e3:.1f}",
                    f"{made[0]['held_bytes'] / 2**20:.2f}",
                ]
            )
        head = [
            f"{score} ({report['scores'][score]} is better)",
            "mean ± deviation",
            "seeds",
            *(f"minus {other}" for other in against),
            "parameters",
            "M operations",
            "ms a step, alone" if taken else "ms a step",
            "MiB held",
        ]
        parts.append(markdown_table(head, rows))
    return "\n\n".join(parts)


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page: what was planned, what came out, how it was made."""
    missing = ", ".join(f"{variant} seed {seed}" for variant, seed in report["missing"])
    left = f"Planned runs that are missing: {missing}." if missing else "All planned runs are there."
    timed = (
        f"was taken alone, the variants taking turns (median, {report['times']['batch']} samples)"
        if report["times"]
        else "is a median on a machine that others may use too"
    )
    return f"""# Study: {report["name"]}

Differences are paired by seed, with Student's 95% interval; bold where it leaves out 0. Operations and memory held for
the backward pass are a sample's, of the whole network; a step's time {timed}.
Intervals are of one comparison each and not corrected for how many there are. {left}

{tables(report)}

{header_block(report, ("compared", "runs", "missing", "times"))}
"""


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Every run as a dot, means as bars, and the differences to the first of ``against`` that has the score.

    Args:
        report: as `markdown` takes it.
        path: of the SVG.
    """
    require("matplotlib", extra="viz")
    from matplotlib.figure import Figure

    compared = report["compared"]
    most = max(len(variants) for variants in compared.values())
    figure = Figure(figsize=(9, (0.6 + 0.32 * most) * len(compared) + 0.4), layout="constrained")
    axes = figure.subplots(len(compared), 2, squeeze=False)
    for (left, right), (score, variants) in zip(axes, compared.items(), strict=True):
        # The first variant of `against` may lack this score.
        other = next((name for name in report["against"] if name in variants), report["against"][0])
        places = range(len(variants))
        for place, found in zip(places, variants.values(), strict=True):
            left.plot(found["values"], [place] * len(found["values"]), "o", color="#2e86ab", alpha=0.5, markersize=4)
            left.plot(found["mean"], place, "|", color="black", markersize=14)
            gap = found["differences"][other]
            if gap is not None:
                reach = [[gap["mean"] - gap["low"]], [gap["high"] - gap["mean"]]]
                right.errorbar(gap["mean"], place, xerr=reach, fmt="o", color="#d1495b", capsize=3, markersize=4)
        left.set_yticks(places, list(variants), fontsize=8)
        right.set_yticks(places, [""] * len(variants))
        right.axvline(0, color="black", linewidth=0.8)
        for axis, title in ((left, score), (right, f"minus {other}, 95% interval")):
            axis.set_ylim(len(variants) - 0.5, -0.5)
            axis.set_xlabel(title, fontsize=8)
            axis.tick_params(labelsize=8)
            axis.grid(axis="x", alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})


def plot_times(report: Mapping[str, Any], path: Path) -> None:
    """The first score against the time of a training step: the mean of each variant, with its spread.

    Args:
        report: as `markdown` takes it, with times.
        path: of the SVG.
    """
    require("matplotlib", extra="viz")
    from matplotlib.figure import Figure

    score, variants = next(iter(report["compared"].items()))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    taken = {name: times["step"]["median"] * 1e3 for name, times in report["times"]["seconds"].items()}
    # Labels stand above and below in turn: of two variants that cost the same, one would hide the other's.
    for turn, variant in enumerate(sorted(variants, key=taken.__getitem__)):
        point, spread = (taken[variant], variants[variant]["mean"]), variants[variant]["deviation"] or 0.0
        axis.errorbar(*point, yerr=spread, fmt="o", color="#2e86ab", capsize=3, markersize=5)
        axis.annotate(variant, point, (6, (5, -11)[turn % 2]), textcoords="offset points", fontsize=8)
    axis.set_xlabel(f"ms a training step of {report['times']['batch']} samples, one thread", fontsize=8)
    axis.set_ylabel(f"{score} ({report['scores'][score]} is better)", fontsize=8)
    axis.set_xlim(0, 1.3 * max(taken.values()))
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
