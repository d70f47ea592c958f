"""Put LatentGNN blocks into any network, tell them which nodes are real, and take them out again."""

import copy
import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from latentgnn.layer import LatentGNN
from latentgnn.points import PackedLatentGNN

_CHILD = "latentgnn"
_SCENES = ("offsets", "batch")
_SIDES = {1: (1024, 256), 2: (224, 64, 32, 384, 512), 3: (64, 32, 128)}
_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_ADAPTIVE_POOL = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


def insert(
    model: nn.Module, blocks: Mapping[str, Mapping[str, Any]], *, example_input: Any = None, **defaults: Any
) -> tuple[str, ...]:
    """Add a `LatentGNN` after submodules of a network, in place.

    Each block becomes the child ``latentgnn`` of its submodule: the last child of an ``nn.Sequential``, otherwise a
    child that a forward hook applies to the submodule's output. After a submodule of a point network, whose output is
    packed points (T, C), it is a `PackedLatentGNN`; the network must call that submodule with ``offsets=`` or
    ``batch=``, which say what belongs to which scene. The network's own state-dict keys stay as they are:
    load pretrained weights before inserting, or afterwards with ``strict=False``. Insert before wrapping the network in
    ``torch.compile`` or DistributedDataParallel.

    The channel counts are read off one forward pass of a copy that holds no data, so the network itself is neither run
    nor changed. Everything is checked before the first block is added.

    Args:
        model: the network.
        blocks: for each submodule's name, as in ``model.named_modules()``, the options of its block.
        example_input: what the network takes, one tensor or a tuple of arguments; by default an image (a sequence, a
            volume) with as many channels as the first convolution takes.
        defaults: options of every block; those in ``blocks`` come first.

    Returns:
        The names of the new parameters, as in ``model.named_parameters()``.

    Raises:
        ValueError: no such submodule (the nearest names are given), a block is there already, the submodule does not
            run exactly once in a forward pass, or the block's options do not fit.
        TypeError: the submodule's output is neither a tensor (B, C, *spatial) nor packed points, or the network does
            not run.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU())
        >>> insert(net, {"1": dict(num_latents=16)}, norm=nn.BatchNorm1d)[-1].startswith("1.latentgnn.")
        True
    """
    hosts = {name: _find_host(model, name) for name in blocks}
    if len({id(host) for host in hosts.values()}) < len(hosts):
        raise ValueError(
            f"{', '.join(map(repr, hosts))}: several of these names are one submodule, shared; name it once"
        )
    outputs = _run_on_fakes(model, tuple(hosts), example_input) if hosts else {}
    built = {
        name: _build(name, _output_of(name, host, outputs[name]), model, host, {**defaults, **blocks[name]})
        for name, host in hosts.items()
    }
    for name, block in built.items():
        hosts[name].add_module(_CHILD, block)
        if not _runs_children_in_order(hosts[name]):
            # First among the hooks: feature extractors that collect outputs by hooks then see the block's output.
            apply = _apply_packed_block if isinstance(block, PackedLatentGNN) else _apply_block
            hosts[name].register_forward_hook(apply, prepend=True, with_kwargs=True)
    new = {id(parameter) for block in built.values() for parameter in block.parameters()}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in new)


def remove(model: nn.Module, names: str | Iterable[str] | None = None) -> None:
    """Take out what `insert` added; the network is then as before.

    Args:
        model: the network.
        names: submodules whose blocks go; all of them by default.

    Raises:
        ValueError: there is no block after a named submodule.
    """
    hosts = {name: module for name, module in model.named_modules() if _holds_block(module)}
    wanted = tuple(hosts) if names is None else (names,) if isinstance(names, str) else tuple(names)
    for name in wanted:
        if name not in hosts:
            raise ValueError(f"no block after {name!r}; there are blocks after {', '.join(map(repr, hosts)) or 'none'}")
    for name in wanted:
        delattr(hosts[name], _CHILD)
        # By the function and not by a handle: a handle does not survive a deep copy of the network.
        hooks = hosts[name]._forward_hooks
        for key in [key for key, hook in hooks.items() if hook in _APPLY]:
            del hooks[key]
            hosts[name]._forward_hooks_with_kwargs.pop(key, None)


@contextmanager
def node_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Tell every `LatentGNN` in a network which part of its input is real, for the time of a ``with`` block.

    Each layer gets the mask at the resolution of its own feature map. A node is valid if the cell of the image that it
    stands for holds a valid pixel: of an image that is valid up to row ``h``, a stride of ``s`` keeps ``ceil(h / s)``
    rows, which is what a strided convolution computes from them; and an image with a valid pixel keeps a valid node.

    Nothing stays behind: layers called with a mask of their own keep it, and the hooks are gone after the block. With
    activation checkpointing the backward pass belongs inside the block too, for it runs the layers again. Networks in
    ``torch.compile`` run uncompiled inside the block, and the block itself must not be compiled.

    Args:
        model: the network.
        mask: (B, *spatial) bool at the resolution of the network's input, True for valid.

    Raises:
        TypeError: the mask is not bool.
        ValueError: the mask does not fit a layer's input in batch size or number of spatial dimensions.

    Example:
        >>> net = LatentGNN(16, num_latents=4)
        >>> with node_mask(net, torch.ones(2, 64, 64, dtype=torch.bool)):
        ...     features = net(torch.randn(2, 16, 8, 8))
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"the mask must be bool, True for valid; got {mask.dtype}")
    hook = partial(_pass_mask, mask)
    # Packed points have no padding, and no place in an image.
    found = [layer for layer in model.modules() if isinstance(layer, LatentGNN)]
    layers = [layer for layer in found if not isinstance(layer, PackedLatentGNN)]
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        # Compiled code does not notice new hooks: it would leave the mask out, or keep an old one, and not say so.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_mask(
    mask: Tensor, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if len(args) > 1 or kwargs.get("mask") is not None:
        return None
    x = args[0] if args else kwargs["x"]
    if mask.ndim != x.ndim - 1 or mask.shape[0] != x.shape[0]:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not fit a layer's input of shape {tuple(x.shape)}: "
            f"expected (B, *spatial) with B = {x.shape[0]} and {x.ndim - 2} spatial dimensions"
        )
    return args, {**kwargs, "mask": _resize(mask, tuple(x.shape[2:]))}


def _resize(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """A mask whose nodes are valid where any pixel of their cell is."""
    full = tuple(mask.shape[1:])
    if full == size:
        return mask
    pixels = mask[:, None].float()
    strides = tuple(-(-many // few) for many, few in zip(full, size, strict=True))
    if all(-(-many // stride) == few for many, few, stride in zip(full, size, strides, strict=True)):
        nodes = _POOL[len(size)](pixels, strides, ceil_mode=True)
    else:  # no whole stride leads from the one to the other, as after convolutions without padding
        nodes = _ADAPTIVE_POOL[len(size)](pixels, size)
    return nodes[:, 0] > 0


def _apply_block(module: Any, args: Any, kwargs: Any, output: Tensor) -> Any:
    return module.latentgnn(output)


def _apply_packed_block(module: Any, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> Any:
    return module.latentgnn(output, **{name: kwargs[name] for name in _SCENES if name in kwargs})


_APPLY = (_apply_block, _apply_packed_block)


def _runs_children_in_order(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward


def _holds_block(module: nn.Module) -> bool:
    runs = _runs_children_in_order(module) or any(hook in _APPLY for hook in module._forward_hooks.values())
    return runs and isinstance(module._modules.get(_CHILD), LatentGNN)


def _find_host(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=5, cutoff=0.4) or [n for n, _ in model.named_children()]
        raise ValueError(f"no submodule {name!r} in {type(model).__name__}; nearest: {', '.join(map(repr, near))}")
    if hasattr(modules[name], _CHILD):
        raise ValueError(f"{name!r} has a {_CHILD!r} already; take it out first with remove(model, {name!r})")
    return modules[name]


class _Output(NamedTuple):
    """What a submodule gave, and whether it was told which of its rows belong to which scene."""

    value: Any
    has_scenes: bool


def _run_on_fakes(model: nn.Module, names: tuple[str, ...], example_input: Any) -> dict[str, list[_Output]]:
    """The outputs of submodules in one forward pass, on tensors that have a shape, a type and a device but no data."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, Any] = {id(t): mode.from_tensor(t) for t in (*model.parameters(), *model.buffers())}
    # A copy, for a forward pass may write to anything; its memo hands out the fakes, so no weights are copied.
    twin = copy.deepcopy(model, fakes).eval()
    # Blocks that are there already change no shape, but look into their scenes.
    remove(twin)
    outputs: dict[str, list[_Output]] = {name: [] for name in names}

    def record(name: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        outputs[name].append(_Output(output, any(kwargs.get(key) is not None for key in _SCENES)))

    for name in names:
        twin.get_submodule(name).register_forward_hook(partial(record, name), with_kwargs=True)
    failure: Exception | None = None
    for args in _example_inputs(model, mode, example_input):
        for calls in outputs.values():
            calls.clear()
        try:
            with torch.no_grad(), mode:
                twin(*args)
            return outputs
        except Exception as error:
            # What follows the named submodules need not run without data: a detector's heads, say, cannot.
            if all(outputs.values()):
                return outputs
            failure = error
    raise TypeError(
        f"{type(model).__name__} does not run on its default input, or on example_input: pass as example_input what it "
        f"takes, one tensor or a tuple of arguments ({type(failure).__name__}: {failure})"
    ) from failure


def _example_inputs(model: nn.Module, mode: FakeTensorMode, example_input: Any) -> Iterator[tuple[Any, ...]]:
    if example_input is not None:
        args = example_input if isinstance(example_input, tuple) else (example_input,)
        yield tree_map_only(Tensor, mode.from_tensor, args)
        return
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
    if conv is None:
        raise TypeError(f"{type(model).__name__} has no convolution that tells what it takes: pass example_input")
    dims = conv.weight.ndim - 2
    sizes = [(side,) * dims for side in _SIDES[dims]]
    # timm's networks say which size they are made for, and some of them take no other.
    published = getattr(model, "pretrained_cfg", None)
    if isinstance(published, Mapping) and len(published.get("input_size") or ()) == dims + 1:
        sizes.insert(0, tuple(published["input_size"][1:]))
    for size in sizes:
        with mode:
            x = torch.empty(1, conv.in_channels, *size, dtype=conv.weight.dtype, device=conv.weight.device)
        yield (x,)


def _output_of(name: str, host: nn.Module, outputs: list[_Output]) -> Tensor:
    """A submodule's only output, which a block can follow."""
    if len(outputs) != 1:
        times = f"{len(outputs)} times" if outputs else "never"
        raise ValueError(f"{name!r} is called {times} in a forward pass; a block needs a submodule that is called once")
    output, has_scenes = outputs[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"{name!r} gives a {type(output).__name__}; a block needs one tensor (B, C, *spatial)")
    shape = tuple(output.shape)
    is_map = 3 <= output.ndim <= 5 and not _is_channels_last(host, shape)
    if not output.is_floating_point() or not (is_map or (output.ndim == 2 and has_scenes)):
        raise TypeError(
            f"{name!r} gives {output.dtype} of shape {shape}; a block needs floating point (B, C, *spatial), with the "
            "channels on the second axis and one to three spatial dimensions, or packed points (T, C) of a submodule "
            "that the network calls with offsets= or batch="
        )
    return output


def _is_channels_last(host: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether the last layer's width is found on the last axis and not on the second: tokens, or (B, H, W, C)."""
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
