"""A point network as a program without Python."""

import torch
from torch import Tensor, nn
from torch.export import Dim

from latentgnn.tasks.exporting import Program
from latentgnn.tasks.pointcloud.model import PointNetwork
from latentgnn.tasks.pointcloud.neighbors import Level


class FlatPointNetwork(nn.Module):
    """A point network whose levels are lists of tensors, which exported programs support.

    Args:
        network: the network in evaluation mode.
    """

    def __init__(self, network: PointNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor, levels: list[list[Tensor]]) -> Tensor:
        """Return logits (T, num_classes), see `PointNetwork.forward`; each level lists the tensors of `Level`."""
        logits: Tensor = self.network(features, tuple(Level(*level) for level in levels))
        return logits


def point_program(model: PointNetwork) -> Program:
    """Return the whole network, from features and levels to logits.

    Args:
        model: the network in evaluation mode, on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    # In metres, and large enough that every level has many points.
    extent = 8 * max(model.grids)

    def sample(*sizes: int) -> dict[str, object]:
        points = torch.rand(sum(sizes), 3, generator=generator) * extent
        offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0)])
        features = torch.rand(sum(sizes), model.num_features, generator=generator)
        return {"features": features, "levels": [list(level) for level in model.hierarchy(points, offsets)]}

    samples = [sample(900, 600), sample(700)]
    each = {
        "coordinates": "float32 (T, 3), metres from the middle of each crop",
        "offsets": "int64 (crops + 1,), where each crop begins, and T at the end",
        "neighbors": "int64 (T, K), the nearest points of the same crop, the point itself first",
        "kept": "int64 (T,), which points of the finer level these are",
        "anchors": "int64 (T of the finer level, 3), the nearest points here of each there",
    }
    levels = range(len(model.encoder))
    return Program(
        network=FlatPointNetwork(model).eval(),
        samples=samples,
        dynamic={
            "features": {0: Dim.DYNAMIC},
            "levels": [[{0: Dim.DYNAMIC} for _ in Level._fields] for _ in levels],
        },
        inputs={
            "features": f"float32 (T, {model.num_features})",
            **{f"{name}_{level}": text for level in levels for name, text in each.items()},
        },
        outputs={"logits": f"float32 (T, {model.num_classes})"},
        part="the whole network, from the features and the levels of packed crops to a logit a class",
        left_out="voxels, crops and neighbours, which are made before it: latentgnn.tasks.pointcloud.neighbors, with "
        "NumPy and SciPy alone",
    )
