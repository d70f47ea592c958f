import pytest
import torch
from sweep import make_layer, relative_error
from torch import nn

from latentgnn import FrozenBatchNorm, PackedLatentGNN, reference


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
