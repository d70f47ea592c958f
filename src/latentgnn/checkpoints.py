"""Weights of the layer published with the paper, into ours and back."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from latentgnn.layer import LatentGNN
from latentgnn.projections import Projection

_MARK = "up_channel.0.weight"


def _pairs(layer: LatentGNN) -> Iterator[tuple[str, Projection]]:
    """Published name and our module of every 1x1 convolution with its norm."""
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
    """Published name to our tensor."""
    if layer.config.num_groups != 1:
        raise ValueError("the published layer has no groups; its weights need a layer with num_groups=1")
    targets = {"gamma": layer.gamma}
    for name, projection in _pairs(layer):
        targets[f"{name}.0.weight"] = projection.weight
        for key, tensor in projection.norm.state_dict(keep_vars=True).items():
            targets[f"{name}.1.{key}"] = tensor
    return targets


def _prefix(state_dict: Mapping[str, Tensor], prefix: str | None) -> str:
    """The prefix of one published layer in a state dict of perhaps many."""
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
    """Whether a prefix is, or ends in, one given without its last dot; none at all is only itself."""
    return f".{candidate}".endswith(f".{end}.") if end else not candidate


def load_published(layer: LatentGNN, state_dict: Mapping[str, Tensor], *, prefix: str | None = None) -> None:
    """Load the published layer's weights, by its own names; all of them or, on an error, none.

    Args:
        layer: the layer that takes the weights.
        state_dict: of the published layer, or of a network that holds it, such as its Mask R-CNN fork
            (``featureaug2.`` to ``featureaug4.``).
        prefix: the layer's place in that network, or the end of it; needed only where there are several.

    Raises:
        ValueError: no layer or several at that prefix, or keys that are missing, unexpected or misshapen.

    Example:
        >>> source, target = LatentGNN(16, num_latents=4), LatentGNN(16, num_latents=4)
        >>> load_published(target, {f"featureaug3.{k}": v for k, v in published_state_dict(source).items()})
        >>> torch.equal(source.expand.weight, target.expand.weight)
        True
    """
    targets = _targets(layer)
    prefix = _prefix(state_dict, prefix)
    given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    # A batch norm without tracking and a frozen one have no counter; one that is absent or not wanted changes nothing.
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
    """(O, I, 1, 1) as (O, I) and gamma's (1,) as (1,)."""
    return tuple(shape[:2]) if len(shape) > 2 and all(size == 1 for size in shape[2:]) else tuple(shape)


def _published_shape(key: str, tensor: Tensor) -> tuple[int, ...]:
    return (1,) if key == "gamma" else tuple(tensor.shape)


def published_state_dict(layer: LatentGNN, *, spatial_dims: Literal[1, 2, 3] = 2) -> dict[str, Tensor]:
    """The layer's weights under the published names, as copies.

    Args:
        layer: the layer.
        spatial_dims: of the published layer's convolutions; the paper's are 2.

    Raises:
        ValueError: a layer with groups, which the published one does not have.
    """
    state = {}
    for key, tensor in _targets(layer).items():
        ones = [1] * spatial_dims if key.endswith(".0.weight") else []
        state[key] = tensor.detach().clone().reshape([*_published_shape(key, tensor), *ones])
    return state
