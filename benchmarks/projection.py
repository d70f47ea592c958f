"""The time of a step on many processes, computed from measurements on few.

A step of one process on n nodes takes a + b n seconds; an all-reduce of s bytes between p processes takes
log2(p) l + 2 (p - 1) / p s / w seconds. Nothing overlaps. Measurements of one process give a and b, and those
of a single all-reduce give l and w. The measured steps of two processes, which were used for neither, check the model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Results = Mapping[str, Mapping[str, Any]]

NODES = 10**9
# How often a step reads or writes the input's size: `latentgnn.cost`.
_PASSES = 8
FLOAT = 4
"""Bytes of a number."""


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
        """The line with the least squared relative errors; neither part is negative.

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
    """Seconds of one all-reduce: the latency of a tree, and the bytes of a ring.

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
    """Seconds of a step whose nodes are spread evenly.

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
    """What is not measured here: figures from data sheets, and the share of them that a program gets.

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
        """The model with all-reduces as slow as the slowest that the steps of two processes allow.

        In a step, each process also waits for the other one, which an all-reduce alone does not show.

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
        moving = _PASSES * FLOAT * self.layer["channels"] / assumed.bandwidth
        step = Line(assumed.fixed, max(computing, moving) / assumed.share)
        return Measured(step, Line(assumed.latency, 1 / assumed.link), self.sums, self.layer)

    def efficiency(self, nodes: float, processes: int) -> float:
        """Of a step."""
        return efficiency(self.step, self.link, self.sums, nodes, processes)

    def seconds(self, nodes: float, processes: int) -> float:
        """Of a step."""
        return step_seconds(self.step, self.link, self.sums, nodes, processes)

    def nodes_for(self, wanted: float, processes: int) -> float:
        """The fewest nodes, of all processes together, for which a step has an efficiency.

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
