import pytest
import torch
from torch import nn

from latentgnn import FrozenBatchNorm, LatentGNN, insert, node_mask, remove


def test_mask_reaches_every_layer_at_its_resolution():
    """Against layers called with a mask by hand, at strides whose sizes are no multiples of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)).eval()
    images = torch.randn(2, 3, 30, 23)
    mask = torch.zeros(2, 30, 23, dtype=torch.bool)
    mask[0, :13, :], mask[1, :, :6] = True, True
    insert(model, {"0": {"num_latents": 3}, "1": {"num_latents": 3}}, gamma_init=1.0, norm=FrozenBatchNorm)
    first, second = model[0].latentgnn, model[1].latentgnn
    at_2, at_4 = torch.zeros(2, 15, 12, dtype=torch.bool), torch.zeros(2, 8, 6, dtype=torch.bool)
    at_2[0, :7, :], at_2[1, :, :3] = True, True  # ceil(13 / 2), ceil(6 / 2)
    at_4[0, :4, :], at_4[1, :, :2] = True, True  # ceil(13 / 4), ceil(6 / 4)
    with torch.no_grad():
        with node_mask(model, mask):
            got = model(images)
        plain = model(images)
        remove(model)
        expected = second(model[1](first(model[0](images), at_2)), at_4)
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got, plain)
    assert not any(m._forward_pre_hooks for m in (first, second))


@pytest.mark.parametrize(("stride", "sides"), [(4, range(1, 33)), (32, range(1, 97, 5))])
def test_the_valid_extent_is_that_of_a_strided_convolution(stride, sides):
    model = nn.Sequential(nn.Conv2d(1, 4, stride, stride=stride))
    insert(model, {"0": {"num_latents": 1}}, reduction=1)
    total = max(sides) + stride - max(sides) % stride
    seen = []
    model[0].latentgnn.register_forward_hook(lambda m, args, kwargs, out: seen.append(kwargs["mask"]), with_kwargs=True)
    model.eval()
    for side in sides:
        mask = torch.arange(total)[None, :, None].expand(1, total, total) < side
        with torch.no_grad(), node_mask(model, mask):
            model(torch.randn(1, 1, total, total))
    got = [m[0, :, 0].sum().item() for m in seen]
    assert got == [-(-side // stride) for side in sides]


def test_one_valid_pixel_anywhere_keeps_a_valid_node():
    model = nn.Sequential(nn.Conv2d(1, 4, 5, stride=5))
    insert(model, {"0": {"num_latents": 1}}, reduction=1)
    seen = []
    model[0].latentgnn.register_forward_hook(lambda m, args, kwargs, out: seen.append(kwargs["mask"]), with_kwargs=True)
    mask = torch.eye(49, dtype=torch.bool).view(49, 7, 7)
    with torch.no_grad(), node_mask(model.eval(), mask):
        model(torch.randn(49, 1, 7, 7))
    assert seen[0].shape == (49, 1, 1)
    assert seen[0].all()


@pytest.mark.parametrize("dims", [1, 3])
def test_mask_in_one_and_three_dimensions(dims):
    conv = (nn.Conv1d, nn.Conv3d)[dims // 2](2, 8, 2, stride=2)
    model = nn.Sequential(conv)
    insert(model, {"0": {"num_latents": 2}}, reduction=2, gamma_init=1.0, norm=FrozenBatchNorm)
    x = torch.randn(1, 2, *[8] * dims)
    mask = torch.zeros(1, *[8] * dims, dtype=torch.bool)
    mask[:, :4] = True
    with torch.no_grad(), node_mask(model, mask):
        clean = model(x)[:, :, :2]
        x[:, :, 4:] = torch.nan
        assert torch.equal(model(x)[:, :, :2], clean)
    assert clean.isfinite().all()


def test_a_mask_of_the_callers_own_wins_and_exceptions_clean_up():
    layer = LatentGNN(16, num_latents=2, gamma_init=1.0).eval()
    x, half = torch.randn(1, 16, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    half[:, 2:] = False
    with torch.no_grad():
        with node_mask(layer, torch.ones(1, 4, 4, dtype=torch.bool)):
            own, keyword = layer(x, half), layer(x, mask=half)
        assert torch.equal(own, layer(x, half))
        assert torch.equal(keyword, own)
        with pytest.raises(RuntimeError, match="stop"), node_mask(layer, half):
            raise RuntimeError("stop")
        assert not layer._forward_pre_hooks
        torch.testing.assert_close(layer(x), layer(x, torch.ones_like(half)))
        with pytest.raises(ValueError, match=r"mask of shape \(2, 4, 4\)"), node_mask(layer, half.repeat(2, 1, 1)):
            layer(x)
        with pytest.raises(TypeError, match="bool"), node_mask(layer, half.float()):
            layer(x)


def test_compiled_networks_do_not_ignore_the_mask():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1))
    insert(model, {"0": {"num_latents": 4}}, gamma_init=0.5)
    compiled = torch.compile(model.eval(), backend="aot_eager")
    x, mask = torch.randn(1, 3, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool)
    mask[:, 4:] = False
    with torch.no_grad():
        plain = compiled(x)
        with node_mask(model, mask):
            masked, expected = compiled(x), model(x)
        torch.testing.assert_close(masked, expected)
        assert not torch.allclose(masked, plain)
        torch.testing.assert_close(compiled(x), plain)
