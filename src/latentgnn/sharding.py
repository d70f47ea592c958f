"""Nodes shared between processes: each process holds a part of the nodes of the same inputs."""

from typing import TypeVar, cast

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from latentgnn.layer import LatentGNN
from latentgnn.ranks import Ranks

M = TypeVar("M", bound=nn.Module)


def shard_nodes(module: M, group: ProcessGroup | DeviceMesh | None) -> M:
    """Let the processes of a group share the nodes of each input: every latent sums over the nodes of all of them.

    Each process then calls the layer with its part of the nodes of the same samples: a strip of an image, or some of
    the points. Parts may differ in size and may be empty. The outputs are those of one process with all nodes, and so
    are the gradients of the inputs, if the loss is the sum of the processes' losses. The gradients of parameters are
    partial sums over the process's own nodes: summed over the processes they are those of one process.

    A call sums the latents, (S, G, D, r + 1) numbers, by one all-reduce, and the backward pass as many gradients by
    another. Batch norm in training mode needs two more small ones for each norm, in either direction, and its
    statistics are those of all nodes of the group. The number of bytes does not depend on the number of nodes.

    At its first call, a layer compares what it is about to compute with the other processes, by one small all-gather.

    Args:
        module: a `LatentGNN` or `PackedLatentGNN`, or a network that contains some.
        group: a process group, or a one-dimensional device mesh, such as ``mesh["nodes"]``; ``None`` lets each process
            compute alone again.

    Returns:
        The module, whose layers now share their nodes.

    Raises:
        TypeError: for anything but a module and a group.
        ValueError: for a module without such layers, a mesh of several dimensions, or a group without this process.

    Example:
        >>> layer = LatentGNN(16, num_latents=4)
        >>> shard_nodes(layer, None) is layer
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"shard_nodes takes a module, got {type(module).__name__}")
    layers = [layer for layer in module.modules() if isinstance(layer, LatentGNN)]
    if not layers:
        raise ValueError(
            f"{type(module).__name__} has no LatentGNN layer whose nodes could be shared; insert some first, as in "
            "latentgnn.insert"
        )
    own = None if group is None else _checked(group)
    for layer in layers:
        layer._ranks = None if own is None else Ranks(own.group_name, own.size())
    return module


def _checked(group: ProcessGroup | DeviceMesh) -> ProcessGroup:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"shard_nodes takes a mesh of one dimension, got {group}; name the one that the nodes are spread over, "
                f'as in mesh["{(group.mesh_dim_names or ("nodes",))[-1]}"]'
            )
        return group.get_group()
    if not isinstance(cast(object, group), ProcessGroup):
        if cast(object, group) == torch.distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this process is not in the group; it shares no nodes with it")
        raise TypeError(f"shard_nodes takes a process group, a device mesh or None, got {type(group).__name__}")
    return group
