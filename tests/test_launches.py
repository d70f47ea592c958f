"""Single steps of autograd, and the paths that a GPU takes, run on a CPU that says it is a GPU."""

from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from sweep import CONFIGS, make_layer, relative_error
from torch import Tensor, nn

from latentgnn import (
    FrozenBatchNorm,
    LatentGNN,
    LatentGNNConfig,
    PackedLatentGNN,
    by_size,
    launches,
    modes,
    paths,
    reference,
)
from latentgnn.counts import plain_numbers
from latentgnn.norms import NormFactory, group_norm
from latentgnn.plain import equations, few_calls
from latentgnn.ranks import Ranks


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "is_on_gpu", lambda x: True)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over nodes are cut, and do not come out even."""
    monkeypatch.setattr(launches, "_FEWEST_NODES", 4)


def _random(*shape: int, innermost: bool = False) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    return (x.mT.contiguous().mT if innermost else x).requires_grad_()


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("equation", [launches.unit, launches.inverse_length])
def test_lengths_have_two_derivatives(equation: Callable[..., Tensor], dim: int) -> None:
    x = _random(2, 4, 3)
    lengths = x.norm(dim=dim, keepdim=True)
    expected = x / lengths if equation is launches.unit else 1 / lengths
    torch.testing.assert_close(equation(x, dim, x.dtype, 1e-12), expected)
    assert torch.autograd.gradcheck(lambda x: equation(x, dim, x.dtype, 1e-12), x)
    assert torch.autograd.gradgradcheck(lambda x: equation(x, dim, x.dtype, 1e-12), x)


@pytest.mark.parametrize("equation", [launches.unit, launches.inverse_length])
def test_what_has_no_length_is_zero_with_its_derivatives(equation: Callable[..., Tensor]) -> None:
    x = _random(2, 4, 3).detach()
    x[0, 1] = 0
    out = equation(x.requires_grad_(), -1, x.dtype, 1e-12)
    (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    for found in (out, first, second):
        assert not found[0, 1].any()
        assert torch.isfinite(found).all()


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize("nodes", [12, 14])
def test_sums_in_parts_have_two_derivatives(nodes: int, innermost: bool) -> None:
    assert launches.parts_of_sum(2, 4, 3, nodes) == 3
    value, assign = _random(2, nodes, 3, innermost=innermost), _random(2, nodes, 4, innermost=innermost)
    latent = _random(2, 4, 3)
    torch.testing.assert_close(launches.sum_over_nodes(value, assign), assign.mT @ value)
    spread = launches.spread(latent, assign)
    torch.testing.assert_close(spread, assign @ latent)
    assert (spread.stride(-1) != 1) is innermost
    for equation, given in ((launches.sum_over_nodes, (value, assign)), (launches.spread, (latent, assign))):
        assert torch.autograd.gradcheck(equation, given)
        assert torch.autograd.gradgradcheck(equation, given)


@pytest.mark.parametrize(
    ("samples", "rows", "columns", "nodes", "parts"),
    [
        (2, 150, 64, 16800, 21),
        (2, 150, 64, 16807, 21),  # no number of parts divides it
        (8, 150, 64, 16800, 5),
        (2, 150, 64, 1000, 1),  # so few nodes are summed at once
        (64, 150, 64, 16800, 1),  # tiles enough
        (0, 150, 64, 16800, 1),
    ],
)
def test_a_sum_is_cut_where_it_keeps_few_processors_busy(
    samples: int, rows: int, columns: int, nodes: int, parts: int
) -> None:
    assert launches.parts_of_sum(samples, rows, columns, nodes) == parts


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", ["batch", "frozen", "torchvision_frozen", "group", "layer", "rms", "instance", "none"])
@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.usefixtures("on_gpu", "cut")
def test_a_gpu_computes_what_the_reference_computes(name: str, norm: str, training: bool) -> None:
    layer, twin = (make_layer(name, norm, training=training) for _ in range(2))
    for last in (False, True):
        x = torch.randn(2, 32, 3, 4, dtype=torch.float64)
        x = (x.to(memory_format=torch.channels_last) if last else x).requires_grad_()
        out, expected = layer(x), reference.forward(twin, x)
        assert out.stride() == x.stride()
        assert relative_error(out, expected) < 1e-10
        weight = torch.randn_like(out)
        found = torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()])
        wanted = torch.autograd.grad((expected * weight).sum(), [x, *twin.parameters()])
        for own, other in zip(found, wanted, strict=True):
            assert torch.allclose(own, other, rtol=1e-8, atol=1e-9)
    for (key, own), other in zip(layer.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(own, other), key


@pytest.mark.parametrize("norm", ["batch", "frozen", "group", "layer", "none"])
@pytest.mark.parametrize("name", ["two_kernels", "symmetric", "no_residual_graph_conv"])
@pytest.mark.usefixtures("on_gpu")
def test_masks_on_a_gpu_leave_padding_out(name: str, norm: str) -> None:
    layer = make_layer(name, norm, training=norm == "batch")
    x = torch.randn(2, 32, 3, 4, dtype=torch.float64)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[:, :, 3] = False
    expected = reference.forward(make_layer(name, norm, training=norm == "batch"), x[..., :3])
    x[..., 3] = torch.nan
    out = layer(x.requires_grad_(), mask)
    assert relative_error(out[..., :3], expected) < 1e-10
    assert torch.equal(out[..., 3].isnan(), torch.ones_like(x[..., 3], dtype=torch.bool))
    out[..., :3].sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_learns_the_running_statistics_of_the_nodes_in_a_mask(
    momentum: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = LatentGNN(16, num_latents=4, norm=lambda channels: nn.BatchNorm1d(channels, momentum=momentum))
    twin = deepcopy(layer)
    x, mask = torch.randn(2, 16, 3, 4), torch.rand(2, 3, 4) > 0.3
    for _ in range(2):
        twin(x, mask)
    monkeypatch.setattr(modes, "is_on_gpu", lambda x: True)
    layer.to(dtype)
    for _ in range(2):
        layer(x.to(dtype), mask)
    layer(x.to(dtype), torch.zeros_like(mask))
    for (name, own), other in zip(layer.named_buffers(), twin.buffers(), strict=True):
        if name.endswith("num_batches_tracked"):
            assert own == 3
        else:
            torch.testing.assert_close(own, other.to(dtype), rtol=0.05 if dtype == torch.bfloat16 else 1e-4, atol=0.01)


@pytest.mark.usefixtures("on_gpu")
def test_statistics_that_are_not_tracked_do_not_change() -> None:
    layer = make_layer("graph_conv", training=True)
    for norm in layer.norms:
        norm.track_running_stats = False  # type: ignore[assignment]
    before = deepcopy(list(layer.buffers()))
    layer(torch.randn(2, 32, 3, 4, dtype=torch.float64))
    for own, other in zip(layer.buffers(), before, strict=True):
        assert torch.equal(own, other)


@pytest.fixture(params=["ieee", "tf32"])
def matmul(request: pytest.FixtureRequest) -> Iterator[str]:
    """The precision of matrix products; PyTorch lets convolutions use TF32 by itself."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("norm", ["frozen", "none", "layer"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.usefixtures("on_gpu")
def test_products_are_convolutions_where_only_these_may_round(
    norm: str, last: bool, matmul: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = make_layer("graph_conv", norm).float(), torch.randn(2, 32, 3, 4)
    x = x.to(memory_format=torch.channels_last) if last else x
    x.requires_grad_()
    expected = reference.forward(layer, x)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *layer.parameters()])
    called: list[str] = []
    for name in ("conv1d", "conv2d", "baddbmm"):
        operation = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *given, _run=operation, _name=name: called.append(_name) or _run(*given)
        )
    out = layer(x)
    assert out.stride() == x.stride()
    torch.testing.assert_close(out, expected)
    for own, other in zip(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]), wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)
    projections = [name for name in called if name != "baddbmm"]
    if not last and norm != "layer":
        # Without a shift, the expansion and the residual connection are one product where it may round alike.
        joined = matmul == "tf32"
        assert projections == ["conv1d"] * (4 if joined else 5)
        assert ("baddbmm" in called) is (joined and norm == "none")
    elif last:
        assert projections == (["conv2d"] * 5 if matmul == "ieee" else [])


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, FrozenBatchNorm, group_norm, nn.LayerNorm, nn.RMSNorm, nn.Identity])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("on_gpu")
def test_half_types_are_close_to_the_reference(norm: NormFactory, autocast: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LatentGNN(64, num_latents=16, graph_conv=True, norm=norm, gamma_init=1.0)
    x = torch.randn(2, 64, 8, 8)
    x[0, :, 0, 0] = 0
    expected = reference.forward(deepcopy(layer), x)
    given = (x if autocast else x.to(dtype)).requires_grad_()
    if not autocast:
        layer.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = layer(given)
    assert out.dtype == given.dtype
    assert relative_error(out.float(), expected) < 3e-2
    out.float().square().sum().backward()
    assert given.grad is not None
    assert torch.isfinite(given.grad).all()


@pytest.mark.usefixtures("on_gpu")
def test_gradients_of_sums_over_many_nodes_stay_in_the_range_of_float16() -> None:
    torch.manual_seed(0)
    layer = LatentGNN(64, num_latents=16, graph_conv=True, norm=FrozenBatchNorm, gamma_init=1.0)
    x = torch.randn(1, 64, 140, 140)
    expected = reference.forward(layer, x.requires_grad_())
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    x = x.detach().half().requires_grad_()
    out = layer.half()(x)
    (found,) = torch.autograd.grad(out.float().square().sum(), x)
    assert relative_error(found, wanted) < 0.1


@pytest.mark.parametrize("norm", [FrozenBatchNorm, nn.LayerNorm])
@pytest.mark.usefixtures("on_gpu", "cut")
def test_second_derivatives_on_a_gpu(norm: NormFactory) -> None:
    torch.manual_seed(0)
    layer = LatentGNN(8, num_latents=3, reduction=2, norm=norm, gamma_init=0.5).double()
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("config", ["graph_conv", "symmetric", "groups"])
@pytest.mark.parametrize("norm", ["frozen", "batch", "layer"])
@pytest.mark.filterwarnings("default")  # PyTorch's compiler warns of its own internals, differently in each release
@pytest.mark.usefixtures("on_gpu")
def test_a_compiler_gets_the_plain_path_on_a_gpu_at_any_size(
    config: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(by_size, "HOLD_BYTES_ON_GPU", 0)
    layer, graphs = make_layer(config, norm).float(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(2, 32, 3, 4)
    out = torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert relative_error(out, reference.forward(layer, x)) < 2e-5
    assert "latentgnn" not in graphs[0].code
    assert "autograd_function" not in graphs[0].code


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("on_gpu")
def test_pytorchs_compiler_takes_folded_norms() -> None:
    """PyTorch 2.11's refused a part of a vector as a convolution's shift."""
    torch._dynamo.reset()
    layer, x = make_layer("graph_conv", "frozen").float(), torch.randn(2, 32, 9, 11)
    out = torch.compile(layer, fullgraph=True)(x)
    assert relative_error(out, reference.forward(layer, x)) < 2e-5


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm, FrozenBatchNorm])
def test_nodes_of_several_processes_take_no_path_that_sums_over_one(norm: NormFactory) -> None:
    layer = LatentGNN(32, num_latents=4, norm=norm).arrangement()
    layer.ranks = Ranks("nodes", 2)
    x_BNC = torch.randn(1, 1600, 32)
    for compute in (torch.bfloat16, torch.float16, torch.float32):
        assert paths.choose(layer, x_BNC, None, compute).path != "few_calls"
        assert not few_calls.fits(layer, x_BNC, None, compute)


def _taken(layer: LatentGNN, x: Tensor, patch: pytest.MonkeyPatch, *others: Tensor) -> str:
    taken: list[str] = []
    for path, module in (("few_calls", few_calls), ("plain", equations)):

        def record(
            *given: Tensor, _run: Callable[..., Tensor] = module.latent_gnn, _path: str = path, **named: bool
        ) -> Tensor:
            taken.append(_path)
            return _run(*given, **named)

        patch.setattr(module, "latent_gnn", record)
    layer(x, *others)
    return taken[0] if taken else "core"


@pytest.mark.usefixtures("on_gpu")
def test_which_path_a_gpu_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 32, 40, 40)

    def taken(norm: NormFactory, *others: Tensor, **options: object) -> str:
        with monkeypatch.context() as patch:
            return _taken(LatentGNN(32, num_latents=4, norm=norm, **options), x, patch, *others)  # type: ignore[arg-type]

    assert taken(FrozenBatchNorm) == taken(FrozenBatchNorm, torch.ones(1, 40, 40, dtype=torch.bool)) == "few_calls"
    assert taken(nn.BatchNorm1d) == taken(group_norm) == taken(nn.LayerNorm) == "few_calls"
    assert taken(FrozenBatchNorm, num_groups=2) == taken(nn.InstanceNorm1d) == "plain"
    assert taken(nn.BatchNorm1d, torch.ones(1, 40, 40, dtype=torch.bool)) == "plain"
    packed = PackedLatentGNN(32, num_latents=4, norm=nn.LayerNorm)
    with monkeypatch.context() as patch:
        assert _taken(packed, x[0].flatten(1).mT, patch, torch.tensor([0, 600, 1600])) == "core"
    with paths.memory("hold"):
        assert taken(FrozenBatchNorm) == taken(nn.LayerNorm) == "core"
    monkeypatch.setattr(by_size, "HOLD_BYTES_ON_GPU", 1 << 16)
    assert taken(nn.LayerNorm) == taken(FrozenBatchNorm, num_groups=2) == "core"
    assert taken(FrozenBatchNorm) == "few_calls"
    with torch.autocast("cpu", torch.bfloat16):
        assert taken(nn.BatchNorm1d) == "few_calls"
        assert taken(nn.LayerNorm) == "plain"


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, FrozenBatchNorm, nn.LayerNorm])
def test_scenes_stay_apart_in_half_precision(norm: NormFactory) -> None:
    # Rounding differs between versions of PyTorch, and with some seeds an assignment is zero in one type only.
    torch.manual_seed(4)
    layer = PackedLatentGNN(16, num_latents=4, reduction=2, norm=norm, gamma_init=0.5).to(torch.bfloat16)
    x, offsets = torch.randn(70, 16, dtype=torch.bfloat16), torch.tensor([0, 20, 70])
    # The core's scenes are compared with the reference in test_points.py.
    expected = deepcopy(layer).double()(x.double(), offsets) - x.double()
    assert relative_error(layer(x, offsets).double() - x.double(), expected) < 0.03


def test_a_cpu_takes_nothing_of_it() -> None:
    x = torch.randn(2, 5, 3, requires_grad=True)
    assert not modes.is_on_gpu(x)
    assert not modes.is_eager_on_gpu(x)


@pytest.mark.parametrize(
    "options",
    [{}, {"graph_conv": True}, {"symmetric": True}, {"num_latents": (30, 20)}, {"num_groups": 2}, {"residual": False}],
)
@pytest.mark.usefixtures("on_gpu")
def test_what_the_plain_path_holds_on_a_gpu_is_counted(options: dict[str, object]) -> None:
    options = {"num_latents": 40, **options}
    layer = LatentGNN(128, norm=nn.BatchNorm1d, **options)  # type: ignore[arg-type]
    x = torch.randn(2, 128, 24, 24, requires_grad=True)
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(x)
    config = LatentGNNConfig(channels=128, **options)  # type: ignore[arg-type]
    counted = out.numel() // 128 * 4 * plain_numbers(config)
    assert 0.8 < sum(held.values()) / counted < 1.2
