"""One node for the whole layer in a graph traced by `torch.fx`."""

from typing import Any

from torch import fx, nn


def as_one_node(layer: nn.Module, *args: Any, **kwargs: Any) -> fx.Proxy | None:
    """Record a call of a layer as one ``call_module`` node, if the call is part of a symbolic trace.

    `torch.fx` traces into every module that is not PyTorch's own, with stand-ins (proxies) for the tensors. What the
    layer does depends on shapes and dtypes, which a proxy does not have; so the layer stays whole, as PyTorch's own
    layers do.

    Args:
        layer: the layer that is called, inside the network that is traced.
        args: positional arguments of its ``forward``.
        kwargs: keyword arguments of its ``forward``; ``None`` stands for an argument that was not given.

    Returns:
        The node's result, or ``None`` if no argument is a proxy, so nothing is being traced.

    Raises:
        TypeError: if the layer is itself the root of the trace.

    Example:
        >>> class Doubled(nn.Module):
        ...     def forward(self, x):
        ...         node = as_one_node(self, x)
        ...         return 2 * x if node is None else node
        >>> [node.op for node in fx.symbolic_trace(nn.Sequential(Doubled())).graph.nodes]
        ['placeholder', 'call_module', 'output']
    """
    proxy = next((value for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy)), None)
    if proxy is None:
        return None
    tracer: Any = proxy.tracer
    path = tracer.path_of_module(layer)
    if not path:
        raise TypeError(
            f"{type(layer).__name__} is one node of a traced network and cannot be traced by itself: trace the network "
            "around it, or nn.Sequential(layer)"
        )
    given = {name: value for name, value in kwargs.items() if value is not None}
    return tracer.create_proxy("call_module", path, args, given)
