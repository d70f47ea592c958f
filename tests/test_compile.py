import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep import NORMS, make_layer, relative_error
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latentgnn import FrozenBatchNorm, LatentGNN, PackedLatentGNN, reference
from latentgnn.norms import group_norm


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.filterwarnings("default")  # PyTorch's compiler warns of its own internals, differently in each release
@pytest.mark.parametrize("config", ["graph_conv_two_kernels", "symmetric", "groups"])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph_and_recompiles_at_most_once(config: str, training: bool) -> None:
    layer = make_layer(config, training=training).float()
    compiled_graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compiled_graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for batch, height, width in [(2, 6, 8), (3, 7, 9), (3, 10, 4), (4, 12, 12), (5, 3, 31)]:
        x = torch.randn(batch, 32, height, width)
        twin = make_layer(config, training=training).float()
        twin.load_state_dict(layer.state_dict())
        assert relative_error(compiled(x), reference.forward(twin, x)) < 2e-5
    assert len(compiled_graphs) <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_inductor_gives_the_same_outputs_and_gradients() -> None:
    layer = make_layer("graph_conv", training=True).float()
    x = torch.randn(2, 32, 8, 8, requires_grad=True)
    twin = make_layer("graph_conv", training=True).float()
    output, expected = torch.compile(layer, fullgraph=True)(x), reference.forward(twin, x)
    assert relative_error(output, expected) < 2e-5
    found = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])
    wanted = torch.autograd.grad(expected.square().sum(), [x, *twin.parameters()])
    for gradient, expected_gradient in zip(found, wanted, strict=True):
        assert relative_error(gradient, expected_gradient) < 1e-4


@pytest.mark.filterwarnings("default")
def test_compiled_packed_points_keep_every_scene() -> None:
    """Offsets are read only when the operator runs; what would leave points out is an error."""
    layer = PackedLatentGNN(16, num_latents=3, norm=FrozenBatchNorm, gamma_init=0.5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(50, 16)
    expected = layer(x, torch.tensor([0, 20, 50]))
    for offsets in ([0, 20, 50], [20, 50]):
        assert relative_error(compiled(x, torch.tensor(offsets)), expected) < 1e-6
    for offsets in ([0, 20, 40], [0, 60, 50]):
        with pytest.raises(ValueError, match="offsets must rise"):
            compiled(x, torch.tensor(offsets))


def test_compiles_with_a_mask() -> None:
    layer = make_layer("graph_conv").float()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 32, 5, 6)
    mask = torch.rand(2, 5, 6) > 0.4
    assert relative_error(compiled(x, mask), layer(x, mask)) < 1e-6


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("config", ["graph_conv", "symmetric", "groups_graph_conv"])
def test_exports_with_dynamic_batch_and_size(config: str) -> None:
    layer = make_layer(config).float()
    network = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), layer).eval()
    dim = torch.export.Dim
    exported = torch.export.export(
        network,
        (torch.randn(2, 3, 8, 10),),
        dynamic_shapes=({0: dim("batch"), 2: dim("height"), 3: dim("width")},),
    )
    for shape in [(2, 3, 8, 10), (1, 3, 5, 7), (3, 3, 17, 4)]:
        x = torch.randn(*shape)
        assert relative_error(exported.module()(x), network(x)) < 1e-6


PROGRAM = """
import sys
sys.modules["latentgnn"] = None  # an import of it fails
import torch
folder = sys.argv[1]
for name in sys.argv[2:]:
    program = torch.export.load(f"{folder}/{name}.pt2")
    given = torch.load(f"{folder}/{name}.inputs.pt", weights_only=True)
    torch.save(program.module()(*given), f"{folder}/{name}.output.pt")
print(sorted(module for module in sys.modules if module.startswith("latentgnn.")))
"""


@pytest.mark.filterwarnings("default")
def test_exported_programs_run_where_the_library_is_not(tmp_path: Path) -> None:
    """Saved to a file and run in a process that cannot import the library, at other sizes than those exported."""
    dim = torch.export.Dim
    batch, height, width = dim("b", min=2), dim("h", min=2), dim("w", min=2)
    points, bounds = dim("t", min=2), dim("s", min=2)
    expected: dict[str, Tensor] = {}

    def save(name: str, layer: nn.Module, example: tuple[Tensor, ...], dynamic: Any, given: tuple[Tensor, ...]) -> None:
        torch.export.save(torch.export.export(layer, example, dynamic_shapes=dynamic), tmp_path / f"{name}.pt2")
        torch.save(given, tmp_path / f"{name}.inputs.pt")
        expected[name] = layer(*given).detach()

    for norm in ("batch", "frozen", "group", "layer", "none"):
        layer = make_layer("graph_conv_two_kernels", norm).float()
        shape = {0: batch, 2: height, 3: width}
        save(f"map_{norm}", layer, (torch.randn(2, 32, 6, 8),), (shape,), (torch.randn(3, 32, 5, 4),))
    mask, other = torch.rand(2, 6, 8) > 0.3, torch.rand(3, 5, 4) > 0.3
    shapes = ({0: batch, 2: height, 3: width}, {0: batch, 1: height, 2: width})
    for config in ("symmetric", "groups", "mean"):
        layer = make_layer(config, "group").float()
        save(f"mask_{config}", layer, (torch.randn(2, 32, 6, 8), mask), shapes, (torch.randn(3, 32, 5, 4), other))
    scenes, others = torch.tensor([0, 12, 20]), torch.tensor([0, 3, 9, 15])
    for norm in (FrozenBatchNorm, nn.LayerNorm):
        packed = PackedLatentGNN(32, num_latents=4, norm=norm, gamma_init=0.5).eval()
        example, given = (torch.randn(20, 32), scenes), (torch.randn(15, 32), others)
        save(f"packed_{norm.__name__}", packed, example, ({0: points}, {0: bounds}), given)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), *expected]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")
    for name, output in expected.items():
        assert relative_error(torch.load(tmp_path / f"{name}.output.pt", weights_only=True), output) < 1e-5, name


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [name for name in NORMS if name not in ("batch2d", "torchvision_frozen", "rms")])
def test_gradients_of_one_graph_with_every_norm(norm: str, training: bool) -> None:
    layer, twin = (make_layer("graph_conv", norm, training=training) for _ in range(2))
    x = torch.randn(2, 32, 5, 6, dtype=torch.float64, requires_grad=True)
    output = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    expected = reference.forward(twin, x)
    assert relative_error(output, expected) < 1e-10
    found = torch.autograd.grad(output.sin().sum(), [x, *layer.parameters()])
    wanted = torch.autograd.grad(expected.sin().sum(), [x, *twin.parameters()])
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative_error(ours, theirs) < 1e-8
    for ours, theirs in zip(layer.buffers(), twin.buffers(), strict=True):
        assert relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "frozen", "group", "none"])
def test_gradients_while_operations_are_counted(norm: str, training: bool) -> None:
    """In a dispatch mode, such as the one that counts operations."""
    layer, twin = (make_layer("graph_conv_two_kernels", norm, training=training) for _ in range(2))
    x = torch.randn(2, 32, 5, 6, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sin().sum().backward()
    found = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    assert counter.get_total_flops() > 0
    wanted = torch.autograd.grad(reference.forward(twin, x).sin().sum(), [x, *twin.parameters()])
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative_error(ours, theirs) < 1e-8


def test_groups_and_group_norm_of_channels_last_maps_compile() -> None:
    torch.manual_seed(0)
    layer = LatentGNN(64, num_latents=8, num_groups=2, norm=group_norm, gamma_init=0.5)
    x = torch.randn(2, 64, 6, 5).to(memory_format=torch.channels_last)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), reference.forward(layer, x))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("norm", ["batch_norm", "group_norm", "layer_norm"])
@pytest.mark.parametrize("training", [False, True])
def test_packed_points_compile_with_every_norm(norm: str, training: bool) -> None:
    torch._dynamo.reset()
    layer = PackedLatentGNN(16, num_latents=3, reduction=2, norm=norm, gamma_init=0.5).double().train(training)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(11, 16, dtype=torch.float64)
    for offsets in ([0, 4, 11], [0, 9, 11]):
        scenes = torch.tensor(offsets)
        assert relative_error(compiled(x, scenes), layer(x, scenes)) < 1e-9
    if norm == "batch_norm" and not training:
        return
    with pytest.raises(RuntimeError, match="offsets must rise"):
        compiled(x, torch.tensor([0, 12, 11]))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_forward_mode_inside_a_compiled_function(backend: str) -> None:
    """The core's operator has no formula for it, and would give zeros."""
    torch._dynamo.reset()
    layer = make_layer("graph_conv")
    x, v = (torch.randn(2, 32, 4, 5, dtype=torch.float64) for _ in range(2))
    compiled = torch.compile(lambda x, v: torch.func.jvp(layer, (x,), (v,)), backend=backend)
    for found, expected in zip(compiled(x, v), torch.func.jvp(layer, (x,), (v,)), strict=True):
        assert relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("norm", ["batch", "frozen", "group"])
def test_a_compiled_layer_keeps_the_strides_of_a_map_with_a_mask(norm: str) -> None:
    torch._dynamo.reset()
    layer, x = make_layer("graph_conv", norm).float(), torch.randn(2, 32, 5, 7)
    mask = torch.rand(2, 5, 7) > 0.3
    assert torch.compile(layer, backend="aot_eager")(x, mask).stride() == layer(x, mask).stride() == x.stride()
