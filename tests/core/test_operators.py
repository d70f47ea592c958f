"""The operators as PyTorch asks for them, with every kind of argument that a layer gives them."""

from typing import Any

import pytest
import torch
from sweep import CONFIGS
from torch import Tensor

from latentgnn import FrozenBatchNorm, LatentGNN, PackedLatentGNN
from latentgnn.core import autograd

INPUTS: dict[str, tuple[type[LatentGNN], tuple[int, ...], tuple[Tensor, ...]]] = {
    "map": (LatentGNN, (2, 16, 3, 5), ()),
    "masked": (LatentGNN, (2, 16, 3, 5), (torch.arange(30).view(2, 3, 5) % 4 > 0,)),
    "packed": (PackedLatentGNN, (15, 16), (torch.tensor([0, 6, 15]),)),
}


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def arguments_of(layer: LatentGNN, *given: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What `torch.ops.latentgnn.forward` is called with."""
    calls: list[tuple[Any, ...]] = []
    operator = torch.ops.latentgnn.forward
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.latentgnn, "forward", lambda *values: calls.append(values) or operator(*values))
        patch.setattr(autograd, "is_in_torch_dispatch_mode", lambda: True)
        layer(*given)
    (arguments,) = calls
    return arguments


@pytest.mark.filterwarnings("default")  # PyTorch's check warns of its own internals
@pytest.mark.parametrize("norm", [FrozenBatchNorm, "none"])
@pytest.mark.parametrize("config", ["groups_graph_conv", "groups_symmetric", "mean", "no_residual"])
@pytest.mark.parametrize("given", INPUTS)
def test_opcheck(given: str, config: str, norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that a layer does not have, as without a norm or a residual, are gaps in the operators' lists."""
    kind, shape, others = INPUTS[given]
    layer = kind(16, norm=norm, reduction=2, gamma_init=1.0, dtype=torch.float64, **CONFIGS[config])
    operator = torch.ops.latentgnn.forward
    x = torch.randn(shape, dtype=torch.float64)
    x, mask, offsets, tensors, present, *plan = arguments_of(layer, x, *others, monkeypatch=monkeypatch)
    tensors = [leaf(tensor) for tensor in tensors]
    torch.library.opcheck(operator.default, (leaf(x), mask, offsets, tensors, present, *plan))
    with torch.no_grad():
        output, sums, weights = operator(x, mask, offsets, tensors, present, *plan)
    for needs_x in (True, False):
        needs = [index % 2 == int(needs_x) or needs_x for index in range(len(tensors))]
        arguments = (torch.randn_like(output), x, mask, offsets, tensors, present, sums, weights, needs_x, needs, *plan)
        # Without AOT autograd's test, which differentiates: there are no second derivatives.
        torch.library.opcheck(
            torch.ops.latentgnn.backward.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.filterwarnings("default")
def test_gradients_of_transposed_matrices_lie_as_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers count on the strides that the operator tells them."""
    layer = LatentGNN(16, num_latents=3, norm=FrozenBatchNorm, reduction=2)
    for part in layer.arrangement().projections:
        part.weight.data = part.weight.data.T.contiguous().T
    x, mask, offsets, given, present, *plan = arguments_of(layer, torch.randn(2, 16, 9), monkeypatch=monkeypatch)
    tensors = [leaf(tensor) for tensor in given]
    with torch.no_grad():
        output, sums, weights = torch.ops.latentgnn.forward(x, mask, offsets, tensors, present, *plan)
    needs = [tensor.dim() == 2 for tensor in tensors]
    arguments = (torch.randn_like(output), x, mask, offsets, tensors, present, sums, weights, True, needs, *plan)
    torch.library.opcheck(torch.ops.latentgnn.backward.default, arguments, test_utils="test_faketensor")
