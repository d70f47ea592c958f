"""A hierarchical point network in plain PyTorch operations: set abstraction and feature propagation of PointNet++
(Qi et al., NeurIPS 2017, arXiv 1706.02413) with PointNeXt's residual blocks (Qian et al., NeurIPS 2022, arXiv
2206.04670), and LatentGNN blocks at any level.

Axes: T points of all crops of a batch at a level, K neighbours, C channels.
"""

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentgnn.errors import UserError
from latentgnn.tasks.blocks import insert_blocks
from latentgnn.tasks.pointcloud.config import ModelConfig
from latentgnn.tasks.pointcloud.neighbors import Hierarchy, Level, build_hierarchy, pack
from latentgnn.tasks.pointcloud.voxels import recentre

_NODES_AT_ONCE = 16_384
"""Number of points whose neighbours are processed together if nothing is stored for a backward pass."""


def build_point_network(config: ModelConfig, *, num_features: int, num_classes: int) -> "PointNetwork":
    """Build a point network with LatentGNN blocks at its levels.

    Blocks are created last, so that with the same seed everything else is initialised equally with and without them.

    Args:
        config: see `ModelConfig`.
        num_features: number of inputs per point besides its coordinates.
        num_classes: number of classes.

    Raises:
        UserError: if a setting is out of range or does not fit the others.
    """
    if num_classes < 2:
        raise UserError(f"a segmenter needs two classes or more; got {num_classes}")
    model = PointNetwork(
        num_features,
        num_classes,
        widths=config.widths,
        depths=config.depths,
        grids=config.grids,
        neighbors=config.neighbors,
        dropout=config.dropout,
    )
    try:
        latents = {f"encoder.{level.removeprefix('L')}": number for level, number in config.blocks.items()}
        insert_blocks(model, latents, config.block, example_input=model.example_input())
    except (TypeError, ValueError) as error:
        raise UserError(f"model.blocks {dict(config.blocks)}: {error}") from error
    return model


class PointNetwork(nn.Module):
    """Class scores for every point of packed crops.

    The encoder halves the resolution from level to level, and the decoder restores it. Stage l of the encoder,
    ``encoder.l``, works at level l and returns (T_l, widths[l]); a LatentGNN block may follow it. Coordinates are used
    as differences between neighbours, and as height above the lowest point of a crop.

    Args:
        num_features: number of inputs per point besides its coordinates.
        num_classes: number of classes.
        widths: number of channels of each level, finest level first.
        depths: number of residual blocks of each level.
        grids: edges in metres of the voxels of all levels except the finest.
        neighbors: K.
        dropout: dropout probability in the head.

    Example:
        >>> model = PointNetwork(2, 5, widths=(16, 32), depths=(1, 1), grids=(0.5,), neighbors=8).eval()
        >>> points, features = torch.rand(100, 3), torch.rand(100, 2)
        >>> model(features, model.hierarchy(points, offsets=torch.tensor([0, 60, 100]))).shape
        torch.Size([100, 5])
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        grids: tuple[float, ...],
        neighbors: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.grids = grids
        self.neighbors = neighbors
        # Features have different units, so they are normalised.
        self.scale = nn.BatchNorm1d(num_features + 1)
        self.num_features = num_features
        self.num_classes = num_classes
        inputs = (num_features + 1, *widths[:-1])
        # At every level, neighbours are about half a voxel of the next level apart.
        edges = (grids[0] / 2, *grids)
        self.encoder = nn.ModuleList(
            Stage(inputs[level], widths[level], depths[level], edge=edges[level]) for level in range(len(widths))
        )
        self.decoder = nn.ModuleList(
            FeaturePropagation(widths[level] + widths[level + 1], widths[level]) for level in range(len(widths) - 1)
        )
        self.head = nn.Sequential(
            *_linear(widths[0], widths[0]), nn.Dropout(dropout), nn.Linear(widths[0], num_classes)
        )

    @property
    def classifier(self) -> str:
        """The name of the layer with one row per class."""
        return f"head.{len(self.head) - 1}"

    def hierarchy(self, coordinates: Tensor, offsets: Tensor | None = None) -> Hierarchy:
        """Return the levels that `forward` takes, on the coordinates' device.

        Args:
            coordinates: metres, (T, 3), of consecutive crops; in float64 for map coordinates of 10^6 m. Each crop gets
                its own origin.
            offsets: (B + 1,), the start of each crop, and T at the end; without it, there is one crop.
        """
        points = coordinates.detach().cpu().numpy().astype(np.float64)
        ends = [0, len(points)] if offsets is None else offsets.tolist()
        crops = [recentre(points[start:end]) for start, end in pairwise(ends)]
        packed = pack([build_hierarchy(crop, grids=self.grids, neighbors=self.neighbors, workers=-1) for crop in crops])
        return tuple(Level(*(tensor.to(coordinates.device) for tensor in level)) for level in packed)

    def forward(self, features: Tensor, hierarchy: Hierarchy) -> Tensor:
        """Return class scores.

        Args:
            features: (T, F).
            hierarchy: levels of the same T points, from `hierarchy` or `latentgnn.tasks.pointcloud.neighbors`.

        Returns:
            Logits (T, num_classes).
        """
        x = self.scale(torch.cat((features, hierarchy[0].coordinates[:, 2:]), dim=1))
        outputs: list[Tensor] = []
        for number, stage in enumerate(self.encoder):
            level = hierarchy[number]
            # The keyword tells a LatentGNN block after the stage which points are one scene.
            x = stage(x, level, hierarchy[max(number - 1, 0)], offsets=level.offsets)
            outputs.append(x)
        for number in reversed(range(len(self.decoder))):
            x = self.decoder[number](outputs[number], x, hierarchy[number], hierarchy[number + 1])
        logits: Tensor = self.head(x)
        return logits

    def example_input(self) -> tuple[Tensor, Hierarchy]:
        """Return a small input of `forward`, for `latentgnn.insert`."""
        points = torch.rand(64, 3)
        device = next(self.parameters()).device
        return torch.zeros(64, self.num_features, device=device), self.hierarchy(points.to(device))


class Stage(nn.Module):
    """One level of the encoder: set abstraction from the finer level, then residual blocks.

    Args:
        in_channels: number of channels of the finer level.
        out_channels: number of channels of this level.
        depth: number of residual blocks.
        edge: unit of length in metres, about the distance between neighbours.
    """

    def __init__(self, in_channels: int, out_channels: int, depth: int, *, edge: float) -> None:
        super().__init__()
        self.abstraction = LocalAggregation(in_channels, out_channels, edge=edge)
        self.blocks = nn.ModuleList(ResidualBlock(out_channels, edge=edge) for _ in range(depth))

    def forward(self, x: Tensor, level: Level, finer: Level, *, offsets: Tensor) -> Tensor:
        """Map (T_finer, C_in) to (T, C_out); ``offsets`` are those of the output."""
        x = self.abstraction(x, level.coordinates, finer.coordinates, finer.neighbors[level.kept])
        for block in self.blocks:
            x = block(x, level)
        return x


class ResidualBlock(nn.Module):
    """Local aggregation and a two-layer pointwise network, added to the input."""

    def __init__(self, channels: int, *, edge: float) -> None:
        super().__init__()
        self.aggregation = LocalAggregation(channels, channels, edge=edge)
        self.pointwise = nn.Sequential(
            *_linear(channels, 2 * channels), nn.Linear(2 * channels, channels, bias=False), nn.BatchNorm1d(channels)
        )

    def forward(self, x: Tensor, level: Level) -> Tensor:
        """Map (T, C) to the same shape."""
        y = self.aggregation(x, level.coordinates, level.coordinates, level.neighbors)
        return F.relu(x + self.pointwise(y))


class LocalAggregation(nn.Module):
    """The maximum response over all neighbours: max_j relu(norm(W x_j) + P (p_j - p_i) / edge), then a norm.

    PointNet++ applies its matrix to every pair of a point and a neighbour. As the response is a sum, the part of the
    features is the same for all pairs with that neighbour, and is computed only once.
    """

    def __init__(self, in_channels: int, out_channels: int, *, edge: float) -> None:
        super().__init__()
        self.edge = edge
        self.features = nn.Linear(in_channels, out_channels, bias=False)
        self.norm = nn.BatchNorm1d(out_channels)
        self.position = nn.Linear(3, out_channels)
        self.out_norm = nn.BatchNorm1d(out_channels)

    def forward(self, x: Tensor, centers: Tensor, coordinates: Tensor, neighbors: Tensor) -> Tensor:
        """Return features of the centres.

        Args:
            x: (T, C_in).
            centers: metres, (M, 3).
            coordinates: coordinates of the points of ``x`` in metres, (T, 3).
            neighbors: indices of each centre's neighbours, (M, K).

        Returns:
            (M, C_out).
        """
        x = self.norm(self.features(x))
        if torch.is_grad_enabled():
            return self.out_norm(self._largest(x, centers, coordinates, neighbors))
        # Without a backward pass the pairs need not all be in memory at once.
        parts = zip(centers.split(_NODES_AT_ONCE), neighbors.split(_NODES_AT_ONCE), strict=True)
        return self.out_norm(torch.cat([self._largest(x, some, coordinates, near) for some, near in parts]))

    def _largest(self, x: Tensor, centers: Tensor, coordinates: Tensor, neighbors: Tensor) -> Tensor:
        position = self.position((coordinates[neighbors] - centers[:, None]) / self.edge)
        # On a CPU, the backward pass of an embedding adds up rows many times faster than that of indexing.
        pairs = F.embedding(neighbors, x) + position
        return F.relu(pairs.amax(dim=1))


class FeaturePropagation(nn.Module):
    """Features of a level from its own and the coarser level's, interpolated by inverse squared distances."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(*_linear(in_channels, out_channels), *_linear(out_channels, out_channels))

    def forward(self, x: Tensor, coarse: Tensor, level: Level, coarser: Level) -> Tensor:
        """Map (T, C) and (T_coarser, C') to (T, C)."""
        apart = coarser.coordinates[coarser.anchors] - level.coordinates[:, None]
        # Distances are in metres; a point that the coarser level keeps takes its own features from there.
        squared = apart.square().sum(dim=2)
        # ONNX's optimizer treats 1e-8 as zero and removes it; for an export, both terms are scaled by 1e8, which
        # cancels below.
        weight = 1 / (1e8 * squared + 1) if torch.compiler.is_exporting() else 1 / (squared + 1e-8)
        weight = (weight / weight.sum(dim=1, keepdim=True)).to(coarse.dtype)
        raised = F.embedding_bag(coarser.anchors, coarse, per_sample_weights=weight, mode="sum")
        mixed: Tensor = self.mix(torch.cat((x, raised), dim=1))
        return mixed


def _linear(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    return nn.Linear(in_channels, out_channels, bias=False), nn.BatchNorm1d(out_channels), nn.ReLU()
