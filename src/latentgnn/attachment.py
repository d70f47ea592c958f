"""Attaches a block to the submodule that it follows (its host), so that it runs once, on the host's output.

A block is always the host's child ``latentgnn``. What runs it depends on the host: a host that runs its children in
sequence runs the block as the last of them; for any other host a forward hook does. A container with its own loop over
children, such as DenseNet's dense blocks, would also run the block as one more child; its loop is prevented from seeing
it.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from latentgnn.points import PackedLatentGNN

CHILD = "latentgnn"
SCENES = ("offsets", "batch")
"""The arguments that say which packed points belong to which scene."""

Way = Literal["child", "hook", "hidden"]
"""What runs a block: the host, as its last child; a forward hook; or a forward hook, with the block hidden from the
host's own loops."""

_WAY = "_attached_by"


def attach(host: nn.Module, block: nn.Module, way: Way) -> None:
    """Attach a block so that a host runs it last.

    Args:
        host: a module without a block.
        block: receives the host's output; for packed points, also their scenes.
        way: result of `find_way`.
    """
    host.add_module(CHILD, block)
    setattr(block, _WAY, way)
    if way == "hidden":
        host.__class__ = _hiding(cast(Any, type(host)))
    if way != "child":
        # First of the hooks, so that feature extractors that use hooks see the block's output.
        hook = partial(_apply, positions=scene_positions(host))
        host.register_forward_hook(hook, prepend=True, with_kwargs=True)


def detach(host: nn.Module) -> None:
    """Undo `attach`."""
    block = host._modules[CHILD]
    if getattr(block, _WAY) == "hidden":
        host.__class__ = cast(Any, type(host)).host_class
    delattr(host, CHILD)
    delattr(block, _WAY)
    # Found by function, because a handle does not survive a deep copy of the network.
    for key in [key for key, hook in host._forward_hooks.items() if getattr(hook, "func", None) is _apply]:
        del host._forward_hooks[key]
        host._forward_hooks_with_kwargs.pop(key, None)


def holds_block(module: nn.Module) -> bool:
    """Whether `attach` put a block there; a user's own layer of the same name does not count."""
    return hasattr(getattr(module, CHILD, None), _WAY)


def find_way(host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Way | None:
    """Try the ways on a host; return the first one in which a block runs once and its output becomes the host's.

    Args:
        host: a copy that may be run; it is unchanged afterwards.
        args: positional arguments of its call.
        kwargs: keyword arguments of its call.

    Returns:
        The way, or ``None`` if there is none.
    """
    with _Operations() as alone:
        host(*args, **kwargs)
    for way in get_args(Way):
        if way == "hidden" and not isinstance(host, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            continue
        with _Operations() as operations:
            block = _StandIn(operations)
            attach(host, block, way)
            try:
                output = host(*args, **kwargs)
            except Exception:  # A loop that hands its children something else than a tensor fails on the block.
                continue
            finally:
                detach(host)
        # A host's own loop may treat its last child in another way, which is then the block.
        if block.calls == 1 and output is block.output and block.before == alone.names:
            return way
    return None


def scene_positions(host: nn.Module) -> dict[str, int]:
    """Return the positions of ``offsets`` and ``batch`` in a host's ``forward``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(host.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    return {name: names.index(name) for name in SCENES if name in names}


def scenes_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any], positions: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the argument of a host's call that assigns points to scenes, by name; empty without one."""
    for name in SCENES:
        position = positions.get(name, len(args))
        value = args[position] if position < len(args) else kwargs.get(name)
        if isinstance(value, Tensor | fx.Proxy):
            return {name: cast(Tensor, value)}
    return {}


def _apply(module: Any, args: Any, kwargs: Mapping[str, Any], output: Tensor, *, positions: Mapping[str, int]) -> Any:
    # Maps have no scenes: an argument with that name means something else to their host.
    packed = isinstance(module.latentgnn, PackedLatentGNN)
    return module.latentgnn(output, **(scenes_of_call(args, kwargs, positions) if packed else {}))


class _Operations(TorchDispatchMode):
    """Notes PyTorch's operations in their order, each with the shapes of its results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(f"{func} {tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), result)}")
        return result


class _StandIn(nn.Module):
    """Takes a block's place in a trial: counts its calls, and keeps the operations before the last one."""

    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self.calls = 0
        self.output: Any = None
        self.before: list[str] = []
        self._operations = operations

    def forward(self, x: Any) -> Any:
        self.calls += 1
        self.before = list(self._operations.names)
        # A new tensor, so that the host's output can be distinguished from the block's input.
        self.output = torch.empty_like(x)
        return self.output


class _HidesBlock:
    """Mixed into a container's class: loops over the container skip the block.

    The block is still a normal submodule for parameters, state dicts, devices and modes.
    """

    host_class: Any
    _modules: dict[str, nn.Module]

    def _others(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self._modules.items() if name != CHILD}

    def __len__(self) -> int:
        return len(self._others())

    def __iter__(self) -> Iterator[Any]:
        others = self._others()
        return iter(others) if isinstance(self, nn.ModuleDict) else iter(others.values())

    def keys(self) -> Any:
        return self._others().keys()

    def values(self) -> Any:
        return self._others().values()

    def items(self) -> Any:
        return self._others().items()

    def __repr__(self) -> str:
        # ModuleList's own __repr__ uses its loop.
        return nn.Module.__repr__(cast(nn.Module, self))

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
        # Pickle finds classes by name, and this class has its host's name.
        return _new_hiding, (self.host_class,), self.__getstate__()


@cache
def _hiding(host_class: Any) -> Any:
    names = {"__module__": host_class.__module__, "__qualname__": host_class.__qualname__, "host_class": host_class}
    return type(host_class.__name__, (_HidesBlock, host_class), names)


def _new_hiding(host_class: Any) -> Any:
    hiding = _hiding(host_class)
    return hiding.__new__(hiding)
