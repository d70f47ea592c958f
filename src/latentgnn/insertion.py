"""Insert LatentGNN blocks into any network, and remove them again."""

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latentgnn.attachment import CHILD, Way, attach, detach, holds_block, scene_positions, scenes_of_call
from latentgnn.layer import LatentGNN
from latentgnn.points import PackedLatentGNN
from latentgnn.trial_run import TrialRun

BlockOptions = int | Sequence[int] | Mapping[str, Any]
"""The number of latents, one per kernel, or any options of `LatentGNN`."""

_OPTIONS = tuple(name for name in inspect.signature(LatentGNN).parameters if name != "channels")
_CLOSED = {
    "torch.jit": "is scripted or traced by torch.jit, and cannot be extended: insert into the network that it was made "
    "from, and use torch.compile or torch.export instead",
    "torch._dynamo": "is compiled: insert into the network that it was made from, and compile that afterwards",
    "torch.nn.parallel": "is wrapped for several devices: insert into its .module, and wrap that afterwards",
    "torch.distributed.fsdp": "is sharded: insert before sharding",
}
"""Modules that cannot take a block, by the package of their class, and what to do instead."""


def insert(
    model: nn.Module,
    blocks: str | Iterable[str] | Mapping[str, BlockOptions],
    *,
    example_input: Any = None,
    **defaults: Any,
) -> tuple[str, ...]:
    """Add a `LatentGNN` after submodules of a network, in place.

    Each block becomes the child ``latentgnn`` of its submodule and runs once per forward pass, on the submodule's
    output. After a submodule of a point network, whose output is packed points (T, C), it is a `PackedLatentGNN`; the
    network must call that submodule with ``offsets`` or ``batch``, which assign points to scenes. The network's own
    state-dict keys do not change: load pretrained weights before inserting, or afterwards with ``strict=False``. To
    load the weights of a network that has blocks, build it, insert the same blocks, and load. Insert before wrapping
    the network in ``torch.compile`` or DistributedDataParallel.

    Channel counts are taken from one forward pass of a copy without data and without the network's hooks, so the
    network itself is neither run nor changed. Everything is checked before the first block is added.

    Args:
        model: the network.
        blocks: the submodules' names, as in ``model.named_modules()``: one name, several, or a mapping from each to the
            options of its block. An int or a sequence of ints stands for ``num_latents``.
        example_input: what the network takes, one tensor or a tuple of arguments; by default an image (a sequence, a
            volume) with as many channels as the first convolution takes.
        defaults: options of every block; those in ``blocks`` take precedence.

    Returns:
        The names of the new parameters, as in ``model.named_parameters()``.

    Raises:
        ValueError: if there is no such submodule (similar names are given), a block is there already, the submodule
            does not run exactly once per forward pass, returns a map of a single node or has no place for a block, or
            the block's options do not fit.
        TypeError: for an argument of the wrong kind, an unknown option, a network that is scripted, compiled or wrapped
            or does not run, or a submodule whose output is neither a tensor (B, C, *spatial) nor packed points.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU())
        >>> insert(net, {"1": 16}, norm=nn.BatchNorm1d)[-1].startswith("1.latentgnn.")
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    options = _read_blocks(blocks, defaults)
    hosts = {name: _find_host(model, name) for name in options}
    if len({id(host) for host in hosts.values()}) < len(hosts):
        raise ValueError(
            f"{', '.join(map(repr, hosts))}: several of these names are one submodule, shared; name it once"
        )
    if not hosts:
        return ()
    trial = TrialRun(model, hosts, example_input)
    built = {
        name: _build(name, _output_of(name, model, host, trial), model, host, options[name])
        for name, host in hosts.items()
    }
    ways = {name: _way_of(name, host, trial) for name, host in hosts.items()}
    for name, host in hosts.items():
        attach(host, built[name], ways[name])
    new = {id(parameter) for block in built.values() for parameter in block.parameters()}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in new)


def remove(model: nn.Module, names: str | Iterable[str] | None = None) -> None:
    """Remove what `insert` added; the network is then as before.

    Args:
        model: the network.
        names: submodules whose blocks are removed; by default all.

    Raises:
        ValueError: if there is no block after a named submodule.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(names, Iterable | None):
        raise TypeError(f"names must be a submodule's name or several, got {names!r:.80} ({type(names).__name__})")
    hosts = {name: module for name, module in model.named_modules() if holds_block(module)}
    wanted = tuple(hosts) if names is None else (names,) if isinstance(names, str) else tuple(names)
    for name in wanted:
        if name not in hosts:
            raise ValueError(f"no block after {name!r}; there are blocks after {', '.join(map(repr, hosts)) or 'none'}")
    for name in dict.fromkeys(wanted):
        detach(hosts[name])


def _read_blocks(
    blocks: str | Iterable[str] | Mapping[str, BlockOptions], defaults: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Each block's options, in any of the accepted forms."""
    if isinstance(blocks, str):
        blocks = {blocks: {}}
    elif not isinstance(blocks, Mapping):
        if not isinstance(blocks, Iterable) or isinstance(blocks, nn.Module | Tensor | bytes):
            raise TypeError(
                "blocks must be names of submodules, or a mapping from names to options such as {'layer3': 64}; got "
                f"{type(blocks).__name__}"
            )
        names = list(blocks)
        _check_names(names)
        if len(set(names)) < len(names):
            raise ValueError(f"blocks names a submodule twice: {', '.join(map(repr, names))}; name each once")
        blocks = {name: {} for name in names}
    _check_names(blocks)
    return {name: _read_options(name, given, defaults) for name, given in blocks.items()}


def _check_names(names: Iterable[Any]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"blocks must name submodules by strings, as in model.named_modules(); got {name!r:.80} "
                f"({type(name).__name__})"
            )


def _read_options(name: str, given: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(given, Mapping):
        options = {**defaults, **given}
    elif isinstance(given, int | list | tuple) and not isinstance(given, bool):
        options = {**defaults, "num_latents": given}
    else:
        raise TypeError(
            f"the block after {name!r} must be given as a number of latents (64), one number a kernel ([64, 32]) or a "
            f"mapping of options (dict(num_latents=64, symmetric=True)); got {given!r:.80} ({type(given).__name__})"
        )
    for option in options:
        if option == "channels":
            raise TypeError(f"block after {name!r}: the channels are read off the network; leave 'channels' out")
        if option not in _OPTIONS:
            near = difflib.get_close_matches(str(option), _OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_OPTIONS)}"
            raise TypeError(f"block after {name!r}: unknown option {option!r}; {hint}")
    if "num_latents" not in options:
        raise TypeError(
            f"block after {name!r}: num_latents is missing; write {{{name!r}: 64}}, or num_latents=64 for all blocks"
        )
    return options


def _find_host(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if path == "" or name == path or name.startswith(f"{path}."):
            _check_open(path, module)
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=5, cutoff=0.4) or [n for n, _ in model.named_children()]
        raise ValueError(
            f"no submodule {name!r} in {type(model).__name__}; nearest: {', '.join(map(repr, near)) or 'none'}"
        )
    for path, module in modules.items():
        block = f"{path}.{CHILD}" if path else CHILD
        if holds_block(module) and (name == block or name.startswith(f"{block}.")):
            raise ValueError(f"{name!r} is part of the block after {path!r}; name a submodule of the network itself")
    if hasattr(modules[name], CHILD):
        raise ValueError(f"{name!r} has a {CHILD!r} already; take it out first with remove(model, {name!r})")
    return modules[name]


def _check_open(path: str, module: nn.Module) -> None:
    """Refuse modules with fixed content, in which a block would not run or not be trained."""
    what = f"{path!r} ({type(module).__name__})" if path else f"the network ({type(module).__name__})"
    for package, reason in _CLOSED.items():
        if any(f"{base.__module__}.".startswith(f"{package}.") for base in type(module).__mro__):
            raise TypeError(f"{what} {reason}")
    if module._compiled_call_impl is not None:
        raise TypeError(f"{what} is compiled by its compile(): insert before compiling")


def _output_of(name: str, model: nn.Module, host: nn.Module, trial: TrialRun) -> Tensor:
    """A submodule's only output, if a block can follow it."""
    calls = trial.calls.get(name, [])
    if len(calls) != 1:
        times = f"is called {len(calls)} times" if calls else "is never called"
        raise ValueError(f"{name!r} {times} in a forward pass; a block needs a submodule that is called once")
    (call,) = calls
    output = call.output
    if not isinstance(output, Tensor):
        raise TypeError(f"{name!r} gives a {type(output).__name__}; a block needs one tensor (B, C, *spatial)")
    shape = tuple(output.shape)
    has_scenes = (
        output.ndim == 2
        and output.is_floating_point()
        and scenes_of_call(call.args, call.kwargs, scene_positions(host))
    )
    if not (_is_map(host, output) or has_scenes):
        raise TypeError(
            f"{name!r} gives {output.dtype} of shape {shape}; a block needs floating point (B, C, *spatial), with the "
            "channels on the second axis and one to three spatial dimensions, or packed points (T, C) of a submodule "
            "that the network calls with offsets= or batch=, by name or by position"
        )
    if output.ndim > 2 and output.shape[2:].numel() == 1:
        larger = ", ".join(f"{place!r} {size}" for place, size in _larger_maps(name, model, trial).items())
        inputs = ", ".join(str(tuple(arg.shape)) for arg in trial.args if isinstance(arg, Tensor))
        raise ValueError(
            f"{name!r} gives a map of one node, {shape}, for an input of {inputs}; a single node has no others to "
            f"exchange context with. Name a submodule with a larger map{f', as {larger}' if larger else ''}; or, if "
            "your inputs are larger, pass one as example_input"
        )
    return output


def _larger_maps(name: str, model: nn.Module, trial: TrialRun) -> dict[str, tuple[int, ...]]:
    """The last places before a submodule, at most as deep in the network, that a block could follow."""
    larger: dict[str, tuple[int, ...]] = {}
    for place, calls in trial.calls.items():
        if place == name:
            break
        output = calls[0].output
        if len(calls) > 1 or place.count(".") > name.count(".") or not isinstance(output, Tensor):
            continue
        if _is_map(model.get_submodule(place), output) and output.shape[2:].numel() > 1:
            larger[place] = tuple(output.shape)
    return dict(list(larger.items())[-3:])


def _way_of(name: str, host: nn.Module, trial: TrialRun) -> Way:
    way = trial.way_of(name)
    if way is not None and way != "child" and not name:
        raise ValueError(
            f"the network itself ({type(host).__name__}) would run a block in a forward hook, which torch.fx leaves "
            "out of the network that it traces; name its last submodule, or insert into nn.Sequential(network) after "
            "'0'"
        )
    if way is not None:
        return way
    children = [f"{name}.{child}" if name else child for child, _ in host.named_children()]
    inside = f"one of its children ({', '.join(map(repr, children[-3:]))}), " if children else ""
    raise ValueError(
        f"{name!r} ({type(host).__name__}) has no place for a block: neither as its last child nor applied to its "
        "output would one run exactly once, as in modules that loop over their children by themselves. Name "
        f"{inside}the submodule that follows it, or call a LatentGNN in its forward"
    )


def _is_map(host: nn.Module, output: Tensor) -> bool:
    fits = 3 <= output.ndim <= 5 and output.is_floating_point()
    return fits and not _is_channels_last(host, tuple(output.shape))


def _is_channels_last(host: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether the last layer's width is on the last axis and not on the second: tokens, or (B, H, W, C)."""
    for layer in reversed(list(host.modules())):
        width = None
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if layer.weight.ndim == len(shape):
                return False
            width = layer.out_channels
        elif isinstance(layer, nn.Linear):
            width = layer.out_features
        elif isinstance(layer, nn.LayerNorm):
            width = layer.normalized_shape[-1]
        if width is not None:
            return shape[-1] == width != shape[1]
    return False


def _build(name: str, output: Tensor, model: nn.Module, host: nn.Module, options: dict[str, Any]) -> LatentGNN:
    channels = output.shape[1]
    kind = PackedLatentGNN if output.ndim == 2 else LatentGNN
    tensors = (*host.parameters(), *host.buffers(), *model.parameters())
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    try:
        block = kind(channels, **{"device": like.device, "dtype": like.dtype, **options})
    except (TypeError, ValueError) as error:
        raise type(error)(f"block after {name!r}, which gives {channels} channels: {error}") from error
    return block.train(host.training)
