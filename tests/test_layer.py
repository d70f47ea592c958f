from functools import partial

import pytest
import torch
from sweep import CONFIGS, NORMS, make_input, make_layer, relative_error
from timm.layers.norm_act import GroupNormAct
from torch import Tensor, nn

from latentgnn import LatentGNN, LatentGNNConfig, reference


def gradients(layer: LatentGNN, output: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Gradients of the input and every parameter, for an incoming gradient without symmetries."""
    weights = torch.sin(torch.arange(output.numel(), dtype=output.dtype)).view(output.shape)
    names = ["input", *(name for name, _ in layer.named_parameters())]
    values = torch.autograd.grad((output * weights).sum(), [x, *layer.parameters()], allow_unused=True)
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


def make_twin(config: str, norm: str, *, training: bool) -> LatentGNN:
    """The same layer for the reference, in 1-D: PyTorch's 4-D batch norm has wrong gradients on a CPU."""
    return make_layer(config, norm.removesuffix("2d"), training=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("config", CONFIGS)
def test_agrees_with_the_reference(config: str, norm: str, training: bool) -> None:
    layer, twin = make_layer(config, norm, training=training), make_twin(config, norm, training=training)
    x = make_input(3, 32, 4, 5).requires_grad_()
    output, expected = layer(x), reference.forward(twin, x)
    assert relative_error(output, expected) < 1e-11
    found, wanted = gradients(layer, output, x), gradients(twin, expected, x)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert relative_error(found[name], wanted[name]) < 1e-9, name
    for (name, buffer), (_, twin_buffer) in zip(layer.named_buffers(), twin.named_buffers(), strict=True):
        assert relative_error(buffer, twin_buffer) < 1e-11, name


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", ["asymmetric", "graph_conv", "symmetric", "groups_graph_conv", "mean"])
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_gradients_against_central_differences(config: str, norm: str, training: bool, batch: int) -> None:
    layer = make_layer(config, norm, training=training, channels=16)
    # Running statistics move at every call; without them each call is the same function.
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm1d) and training:
            module.momentum = 0.0
    x = make_input(batch, 16, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("config", ["asymmetric", "graph_conv_two_kernels", "groups", "symmetric", "mean"])
def test_dense_affinity_gives_the_same_output(config: str) -> None:
    layer = make_layer(config)
    x = make_input(2, 32, 4, 5)
    assert relative_error(reference.dense_forward(layer, x), layer(x)) < 1e-11
    affinity = reference.dense_affinity(layer, x)
    kernels, groups = len(layer.config.latents), layer.config.num_groups
    assert affinity.shape == (2, kernels, groups, 20, 20)
    for kernel, latents in enumerate(layer.config.latents):
        assert torch.linalg.matrix_rank(affinity[0, kernel, 0], rtol=1e-10) <= latents


@pytest.mark.parametrize("spatial", [(7,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("config", ["asymmetric", "graph_conv"])
def test_spatial_dimensions_are_only_nodes(spatial: tuple[int, ...], config: str) -> None:
    layer = make_layer(config, training=True)
    x = make_input(2, 32, *spatial)
    output = layer(x)
    assert output.shape == x.shape
    assert relative_error(output.flatten(2), reference.forward(layer, x.flatten(2))) < 1e-11


def strided_inputs() -> dict[str, Tensor]:
    x = make_input(2, 32, 6, 5)
    volume = make_input(2, 32, 3, 4, 5)
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "channels_last_3d": volume.contiguous(memory_format=torch.channels_last_3d),
        "tokens": make_input(2, 32, 30).mT.contiguous().mT,
        "batch_of_one": x[:1],
    }


@pytest.mark.parametrize("layout", strided_inputs())
@pytest.mark.parametrize("config", ["asymmetric", "graph_conv", "groups", "no_residual"])
@pytest.mark.parametrize("training", [True, False])
def test_keeps_shape_type_and_strides(layout: str, config: str, training: bool) -> None:
    x = strided_inputs()[layout]
    layer = make_layer(config, training=training)
    output = layer(x)
    assert (output.shape, output.dtype, output.stride()) == (x.shape, x.dtype, x.stride())
    assert relative_error(output, reference.forward(layer, x.contiguous())) < 1e-11


@pytest.mark.parametrize("layout", strided_inputs())
@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_keeps_strides_with_any_norm(layout: str, norm: str, masked: bool, residual: bool) -> None:
    x = strided_inputs()[layout]
    layer = make_layer("asymmetric" if residual else "no_residual", norm, training=True)
    mask = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool) if masked else None
    assert layer(x, mask).stride() == x.stride()


@pytest.mark.parametrize("layout", strided_inputs())
def test_keeps_strides_where_a_norm_has_others(layout: str) -> None:
    x = strided_inputs()[layout]
    assert make_layer("no_residual", "instance")(x).stride() == x.stride()


@pytest.mark.parametrize("view", ["every_other_row", "transposed", "expanded"])
def test_any_strides_are_read_right(view: str) -> None:
    x = make_input(2, 32, 6, 8)
    views = {
        "every_other_row": x[:, :, ::2],
        "transposed": x.transpose(2, 3),
        "expanded": x[:1].expand(3, -1, -1, -1),
    }
    layer = make_layer("graph_conv")
    assert relative_error(layer(views[view]), reference.forward(layer, views[view].contiguous())) < 1e-11


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_reads_the_input_without_a_copy(layout: torch.memory_format) -> None:
    x = make_input(2, 32, 8, 8).to(memory_format=layout)
    layer = make_layer("graph_conv", "frozen")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(x.requires_grad_())
    # Whatever the backward pass keeps of the input's size must be the input itself.
    large = {t.untyped_storage().data_ptr() for t in saved if t.numel() == x.numel()}
    assert large <= {x.untyped_storage().data_ptr()}


def test_starts_as_an_identity_with_a_gradient_for_gamma_alone() -> None:
    layer = LatentGNN(32, num_latents=6, reduction=4, graph_conv=True)
    x = torch.randn(2, 32, 5, 6, requires_grad=True)
    output = layer(x)
    torch.testing.assert_close(output, x, rtol=0, atol=0)
    output.square().sum().backward()
    moved = {name for name, parameter in layer.named_parameters() if parameter.grad.abs().max() > 0}
    assert moved == {"gamma"}


@pytest.mark.parametrize("config", ["asymmetric", "graph_conv", "symmetric"])
@pytest.mark.parametrize("training", [True, False])
def test_permuting_nodes_permutes_the_output(config: str, training: bool) -> None:
    layer = make_layer(config, training=training)
    x = make_input(2, 32, 40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert relative_error(layer(x[:, :, order]), layer(x)[:, :, order]) < 1e-11


def test_repeats_bit_for_bit() -> None:
    layer = make_layer("graph_conv").float()
    x = make_input(2, 32, 20, 20).float().requires_grad_()
    runs = [gradients(layer, layer(x), x) for _ in range(3)]
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)


def test_mean_scale_does_not_depend_on_the_number_of_nodes() -> None:
    x = make_input(2, 32, 10)
    layer = make_layer("mean", "none")
    published = make_layer("asymmetric", "none")
    repeated = x.repeat(1, 1, 9)
    assert relative_error((layer(repeated) - repeated)[..., :10], layer(x) - x) < 1e-11
    growth = (published(repeated) - repeated)[..., :10].norm() / (published(x) - x).norm()
    assert growth.item() == pytest.approx(3.0)  # sqrt(9), as published


MASKABLE = [name for name in NORMS if "instance" not in name]


@pytest.mark.parametrize("norm", MASKABLE)
@pytest.mark.parametrize("config", CONFIGS)
def test_mask_is_as_if_only_the_valid_nodes_were_there(config: str, norm: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = make_input(3, 32, 5, 6)
    # As many valid nodes in every sample, at other places, so that the reference takes them as one dense batch.
    order = torch.rand(3, 30, generator=generator).argsort(1)[:, :17].sort(1).values
    mask = torch.zeros(3, 30, dtype=torch.bool).scatter_(1, order, True)
    index = order[:, None].expand(-1, 32, -1)
    layer, twin = make_layer(config, norm, training=True), make_twin(config, norm, training=True)
    dirty = x.flatten(2).masked_fill(~mask[:, None], float("nan")).view_as(x).requires_grad_()
    dense = x.flatten(2).gather(2, index).requires_grad_()

    output, expected = layer(dirty, mask.view(3, 5, 6)), reference.forward(twin, dense)
    assert relative_error(output.flatten(2).gather(2, index), expected) < 1e-11
    outside = ~mask.view(3, 1, 5, 6).expand_as(x)
    assert output[outside].isnan().all()
    for (name, buffer), (_, twin_buffer) in zip(layer.named_buffers(), twin.named_buffers(), strict=True):
        assert relative_error(buffer, twin_buffer) < 1e-11, name

    weights = torch.sin(torch.arange(expected.numel(), dtype=torch.float64)).view(expected.shape)
    found = torch.autograd.grad(
        (output.flatten(2).gather(2, index) * weights).sum(), [dirty, *layer.parameters()], allow_unused=True
    )
    wanted = torch.autograd.grad((expected * weights).sum(), [dense, *twin.parameters()], allow_unused=True)
    assert relative_error(found[0].flatten(2).gather(2, index), wanted[0]) < 1e-9
    assert found[0].masked_select(outside).abs().max() == 0
    for gradient, expected_gradient in zip(found[1:], wanted[1:], strict=True):
        assert relative_error(gradient, expected_gradient) < 1e-9


def test_mask_with_uneven_samples_and_one_empty_sample() -> None:
    x = make_input(3, 32, 4, 5)
    mask = torch.zeros(3, 4, 5, dtype=torch.bool)
    mask[0, :2, :3] = mask[1, 1:, 2:] = True
    layer = make_layer("graph_conv_two_kernels", "frozen")
    output = layer(x, mask)
    for sample, size in ((0, (2, 3)), (1, (3, 3))):
        alone = x[sample][:, mask[sample]].view(1, 32, *size)
        assert relative_error(output[sample][:, mask[sample]], layer(alone).flatten(2)[0]) < 1e-11
    assert torch.equal(output[2], x[2])


def test_mask_of_all_nodes_changes_nothing() -> None:
    x = make_input(2, 32, 4, 5).to(memory_format=torch.channels_last)
    layer, twin = make_layer("graph_conv", training=True), make_layer("graph_conv", training=True)
    output = layer(x, torch.ones(2, 4, 5, dtype=torch.bool))
    assert relative_error(output, twin(x)) < 1e-12
    assert output.stride() == x.stride()


def test_a_cumulative_average_and_untracked_statistics_are_batch_norms_own() -> None:
    def untracked(channels: int) -> nn.Module:
        return nn.BatchNorm1d(channels, track_running_stats=False)

    def cumulative(channels: int) -> nn.Module:
        return nn.BatchNorm1d(channels, momentum=None)

    for norm in (untracked, cumulative):
        torch.manual_seed(0)
        layer = LatentGNN(16, num_latents=3, reduction=2, norm=norm, gamma_init=1.0, dtype=torch.float64)
        twin = LatentGNN(16, num_latents=3, reduction=2, norm=norm, gamma_init=1.0, dtype=torch.float64)
        twin.load_state_dict(layer.state_dict())
        for seed in range(3):
            x = make_input(2, 16, 9, seed=seed)
            assert relative_error(layer(x), reference.forward(twin, x)) < 1e-11
        layer.eval(), twin.eval()
        assert relative_error(layer(x), reference.forward(twin, x)) < 1e-11


def test_from_config_is_the_same_layer() -> None:
    config = LatentGNNConfig(
        channels=24, num_latents=(3, 4), reduction=4, graph_conv=True, num_groups=3, gamma_init=0.5
    )
    layer = LatentGNN.from_config(config, dtype=torch.float64)
    assert layer.config == config
    twin = LatentGNN(24, num_latents=(3, 4), reduction=4, graph_conv=True, num_groups=3, gamma_init=0.5)
    assert layer.state_dict().keys() == twin.state_dict().keys()


def test_state_dict_round_trip_and_reset() -> None:
    layer = LatentGNN(16, num_latents=3, gamma_init=0.25)
    twin = LatentGNN(16, num_latents=3)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(layer.eval()(x), twin.eval()(x))
    twin.reset_parameters()
    assert twin.gamma.item() == 0
    assert not torch.equal(twin.expand.weight, layer.expand.weight)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"channels": 0}, ValueError, "channels must be at least 1"),
        ({"channels": -8}, ValueError, "channels must be at least 1"),
        ({"channels": 30}, ValueError, "divisible by reduction, got 30 and 8; .*divides them, such as 6"),
        ({"channels": 32.0}, TypeError, "channels must be an int"),
        ({"reduction": 0}, ValueError, "reduction must be at least 1"),
        ({"num_groups": 3}, ValueError, "divisible by num_groups, got 3; .*divides them, such as 2"),
        ({"num_groups": 9}, ValueError, "divisible by num_groups, got 9; .*divides them, such as 4"),
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1"),
        ({"num_latents": 0}, ValueError, "num_latents must be at least 1"),
        ({"num_latents": (4, -1)}, ValueError, "num_latents must be at least 1"),
        ({"num_latents": ()}, ValueError, "at least one kernel"),
        ({"num_latents": 2.5}, TypeError, "num_latents must be an int or a sequence"),
        ({"num_latents": True}, TypeError, "num_latents"),
        ({"num_latents": "8"}, TypeError, "num_latents"),
        ({"num_latents": (4, 2.0)}, TypeError, "num_latents must be an int"),
        ({"norm": "batch"}, ValueError, "batch_norm"),
        ({"norm": None}, TypeError, "callable"),
        ({"norm": nn.BatchNorm1d(32)}, TypeError, r"got one module, BatchNorm1d\(32.*give its class, BatchNorm1d"),
        ({"norm": nn.GroupNorm}, TypeError, r"partial\(nn\.GroupNorm, 32\), or take latentgnn\.norms\.group_norm"),
        ({"norm": partial(nn.GroupNorm, 3)}, ValueError, r"does not take 4 channels.*latentgnn\.norms\.group_norm"),
        ({"norm": lambda channels: None}, TypeError, "norm must give a module.*NoneType"),
        ({"norm": partial(GroupNormAct, num_groups=1)}, TypeError, "GroupNormAct has the activation ReLU"),
        ({"node_scale": "sum"}, ValueError, "published, mean"),
        ({"symmetric": "yes"}, TypeError, "symmetric must be True or False"),
        ({"gamma_init": "0"}, TypeError, "gamma_init must be a number"),
        ({"gamma_init": float("nan")}, ValueError, "gamma_init must be finite"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    channels = arguments.pop("channels", 32)
    with pytest.raises(error, match=words):
        LatentGNN(channels, **{"num_latents": 4, **arguments})  # type: ignore[arg-type]


def test_positional_options_are_refused() -> None:
    with pytest.raises(TypeError, match="positional"):
        LatentGNN(32, 4)  # type: ignore[misc, call-arg]


@pytest.mark.parametrize(
    ("x", "mask", "error", "words"),
    [
        (torch.zeros(2, 32), None, ValueError, r"one, two or three spatial dimensions, got \(2, 32\)"),
        (torch.zeros(2, 32, 2, 2, 2, 2), None, ValueError, "one, two or three spatial"),
        (torch.zeros(2, 31, 4), None, ValueError, r"has 32 channels, in dimension 1; got .*\(2, 31, 4\)"),
        (torch.zeros(2, 32, 4, dtype=torch.int64), None, TypeError, "floating-point"),
        (torch.zeros(2, 32, 4, dtype=torch.float64), None, TypeError, "float64.*float32"),
        (torch.zeros(2, 32, 4, device="meta"), None, ValueError, "on meta, the layer on cpu"),
        ("x", None, TypeError, "takes a tensor"),
        (torch.zeros(2, 32, 4), torch.ones(2, 4), TypeError, "bool"),
        (torch.zeros(2, 32, 4), [True], TypeError, "bool tensor"),
        (torch.zeros(2, 32, 4), torch.ones(2, 5, dtype=torch.bool), ValueError, r"\(2, 4\), got \(2, 5\)"),
        (torch.zeros(2, 32, 4), torch.ones(2, 32, 4, dtype=torch.bool), ValueError, "shape"),
        (torch.zeros(2, 32, 4), torch.ones(2, 4, dtype=torch.bool, device="meta"), ValueError, "mask is on meta"),
        (torch.zeros(1, 32, 1), None, ValueError, "more than one node"),
    ],
)
def test_bad_inputs(x: object, mask: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        LatentGNN(32, num_latents=4)(x, mask)


def test_a_mask_needs_a_norm_that_can_leave_nodes_out() -> None:
    layer = make_layer("asymmetric", "instance")
    with pytest.raises(ValueError, match="InstanceNorm1d"):
        layer(make_input(2, 32, 6), torch.ones(2, 6, dtype=torch.bool))


@pytest.mark.parametrize("options", [{"num_groups": 2}, {"num_latents": 1}])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_of_rms_norm_keep_the_strides_of_maps(options: dict[str, int], masked: bool) -> None:
    """Its rows may have a single channel, whose nodes are then innermost too."""
    layer = LatentGNN(8, **{"num_latents": 8, "reduction": 4, "norm": nn.RMSNorm, **options})
    x, mask = torch.randn(2, 8, 12, 12), torch.rand(2, 12, 12) > 0.3 if masked else None
    assert layer(x, mask).stride() == x.stride()
