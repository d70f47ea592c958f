import copy
import pickle

import pytest
import timm
import torch
import torch.nn.utils.prune
import torchvision
from safetensors.torch import load_file, save_file
from timm.models import FeatureHookNet
from torch import nn
from torch.distributed.fsdp import fully_shard

from latentgnn import FrozenBatchNorm, LatentGNN, insert, remove


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


class LoopOverChildren(nn.Module):
    """A loop that a block can neither join, as what follows it changes the output, nor be kept out of."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", nn.Conv2d(8, 8, 1))
            self.add_module("1", nn.ReLU())

        def forward(self, x):
            y = x
            for child in self.children():
                y = child(y)
            return x + y

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.loop = self.Loop()

    def forward(self, x):
        return self.loop(self.first(x))


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
        (
            resnet18,
            {"layer3": {"num_latnts": 3}},
            TypeError,
            "after 'layer3'.*'num_latnts'; did you mean 'num_latents'",
        ),
        (resnet18, {"avgpool": 8}, ValueError, r"map of one node, \(1, 512, 1, 1\).*'layer3' \(1, 256, 14, 14\)"),
        (
            LoopOverChildren,
            {"loop": 8},
            ValueError,
            r"'loop' \(Loop\) has no place.*Name one of its children \('loop.0'",
        ),
        (
            resnet18,
            {"layer3": {"reduction": 7}},
            ValueError,
            "after 'layer3', which gives 256 channels.*got 256 and 7; take a reduction that divides them, such as 4",
        ),
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


@pytest.mark.parametrize(
    ("blocks", "options", "latents"),
    [
        ({"layer3": 6}, {}, (6,)),
        ({"layer3": [6, 4]}, {}, (6, 4)),
        ({"layer3": (6, 4)}, {"num_latents": 9}, (6, 4)),
        ({"layer3": {}}, {"num_latents": 6}, (6,)),
        ("layer3", {"num_latents": 6}, (6,)),
        (["layer3"], {"num_latents": 6}, (6,)),
        (("layer3", "layer4"), {"num_latents": (6, 4)}, (6, 4)),
        (iter(["layer3"]), {"num_latents": 6}, (6,)),
    ],
)
def test_ways_to_write_blocks(blocks, options, latents):
    model = resnet18()
    assert insert(model, blocks, **options)
    assert model.layer3.latentgnn.config.latents == latents


def test_no_blocks_are_no_change():
    model = resnet18()
    assert insert(model, {}) == insert(model, []) == ()
    assert not any(isinstance(m, LatentGNN) for m in model.modules())


@pytest.mark.parametrize(
    ("blocks", "options", "error", "words"),
    [
        (3, {}, TypeError, r"blocks must be names of submodules, or a mapping.*\{'layer3': 64\}; got int"),
        (None, {}, TypeError, "got NoneType"),
        (nn.Sequential(nn.ReLU()), {}, TypeError, "got Sequential"),
        ([3], {}, TypeError, r"by strings.*got 3 \(int\)"),
        ({3: 64}, {}, TypeError, r"by strings.*got 3 \(int\)"),
        (["layer3", "layer3"], {"num_latents": 4}, ValueError, "names a submodule twice: 'layer3', 'layer3'"),
        ({"layer3": None}, {}, TypeError, r"after 'layer3' must be given as a number of latents.*got None"),
        ({"layer3": 6.0}, {}, TypeError, r"got 6.0 \(float\)"),
        ({"layer3": True}, {}, TypeError, r"got True \(bool\)"),
        ({"layer3": "64"}, {}, TypeError, r"got '64' \(str\)"),
        ({"layer3": [6.0]}, {}, TypeError, "num_latents"),
        ({"layer3": []}, {}, ValueError, "num_latents must name at least one kernel"),
        ({"layer3": 0}, {}, ValueError, "num_latents"),
        ({"layer3": 6}, {"symetric": True}, TypeError, "unknown option 'symetric'; did you mean 'symmetric'"),
        ({"layer3": {3: 4}}, {}, TypeError, "unknown option 3; there are num_latents, reduction"),
        ({"layer3": {"channels": 256}}, {"num_latents": 4}, TypeError, "leave 'channels' out"),
        ("layer3", {}, TypeError, r"after 'layer3': num_latents is missing; write \{'layer3': 64\}"),
        ({"layer3": {}}, {}, TypeError, "num_latents is missing"),
    ],
)
def test_nonsense_arguments_are_told(blocks, options, error, words):
    model = resnet18()
    with pytest.raises(error, match=words):
        insert(model, blocks, **options)
    assert not any(isinstance(m, LatentGNN) for m in model.modules())


def test_the_model_is_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        insert({}, "layer3", num_latents=4)


def test_a_map_of_one_node_counts_for_the_input_that_it_has():
    """At 32 pixels ResNet's last stage has one node, at 64 it has four."""
    with pytest.raises(ValueError, match=r"one node, .* for an input of \(1, 3, 32, 32\).*'layer3' \(1, 256, 2, 2\)"):
        insert(resnet18(), {"layer4": 4}, example_input=torch.zeros(1, 3, 32, 32))
    assert insert(resnet18(), {"layer4": 4}, example_input=torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"one node, \(1, 8, 1\)"):
        insert(nn.Sequential(nn.Conv1d(2, 8, 3), nn.AdaptiveAvgPool1d(1)), {"1": 4})


def test_the_users_hooks_do_not_see_the_trial_and_are_not_copied():
    class Hook:
        calls = 0

        def __call__(self, *args):
            self.calls += 1

        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    model, hook = resnet18(), Hook()
    handles = [model.layer3.register_forward_hook(hook), model.layer3[0].register_forward_pre_hook(hook)]
    handles.append(model.layer2[0].register_forward_hook(hook, always_call=True))
    insert(model, ["layer3", "layer2.0"], num_latents=4)
    insert(model, {"layer4": 4})  # with blocks there already
    assert hook.calls == 0
    model(torch.randn(2, 3, 64, 64))
    assert hook.calls == 3
    for handle in handles:
        handle.remove()
    remove(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_of_all_modules_do_not_see_the_trial():
    """As profilers register them."""
    model, seen = resnet18(), []
    register = torch.nn.modules.module
    handles = [
        register.register_module_forward_hook(lambda *_: seen.append("after")),
        register.register_module_forward_hook(lambda *_: seen.append("always"), always_call=True),
        register.register_module_forward_pre_hook(lambda *_: seen.append("before")),
    ]
    try:
        insert(model, {"layer3": 4})
        assert not seen
        nn.Identity()(torch.zeros(1))
        assert sorted(seen) == ["after", "always", "before"]
    finally:
        for handle in handles:
            handle.remove()
    nn.Identity()(torch.zeros(1))
    assert len(seen) == 3


@pytest.mark.parametrize("name", ["layer3.latentgnn", "layer3.latentgnn.expand.norm"])
def test_a_block_takes_no_block(name):
    model = resnet18()
    insert(model, {"layer3": 4})
    with pytest.raises(ValueError, match=f"'{name}' is part of the block after 'layer3'; name a submodule of the net"):
        insert(model, {name: 4})


def test_a_pruned_network():
    """Pruning keeps weights as results of an operation, which cannot be copied like parameters."""
    model = resnet18()
    torch.nn.utils.prune.random_unstructured(model.layer3[0].conv1, "weight", 0.5)
    insert(model, {"layer3": 4})
    assert model.layer3.latentgnn.config.channels == 256
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


def test_a_network_that_cannot_be_copied():
    model = nn.Sequential(nn.Conv2d(3, 8, 1))
    model.file = open(__file__)  # noqa: SIM115
    with model.file, pytest.raises(TypeError, match=r"Sequential cannot be copied.*by hand"):
        insert(model, {"0": 4})


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 1)))


def traced() -> nn.Module:
    return torch.jit.trace(nn.Sequential(nn.Conv2d(3, 8, 1)), torch.zeros(1, 3, 8, 8))


def compiled_in_place() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 1))
    model.compile(backend="eager")
    return model


def alone() -> None:
    """A process group of this process; the test ends it."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def distributed() -> nn.Module:
    alone()
    return nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 8, 1)))


def sharded() -> nn.Module:
    alone()
    model = nn.Sequential(nn.Conv2d(3, 8, 1))
    return fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize(
    ("build", "name", "words"),
    [
        (scripted, "0", "the network .RecursiveScriptModule. is scripted or traced.*insert into the network"),
        (traced, "0", "the network .TopLevelTracedModule. is scripted or traced"),
        (lambda: nn.Sequential(scripted()), "0.0", "'0' .RecursiveScriptModule. is scripted or traced"),
        (lambda: torch.compile(nn.Sequential(nn.Conv2d(3, 8, 1))), "_orig_mod.0", "is compiled.*compile that after"),
        (lambda: torch.compile(nn.Sequential(nn.Conv2d(3, 8, 1))), "0", "is compiled.*compile that after"),
        (compiled_in_place, "0", r"is compiled by its compile\(\): insert before"),
        (lambda: nn.DataParallel(nn.Sequential(nn.Conv2d(3, 8, 1))), "module.0", r"wrapped.*insert into its .module"),
        (distributed, "module.0", r"the network .DistributedDataParallel. is wrapped.*insert into its .module"),
        (sharded, "0", r"the network .FSDPSequential. is sharded: insert before"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_networks_that_are_closed_are_refused(build, name, words):
    try:
        model = build()
        with pytest.raises(TypeError, match=words):
            insert(model, {name: 4})
        assert not any(isinstance(m, LatentGNN) for m in model.modules())
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_what_is_compiled_elsewhere_does_not_matter():
    model = resnet18()
    model.layer1.compile(backend="eager")
    insert(model, {"layer3": 4})
    assert model.layer3.latentgnn.config.channels == 256


@pytest.mark.parametrize("saver", ["torch", "safetensors"])
def test_saved_inserted_loaded(saver, tmp_path):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)

    def extended() -> nn.Module:
        model = resnet18()
        insert(model, {"layer3": 4, "layer2.0": 4}, graph_conv=True)
        return model

    trained = extended()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        trained(images).square().mean().backward()
        optimizer.step()
    if saver == "torch":
        torch.save(trained.state_dict(), tmp_path / "weights.pt")
        weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    else:
        save_file(trained.state_dict(), tmp_path / "weights.safetensors")
        weights = load_file(tmp_path / "weights.safetensors")
    fresh = extended()
    assert fresh.load_state_dict(weights, strict=True)
    assert fresh.layer3.latentgnn.gamma != 0
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images), trained.eval()(images))
