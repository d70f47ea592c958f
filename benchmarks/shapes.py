"""The inputs that the layer is measured on, each with its layer, and the cases that a measurement has."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from latentgnn import LatentGNNConfig

Kind = Literal["map", "tokens", "packed"]

# Only batch norm computes something different in evaluation and in training.
MODES: Mapping[str, tuple[str, ...]] = {
    "batch": ("evaluation", "training"),
    "frozen": ("training",),
    "group": ("training",),
    "layer": ("training",),
}


@dataclass(frozen=True)
class Shape:
    """One input and the layer for it.

    Args:
        batch: samples, or scenes of packed points.
        channels: C.
        spatial: sizes of the map, or the number of nodes of each sample.
        latents: latents of each kernel.
        graph_conv: whether the layer has a graph convolution.
        reduction: C over the reduced channels.
        kind: ``map`` for (B, C, *spatial), ``tokens`` for (B, N, C), ``packed`` for (T, C) with offsets.
        everyday: whether it counts in the geometric means over everyday shapes.
    """

    batch: int
    channels: int
    spatial: tuple[int, ...]
    latents: tuple[int, ...]
    graph_conv: bool = False
    reduction: int = 8
    kind: Kind = "map"
    everyday: bool = False

    @property
    def nodes(self) -> int:
        """Nodes of one sample."""
        return prod(self.spatial)

    @property
    def size(self) -> tuple[int, ...]:
        """Sizes of the input tensor."""
        if self.kind == "packed":
            return (self.batch * self.nodes, self.channels)
        if self.kind == "tokens":
            return (self.batch, self.nodes, self.channels)
        return (self.batch, self.channels, *self.spatial)

    @property
    def layouts(self) -> tuple[str, ...]:
        """The memory layouts that the input can have."""
        two_or_three = self.kind == "map" and len(self.spatial) in (2, 3)
        return ("contiguous", "channels-last") if two_or_three else ("contiguous",)

    @property
    def config(self) -> LatentGNNConfig:
        """The options of the layer, with the default norm."""
        return LatentGNNConfig(
            channels=self.channels, num_latents=self.latents, reduction=self.reduction, graph_conv=self.graph_conv
        )


def _everyday() -> dict[str, Shape]:
    shapes = {}
    for batch in (1, 8, 32):
        shapes[f"stage3-b{batch}"] = Shape(batch, 512, (28, 28), (100,), everyday=True)
        shapes[f"stage4-b{batch}"] = Shape(batch, 1024, (14, 14), (100,), everyday=True)
        shapes[f"stage5-b{batch}"] = Shape(batch, 2048, (7, 7), (50,), everyday=True)
    for batch in (1, 8):
        shapes[f"square32-b{batch}"] = Shape(batch, 256, (32, 32), (64,), everyday=True)
    return shapes | {
        "narrow32-b8": Shape(8, 64, (32, 32), (32,), everyday=True),
        "unreduced16-b25": Shape(25, 32, (16, 16), (32,), reduction=1, everyday=True),
        "convnext14-b8": Shape(8, 384, (14, 14), (64,), everyday=True),
        "convnext56-b8": Shape(8, 96, (56, 56), (32,), everyday=True),
        "tokens-b8": Shape(8, 768, (196,), (64,), kind="tokens", everyday=True),
        "packed-b8": Shape(8, 64, (4096,), (32,), kind="packed", everyday=True),
    }


SHAPES: Mapping[str, Shape] = {
    # The paper's detection settings at 800 x 1333, and the shape of its published test.
    "C3": Shape(2, 512, (100, 168), (150,), graph_conv=True),
    "C4": Shape(2, 1024, (50, 84), (100,), graph_conv=True),
    "C5": Shape(2, 2048, (25, 42), (50,), graph_conv=True),
    "published": Shape(8, 1024, (30, 30), (100, 100)),
    "map": Shape(1, 256, (512, 512), (64,)),
    "video": Shape(1, 512, (8, 56, 56), (64,)),
    "million": Shape(1, 96, (1_000_000,), (64,)),
    # A small map of few nodes, for the choice between the layer's paths.
    "few14": Shape(1, 512, (14, 14), (100,)),
    **_everyday(),
}

# Square maps of growing size, for the sweep over nodes.
SQUARES: Mapping[str, Shape] = {f"square-{side}": Shape(1, 256, (side, side), (64,)) for side in (16, 32, 64, 128, 256)}


@dataclass(frozen=True)
class Case:
    """One comparison: which input, which norm in which mode, which layout, where and in which type.

    Args:
        shape: a name in `SHAPES` or `SQUARES`.
        norm: a name in `MODES`.
        mode: one of the norm's modes.
        layout: one of the shape's layouts.
        device: ``cpu`` or ``cuda``.
        dtype: a floating-point type's name in torch.
    """

    shape: str
    norm: str = "batch"
    mode: str = "evaluation"
    layout: str = "contiguous"
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def input(self) -> Shape:
        """The shape that the name stands for."""
        return {**SHAPES, **SQUARES}[self.shape]

    @property
    def name(self) -> str:
        """A key for results."""
        return f"{self.shape} {self.norm} {self.mode} {self.layout}"


def cases(
    shapes: list[str],
    norms: list[str],
    modes: list[str],
    layouts: list[str],
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> list[Case]:
    """Every valid combination: norms with one mode appear once, and inputs without layouts are contiguous.

    Args:
        shapes: names in `SHAPES` or `SQUARES`.
        norms: names in `MODES`.
        modes: of batch norm.
        layouts: of maps.
        device: of all of them.
        dtype: of all of them.

    Example:
        >>> [case.name for case in cases(["million"], ["batch", "group"], ["evaluation"], ["contiguous"])]
        ['million batch evaluation contiguous', 'million group training contiguous']
    """
    return [
        Case(shape, norm, mode, layout, device, dtype)
        for shape in shapes
        for norm in norms
        for mode in (modes if norm == "batch" else MODES[norm])
        for layout in layouts
        if layout in Case(shape).input.layouts
    ]
