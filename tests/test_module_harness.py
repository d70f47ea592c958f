"""The layer under PyTorch's own harness for modules, `torch.testing._internal.common_modules`."""

# ruff: noqa: PT009  (its `assertEqual` compares tensors)

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("expecttest", reason="PyTorch's test harness needs it")

import torch
from torch import Tensor
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_modules import FunctionInput, ModuleInfo, ModuleInput, modules
from torch.testing._internal.common_utils import TestCase, freeze_rng_state, make_tensor

from latentgnn import LatentGNN, PackedLatentGNN, reference


def _inputs(
    info: ModuleInfo, device: str, dtype: torch.dtype, requires_grad: bool, training: bool, **_: Any
) -> Iterator[ModuleInput]:
    def made(*shape: int) -> Tensor:
        return make_tensor(shape, device=device, dtype=dtype, requires_grad=requires_grad)

    for options in (
        {},
        {"norm": "group_norm", "graph_conv": True},
        {"norm": "layer_norm", "symmetric": True},
        {"norm": "frozen_batch_norm", "num_groups": 2},
        {"norm": "none", "node_scale": "mean", "residual": False},
    ):
        constructor = FunctionInput(16, num_latents=(3, 2), reduction=4, gamma_init=0.5, **options)
        if info.module_cls is PackedLatentGNN:
            packed = FunctionInput(made(9, 16), torch.tensor([0, 4, 9], device=device))
            for given in (packed, FunctionInput(made(2, 5, 16))):
                yield ModuleInput(constructor_input=constructor, forward_input=given, desc=str(options))
        else:
            yield ModuleInput(
                constructor_input=constructor,
                forward_input=FunctionInput(made(2, 16, 3, 4)),
                desc=str(options),
                reference_fn=lambda layer, parameters, x: reference.forward(copy.deepcopy(layer), x),
            )


LAYERS = [
    ModuleInfo(kind, module_inputs_func=_inputs, train_and_eval_differ=True, supports_gradgrad=False)
    for kind in (LatentGNN, PackedLatentGNN)
]
EXACT = (torch.float64,)


def _each(
    info: ModuleInfo, device: str, dtype: torch.dtype, training: bool, *, requires_grad: bool = False
) -> Iterator[tuple[ModuleInput, torch.nn.Module]]:
    for given in info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=requires_grad, training=training
    ):
        with freeze_rng_state():
            torch.manual_seed(0)
            arguments = given.constructor_input
            yield given, info.module_cls(*arguments.args, **arguments.kwargs).to(device, dtype).train(training)


def _call(module: torch.nn.Module, given: ModuleInput) -> Tensor:
    return module(*given.forward_input.args, **given.forward_input.kwargs)


class TestLayers(TestCase):
    @modules(LAYERS)
    def test_forward(self, device: str, dtype: torch.dtype, module_info: ModuleInfo, training: bool) -> None:
        for given, module in _each(module_info, device, dtype, training):
            expected = None
            if given.reference_fn is not None:
                expected = given.reference_fn(module, *given.forward_input.args)
            output = _call(module, given)
            self.assertEqual(output.shape, given.forward_input.args[0].shape)
            if expected is not None:
                self.assertEqual(output, expected, rtol=1e-4, atol=1e-4)

    @modules(LAYERS)
    def test_factory_arguments(self, device: str, dtype: torch.dtype, module_info: ModuleInfo, training: bool) -> None:
        for given, _ in _each(module_info, device, dtype, training):
            arguments = given.constructor_input
            for place in (device, "meta"):
                module = module_info.module_cls(*arguments.args, **arguments.kwargs, device=place, dtype=dtype)
                state = [*module.parameters(), *module.buffers()]
                assert {value.device.type for value in state} == {torch.device(place).type}
                assert {value.dtype for value in state if value.is_floating_point()} == {dtype}

    @modules(LAYERS, allowed_dtypes=EXACT)
    def test_repr_and_pickle(self, device: str, dtype: torch.dtype, module_info: ModuleInfo, training: bool) -> None:
        for given, module in _each(module_info, device, dtype, training):
            assert str(module).startswith(module_info.module_cls.__name__)
            file = io.BytesIO()
            torch.save(module, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
            self.assertEqual(_call(twin, given), _call(module, given))

    @modules(LAYERS, allowed_dtypes=EXACT)
    def test_state_dict_of_another_device(
        self, device: str, dtype: torch.dtype, module_info: ModuleInfo, training: bool
    ) -> None:
        for given, module in _each(module_info, device, dtype, training):
            arguments = given.constructor_input
            twin = module_info.module_cls(*arguments.args, **arguments.kwargs, device="meta", dtype=dtype)
            twin.load_state_dict(module.state_dict(), assign=True)
            self.assertEqual(_call(twin.train(training), given), _call(module, given))

    @modules(LAYERS, allowed_dtypes=EXACT)
    def test_inputs_with_gaps(self, device: str, dtype: torch.dtype, module_info: ModuleInfo, training: bool) -> None:
        for given, module in _each(module_info, device, dtype, training, requires_grad=True):
            x, *others = given.forward_input.args
            sparse = torch.empty(*x.shape, 2, dtype=dtype, device=device)[..., 0].copy_(x).detach().requires_grad_()
            assert not sparse.is_contiguous()
            twin = copy.deepcopy(module)
            output, expected = twin(sparse, *others), module(x, *others)
            self.assertEqual(output, expected)
            output.sin().sum().backward()
            expected.sin().sum().backward()
            self.assertEqual(sparse.grad, x.grad)
            for ours, theirs in zip(twin.parameters(), module.parameters(), strict=True):
                self.assertEqual(ours.grad, theirs.grad)

    @modules(LAYERS, allowed_dtypes=EXACT)
    def test_gradients(self, device: str, dtype: torch.dtype, module_info: ModuleInfo, training: bool) -> None:
        for given, module in _each(module_info, device, dtype, training, requires_grad=True):
            for norm in module.modules():
                if isinstance(norm, torch.nn.BatchNorm1d):
                    norm.momentum = 0.0  # each call must be the same function
            x, *others = given.forward_input.args
            assert torch.autograd.gradcheck(
                lambda x, *_, module=module, others=others: module(x, *others), (x, *module.parameters()), atol=1e-6
            )

    @modules(LAYERS, allowed_dtypes=EXACT)
    def test_devices_and_types_change_the_tensors_and_not_the_module(
        self, device: str, dtype: torch.dtype, module_info: ModuleInfo, training: bool
    ) -> None:
        for _, module in _each(module_info, device, dtype, training):
            identities = [id(value) for value in module.parameters()]
            module.to(torch.float32).to(dtype)
            assert [id(value) for value in module.parameters()] == identities
            module.to_empty(device="meta").to_empty(device=device)
            assert {value.device.type for value in module.parameters()} == {torch.device(device).type}


instantiate_device_type_tests(TestLayers, globals(), only_for="cpu")
