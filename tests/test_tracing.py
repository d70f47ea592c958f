import copy

import pytest
import torch
import torchvision
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from latentgnn import LatentGNN, PackedLatentGNN, insert, node_mask
from latentgnn.tracing import as_one_node


def resnet() -> nn.Module:
    """Blocks as a last child, by a hook of a module that is traced, and by a hook of one that is itself a node."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None)
    insert(model, {"layer2": 4, "layer3.0": 4, "bn1": 4}, gamma_init=0.5)
    return model.eval()


def blocks_in(graph: fx.Graph) -> list[str]:
    return [node.target for node in graph.nodes if node.op == "call_module" and "latentgnn" in node.target]


def test_a_network_with_blocks_is_traced():
    model, images = resnet(), torch.randn(2, 3, 64, 64)
    traced = fx.symbolic_trace(model)
    assert blocks_in(traced.graph) == ["layer2.latentgnn", "layer3.0.latentgnn"]
    with torch.no_grad():
        torch.testing.assert_close(traced(images), model(images))
        torch.testing.assert_close(copy.deepcopy(fx.symbolic_trace(traced))(images), model(images))
        # bn1's block runs inside the node of bn1.
        traced.bn1.latentgnn.gamma.fill_(0.0)
        assert not torch.allclose(traced(images), fx.symbolic_trace(resnet())(images), rtol=1e-3)
    assert {name for name, _ in traced.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_feature_extractors():
    model, images = resnet(), torch.randn(1, 3, 64, 64)
    seen = {}
    for name in ("layer2", "layer3.0"):
        model.get_submodule(name).latentgnn.register_forward_hook(
            lambda module, args, output, name=name: seen.update({f"{name}.latentgnn": output})
        )
    names = get_graph_node_names(model)
    assert [name for name in names[0] if "latentgnn" in name] == ["layer2.latentgnn", "layer3.0.latentgnn"]
    assert names[0] == names[1]
    extractor = create_feature_extractor(model, ["layer2", "layer3.0.latentgnn"])
    with torch.no_grad():
        features = extractor(images)
        model(images)
    torch.testing.assert_close(features, {"layer2": seen["layer2.latentgnn"], **{k: seen[k] for k in list(seen)[1:]}})


def test_a_container_whose_loop_does_not_see_the_block():
    torch.manual_seed(0)
    model = torchvision.models.densenet121(weights=None).eval()
    insert(model, {"features.denseblock2": 4}, gamma_init=0.5)
    traced, images = fx.symbolic_trace(model), torch.randn(1, 3, 64, 64)
    assert blocks_in(traced.graph) == ["features.denseblock2.latentgnn"]
    with torch.no_grad():
        torch.testing.assert_close(traced(images), model(images))


def test_masks_and_scenes_are_arguments_of_the_node():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = LatentGNN(16, num_latents=4, gamma_init=0.5)
            self.points = PackedLatentGNN(16, num_latents=4, gamma_init=0.5)

        def forward(self, x, mask, offsets):
            return self.points(self.map(x, mask=mask).flatten(2).mT.flatten(0, 1), offsets, batch=None)

    model = Net().eval()
    x, mask, offsets = torch.randn(2, 16, 3, 3), torch.rand(2, 3, 3) > 0.3, torch.tensor([0, 9, 18])
    traced = fx.symbolic_trace(model)
    calls = {node.target: node for node in traced.graph.nodes if node.op == "call_module"}
    assert {name: (len(node.args), list(node.kwargs)) for name, node in calls.items()} == {
        "map": (1, ["mask"]),
        "points": (1, ["offsets"]),
    }
    with torch.no_grad():
        torch.testing.assert_close(traced(x, mask, offsets), model(x, mask, offsets))


def test_a_traced_network_takes_a_mask():
    model = nn.Sequential(nn.Conv2d(3, 16, 1))
    insert(model, {"0": 4}, gamma_init=0.5)
    traced = fx.symbolic_trace(model.eval())
    x, mask = torch.randn(1, 3, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool)
    mask[:, 4:] = False
    with torch.no_grad():
        plain = model(x)
        with node_mask(traced, mask), node_mask(model, mask):
            torch.testing.assert_close(traced(x), model(x))
            assert not torch.allclose(traced(x), plain)


def test_the_layer_alone_is_no_network():
    layer = LatentGNN(16, num_latents=4)
    with pytest.raises(
        TypeError, match=r"LatentGNN is one node .* cannot be traced by itself.*nn\.Sequential\(layer\)"
    ):
        fx.symbolic_trace(layer)
    assert as_one_node(layer, torch.zeros(1, 16, 2, 2), mask=None) is None


def test_the_number_of_scenes_is_traced():
    class Scenes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = PackedLatentGNN(16, num_latents=3)

        def forward(self, x, batch):
            return self.layer(x, batch=batch, num_scenes=2)

    (call,) = [node for node in fx.symbolic_trace(Scenes()).graph.nodes if node.op == "call_module"]
    assert call.kwargs["num_scenes"] == 2


def test_a_block_in_a_network_of_points_is_one_node():
    class Points(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = Scenes(), nn.Linear(16, 4)

        def forward(self, x, offsets):
            return self.last(self.first(x, offsets))

    class Scenes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x, offsets):
            return self.linear(x)

    net, x, offsets = Points().eval(), torch.randn(9, 16), torch.tensor([0, 4, 9])
    insert(net, {"first": {"num_latents": 3, "gamma_init": 0.5}}, example_input=(x, offsets))
    traced = fx.symbolic_trace(net)
    assert blocks_in(traced.graph) == ["first.latentgnn"]
    torch.testing.assert_close(traced(x, offsets), net(x, offsets))
