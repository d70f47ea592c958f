"""Converts weights of the layer published with the paper to ours and back."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from latentgnn.layer import LatentGNN
from latentgnn.projections import Projection

_MARK = "up_channel.0.weight"


def _pairs(layer: LatentGNN) -> Iterator[tuple[str, Projection]]:
    """Yield published name and our module of every 1x1 convolution with its norm."""
    symmetric = layer.scatter_reduce is None
    yield "down_channel" if symmetric else "down_channel_v2l", layer.gather_reduce
    if layer.scatter_reduce is not None:
        yield "down_channel_l2v", layer.scatter_reduce
    for index, kernel in enumerate(layer.kernel_list):
        name = f"LatentGNN_Kernel_{index}"
        yield f"{name}.psi" if symmetric else f"{name}.psi_v2l", kernel.gather_assign
        if kernel.scatter_assign is not None:
            yield f"{name}.psi_l2v", kernel.scatter_assign
        if kernel.graph_conv is not None:
            yield f"{name}.GraphConvWeight", kernel.graph_conv
    yield "up_channel", layer.expand


def _targets(layer: LatentGNN) -> dict[str, Tensor]:
    """Map published names to our tensors."""
    if layer.config.num_groups != 1:
        raise ValueError("the published layer has no groups; its weights need a layer with num_groups=1")
    targets = {"gamma": layer.gamma}
    for name, projection in _pairs(layer):
        targets[f"{name}.0.weight"] = projection.weight
        for key, tensor in projection.norm.state_dict(keep_vars=True).items():
            targets[f"{name}.1.{key}"] = tensor
    return targets


def _prefix(state_dict: Mapping[str, Tensor], prefix: str | None) -> str:
    """The prefix of the published layer in a state dict that may contain several."""
    prefixes = sorted(key.removesuffix(_MARK) for key in state_dict if key.endswith(_MARK))
    matching = [candidate for candidate in prefixes if prefix is None or _ends_in(candidate, prefix.rstrip("."))]
    if len(matching) == 1:
        return matching[0]
    listed = ", ".join(repr(candidate) for candidate in prefixes)
    if not prefixes:
        raise ValueError(f"no published layer in the state dict: no key ends in {_MARK!r}")
    if not matching:
        raise ValueError(f"no published layer has the prefix {prefix!r}; the state dict has {listed}")
    raise ValueError(f"the state dict has several published layers; name one of them with prefix=: {listed}")


def _ends_in(candidate: str, end: str) -> bool:
    """Whether a prefix equals or ends in another one, given without its last dot; an empty one only matches itself."""
    return f".{candidate}".endswith(f".{end}.") if end else not candidate


def load_published(layer: LatentGNN, state_dict: Mapping[str, Tensor], *, prefix: str | None = None) -> None:
    """Load the published layer's weights, by its own names; on an error, none are loaded.

    Args:
        layer: the layer that takes the weights.
        state_dict: state dict of the published layer, or of a network that contains it, such as its Mask R-CNN fork
            (``featureaug2.`` to ``featureaug4.``).
        prefix: the layer's name in that network, or the end of it; only needed if there are several.

    Raises:
        ValueError: if there is no layer or several at that prefix, or keys are missing, unexpected or have wrong
            shapes.

    Example:
        >>> source, target = LatentGNN(16, num_latents=4), LatentGNN(16, num_latents=4)
        >>> load_published(target, {f"featureaug3.{k}": v for k, v in published_state_dict(source).items()})
        >>> torch.equal(source.expand.weight, target.expand.weight)
        True
    """
    targets = _targets(layer)
    prefix = _prefix(state_dict, prefix)
    given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    # Untracked and frozen batch norms have no counter; a missing or superfluous one changes nothing.
    counters = {key for key in {*targets, *given} if key.endswith("num_batches_tracked")}
    missing = sorted(targets.keys() - given.keys() - counters)
    unexpected = sorted(given.keys() - targets.keys() - counters)
    shared = targets.keys() & given.keys()
    misshapen = sorted(key for key in shared if _published_shape(key, targets[key]) != _squeezed(given[key].shape))
    if missing or unexpected or misshapen:
        lines = ["the published weights do not fit this layer:"]
        lines += [f"  missing: {prefix}{key}" for key in missing]
        lines += [f"  unexpected: {prefix}{key}" for key in unexpected]
        lines += [
            f"  misshapen: {prefix}{key} is {tuple(given[key].shape)}, the layer's is {tuple(targets[key].shape)}"
            for key in misshapen
        ]
        raise ValueError("\n".join(lines))
    with torch.no_grad():
        for key in shared:
            targets[key].copy_(given[key].reshape(targets[key].shape))


def _squeezed(shape: torch.Size) -> tuple[int, ...]:
    """Map (O, I, 1, 1) to (O, I); other shapes, such as gamma's (1,), are unchanged."""
    return tuple(shape[:2]) if len(shape) > 2 and all(size == 1 for size in shape[2:]) else tuple(shape)


def _published_shape(key: str, tensor: Tensor) -> tuple[int, ...]:
    return (1,) if key == "gamma" else tuple(tensor.shape)


def published_state_dict(layer: LatentGNN, *, spatial_dims: Literal[1, 2, 3] = 2) -> dict[str, Tensor]:
    """Return copies of the layer's weights under the published names.

    Args:
        layer: the layer.
        spatial_dims: number of spatial dimensions of the published layer's convolutions; 2 in the paper.

    Raises:
        ValueError: if the layer has groups, which the published one does not support.
    """
    state = {}
    for key, tensor in _targets(layer).items():
        ones = [1] * spatial_dims if key.endswith(".0.weight") else []
        state[key] = tensor.detach().clone().reshape([*_published_shape(key, tensor), *ones])
    return state
