"""The layer for sets of points: packed scenes, and tokens."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._C._functorch import is_batchedtensor

from latentgnn.core.node import has_values
from latentgnn.core.nodes import check_offsets
from latentgnn.dtensors import by_parts, first_node, mesh_dimension
from latentgnn.layer import LatentGNN, check_mask, reshape
from latentgnn.tracing import as_one_node


class PackedLatentGNN(LatentGNN):
    """`LatentGNN` for sets of points: scenes of any sizes one after another, or tokens with channels last.

    Each scene exchanges context within itself, as if it were alone in the batch, without padding and at a cost linear
    in the points of all. Only batch norm in training takes its statistics over the points of all scenes, as it does
    over the pixels of all images. Parameters, state dict and arguments are those of `LatentGNN`.

    Example:
        >>> layer = PackedLatentGNN(32, num_latents=8)
        >>> points = torch.randn(100, 32)
        >>> layer(points, offsets=torch.tensor([0, 70, 100])).shape  # scenes of 70 and of 30 points
        torch.Size([100, 32])
        >>> layer(points, batch=torch.arange(100) % 3).shape  # PyG's index, sorted or not
        torch.Size([100, 32])
        >>> layer(torch.randn(2, 50, 32)).shape  # tokens (B, N, C)
        torch.Size([2, 50, 32])
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        offsets: Tensor | None = None,
        *,
        batch: Tensor | None = None,
        num_scenes: int | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Add to every point the context of all points of its scene.

        Args:
            x: (T, C), the points of all scenes; (B, N, C), tokens of which each sample has the same number; or a
                nested tensor (B, jagged, C), which has its own offsets.
            offsets: (S + 1,), where each scene begins, and T at the end, as in ``torch.nested``; Pointcept's, which
                leaves out the leading 0, is taken as well. A scene may be empty.
            batch: (T,), the scene of each point, sorted or not, as in PyG. Packed points take one of the two; those of
                a single scene are tokens, ``x[None]``.
            num_scenes: how many scenes there are, S, with ``batch``: those without points count. Needed where nodes are
                shared between processes, none of which sees all scenes; otherwise ``batch`` says it.
            mask: (B, N), bool, for tokens: those outside it take no part and come back unchanged.

        Returns:
            The shape and type of ``x``, with the points in the same order.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: an argument of the wrong shape or on another device, packed points without offsets or batch, or
                offsets that do not rise from 0 to T.
        """
        if isinstance(cast(object, x), fx.Proxy):
            return cast(Tensor, as_one_node(self, x, offsets=offsets, batch=batch, mask=mask))
        if isinstance(x, Tensor) and x.is_nested:
            return self._jagged(x, offsets, batch, mask)
        self._check(x)
        if x.dim() not in (2, 3) or x.shape[-1] != self.config.channels:
            raise ValueError(
                f"this PackedLatentGNN takes packed points (T, {self.config.channels}) or tokens "
                f"(B, N, {self.config.channels}), with channels last; got {tuple(x.shape)}"
            )
        if x.dim() == 3:
            if offsets is not None or batch is not None or num_scenes is not None:
                raise ValueError(f"offsets and batch are for packed points (T, C); tokens {tuple(x.shape)} take a mask")
            if mask is not None:
                check_mask(mask, x, tuple(x.shape[:2]), "(B, N)")
            spread = mesh_dimension(x, range(1, 2))
            if spread is not None:
                return by_parts(
                    self, x, spread, lambda own, part: self.forward(own, mask=None if mask is None else part(mask, 0))
                )
            return self._output(x, mask)
        if mask is not None:
            raise ValueError("a mask is for tokens (B, N, C); leave points out of packed ones instead")
        if (offsets is None) == (batch is None):
            raise ValueError(
                f"packed points {tuple(x.shape)} need either offsets or batch, which say what belongs to which scene; "
                f"got {'neither' if offsets is None else 'both'}; points of one scene may be given as x[None], "
                f"(1, {len(x)}, {self.config.channels})"
            )
        spread = mesh_dimension(x, range(1))
        if spread is not None:
            return self._spread(x, spread, offsets, batch, num_scenes)
        if offsets is not None:
            if num_scenes is not None:
                raise ValueError("num_scenes goes with batch; offsets say how many scenes there are")
            return reshape(self._output(x[None], None, _checked_offsets(offsets, x.shape[0])), x.shape)
        assert batch is not None
        order, offsets = _scenes(batch, x.shape[0], num_scenes, shared=self._ranks is not None)
        if order is None:
            return reshape(self._output(x[None], None, offsets), x.shape)
        return torch.empty_like(x).index_copy(0, order, self._output(x[order][None], None, offsets)[0])

    def _spread(
        self, x: Tensor, dimension: int, offsets: Tensor | None, batch: Tensor | None, num_scenes: int | None
    ) -> Tensor:
        """Of points that a DTensor spreads over processes, while offsets and batch name those of all."""

        def call(own: Tensor, part: Callable[[Tensor, int], Tensor]) -> Tensor:
            if offsets is not None:
                bounds = _checked_offsets(offsets, len(x)) - first_node(x, dimension)
                return self.forward(own, bounds.clamp(0, len(own)))
            assert batch is not None
            scenes = num_scenes
            if scenes is None and not hasattr(batch, "placements"):
                scenes = int(batch.max()) + 1
            return self.forward(own, batch=part(batch, 0), num_scenes=scenes)

        return by_parts(self, x, dimension, call)

    def _jagged(self, x: Tensor, offsets: Tensor | None, batch: Tensor | None, mask: Tensor | None) -> Tensor:
        if any(argument is not None for argument in (offsets, batch, mask)):
            raise ValueError("a nested tensor has its own offsets; offsets, batch and mask are for other inputs")
        if x.layout != torch.jagged or x.dim() != 3:
            raise ValueError(
                f"nested tensors must be (B, jagged, {self.config.channels}) with layout=torch.jagged; got "
                f"{x.dim()} dimensions and layout {x.layout}"
            )
        nested: Any = x
        if nested.lengths() is not None:
            raise ValueError("nested tensors must have no gaps between their samples; give x.contiguous()")
        values = self.forward(nested.values(), nested.offsets())
        return torch.nested.nested_tensor_from_jagged(values, nested.offsets())


def _check_index(index: Tensor, name: str) -> None:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {kind}")
    if is_batchedtensor(index):
        raise ValueError(
            f"{name} cannot differ along the dimension that torch.func.vmap maps over, as its values say where scenes "
            f"begin; use in_dims=None for {name}, or pack all scenes into one call without vmap"
        )
    if index.dim() != 1 or (index.numel() == 0 and name == "offsets"):
        raise ValueError(f"{name} must have one dimension and at least one entry, got {tuple(index.shape)}")


def _checked_offsets(offsets: Tensor, points: int) -> Tensor:
    """Offsets with the leading 0, on the CPU, where they are read one by one."""
    _check_index(offsets, "offsets")
    if not has_values(offsets):
        return torch.nn.functional.pad(offsets.to(torch.int64), (1, 0))
    offsets = offsets.detach().to("cpu", torch.int64)
    if torch.compiler.is_compiling():
        # Whether they begin with 0 is not known here; if they do, the first scene is an empty one.
        return torch.nn.functional.pad(offsets, (1, 0))
    if offsets[0] != 0:
        offsets = torch.nn.functional.pad(offsets, (1, 0))
    check_offsets(offsets.tolist(), points)
    return offsets


def _scenes(batch: Tensor, points: int, scenes: int | None, *, shared: bool) -> tuple[Tensor | None, Tensor]:
    """The order that puts the points of each scene together (``None`` if they are), and the offsets."""
    _check_index(batch, "batch")
    if len(batch) != points:
        raise ValueError(f"batch must name the scene of each of the {points} points, got {len(batch)} entries")
    if torch.compiler.is_exporting() or not has_values(batch):
        raise ValueError(
            "how many scenes batch names depends on its values, which are not known on the meta device, in "
            "FakeTensorMode and in an export; put the points of each scene together and give offsets"
        )
    if shared and scenes is None:
        raise ValueError(
            "a layer whose nodes are shared between processes takes num_scenes beside batch: how many scenes there are "
            "in all of them"
        )
    if points == 0:
        return None, torch.zeros((scenes or 0) + 1, dtype=torch.int64)
    if batch.min() < 0:
        raise ValueError(f"batch must not be negative, got {int(batch.min())}")
    if scenes is not None and batch.max() >= scenes:
        raise ValueError(f"batch names scenes from 0 to num_scenes - 1 = {scenes - 1}, got {int(batch.max())}")
    order = None if (batch.diff() >= 0).all() else batch.argsort(stable=True)
    counts = batch.unique(return_counts=True)[1] if scenes is None else batch.bincount(minlength=scenes)
    return order, torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to("cpu", torch.int64)
