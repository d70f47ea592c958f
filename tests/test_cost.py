"""The arithmetic of costs against PyTorch's counter and against what is really held."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import held_bytes
from latentgnn import FrozenBatchNorm, LatentGNN, LatentGNNConfig
from latentgnn.cli import main
from latentgnn.core import autograd
from latentgnn.cost import cost, non_local_cost, table
from latentgnn.paths import memory


@pytest.mark.parametrize(
    ("symmetric", "graph_conv", "num_groups", "num_latents"),
    list(itertools.product([False, True], [False, True], [1, 2], [(5,), (5, 3)])),
)
def test_operations_are_those_that_pytorch_counts(
    symmetric: bool, graph_conv: bool, num_groups: int, num_latents: tuple[int, ...]
) -> None:
    layer = LatentGNN(
        32,
        num_latents=num_latents,
        reduction=4,
        symmetric=symmetric,
        graph_conv=graph_conv,
        num_groups=num_groups,
        norm=FrozenBatchNorm,
    )
    x = torch.randn(2, 32, 31, dtype=torch.float64)
    layer.double()
    for choice in ("hold", "recompute"):
        counted = cost(layer.config, (2, 32, 31), held=choice == "hold")
        given = x.clone().requires_grad_()
        with memory(choice), FlopCounterMode(display=False) as counter, _eager():
            output = layer(given)
        assert counted.forward_operations == counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            output.backward(x)
        assert counted.backward_operations == counter.get_total_flops()


@contextmanager
def _eager() -> Iterator[None]:
    """Under a dispatch mode the layer is an operator; here the counter is to see what is inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "is_in_torch_dispatch_mode", lambda: False)
        yield


def test_the_counter_sees_the_operators() -> None:
    layer = LatentGNN(32, num_latents=(5, 3), reduction=4, graph_conv=True, norm=FrozenBatchNorm, gamma_init=1.0)
    x = torch.randn(2, 32, 6, 7, requires_grad=True)
    expected = cost(layer.config, x.shape)
    with FlopCounterMode(display=False) as counter:
        output = layer(x)
    assert counter.get_total_flops() == expected.forward_operations
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() >= expected.backward_operations


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, FrozenBatchNorm, nn.LayerNorm, nn.Identity])
@pytest.mark.parametrize("arguments", [{}, {"symmetric": True, "num_groups": 2}, {"graph_conv": True}])
def test_parameters(norm: type[nn.Module], arguments: dict[str, object]) -> None:
    layer = LatentGNN(64, num_latents=(6, 4), norm=norm, **arguments)
    assert cost(layer.config, (1, 64, 5)).parameters == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("graph_conv", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_held_bytes_are_those_that_autograd_keeps(graph_conv: bool, symmetric: bool, training: bool) -> None:
    layer = LatentGNN(128, num_latents=20, graph_conv=graph_conv, symmetric=symmetric).train(training)
    x = torch.randn(2, 128, 60, 60, requires_grad=True)
    held = held_bytes(layer, x, layer)
    expected = cost(layer.config, x.shape, norm="batch" if training else "affine").held_bytes
    assert held == pytest.approx(expected, rel=0.05)


def test_a_non_local_block_costs_what_timms_does() -> None:
    from timm.layers import NonLocalAttn

    block = NonLocalAttn(64, rd_ratio=0.5, rd_divisor=1)
    found = non_local_cost(64, (2, 64, 20, 20))
    biases = sum(p.numel() for name, p in block.named_parameters() if name.endswith(".bias") and "norm" not in name)
    assert found.parameters == sum(p.numel() for p in block.parameters()) - biases
    x: Tensor = torch.randn(2, 64, 20, 20)
    with FlopCounterMode(display=False) as counter:
        block(x)
    assert found.forward_operations == counter.get_total_flops()


def test_a_wrong_shape_is_told() -> None:
    config = LatentGNNConfig(channels=16, num_latents=4)
    with pytest.raises(ValueError, match=r"expected a shape \(S, 16, \*spatial\), got \(2, 8, 5\)"):
        cost(config, (2, 8, 5))
    assert "non-local" in table(config, (1, 16, 8, 8))


def test_the_cost_command_counts_the_layers_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["cost", "--channels", "64", "--size", "10x12", "--latents", "8,4", "--graph-conv"]
    assert main(argv) == 0
    layer = LatentGNN(64, num_latents=(8, 4), graph_conv=True)
    shown = capsys.readouterr().out
    assert f"{sum(parameter.numel() for parameter in layer.parameters()):,}" in shown
    # What is not counted with batch statistics is not shown for them.
    (operations,) = [line for line in shown.splitlines() if line.startswith("forward operations")]
    assert operations.split().count("-") == 1
    assert main(["cost", "--channels", "60", "--size", "10", "--latents", "8"]) == 2
    assert "divisible" in capsys.readouterr().err
    assert main(["cost", "--channels", "64", "--size", "10x0", "--latents", "8"]) == 2
    assert "expected numbers from 1 on" in capsys.readouterr().err
