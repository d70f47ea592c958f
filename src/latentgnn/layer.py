"""The LatentGNN layer as a module: parameters, shapes and errors; `latentgnn.running` runs it."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.stateless import _reparametrize_module

from latentgnn import paths, running
from latentgnn.config import LatentGNNConfig
from latentgnn.dtensors import by_parts, mesh_dimension, whole_parameters
from latentgnn.functional import NodeScale
from latentgnn.modules import child, own_tensor
from latentgnn.norms import NormFactory
from latentgnn.projections import Arrangement, Projection
from latentgnn.ranks import Ranks
from latentgnn.tracing import as_one_node


class LatentKernel(nn.Module):
    """The parameters of one kernel: its assignments and its graph convolution.

    Args:
        config: the layer's options.
        num_latents: D_k, the latents of this kernel in each group.
    """

    def __init__(
        self,
        config: LatentGNNConfig,
        num_latents: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        reduced, groups = config.reduced_channels, config.num_groups

        def projection(out_features: int) -> Projection:
            width = reduced // groups
            return Projection(width, out_features, norm=config.norm_factory, device=device, dtype=dtype)

        self.gather_assign = projection(groups * num_latents)
        self.scatter_assign = None if config.symmetric else projection(groups * num_latents)
        self.graph_conv = projection(reduced) if config.graph_conv else None


class LatentGNN(nn.Module):
    """Give every node of a feature map the context of all others, through a few latent nodes.

    Nodes gather into latents, ``Z = P V^T``; the latents mix, ``Y = softmax(z z^T) Z``; and scatter back,
    ``O = Y^T Q``: ``out = x + gamma norm(U O)``. V are values of the nodes, P and Q their assignments to the latents.
    The affinity of all pairs of nodes is never formed, and the cost is linear in the number of nodes. Source: Zhang,
    Yan, He, ICML 2019, arXiv 1905.11634.

    Gamma starts at 0, so a new layer is an identity and can be put into a trained network. In the first step only
    gamma gets a gradient; the other parameters follow once gamma is no longer 0.

    With the published scaling, the result before the norm grows with the number of nodes N, like sqrt(N), or like N if
    symmetric. If inputs may have other sizes than in training, use ``node_scale="mean"``.

    Args:
        channels: channels C of the input and the output.
        num_latents: latents in each group: one number, or a sequence with one number per kernel.
        reduction: C is reduced to C // reduction channels inside.
        symmetric: one assignment for gather and scatter instead of two.
        graph_conv: a graph convolution with a norm and a ReLU after the scatter step.
        residual: add the result, times gamma, to the input; without it, gamma is an unused buffer.
        norm: callable from a channel count to a norm: ``nn.BatchNorm1d`` or 2d, `latentgnn.norms.FrozenBatchNorm`,
            torchvision's ``FrozenBatchNorm2d``, ``nn.GroupNorm`` through a partial, ``nn.LayerNorm``, ``nn.Identity``;
            any other module is called with (B, C, N) and allows no mask. Or a name in `latentgnn.norms.NORMS`:
            ``batch_norm``, ``frozen_batch_norm``, ``group_norm``, ``layer_norm``, ``none``.
        num_groups: groups of the reduced channels, each with latent graphs of its own.
        gamma_init: initial value of gamma.
        node_scale: ``published``, or ``mean`` to make each latent a weighted mean of its nodes, so that the output's
            size does not depend on the number of nodes.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        (B, C, *spatial) with one, two or three spatial dimensions, to the same shape, type and strides.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: counts below one, or channels that do not divide.

    Example:
        >>> layer = LatentGNN(64, num_latents=16)
        >>> x = torch.randn(2, 64, 10, 12)
        >>> torch.equal(layer(x), x)  # gamma is 0
        True
    """

    # Set by `latentgnn.shard_nodes`.
    _ranks: Ranks | None = None

    def __init__(
        self,
        channels: int,
        *,
        num_latents: int | Sequence[int],
        reduction: int = 8,
        symmetric: bool = False,
        graph_conv: bool = False,
        residual: bool = True,
        norm: NormFactory | str = "batch_norm",
        num_groups: int = 1,
        gamma_init: float = 0.0,
        node_scale: NodeScale = "published",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config = LatentGNNConfig(
            channels=channels,
            num_latents=num_latents,
            reduction=reduction,
            symmetric=symmetric,
            graph_conv=graph_conv,
            residual=residual,
            norm=norm,
            num_groups=num_groups,
            gamma_init=gamma_init,
            node_scale=node_scale,
        )
        reduced = config.reduced_channels

        def projection(in_features: int, out_features: int) -> Projection:
            return Projection(in_features, out_features, norm=config.norm_factory, device=device, dtype=dtype)

        self.gather_reduce = projection(channels, reduced)
        self.scatter_reduce = None if symmetric else projection(channels, reduced)
        self.kernels = nn.ModuleList(
            LatentKernel(config, count, device=device, dtype=dtype) for count in config.latents
        )
        self.expand = projection(len(config.latents) * reduced, channels)
        gamma = torch.empty(1, device=device, dtype=dtype)
        if residual:
            self.gamma: Tensor = nn.Parameter(gamma)
        else:
            # Unused, but the published layer has a gamma here too, and its state dicts must fit.
            self.register_buffer("gamma", gamma)
        self.reset_parameters()

    @classmethod
    def from_config(
        cls,
        config: LatentGNNConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The layer that a configuration describes."""
        options = {field.name: getattr(config, field.name) for field in fields(config)}
        return cls(options.pop("channels"), **options, device=device, dtype=dtype)

    @classmethod
    def from_pretrained(
        cls,
        source: Path | str,
        *,
        from_hub: bool = False,
        revision: str | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """The layer that `save_pretrained` wrote, in evaluation mode.

        Args:
            source: the folder, or the file of weights alone; with ``from_hub``, a model's name on the Hugging Face hub.
            from_hub: download it; without this, nothing goes to the network.
            revision: a branch, tag or commit on the hub.
            device: where the layer is put.

        Raises:
            UserError: there is no such model, it is something else, or it cannot be downloaded.
        """
        from latentgnn.saved import load_layer

        return load_layer(cls, source, from_hub=from_hub, revision=revision).to(device)

    def save_pretrained(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder, as the Hugging Face hub takes them.

        Args:
            folder: made if it is not there.
            overwrite: replace existing files.

        Raises:
            UserError: the files exist, and ``overwrite`` is false.
            ValueError: the norm is not in `latentgnn.norms.NORMS`, so it has no name to save.

        Example:
            >>> import tempfile
            >>> layer = LatentGNN(64, num_latents=16)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     layer.save_pretrained(folder)
            ...     LatentGNN.from_pretrained(folder).config == layer.config
            True
        """
        from latentgnn.saved import save_layer

        save_layer(self, folder, overwrite=overwrite)

    def reset_parameters(self) -> None:
        """Initialize all matrices and norms again, and set gamma to ``gamma_init``."""
        for projection in self.projections:
            projection.reset_parameters()
        nn.init.constant_(self.gamma, self.config.gamma_init)

    @property
    def kernel_list(self) -> list[LatentKernel]:
        """The kernels, in order."""
        return [cast(LatentKernel, kernel) for kernel in self.kernels]

    @property
    def projections(self) -> list[Projection]:
        """Every matrix with its norm."""
        return [module for module in self.modules() if isinstance(module, Projection)]

    @property
    def norms(self) -> list[nn.Module]:
        """Every norm."""
        return [projection.norm for projection in self.projections]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Add to every node the context of all.

        Args:
            x: (B, C, *spatial), contiguous or channels-last.
            mask: (B, *spatial), bool. Nodes where it is false are left out of gather and of batch statistics and are
                returned unchanged; their values never affect the other nodes.

        Returns:
            The shape, type and strides of ``x``.

        Raises:
            TypeError: an input or a mask of the wrong type.
            ValueError: an input or a mask of the wrong shape or on another device.
        """
        if isinstance(cast(object, x), fx.Proxy):
            return cast(Tensor, as_one_node(self, x, mask=mask))
        self._check_map(x, mask)
        spread = mesh_dimension(x, range(2, x.dim()))
        if spread is not None:
            return by_parts(
                self, x, spread, lambda own, part: self.forward(own, None if mask is None else part(mask, 1))
            )
        x_BNC, mask_BN = _nodes_of(x, mask)
        return reshape(self._output(x_BNC, mask_BN).mT, x.shape)

    def path_for(self, x: Tensor, mask: Tensor | None = None) -> paths.Choice:
        """The path that a call would take, and why it is not the core; the arguments are those of a call.

        Example:
            >>> LatentGNN(16, num_latents=4).path_for(torch.randn(2, 16, 8, 8)).path in ("core", "plain", "few_calls")
            True
        """
        return self._path_for(*self.nodes_of(x, mask))

    def _path_for(self, x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None = None) -> paths.Choice:
        return paths.choose(self.arrangement(), x_BNC, mask_BN, running.products_in(x_BNC)[0], offsets)

    def nodes_of(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Check an input and its mask, and flatten them to nodes: (B, N, C), a view of the input, and (B, N)."""
        self._check_map(x, mask)
        return _nodes_of(x, mask)

    def _check_map(self, x: Tensor, mask: Tensor | None) -> None:
        self._check(x)
        if not 3 <= x.dim() <= 5:
            raise ValueError(
                f"LatentGNN takes (B, C, *spatial) with one, two or three spatial dimensions, got {tuple(x.shape)}"
            )
        if x.shape[1] != self.config.channels:
            raise ValueError(
                f"this LatentGNN has {self.config.channels} channels, in dimension 1; got an input of shape "
                f"{tuple(x.shape)}"
            )
        if mask is not None:
            check_mask(mask, x, (x.shape[0], *x.shape[2:]), "(B, *spatial)")

    def _output(self, x_BNC: Tensor, mask_BN: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
        layer = self.arrangement()
        if any(type(matrix) is not nn.Parameter for matrix in layer.matrices) and (whole := whole_parameters(self)):
            with _reparametrize_module(self, whole):
                return running.run(self.arrangement(), x_BNC, mask_BN, offsets)
        return running.run(layer, x_BNC, mask_BN, offsets)

    def arrangement(self) -> Arrangement:
        """The layer's projections by their place in the equations."""
        reduces, assigns = [self._part("gather_reduce")], [self._parts("gather_assign")]
        if not self.config.symmetric:
            reduces.append(self._part("scatter_reduce"))
            assigns.append(self._parts("scatter_assign"))
        convs = self._parts("graph_conv") if self.config.graph_conv else []
        gamma = own_tensor(self, "gamma") if self.config.residual else None
        return Arrangement(self.config, reduces, assigns, convs, self._part("expand"), gamma, self._ranks)

    def _part(self, name: str) -> Projection:
        return cast(Projection, child(self, name))

    def _parts(self, name: str) -> list[Projection]:
        """The projection of this name in each kernel."""
        kernels = child(self, "kernels")._modules.values()
        return [cast(Projection, child(cast(nn.Module, kernel), name)) for kernel in kernels]

    def _check(self, x: Tensor) -> None:
        name, weight = type(self).__name__, cast(Tensor, own_tensor(self._part("gather_reduce"), "weight"))
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} takes a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name} takes floating-point inputs, got {x.dtype}")
        if x.device != weight.device:
            raise ValueError(f"the input is on {x.device}, the layer on {weight.device}; move one to the other")
        if x.dtype != weight.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            raise TypeError(f"the input is {x.dtype}, the layer {weight.dtype}; convert one, or use torch.autocast")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # Earlier versions of this layer saved gamma without a dimension.
        gamma = state_dict.get(f"{prefix}gamma")
        if isinstance(gamma, Tensor) and gamma.dim() == 0:
            state_dict[f"{prefix}gamma"] = gamma.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"channels={config.channels}, num_latents={config.latents}, reduction={config.reduction}, "
            f"symmetric={config.symmetric}, graph_conv={config.graph_conv}, num_groups={config.num_groups}, "
            f"node_scale={config.node_scale!r}"
        )


def _nodes_of(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return x.flatten(2).mT, None if mask is None else mask.flatten(1)


def reshape(out: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape a fresh output without making it a view.

    If an in-place operation changed a view, module hooks, FSDP2's in particular, would be lost.
    """
    return torch.ops.aten._unsafe_view.default(out, shape)


def check_mask(mask: Tensor, x: Tensor, shape: tuple[int, ...], axes: str) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True where a node takes part; got {kind}")
    if mask.shape != shape:
        raise ValueError(f"mask must have the shape {axes} = {shape}, got {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"the mask is on {mask.device}, the input on {x.device}; move one to the other")
