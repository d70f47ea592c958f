"""Runs a copy of a network once on tensors without data, to record inputs and outputs of its submodules."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from latentgnn.attachment import Way, detach, find_way, holds_block

_SIDES = {1: (1024, 256), 2: (224, 64, 32, 384, 512), 3: (64, 32, 128)}
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_HOOKS_OF_ALL = (
    "_global_forward_hooks",
    "_global_forward_hooks_with_kwargs",
    "_global_forward_hooks_always_called",
    "_global_forward_pre_hooks",
)
"""Where `torch.nn.modules.module` stores hooks for all modules, such as those of profilers."""


class Call(NamedTuple):
    """One call of a submodule."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


class TrialRun:
    """A forward pass of a network's copy, without its hooks and its existing blocks.

    The copy's tensors have a shape, a dtype and a device but no data; the network itself is neither run nor changed,
    and the user's hooks are not called.

    Args:
        model: the network.
        names: submodules that must be reached. Later ones may fail without data, as a detector's heads do.
        example_input: as in `latentgnn.insert`.

    Attributes:
        calls: the calls of every submodule, by its name in ``model.named_modules()``, in the order in which the
            submodules first finished.
        args: the network's inputs.

    Raises:
        TypeError: the network cannot be copied, or does not run; or a part of it is scripted or lazy.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], example_input: Any) -> None:
        _check_runs_without_data(model)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._twin = _copy_without_data(model, self._mode)
        self.calls: dict[str, list[Call]] = {}
        self.args: tuple[Any, ...] = ()
        hosts = {name: self._twin.get_submodule(name) for name in names}
        recorders = [
            module.register_forward_hook(partial(self._record, name), with_kwargs=True)
            for name, module in (dict(self._twin.named_modules()) | hosts).items()
        ]
        failure: Exception | None = None
        for args in _example_inputs(model, self._mode, example_input):
            self.args = args
            self.calls.clear()
            try:
                with torch.no_grad(), self._mode, _without_hooks_of_all():
                    self._twin(*args)
                break
            except Exception as error:
                if all(name in self.calls for name in hosts):
                    break
                failure = error
        else:
            raise TypeError(
                f"{type(model).__name__} does not run on its default input, or on example_input: pass as example_input "
                f"what it takes, one tensor or a tuple of arguments ({type(failure).__name__}: {failure})"
            ) from failure
        for recorder in recorders:
            recorder.remove()

    def _record(self, name: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        self.calls.setdefault(name, []).append(Call(args, kwargs, output))

    def way_of(self, name: str) -> Way | None:
        """Return how a block can be attached to a submodule that was called: see `latentgnn.attachment.find_way`."""
        call = self.calls[name][0]
        with torch.no_grad(), self._mode, _without_hooks_of_all():
            return find_way(self._twin.get_submodule(name), call.args, call.kwargs)


@contextmanager
def _without_hooks_of_all() -> Iterator[None]:
    """Temporarily remove the hooks that are registered for all modules of the process."""
    stores = [getattr(torch.nn.modules.module, name) for name in _HOOKS_OF_ALL]
    kept = [dict(store) for store in stores]
    for store in stores:
        store.clear()
    try:
        yield
    finally:
        for store, hooks in zip(stores, kept, strict=True):
            store.update(hooks)


def _check_runs_without_data(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"its submodule {name!r}" if name else "it"
            raise TypeError(f"the network cannot be tried out: {what} is scripted; insert before scripting")
    lazy = next((name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)), None)
    if lazy is not None:
        raise TypeError(f"{lazy!r} has no size yet, as lazy modules before a first call; run the network once before")


def _copy_without_data(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    # The memo maps tensors to fake ones, so that no weights are copied, and dictionaries of hooks to new ones.
    memo: dict[int, Any] = {id(t): mode.from_tensor(t) for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        for name, value in vars(module).items():
            if name in _HOOKS:
                memo[id(value)] = OrderedDict()
            elif isinstance(value, Tensor):
                # Tensors computed by operations, which pruning stores as plain attributes, cannot be deep-copied.
                memo[id(value)] = mode.from_tensor(value.detach())
    try:
        twin = copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise TypeError(
            f"{type(model).__name__} cannot be copied, which finding the channels needs: put LatentGNN layers into it "
            f"by hand ({type(error).__name__}: {error})"
        ) from error
    # Existing blocks do not change shapes, but read scene offsets, which have no data.
    for host in list(twin.modules()):
        if holds_block(host):
            detach(host)
    return twin


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
    # timm's networks record their intended input size, and some of them accept no other.
    published = getattr(model, "pretrained_cfg", None)
    if isinstance(published, Mapping) and len(published.get("input_size") or ()) == dims + 1:
        sizes.insert(0, tuple(published["input_size"][1:]))
    for size in sizes:
        with mode:
            x = torch.empty(1, conv.in_channels, *size, dtype=conv.weight.dtype, device=conv.weight.device)
        yield (x,)
