import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn

from latentgnn import FrozenBatchNorm, PackedLatentGNN, insert, remove


class PlainLoop(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


class ResidualLoop(nn.Sequential):
    def forward(self, x):
        y = x
        for i in range(len(self)):
            y = self[i](y)
        return x + y


class ListLoop(nn.ModuleList):
    def forward(self, x):
        return sum(layer(x) for layer in self)


class DictLoop(nn.ModuleDict):
    def forward(self, x):
        outputs = [x, *(self[name](x) for name in self), *(layer(x) for layer in self.values())]
        assert list(self.keys()) == ["a", "b"]
        return torch.cat([*outputs, *(layer(x) for _, layer in self.items())], 1)


class ChildrenLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(8, 8, 1), nn.ReLU()

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


def convolutions() -> list[nn.Module]:
    return [nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)]


LOOPS = [
    ("Sequential", lambda: nn.Sequential(*convolutions())),
    ("Sequential with a loop", lambda: PlainLoop(*convolutions())),
    ("Sequential with a loop and more", lambda: ResidualLoop(*convolutions())),
    ("ModuleList", lambda: ListLoop(convolutions())),
    ("ModuleDict", lambda: DictLoop(dict(zip("ab", convolutions(), strict=True)))),
    ("Module with a loop", ChildrenLoop),
    ("image pooling", lambda: torchvision.models.segmentation.deeplabv3.ASPPPooling(8, 8)),
]


@pytest.mark.parametrize("build", [pytest.param(host[1], id=host[0]) for host in LOOPS])
def test_a_block_runs_once_whatever_runs_the_children(build):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), build()).eval()
    host, kind, length = model[1], type(model[1]), len(list(model[1].children()))
    images, modules = torch.randn(2, 3, 8, 8), [n for n, _ in model.named_modules()]
    with torch.no_grad():
        plain = model(images)
        names = insert(model, {"1": 4}, gamma_init=0.5, reduction=2)
        block = host.latentgnn
        expected = block(plain)
        assert not torch.allclose(expected, plain, rtol=1e-2)
        calls = []
        counter = block.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(model(images), expected)
        assert len(calls) == 1
        counter.remove()

        assert isinstance(host, kind)
        assert repr(host).startswith(f"{kind.__name__}(")
        assert "latentgnn" in repr(host)
        assert {n for n in model.state_dict() if n in names} == set(names)
        assert block is model.get_submodule("1.latentgnn")
        assert model.train()[1].latentgnn.training
        assert not model.eval()[1].latentgnn.training
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(twin(images), expected)
            remove(twin)
            assert type(twin[1]) is kind
            torch.testing.assert_close(twin(images), plain)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), expected)
        torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), expected)
        torch.testing.assert_close(model.double()(images.double()).float(), expected)

        remove(model.float())
        assert type(host) is kind
        assert len(list(host.children())) == length
        assert [n for n, _ in model.named_modules()] == modules
        torch.testing.assert_close(model(images), plain)
        insert(model, {"1": 4})  # a second time, at the same place


@pytest.mark.parametrize("name", ["features.denseblock2", "features.transition1", "features.norm0", "features"])
def test_a_block_runs_once_in_densenet(name):
    torch.manual_seed(0)
    model = torchvision.models.densenet121(weights=None).eval()
    images, before = torch.randn(1, 3, 64, 64), list(model.state_dict())
    host, seen, calls = model.get_submodule(name), {}, []
    # A copy, as DenseNet changes what follows norm0 in place.
    host.register_forward_hook(lambda module, args, output: seen.update(output=output.clone()))
    with torch.no_grad():
        model(images)
        plain = seen["output"]
        insert(model, {name: 4}, gamma_init=0.5)
        host.latentgnn.register_forward_hook(lambda *_: calls.append(1))
        model(images)
        torch.testing.assert_close(seen["output"], host.latentgnn(plain))
    assert len(calls) == 2
    assert set(before) < set(model.state_dict())
    remove(model)
    assert list(model.state_dict()) == before


class Points(nn.Module):
    """Calls its stages with their scenes in one of several ways."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x, scale=1.0, offsets=None, batch=None):
            return self.linear(x) * scale

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stage = self.Stage()
        self.how = how

    def forward(self, x, scenes):
        args, kwargs = {
            "by name": ((x,), {"offsets": scenes}),
            "by position": ((x, 2.0, scenes), {}),
            "batch by name": ((x,), {"batch": scenes, "scale": 2.0}),
            "batch by position": ((x, 2.0, None, scenes), {}),
            "both, one empty": ((x, 2.0, None), {"batch": scenes}),
            "none": ((x,), {"offsets": None}),
        }[self.how]
        return self.stage(*args, **kwargs)


@pytest.mark.parametrize("how", ["by name", "by position", "batch by name", "batch by position", "both, one empty"])
def test_scenes_by_name_and_by_position(how):
    torch.manual_seed(0)
    model, x = Points(how).eval(), torch.randn(7, 6)
    is_index = "batch" in how or "both" in how
    scenes = torch.tensor([0, 0, 0, 0, 1, 1, 1]) if is_index else torch.tensor([0, 4, 7])
    with torch.no_grad():
        plain = model(x, scenes)
        insert(model, {"stage": 3}, example_input=(x, scenes), reduction=2, gamma_init=1.0)
        block = model.stage.latentgnn
        assert isinstance(block, PackedLatentGNN)
        expected = torch.cat([block(scene[None])[0] for scene in (plain[:4], plain[4:])])
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        for network in (model, twin):
            torch.testing.assert_close(network(x, scenes), expected)
        assert not torch.allclose(expected, block(plain[None])[0])  # scenes do matter
    with pytest.raises(TypeError, match="with offsets= or batch=, by name or by position"):
        insert(Points("none"), {"stage": 3}, example_input=(x, scenes))


@pytest.mark.parametrize(
    ("norm", "layout", "training"),
    [
        pytest.param(nn.BatchNorm1d, torch.contiguous_format, True),
        pytest.param(nn.BatchNorm1d, torch.contiguous_format, False),
        pytest.param(nn.BatchNorm1d, torch.channels_last, True),
        pytest.param(nn.BatchNorm1d, torch.channels_last, False),
        pytest.param(FrozenBatchNorm, torch.contiguous_format, True),
        pytest.param(FrozenBatchNorm, torch.channels_last, True),
        pytest.param(nn.LayerNorm, torch.contiguous_format, True),
        pytest.param(nn.LayerNorm, torch.channels_last, True),
    ],
)
def test_what_follows_may_work_in_place(norm, layout, training):
    """Against the same network without the in-place operation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(inplace=True))
    insert(model, {"0": 4}, norm=norm, gamma_init=0.5)
    other = copy.deepcopy(model)
    other[1].inplace = False
    images = torch.randn(2, 3, 8, 8).to(memory_format=layout)
    for network in (model, other):
        network.train(training)(images).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])


@pytest.mark.parametrize("training", [True, pytest.param(False)])
@pytest.mark.parametrize(
    ("build", "name"),
    [
        pytest.param(lambda: torchvision.models.resnet18(weights=None), "bn1", id="ResNet's first norm"),
        pytest.param(
            lambda: torchvision.models.resnet18(weights=None), "layer2.0.bn2", id="a norm before a residual sum"
        ),
        pytest.param(
            lambda: torchvision.models.densenet121(weights=None), "features.norm0", id="DenseNet's first norm"
        ),
    ],
)
def test_networks_that_work_in_place(build, name, training):
    torch.manual_seed(0)
    model = build().train(training)
    insert(model, {name: 4}, gamma_init=0.5)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.get_submodule(name).latentgnn.parameters())


class LastIsDifferent(nn.Sequential):
    def forward(self, x):
        for i, layer in enumerate(self):
            x = layer(x) if i == len(self) - 1 else layer(x).relu()
        return x


class LastByIndex(nn.Sequential):
    def forward(self, x):
        return self[-1](self[0](x))


class SomethingBetween(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x.relu())
        return x


class LastByName(nn.Sequential):
    def forward(self, x):
        *others, last = self.children()
        for layer in others:
            x = layer(x)
        return last(x.relu())


@pytest.mark.parametrize("host", [LastIsDifferent, LastByIndex, SomethingBetween, LastByName])
def test_a_loop_that_treats_its_last_child_in_another_way_stays_as_it_is(host):
    net = nn.Sequential(nn.Conv2d(3, 16, 1), host(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1))).eval()
    x = torch.randn(1, 3, 8, 8)
    expected = net(x)
    if host is LastByName:
        with pytest.raises(ValueError, match="has no place for a block"):
            insert(net, {"1": 4})
    else:
        insert(net, {"1": 4})
    torch.testing.assert_close(net(x), expected)


def test_a_network_that_would_run_its_block_in_a_hook_of_the_root_is_refused():
    """`torch.fx` calls a root's ``forward``, and so none of its hooks."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 1)

        def forward(self, x):
            return self.conv(x).relu()

    with pytest.raises(ValueError, match=r"the network itself .Net. would run a block in a forward hook"):
        insert(Net(), {"": 4})
    assert insert(nn.Sequential(nn.Conv2d(3, 16, 1)), {"": 4})


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:FutureWarning")
def test_parts_that_cannot_be_tried_out_are_told():
    net = torchvision.models.resnet18(weights=None)
    net.layer3 = torch.jit.script(net.layer3)
    with pytest.raises(TypeError, match="its submodule 'layer3' is scripted; insert before scripting"):
        insert(net, {"layer4": 8})
    with pytest.raises(TypeError, match=r"'0.weight' has no size yet.*run the network once before"):
        insert(nn.Sequential(nn.LazyConv2d(16, 1)), {"0": 4}, example_input=torch.randn(1, 3, 8, 8))
    with pytest.raises(TypeError, match="names must be a submodule's name or several, got 3"):
        remove(net, 3)
