from dataclasses import replace

import pytest
import torch
from torch import nn

import latentgnn
from latentgnn.errors import UserError
from latentgnn.tasks.blocks import BlockConfig
from latentgnn.tasks.pointcloud.config import ModelConfig
from latentgnn.tasks.pointcloud.model import FeaturePropagation, LocalAggregation, PointNetwork, build_point_network

SMALL = {"widths": (8, 16, 24), "depths": (1, 1, 0), "grids": (0.5, 1.2), "neighbors": 6}
AWAKE = BlockConfig(reduction=4, norm="batch_norm", gamma_init=0.7, node_scale="mean")


def build(**changes):
    torch.manual_seed(0)
    return build_point_network(ModelConfig(**{**SMALL, **changes}), num_features=2, num_classes=5)


def cloud(number, *, seed=0, size=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, 3, generator=generator) * size, torch.randn(number, 2, generator=generator)


def test_local_aggregation_is_pointnets_network_on_every_pair():
    torch.manual_seed(0)
    layer = LocalAggregation(4, 6, edge=0.5).eval().double()
    x, coordinates = torch.randn(20, 4).double(), torch.rand(20, 3).double()
    centers, neighbors = coordinates[:7] + 0.1, torch.randint(0, 20, (7, 5))
    with torch.no_grad():
        layer.norm.running_mean.normal_()
        layer.norm.running_var.uniform_(0.5, 2)
        # One matrix for the features and the position together, the norm's affine map within it.
        scale = (layer.norm.running_var + layer.norm.eps).rsqrt()
        matrix = torch.cat((layer.features.weight * scale[:, None], layer.position.weight), dim=1)
        bias = layer.position.bias - layer.norm.running_mean * scale
        rows = [
            torch.stack(
                [(matrix @ torch.cat((x[j], (coordinates[j] - centers[i]) / 0.5)) + bias).relu() for j in neighbors[i]]
            ).amax(dim=0)
            for i in range(7)
        ]
        expected = torch.stack(rows) / (1 + layer.out_norm.eps) ** 0.5
        torch.testing.assert_close(layer(x, centers, coordinates, neighbors), expected)


def test_parts_without_a_backward_pass_give_the_same(monkeypatch):
    model = build().eval()
    points, features = cloud(200)
    hierarchy = model.hierarchy(points)
    whole = model(features, hierarchy)
    monkeypatch.setattr("latentgnn.tasks.pointcloud.model._NODES_AT_ONCE", 17)
    with torch.no_grad():
        torch.testing.assert_close(model(features, hierarchy), whole.detach())


def test_a_point_kept_at_the_coarser_level_takes_its_features_there():
    model = PointNetwork(2, 5, **SMALL)
    points, _ = cloud(100)
    fine, coarse = model.hierarchy(points)[:2]
    layer = FeaturePropagation(3, 3)
    layer.mix = nn.Sequential()
    features = torch.randn(len(coarse.coordinates), 3)
    raised = layer(torch.zeros(100, 0), features, fine, coarse)
    torch.testing.assert_close(raised[coarse.kept], features, atol=1e-4, rtol=1e-4)
    # Elsewhere the three nearest, by inverse squared distances.
    other = next(place for place in range(100) if place not in coarse.kept.tolist())
    apart = torch.cdist(fine.coordinates[other, None].double(), coarse.coordinates.double())[0]
    nearest = apart.topk(3, largest=False)
    weight = 1 / nearest.values**2
    expected = (features[nearest.indices].double() * (weight / weight.sum())[:, None]).sum(dim=0)
    torch.testing.assert_close(raised[other].double(), expected, atol=1e-4, rtol=1e-4)


def test_packed_scenes_are_as_if_alone():
    model = build(blocks={"L0": 4, "L1": (3, 2), "L2": 4}, block=AWAKE).eval()
    scenes = [cloud(number, seed=number) for number in (150, 40, 1)]
    points, features = (torch.cat(parts) for parts in zip(*scenes, strict=True))
    offsets = torch.tensor([0, 150, 190, 191])
    together = model(features, model.hierarchy(points, offsets))
    alone = torch.cat([model(features, model.hierarchy(points)) for points, features in scenes])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_map_coordinates_of_a_million_metres():
    model = build().eval()
    points, features = cloud(200)
    points = (points.double() * 1024).round() / 1024
    moved = points + torch.tensor([2.0**20, 2.0**22, 64.0])
    near, far = (model(features, model.hierarchy(where)) for where in (points, moved))
    assert torch.equal(near, far)


def test_blocks_bring_what_is_far_away():
    points, features = cloud(400, size=2.0)
    points[200:, 0] += 500.0
    changed = features.clone()
    changed[200:] += 3.0
    for blocks, feels in (({}, False), ({"L2": 16}, True)):
        model = build(blocks=blocks, block=replace(AWAKE, norm="layer_norm", reduction=2)).eval()
        before, after = (model(values, model.hierarchy(points))[:200] for values in (features, changed))
        moved = float((after - before).detach().abs().max())
        assert moved > 3e-4 if feels else moved == 0


def test_the_same_seed_gives_the_same_network_with_and_without_blocks():
    plain, extended = build(), build(blocks={"L1": 4})
    state = extended.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    assert {name.split(".latentgnn.")[0] for name in state if ".latentgnn." in name} == {"encoder.1"}
    # gamma starts at 0.
    points, features = cloud(100)
    torch.testing.assert_close(
        extended.eval()(features, extended.hierarchy(points)), plain.eval()(features, plain.hierarchy(points))
    )


def test_insert_and_remove_on_a_point_network():
    model = build().eval()
    points, features = cloud(100)
    hierarchy = model.hierarchy(points)
    before = model(features, hierarchy)
    options = {"example_input": model.example_input(), "norm": nn.BatchNorm1d}
    names = latentgnn.insert(model, {"encoder.1": {"num_latents": 4, "gamma_init": 1.0}}, **options)
    assert isinstance(model.encoder[1].latentgnn, latentgnn.PackedLatentGNN)
    assert all(name.startswith("encoder.1.latentgnn.") for name in names)
    model.eval()
    assert not torch.allclose(model(features, hierarchy), before)
    # A second one beside it, with the first in place.
    latentgnn.insert(model, {"encoder.2": {"num_latents": 4}}, **options)
    latentgnn.remove(model)
    torch.testing.assert_close(model(features, hierarchy), before)
    with pytest.raises(TypeError, match="offsets= or batch="):
        latentgnn.insert(model, {"decoder.0": {"num_latents": 4}}, **options)


def test_all_parameters_learn():
    model = build(blocks={"L1": 4}, block=AWAKE)
    points, features = cloud(300)
    model(features, model.hierarchy(points)).square().mean().backward()
    dead = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert dead == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (8,)}, "widths: expected 2 to 8"),
        ({"depths": (1, 1)}, "depths: expected 3"),
        ({"grids": (1.0, 0.5)}, "grids: expected 2 ascending"),
        ({"grids": (1.0,)}, "expected 2 ascending"),
        ({"neighbors": 0}, "neighbors: expected 1 to 1000"),
        ({"dropout": 1.0}, "dropout: expected"),
        ({"blocks": {"L3": 4}}, "levels among L0, L1, L2"),
        ({"blocks": {"L1": 4}, "block": BlockConfig(reduction=5)}, "model.blocks.*divisible"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        build(**changes)


def test_a_thousand_points_and_no_features():
    model = PointNetwork(0, 3, **SMALL).eval()
    points, _ = cloud(1000)
    scores = model(torch.zeros(1000, 0), model.hierarchy(points))
    assert scores.shape == (1000, 3)
    assert scores.isfinite().all()


@pytest.mark.slow
def test_a_million_points():
    model = build(blocks={"L1": 4, "L2": 4}, block=AWAKE).eval()
    points, features = cloud(1_000_000, size=60.0)
    with torch.inference_mode():
        scores = model(features, model.hierarchy(points))
    assert scores.shape == (1_000_000, 5)
    assert scores.isfinite().all()
