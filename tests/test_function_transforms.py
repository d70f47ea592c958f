"""Transforms of `torch.func`, forward-mode and second derivatives, and what happens between the passes."""

import re
from collections.abc import Callable

import pytest
import torch
from sweep import make_input, make_layer, relative_error
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from latentgnn import LatentGNN, PackedLatentGNN, paths, reference

# PyTorch scripts some formulas at the first derivative in forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

NORMS = ["frozen", "batch", "group", "layer", "none"]
MEMORY: list[paths.Memory] = ["hold", "recompute"]


class Published(nn.Module):
    """The reference as a module, with the parameter names of the layer."""

    def __init__(self, layer: LatentGNN) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return reference.forward(self.layer, x)


def pair(norm: str, config: str = "graph_conv", *, training: bool = False) -> tuple[LatentGNN, Published]:
    """A layer, and the reference with the same weights."""
    layers = [make_layer(config, norm, training=training, channels=16) for _ in range(2)]
    for layer in layers:
        if training and norm == "batch":
            torch.func.replace_all_batch_norm_modules_(layer)
    return layers[0], Published(layers[1])


def loss(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x).sin().sum()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, x: grad(loss(f))(x),
    "vjp": lambda f, x: vjp(f, x)[1](x.cos())[0],
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),))[1],
    "jacrev": lambda f, x: jacrev(lambda x: f(x)[:, :3, 0, 0])(x),
    "jacfwd": lambda f, x: jacfwd(f)(x[:1, :, :1]),
    "hessian": lambda f, x: hessian(loss(f))(x[:1, :, :1]),
    "gradients_of_each_sample": lambda f, x: vmap(grad(lambda sample: loss(f)(sample[None])))(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("norm", "training"), [*((norm, False) for norm in NORMS), ("batch", True)])
def test_transforms_agree_with_those_of_the_reference(norm: str, training: bool, transform: str) -> None:
    layer, published = pair(norm, training=training)
    x = make_input(2, 16, 2, 3)
    found, expected = TRANSFORMS[transform](layer, x), TRANSFORMS[transform](published, x)
    assert expected.abs().max() > 1e-6
    assert relative_error(found, expected) < 1e-8


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize(("norm", "training"), [*((norm, False) for norm in NORMS), ("batch", True)])
def test_second_derivatives_against_central_differences(norm: str, training: bool, linear: bool) -> None:
    """Some nodes have no assignment at all, where the published arithmetic has no second derivatives."""
    layer, published = pair(norm, training=training)
    x, direction, weights = (make_input(2, 16, 2, 3, seed=seed) for seed in (1, 2, 3))

    def slope(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Size of the gradient of a loss that is linear in the output, or not."""
        value = (lambda x: (function(x) * weights).sum()) if linear else loss(function)
        return lambda x: grad(value)(x).square().sum()

    step = 1e-6
    after, before = (slope(published)(x + sign * step * direction).detach() for sign in (1, -1))
    found = (grad(slope(layer))(x) * direction).sum()
    torch.testing.assert_close(found.detach(), (after - before) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("norm", [*NORMS, "instance"])
def test_vmap_is_a_loop(norm: str) -> None:
    layer, published = pair(norm, "groups_symmetric")
    x = make_input(3, 16, 8).view(3, 1, 16, 2, 4).expand(3, 2, 16, 2, 4)
    assert relative_error(vmap(layer)(x), torch.stack([published(sample) for sample in x])) < 1e-11


def test_vmap_takes_masks_and_other_dimensions() -> None:
    layer, _ = pair("frozen")
    x, masks = make_input(2, 16, 3, 4), torch.rand(3, 2, 3, 4) > 0.3
    expected = torch.stack([layer(x, mask) for mask in masks], 1)
    assert relative_error(vmap(layer, in_dims=(None, 0), out_dims=1)(x, masks), expected) < 1e-11


@pytest.mark.parametrize("argument", ["offsets", "batch"])
def test_vmap_over_scenes_is_refused(argument: str) -> None:
    layer = PackedLatentGNN(16, num_latents=3)
    x, index = torch.randn(2, 5, 16), torch.tensor([[0, 2, 5], [0, 3, 5]])
    if argument == "batch":
        index = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])
    with pytest.raises(ValueError, match=f"{argument} cannot differ along .*vmap.*in_dims=None"):
        vmap(lambda x, index: layer(x, **{argument: index}))(x, index)


def test_vmap_over_layers_is_an_ensemble() -> None:
    layers = [make_layer("two_kernels", seed=seed) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = make_input(2, 32, 5)
    found = vmap(lambda *state: functional_call(layers[0], state, (x,)))(parameters, buffers)
    assert relative_error(found, torch.stack([reference.forward(layer, x) for layer in layers])) < 1e-11


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_of_a_functional_call(norm: str) -> None:
    layer, published = pair(norm)
    x = make_input(2, 16, 2, 3)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    found = grad(lambda values: functional_call(layer, values, (x,)).sin().sum())(parameters)
    expected = grad(
        lambda values: functional_call(published, {f"layer.{name}": v for name, v in values.items()}, (x,)).sin().sum()
    )(parameters)
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-9, name


@pytest.mark.parametrize("norm", NORMS)
def test_dual_numbers_carry_their_tangents(norm: str) -> None:
    layer, published = pair(norm)
    x, tangent = make_input(2, 16, 2, 3), make_input(2, 16, 2, 3, seed=5)
    with forward_ad.dual_level():
        output = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
    assert relative_error(output.primal, published(x)) < 1e-11
    assert relative_error(output.tangent, jvp(published, (x,), (tangent,))[1]) < 1e-9


def test_dual_numbers_in_the_parameters() -> None:
    """With batch norm in training, whose running statistics must not take a tangent."""
    layer = make_layer("asymmetric", training=True)
    published = Published(make_layer("asymmetric", training=True))
    x = make_input(2, 32, 6)
    tangent = torch.randn_like(layer.expand.weight)
    weights = {"expand.weight": layer.expand.weight.detach()}
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(value, tangent) for name, value in weights.items()}
        found = forward_ad.unpack_dual(functional_call(layer, dual, (x,))).tangent
    torch.func.replace_all_batch_norm_modules_(published)
    expected = jvp(
        lambda weight: functional_call(published, {"layer.expand.weight": weight}, (x,)),
        (weights["expand.weight"],),
        (tangent,),
    )[1]
    assert relative_error(found, expected) < 1e-9
    assert all(int(norm.num_batches_tracked) == 1 for norm in layer.norms)


def test_packed_points_and_second_derivatives_against_central_differences() -> None:
    torch.manual_seed(0)
    # Two kernels: layer norm then takes the plain path, which has second derivatives.
    layer = PackedLatentGNN(8, num_latents=(3, 2), reduction=2, norm=nn.LayerNorm, gamma_init=0.5, dtype=torch.float64)
    offsets = torch.tensor([0, 3, 7])
    x = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, offsets), (x,), check_forward_ad=True)
    with paths.memory("hold"):
        assert torch.autograd.gradgradcheck(lambda x: layer(x, offsets), (x,))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_running_statistics_that_a_transform_does_not_know_are_refused(transform: str) -> None:
    layer = make_layer("asymmetric", training=True)
    x = make_input(2, 32, 2, 3)
    before = {name: value.clone() for name, value in layer.named_buffers()}
    run = {
        "vmap": lambda: vmap(layer)(x[None]),
        "grad": lambda: grad(loss(layer))(x),
        "jvp": lambda: jvp(layer, (x,), (x,)),
    }
    with pytest.raises(RuntimeError, match=r"running statistics.*eval\(\).*replace_all_batch_norm_modules_"):
        run[transform]()
    assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())


def test_running_statistics_given_to_the_transform_are_updated() -> None:
    layer, twin = (make_layer("asymmetric", training=True) for _ in range(2))
    x = make_input(2, 32, 2, 3)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        buffers = {name: value.clone() for name, value in buffers.items()}
        return functional_call(layer, (parameters, buffers), (x,)).sin().sum(), buffers

    found, buffers = grad(run, has_aux=True)(parameters, dict(layer.named_buffers()))
    reference.forward(twin, x).sin().sum().backward()
    for name, parameter in twin.named_parameters():
        assert relative_error(found[name], parameter.grad) < 1e-9, name
    for name, value in twin.named_buffers():
        assert relative_error(buffers[name], value) < 1e-11, name


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize(("norm", "training"), [("frozen", False), ("batch", False), ("batch", True)])
def test_second_derivatives_of_the_core_are_refused(
    norm: str, training: bool, linear: bool, memory: paths.Memory
) -> None:
    layer = make_layer("graph_conv", norm, training=training)
    x = make_input(2, 32, 2, 3).requires_grad_()
    with paths.memory(memory):
        output = layer(x)
    value = output.sum() if linear else output.sin().sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives.*torch\.func\.grad"):
        torch.autograd.grad(gradient.square().sum(), x)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("norm", ["instance"])  # which the core does not know
def test_second_derivatives_of_the_plain_path(norm: str, memory: paths.Memory) -> None:
    layer, published = pair(norm)
    x = make_input(2, 16, 2, 3).requires_grad_()
    with paths.memory(memory):
        (gradient,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(gradient.square().sum(), x)
    assert relative_error(found, grad(lambda x: grad(loss(published))(x).square().sum())(x.detach())) < 1e-8


LAYERS = [("frozen", True), ("batch", False), ("batch", True), ("group", True), ("rms", False)]


def gradients(layer: LatentGNN, output: Tensor, x: Tensor, *, retain: bool = False) -> list[Tensor]:
    return list(torch.autograd.grad(output.sin().sum(), [x, *layer.parameters()], retain_graph=retain))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("what", ["expand.weight", "gather_reduce.weight", "gamma", "weight", "variance", "x", "mask"])
@pytest.mark.parametrize(("norm", "training"), LAYERS)
def test_changes_between_the_passes_raise_or_do_no_harm(
    norm: str, training: bool, what: str, masked: bool, memory: paths.Memory
) -> None:
    """As with PyTorch's own operations: the backward pass never takes new values for old ones."""
    layer, twin = (make_layer("graph_conv", norm, training=training) for _ in range(2))
    x, other = (make_input(2, 32, 2, 3).requires_grad_() for _ in range(2))
    mask = torch.ones(2, 2, 3, dtype=torch.bool)
    expected = gradients(twin, reference.forward(twin, other), other)
    with paths.memory(memory):
        output = layer(x, mask if masked else None)
    last = layer.expand.norm
    tensors = {"x": x, "mask": mask, "weight": last.weight, "variance": getattr(last, "running_var", x)}
    with torch.no_grad():
        changed = tensors.get(what, layer.state_dict().get(what))
        changed.copy_(changed.logical_not() if what == "mask" else changed * 2)
    try:
        found = gradients(layer, output, x)
    except RuntimeError as error:
        assert re.search("modified by an in-?place", str(error))  # noqa: PT017
        return
    assert what != "expand.weight"
    for value, wanted in zip(found, expected, strict=True):
        assert relative_error(value, wanted) < 1e-9


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(("norm", "training"), [*LAYERS, ("instance", True)])
def test_other_changes_between_the_passes_do_no_harm(norm: str, training: bool, memory: paths.Memory) -> None:
    """Another forward pass moves running statistics; backward passes may be repeated."""
    layer, twin = (make_layer("graph_conv", norm, training=training) for _ in range(2))
    x, other = (make_input(2, 32, 2, 3).requires_grad_() for _ in range(2))
    expected = gradients(twin, reference.forward(twin, other), other)
    with paths.memory(memory):
        output = layer(x)
    layer(make_input(2, 32, 3, seed=4))
    found = gradients(layer, output, x, retain=True)
    again = gradients(layer, output, x)
    for first, second, wanted in zip(found, again, expected, strict=True):
        assert relative_error(first, wanted) < 1e-9
        assert torch.equal(first, second)


@pytest.mark.parametrize("change", ["training", "frozen"])
def test_a_layer_that_is_switched_between_the_passes_is_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the plain path computes it again, it would be computed as another layer."""
    layer = make_layer("graph_conv", "batch")
    layer.expand.norm = nn.GroupNorm(2, layer.config.channels).double()
    x = make_input(2, 32, 2, 3).requires_grad_()
    with paths.memory("recompute"):
        output = layer(x)
    if change == "training":
        layer.train()
    else:
        layer.requires_grad_(False)
    with pytest.raises(RuntimeError, match="switched between training and evaluation"):
        output.sum().backward()


def test_several_gradients_at_once_are_refused() -> None:
    layer, x = make_layer("graph_conv"), make_input(2, 32, 2, 3).requires_grad_()
    with paths.memory("hold"):
        output = layer(x)
    with pytest.raises(RuntimeError, match=r"one gradient at a time.*torch.func.jacrev"):
        torch.autograd.grad(output, x, torch.ones(3, *output.shape), is_grads_batched=True)


def test_what_is_folded_is_not_held_after_the_backward_pass() -> None:
    layer, x = make_layer("graph_conv"), make_input(2, 32, 2, 3).requires_grad_()
    with paths.memory("hold"):
        output = layer(x)
    node = next(node for node, _ in _nodes_before(output.grad_fn) if hasattr(node, "folding"))
    assert node.folding is not None
    assert node.mixing is not None
    output.sum().backward()
    assert node.folding is node.mixing is None


def _nodes_before(node):
    yield node, None
    for before, _ in node.next_functions:
        if before is not None:
            yield from _nodes_before(before)
