import copy
import pickle

import pytest
import timm
import torch
import torchvision
from timm.models import FeatureHookNet
from torch import nn

from latentgnn.insertion import insert, remove
from latentgnn.layers import LatentGNN
from latentgnn.masks import node_mask
from latentgnn.norms import FrozenBatchNorm


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(weights=None)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


HOSTS = [
    ("torchvision ResNet", resnet18, "layer3", 256),
    ("torchvision ResNet, an activation", resnet18, "maxpool", 64),
    ("torchvision ResNeXt", lambda: torchvision.models.resnext50_32x4d(weights=None), "layer2", 512),
    ("torchvision ConvNeXt", lambda: torchvision.models.convnext_tiny(weights=None), "features.3", 192),
    ("torchvision DenseNet", lambda: torchvision.models.densenet121(weights=None), "features.denseblock2", 512),
    ("torchvision R3D", lambda: torchvision.models.video.r3d_18(weights=None), "layer2", 128),
    (
        "torchvision Mask R-CNN",
        lambda: torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None),
        "backbone.body.layer2",
        512,
    ),
    ("timm ResNet", lambda: timm.create_model("resnet10t"), "layer4", 512),
    ("timm ResNeXt", lambda: timm.create_model("resnext26ts"), "stages.1", 512),
    ("timm ConvNeXt", lambda: timm.create_model("convnext_atto"), "stages.2", 160),
    ("timm ResNet, features", lambda: timm.create_model("resnet10t", features_only=True), "layer3", 256),
    ("timm ConvNeXt, features", lambda: timm.create_model("convnext_atto", features_only=True), "stages_1", 80),
    ("timm MaxViT, one size only", lambda: timm.create_model("maxvit_tiny_tf_224"), "stages.1", 128),
    ("points", lambda: nn.Sequential(nn.Conv1d(6, 40, 1), nn.ReLU()), "1", 40),
    ("half precision", lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU()).half(), "1", 16),
]


@pytest.mark.parametrize(("build", "name", "channels"), [pytest.param(*host[1:], id=host[0]) for host in HOSTS])
def test_finds_the_channels_and_undoes_itself(build, name, channels):
    model = build()
    before, modules, training = snapshot(model), [n for n, _ in model.named_modules()], model.training
    random_state = torch.get_rng_state()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(ValueError, match="num_latents"):
        insert(model, {name: {"num_latents": 0}})
    assert torch.equal(torch.get_rng_state(), random_state)  # the network was run on nothing real, and is as it was
    assert [n for n, _ in model.named_modules()] == modules

    names = insert(model, {name: {"num_latents": 4}}, reduction=4)
    block = model.get_submodule(name).latentgnn
    assert block.config.channels == channels
    assert block.gamma.dtype == next(iter(before.values())).dtype
    assert set(names) == {n for n, _ in model.named_parameters()} - set(before)
    assert all(n.startswith(f"{name}.latentgnn.") for n in names)
    assert list(names) == [n for n, _ in model.named_parameters() if n in names]
    assert model.training == training
    assert set(before) < set(model.state_dict())
    result = model.load_state_dict(before, strict=False)
    assert not result.unexpected_keys
    assert all(".latentgnn." in key for key in result.missing_keys)

    remove(model, name)
    assert_same(model, before)
    assert [n for n, _ in model.named_modules()] == modules
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize(
    ("build", "name"),
    [
        pytest.param(resnet18, "layer3", id="Sequential"),
        pytest.param(resnet18, "layer3.0", id="hook"),
        pytest.param(lambda: timm.create_model("convnext_atto"), "stages.1", id="timm stage"),
    ],
)
def test_the_block_gets_the_submodules_output_and_what_follows_gets_the_blocks(build, name):
    torch.manual_seed(0)
    model = build().eval()
    images = torch.randn(2, 3, 64, 64)
    seen = {}
    host = model.get_submodule(name)
    handle = host.register_forward_hook(lambda module, args, output: seen.update(plain=output))
    plain = model(images)
    handle.remove()
    insert(model, {name: {"num_latents": 4}}, reduction=4)
    torch.testing.assert_close(model(images), plain)  # an identity at the start

    block = host.latentgnn.eval()
    with torch.no_grad():
        block.gamma.fill_(0.7)
    following = host.register_forward_hook(lambda module, args, output: seen.update(after=output))
    with torch.no_grad():
        changed = model(images)
        torch.testing.assert_close(seen["after"], block(seen["plain"]))
    following.remove()
    assert not torch.allclose(changed, plain, rtol=1e-3)
    model.train()
    model(images).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize(
    ("network", "position", "name"), [("resnet10t", 3, "body.layer3"), ("convnext_atto", 1, "stages_1")]
)
def test_feature_extractors_by_hooks_see_the_block(network, position, name):
    model = timm.create_model(network, features_only=True, feature_cls=FeatureHookNet, out_indices=(position,)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain = model(images)[0]
        insert(model, {name: {"num_latents": 4}}, gamma_init=0.5)
        block = model.get_submodule(f"{name}.latentgnn")
        torch.testing.assert_close(model(images)[0], block(plain))
        assert not torch.allclose(block(plain), plain, rtol=1e-3)


@pytest.fixture
def convnext() -> nn.Module:
    """Blocks of both kinds: last child of a Sequential, and applied by a hook."""
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", num_classes=3)
    insert(model, {"stages.1": {"num_latents": 4}, "stages.2.blocks": {"num_latents": (4, 2)}}, gamma_init=0.5)
    return model.eval()


def test_copies_and_pickles(convnext):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = convnext(images)
        twin = copy.deepcopy(convnext)
        assert torch.equal(twin(images), expected)
        twin.get_submodule("stages.1").latentgnn.gamma.fill_(0.0)
        assert not torch.equal(twin(images), expected)
        assert torch.equal(convnext(images), expected)
        assert torch.equal(pickle.loads(pickle.dumps(convnext))(images), expected)
        remove(twin)
        assert not any("latentgnn" in name for name, _ in twin.named_modules())
        plain = timm.create_model("convnext_atto", num_classes=3).eval()
        plain.load_state_dict(twin.state_dict())
        assert torch.equal(twin(images), plain(images))


def test_compiles_and_exports(convnext):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = convnext(images)
        compiled = torch.compile(convnext, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), expected)
        torch.testing.assert_close(torch.export.export(convnext, (images,)).module()(images), expected)


def test_works_under_timms_checkpointing(convnext):
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        convnext.set_grad_checkpointing(checkpointing)
        convnext.train().zero_grad()
        convnext(images).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in convnext.named_parameters() if "latentgnn" in n})
    assert len(gradients[0]) == len([n for n, _ in convnext.named_parameters() if "latentgnn" in n])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_several_blocks_defaults_and_a_second_call():
    model = resnet18()
    names = insert(
        model,
        {"layer3": {"num_latents": 10}, "layer4": {"num_latents": 5, "symmetric": True}},
        norm=FrozenBatchNorm,
        num_latents=7,
    )
    assert model.layer3.latentgnn.config.latents == (10,)
    assert model.layer4.latentgnn.config.symmetric
    assert not model.layer3.latentgnn.config.symmetric
    assert isinstance(model.layer4.latentgnn.expand.norm, FrozenBatchNorm)
    more = insert(model, {"layer1": {}}, num_latents=3)  # the other blocks run on tensors without data too
    assert not set(more) & set(names)
    remove(model, ["layer3"])
    assert {n for n, m in model.named_modules() if isinstance(m, LatentGNN)} == {"layer1.latentgnn", "layer4.latentgnn"}


def test_pretrained_weights_load_before_and_after(tmp_path):
    torch.manual_seed(0)
    source = resnet18().eval()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    images = torch.randn(1, 3, 64, 64)
    before, after = resnet18().eval(), resnet18().eval()
    before.load_state_dict(weights)
    insert(before, {"layer2": {"num_latents": 4}})
    insert(after, {"layer2": {"num_latents": 4}})
    after.load_state_dict(weights, strict=False)
    with torch.no_grad():
        assert torch.equal(before(images), source(images))
        assert torch.equal(after(images), source(images))


class Twice(nn.Module):
    """Calls one submodule twice, another never; one gives a dict and one a tuple; `shared` is `first`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.again = nn.Conv2d(8, 8, 1)
        self.unused = nn.Conv2d(8, 8, 1)
        self.shared = self.first
        self.attention = nn.MultiheadAttention(8, 1, batch_first=True)

    def forward(self, x):
        x = self.again(self.again(self.first(x)))
        return self.attention(*[x.flatten(2).mT] * 3)


@pytest.mark.parametrize(
    ("build", "blocks", "error", "words"),
    [
        (resnet18, {"layr3": {}}, ValueError, "no submodule 'layr3' in ResNet; nearest: 'layer3'"),
        (resnet18, {"layer3.0.relu": {}}, ValueError, "called 2 times"),
        (resnet18, {"fc": {}}, TypeError, r"shape \(1, 1000\)"),
        (Twice, {"again": {}}, ValueError, "called 2 times"),
        (Twice, {"unused": {}}, ValueError, "never"),
        (Twice, {"attention": {}}, TypeError, "gives a tuple"),
        (Twice, {"first": {}, "shared": {}}, ValueError, "several of these names are one submodule"),
        (resnet18, {"layer3": {"num_latnts": 3}}, TypeError, "after 'layer3'.*num_latnts"),
        (resnet18, {"layer3": {"reduction": 7}}, ValueError, "after 'layer3', which gives 256 channels"),
        (lambda: timm.create_model("vit_tiny_patch16_224"), {"blocks.3": {}}, TypeError, r"\(1, 197, 192\)"),
        (lambda: timm.create_model("vit_tiny_patch16_224"), {"patch_embed": {}}, TypeError, r"\(1, 196, 192\)"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), {"layers.1": {}}, TypeError, r"\(1, 28, 28, 192\)"),
        (lambda: nn.Sequential(nn.Linear(3, 8)), {"0": {}}, TypeError, "pass example_input"),
        (
            lambda: nn.Sequential(nn.Linear(5, 6), nn.Conv2d(3, 8, 1), nn.Linear(3, 3)),
            {"2": {}},
            TypeError,
            "does not run.*pass as example_input",
        ),
    ],
)
def test_refuses_and_leaves_the_model_alone(build, blocks, error, words):
    model = build()
    before, modules = snapshot(model), [n for n, _ in model.named_modules()]
    good = {next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)): {}}
    with pytest.raises(error, match=words):
        insert(model, {**good, **blocks}, num_latents=4)
    assert_same(model, before)
    assert [n for n, _ in model.named_modules()] == modules
    assert not any(m._forward_hooks for m in model.modules())


def test_refuses_a_second_block_at_one_place_and_removing_none():
    model = resnet18()
    insert(model, {"layer3": {"num_latents": 4}})
    with pytest.raises(ValueError, match="'layer3' has a 'latentgnn' already"):
        insert(model, {"layer2": {"num_latents": 4}, "layer3": {"num_latents": 4}})
    assert not hasattr(model.layer2, "latentgnn")
    with pytest.raises(ValueError, match=r"no block after 'layer2'; there are blocks after 'layer3'"):
        remove(model, ["layer3", "layer2"])
    assert hasattr(model.layer3, "latentgnn")


def test_a_layer_of_the_users_own_is_not_removed():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 1)
            self.latentgnn = LatentGNN(16, num_latents=2)

        def forward(self, x):
            return self.latentgnn(self.conv(x))

    model = Net()
    insert(model, {"conv": {"num_latents": 2}})
    remove(model)
    assert isinstance(model.latentgnn, LatentGNN)
    assert not hasattr(model.conv, "latentgnn")


def test_example_input():
    class Points(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 16)
            self.norm = nn.BatchNorm1d(16)

        def forward(self, points, batch):
            return self.norm(self.linear(points).mT) * batch["weight"]

    model = Points()
    insert(model, {"norm": {"num_latents": 4}}, example_input=(torch.zeros(2, 50, 3), {"weight": torch.ones(16, 1)}))
    assert model.norm.latentgnn.config.channels == 16
    assert model.norm.num_batches_tracked == 0


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
