"""The published arithmetic, step by step, as a user would write it with PyTorch's convolutions, norms and products.

Nothing of the library's mathematics is used here. Parameters have the published names, so that the weights of a layer
come from `latentgnn.published_state_dict`. Axes: B batch, C channels, N nodes, R reduced channels, D latents, T points.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentgnn import FrozenBatchNorm, LatentGNNConfig
from latentgnn.norms import group_norm

_CONVOLUTION: dict[int, type[nn.Module]] = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORM: dict[int, type[nn.Module]] = {
    0: nn.BatchNorm1d,
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """Layer norm over dimension 1, through a permutation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def make_norm(name: str, channels: int, spatial_dims: int) -> nn.Module:
    """A norm of PyTorch's own; the frozen one multiplies and adds as torchvision's, for any number of dimensions.

    Args:
        name: batch, frozen, group or layer.
        channels: C.
        spatial_dims: of its input; 0 for (T, C).
    """
    if name == "batch":
        return _BATCH_NORM[spatial_dims](channels)
    if name == "frozen":
        return FrozenBatchNorm(channels)
    if name == "group":
        return group_norm(channels)
    return nn.LayerNorm(channels) if spatial_dims == 0 else ChannelsFirstLayerNorm(channels)


class Kernel(nn.Module):
    """One kernel: its parameters, and its computation on the reduced channels.

    Args:
        config: the layer's options.
        latents: D of this kernel.
        norm: as `make_norm` takes it.
        spatial_dims: of the input; 0 for (T, C).
    """

    def __init__(self, config: LatentGNNConfig, latents: int, *, norm: str, spatial_dims: int) -> None:
        super().__init__()
        reduced = config.reduced_channels
        self.psi_v2l = projection(reduced, latents, norm, spatial_dims)
        self.psi_l2v = projection(reduced, latents, norm, spatial_dims)
        self.GraphConvWeight = projection(reduced, reduced, norm, spatial_dims) if config.graph_conv else None

    def forward(self, v2l: Tensor, l2v: Tensor) -> Tensor:
        """Context (B, R, *spatial) of the reduced channels (B, R, *spatial)."""
        p_BDN = F.normalize(F.relu(self.psi_v2l(v2l)).flatten(2), dim=2)
        q_BDN = F.normalize(F.relu(self.psi_l2v(l2v)).flatten(2), dim=1)
        context = exchange(p_BDN, v2l.flatten(2), q_BDN).view_as(v2l)
        return context if self.GraphConvWeight is None else F.relu(self.GraphConvWeight(context))


def exchange(p_BDN: Tensor, v_BRN: Tensor, q_BDN: Tensor) -> Tensor:
    """Gather, mix and scatter: (B, R, N)."""
    z_BDR = torch.matmul(p_BDN, v_BRN.transpose(1, 2))
    unit_BDR = F.normalize(z_BDR, dim=2)
    affinity_BDD = torch.softmax(torch.matmul(unit_BDR, unit_BDR.transpose(1, 2)), dim=2)
    return torch.matmul(torch.matmul(affinity_BDD, z_BDR).transpose(1, 2), q_BDN)


def projection(inputs: int, outputs: int, norm: str, spatial_dims: int) -> nn.Sequential:
    """A 1x1 convolution without bias (a linear layer for points) and its norm."""
    arguments = () if spatial_dims == 0 else (1,)
    convolution = _CONVOLUTION[spatial_dims](inputs, outputs, *arguments, bias=False)
    return nn.Sequential(convolution, make_norm(norm, outputs, spatial_dims))


class Published(nn.Module):
    """The published asymmetric layer for (B, C, *spatial).

    Args:
        config: the layer's options.
        norm: as `make_norm` takes it.
        spatial_dims: 1 to 3; 0 for what `PublishedPacked` does.
    """

    def __init__(self, config: LatentGNNConfig, *, norm: str, spatial_dims: int = 2) -> None:
        super().__init__()
        channels, reduced = config.channels, config.reduced_channels
        self.down_channel_v2l = projection(channels, reduced, norm, spatial_dims)
        self.down_channel_l2v = projection(channels, reduced, norm, spatial_dims)
        for index, latents in enumerate(config.latents):
            kernel = Kernel(config, latents, norm=norm, spatial_dims=spatial_dims)
            self.add_module(f"LatentGNN_Kernel_{index}", kernel)
        self.up_channel = projection(len(config.latents) * reduced, channels, norm, spatial_dims)
        self.gamma = nn.Parameter(torch.zeros(1))

    @property
    def kernels(self) -> list[Kernel]:
        """The kernels, in order."""
        return [module for module in self.children() if isinstance(module, Kernel)]

    def forward(self, x: Tensor) -> Tensor:
        v2l = F.normalize(self.down_channel_v2l(x), dim=1)
        l2v = F.normalize(self.down_channel_l2v(x), dim=1)
        contexts = [kernel(v2l, l2v) for kernel in self.kernels]
        context = contexts[0] if len(contexts) == 1 else torch.cat(contexts, 1)
        return x + self.gamma * self.up_channel(context)


class PublishedTokens(Published):
    """The same for tokens (B, N, C), which the user transposes.

    Args:
        config: the layer's options.
        norm: as `make_norm` takes it.
    """

    def __init__(self, config: LatentGNNConfig, *, norm: str) -> None:
        super().__init__(config, norm=norm, spatial_dims=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class PublishedPacked(Published):
    """The same for packed points (T, C): linear layers and norms over all points, and a loop over the scenes.

    Args:
        config: the layer's options.
        norm: as `make_norm` takes it. Batch norm takes its statistics over the points of all scenes, group norm over
            those of each scene.
        offsets: where each scene begins, and T at the end.
    """

    def __init__(self, config: LatentGNNConfig, *, norm: str, offsets: list[int]) -> None:
        super().__init__(config, norm=norm, spatial_dims=0)
        self.sizes = [end - start for start, end in pairwise(offsets)]

    def _project(self, sequence: nn.Sequential, x: Tensor) -> Tensor:
        linear, norm = sequence
        y = linear(x)
        if not isinstance(norm, nn.GroupNorm):
            return norm(y)
        return torch.cat([norm(scene.transpose(0, 1)[None])[0].transpose(0, 1) for scene in y.split(self.sizes)])

    def forward(self, x: Tensor) -> Tensor:
        v2l = F.normalize(self._project(self.down_channel_v2l, x), dim=1)
        l2v = F.normalize(self._project(self.down_channel_l2v, x), dim=1)
        contexts = [self._context(kernel, v2l, l2v) for kernel in self.kernels]
        context = contexts[0] if len(contexts) == 1 else torch.cat(contexts, 1)
        return x + self.gamma * self._project(self.up_channel, context)

    def _context(self, kernel: Kernel, v2l: Tensor, l2v: Tensor) -> Tensor:
        p = F.relu(self._project(kernel.psi_v2l, v2l)).split(self.sizes)
        q = F.normalize(F.relu(self._project(kernel.psi_l2v, l2v)), dim=1).split(self.sizes)
        scenes = [
            exchange(F.normalize(one_p, dim=0).transpose(0, 1)[None], one_v.transpose(0, 1)[None], one_q.mT[None])[0].mT
            for one_p, one_v, one_q in zip(p, v2l.split(self.sizes), q, strict=True)
        ]
        context = torch.cat(scenes)
        return context if kernel.GraphConvWeight is None else F.relu(self._project(kernel.GraphConvWeight, context))
