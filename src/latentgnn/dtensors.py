"""DTensors whose nodes are sharded over a device mesh: each process computes its part, and only sums are exchanged.

DTensor matrix products would gather the sharded nodes. Here only the latents' sums are exchanged.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from latentgnn.ranks import Ranks


def mesh_dimension(x: Tensor, nodes: range) -> int | None:
    """Return the dimension of a DTensor's mesh over which its nodes are sharded, ``None`` if they are not.

    Args:
        x: a tensor.
        nodes: its dimensions that are nodes.

    Raises:
        ValueError: if nodes are sharded over several dimensions of the mesh.
    """
    if not is_traceable_wrapper_subclass(cast(object, x)):
        return None
    # Possibly a DTensor; the class is not used, because builds without distributed support lack it.
    placements = getattr(x, "placements", ())
    found = [index for index, placement in enumerate(placements) if placement.is_shard() and placement.dim in nodes]
    if len(found) > 1:
        raise ValueError(
            f"a layer takes DTensors whose nodes are spread over one dimension of a mesh, got {tuple(placements)}; "
            "redistribute the input, or flatten these dimensions of the mesh into one"
        )
    return found[0] if found else None


def by_parts(
    layer: Any, x: Any, dimension: int, call: Callable[[Tensor, Callable[[Tensor, int], Tensor]], Tensor]
) -> Tensor:
    """Compute a layer's output for a DTensor; each process computes it for its own nodes.

    Args:
        layer: the layer, whose parameters may be DTensors of the same mesh.
        x: the input.
        dimension: dimension of the mesh, from `mesh_dimension`.
        call: calls the layer with this process's part of the input, and with a function that takes another tensor
            (whole or a DTensor) and the number of leading dimensions it lacks before those of nodes, and returns this
            process's part of it.

    Returns:
        A DTensor with the placement of the input.

    Raises:
        ValueError: if the input has partial sums, or parameters are on another mesh.
    """
    from torch.distributed.tensor import DTensor

    if any(placement.is_partial() for placement in x.placements):
        raise ValueError(f"a layer does not accept DTensors with partial sums, got {tuple(x.placements)}")
    mesh = x.device_mesh
    with _parts_of_layer(layer, x, Ranks(mesh.get_group(dimension).group_name, mesh.size(dimension), agreed=True)):
        out = call(x.to_local(), lambda other, lacks: _part_like(x, other, lacks))
    return DTensor.from_local(out, mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())


def _part_like(x: Any, other: Any, lacks: int) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = x.device_mesh
    if not isinstance(other, DTensor):
        other = DTensor.from_local(other, mesh, [Replicate()] * mesh.ndim, run_check=False)
    placements = [
        Shard(placement.dim - lacks if placement.dim >= lacks else placement.dim) if placement.is_shard() else placement
        for placement in x.placements
    ]
    part: Tensor = other.redistribute(mesh, placements).to_local()
    return part


@contextmanager
def _parts_of_layer(layer: Any, x: Any, ranks: Ranks) -> Iterator[None]:
    """Replace the layer's parameters by plain tensors; gradients are summed over all processes with other data."""
    from torch.distributed.tensor import Partial, Replicate

    mesh = x.device_mesh
    grads = [Partial() if placement.is_shard() else Replicate() for placement in x.placements]

    def whole(name: str, value: Any) -> Tensor:
        if value.device_mesh != mesh:
            raise ValueError(f"the input is spread over {mesh}, the layer's {name} over {value.device_mesh}")
        local: Tensor = value.redistribute(placements=[Replicate()] * mesh.ndim).to_local(grad_placements=grads)
        return local

    named = [*layer.named_parameters(), *layer.named_buffers()]
    replaced = {name: whole(name, value) for name, value in named if hasattr(value, "device_mesh")}
    before, layer._ranks = layer._ranks, ranks
    try:
        with _reparametrize_module(layer, replaced):
            yield
    finally:
        layer._ranks = before


def first_node(x: Any, dimension: int) -> int:
    """Return the index of this process's first point in the first dimension of a DTensor.

    Args:
        x: (T, C).
        dimension: dimension of the mesh over which the points are sharded.
    """
    mesh = x.device_mesh
    # DTensors are split as by `torch.chunk`.
    each = -(-len(x) // mesh.size(dimension))
    return int(min(each * mesh.get_local_rank(dimension), len(x)))


def whole_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that are split over processes, gathered; gradients flow back to the shards.

    Products of a split matrix with split nodes have wrong gradients in PyTorch.
    """
    split: dict[str, Any] = {
        name: value
        for name, value in module.named_parameters()
        if is_traceable_wrapper_subclass(cast(object, value))
        and any(p.is_shard() for p in getattr(value, "placements", ()))
    }
    if not split:
        return {}
    # Imported here: nothing else needs it, and it is missing in builds without distributed support.
    from torch.distributed.tensor import Replicate

    return {
        name: value.redistribute(placements=[Replicate()] * value.device_mesh.ndim) for name, value in split.items()
    }
