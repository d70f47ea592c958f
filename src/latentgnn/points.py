"""The layer for sets of points: packed scenes, and tokens."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._C._functorch import is_batchedtensor

from latentgnn.core.nodes import check_offsets
from latentgnn.dtensors import by_parts, first_node, mesh_dimension
from latentgnn.layer import LatentGNN, check_mask, reshape
from latentgnn.modes import has_values, is_exporting
from latentgnn.paths import Choice
from latentgnn.tracing import as_one_node


class PackedLatentGNN(LatentGNN):
    """`LatentGNN` for sets of points: scenes of any size, one after another, or tokens with channels last.

    Points exchange context only within their scene. There is no padding, and the cost is linear in the number of
    points. Only batch norm in training mixes scenes: its statistics are over all points, as they are over all pixels
    of a batch of images. Parameters, state dict and arguments are those of `LatentGNN`.

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
            x: (T, C), the points of all scenes; (B, N, C), tokens; or a nested tensor (B, jagged, C), which has its
                own offsets.
            offsets: (S + 1,), where each scene begins, and T at the end, as in ``torch.nested``; Pointcept's form,
                without the leading 0, works too. A scene may be empty.
            batch: (T,), the scene of each point, sorted or not, as in PyG. Packed points need ``offsets`` or ``batch``;
                a single scene can also be passed as tokens, ``x[None]``.
            num_scenes: the number of scenes S, empty ones included; only with ``batch``. Needed if processes share the
                nodes, because no process sees every scene.
            mask: (B, N), bool, for tokens: where it is false, tokens are left out and returned unchanged.

        Returns:
            The shape and type of ``x``, with the points in the same order.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: an argument of the wrong shape or on another device, packed points without offsets or batch, or
                offsets that do not rise from 0 to T.
        """
        if isinstance(cast(object, x), fx.Proxy):
            return cast(Tensor, as_one_node(self, x, offsets=offsets, batch=batch, num_scenes=num_scenes, mask=mask))
        if isinstance(x, Tensor) and x.is_nested:
            return self._jagged(x, (offsets, batch, num_scenes, mask))
        self._check_points(x, offsets, batch, mask, num_scenes)
        spread = mesh_dimension(x, range(x.dim() - 2, x.dim() - 1))
        if spread is not None and x.dim() == 3:
            return by_parts(
                self, x, spread, lambda own, part: self.forward(own, mask=None if mask is None else part(mask, 0))
            )
        if spread is not None:
            return self._spread(x, spread, offsets, batch, num_scenes)
        if batch is None:
            x_BNC, mask_BN, ends = _nodes_of(x, offsets, mask)
            return reshape(self._output(x_BNC, mask_BN, ends), x.shape)
        order, ends = scenes(batch, x.shape[0], num_scenes, shared=self._ranks is not None)
        if order is None:
            return reshape(self._output(x[None], None, ends), x.shape)
        return torch.empty_like(x).index_copy(0, order, self._output(x[order][None], None, ends)[0])

    def path_for(  # type: ignore[override]
        self, x: Tensor, offsets: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Choice:
        """As `LatentGNN.path_for`; for a ``batch``, give the offsets of the sorted points."""
        return self._path_for(*self.points_of(x, offsets, mask))

    def points_of(
        self, x: Tensor, offsets: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Check an input, its mask and its offsets: nodes (B, N, C), the mask (B, N), and offsets (S + 1,) from 0."""
        self._check_points(x, offsets, None, mask, None)
        return _nodes_of(x, offsets, mask)

    def _check_points(
        self,
        x: Tensor,
        offsets: Tensor | None,
        batch: Tensor | None,
        mask: Tensor | None,
        num_scenes: int | None,
    ) -> None:
        self._check(x)
        if x.dim() not in (2, 3) or x.shape[-1] != self.config.channels:
            raise ValueError(
                f"this PackedLatentGNN takes packed points (T, {self.config.channels}) or tokens "
                f"(B, N, {self.config.channels}), with channels last; got {tuple(x.shape)}"
            )
        if x.dim() == 3:
            if offsets is not None or batch is not None or num_scenes is not None:
                raise ValueError(
                    f"offsets, batch and num_scenes are for packed points (T, C); tokens {tuple(x.shape)} take a mask"
                )
            if mask is not None:
                check_mask(mask, x, tuple(x.shape[:2]), "(B, N)")
            return
        if mask is not None:
            raise ValueError("a mask is for tokens (B, N, C); leave points out of packed ones instead")
        if (offsets is None) == (batch is None):
            raise ValueError(
                f"packed points {tuple(x.shape)} need either offsets or batch, which say what belongs to which scene; "
                f"got {'neither' if offsets is None else 'both'}; points of one scene may be given as x[None], "
                f"(1, {len(x)}, {self.config.channels})"
            )
        if offsets is not None and num_scenes is not None:
            raise ValueError("num_scenes goes with batch; offsets say how many scenes there are")
        if offsets is not None and self._ranks is not None:
            _check_shared(offsets)

    def _spread(
        self, x: Tensor, dimension: int, offsets: Tensor | None, batch: Tensor | None, num_scenes: int | None
    ) -> Tensor:
        """The output for points that a DTensor spreads over processes; offsets and batch count all points."""

        def call(own: Tensor, part: Callable[[Tensor, int], Tensor]) -> Tensor:
            if offsets is not None:
                bounds = checked_offsets(offsets, len(x)) - first_node(x, dimension)
                return self.forward(own, bounds.clamp(0, len(own)))
            assert batch is not None
            scenes = num_scenes
            if scenes is None and not hasattr(batch, "placements"):
                scenes = int(batch.max()) + 1
            return self.forward(own, batch=part(batch, 0), num_scenes=scenes)

        return by_parts(self, x, dimension, call)

    def _jagged(self, x: Tensor, others: Sequence[object]) -> Tensor:
        if any(argument is not None for argument in others):
            raise ValueError(
                "a nested tensor has its own offsets; offsets, batch, num_scenes and mask are for other inputs"
            )
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


def _nodes_of(x: Tensor, offsets: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return (x, mask, None) if offsets is None else (x[None], None, checked_offsets(offsets, x.shape[0]))


def _check_index(index: Tensor, name: str) -> None:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name} must be a tensor of int32 or int64, got {kind}; use .long()")
    if is_batchedtensor(index):
        raise ValueError(
            f"{name} cannot differ along the dimension that torch.func.vmap maps over, as its values say where scenes "
            f"begin; use in_dims=None for {name}, or pack all scenes into one call without vmap"
        )
    if index.dim() != 1 or (index.numel() == 0 and name == "offsets"):
        raise ValueError(f"{name} must have one dimension and at least one entry, got {tuple(index.shape)}")


def _check_shared(offsets: Tensor) -> None:
    """Refuse Pointcept's offsets for shared nodes: a process without points of the first scene has a 0 there too."""
    _check_index(offsets, "offsets")
    if has_values(offsets) and not torch.compiler.is_compiling() and offsets[0] != 0:
        raise ValueError(
            f"offsets must have a 0 in front, (S + 1,), if processes share the nodes; got {offsets.tolist()}: without "
            "it, a process that has no points of the first scene would count one scene less"
        )


def checked_offsets(offsets: Tensor, points: int) -> Tensor:
    """Check offsets, add a missing leading 0, and move them to the CPU, where they are read."""
    _check_index(offsets, "offsets")
    if not has_values(offsets):
        return torch.nn.functional.pad(offsets.to(torch.int64), (1, 0))
    offsets = offsets.detach().to("cpu", torch.int64)
    if torch.compiler.is_compiling():
        # The first value is unknown here, so a 0 is always added; if there was one, the first scene is empty.
        return torch.nn.functional.pad(offsets, (1, 0))
    if offsets[0] != 0:
        offsets = torch.nn.functional.pad(offsets, (1, 0))
    check_offsets(offsets.tolist(), points)
    return offsets


def scenes(batch: Tensor, points: int, count: int | None, *, shared: bool) -> tuple[Tensor | None, Tensor]:
    """The permutation that sorts points by scene (``None`` if they are sorted), and the offsets."""
    _check_index(batch, "batch")
    if len(batch) != points:
        raise ValueError(f"batch must name the scene of each of the {points} points, got {len(batch)} entries")
    if is_exporting() or not has_values(batch):
        raise ValueError(
            "how many scenes batch names depends on its values, which are not known on the meta device, in "
            "FakeTensorMode and in an export; put the points of each scene together and give offsets"
        )
    if shared and count is None:
        raise ValueError(
            "a layer whose nodes are shared between processes takes num_scenes beside batch: how many scenes there are "
            "in all of them"
        )
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise ValueError(f"num_scenes must be a positive int, got {count!r}")
    if points == 0:
        return None, torch.zeros((count or 0) + 1, dtype=torch.int64)
    if batch.min() < 0:
        raise ValueError(f"batch must not be negative, got {int(batch.min())}")
    if count is not None and batch.max() >= count:
        raise ValueError(f"batch names scenes from 0 to num_scenes - 1 = {count - 1}, got {int(batch.max())}")
    order = None if (batch.diff() >= 0).all() else batch.argsort(stable=True)
    counts = batch.unique(return_counts=True)[1] if count is None else batch.bincount(minlength=count)
    return order, torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to("cpu", torch.int64)
