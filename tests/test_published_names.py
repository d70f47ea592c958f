import pytest
import torch
from sweep import make_layer

from latentgnn import FrozenBatchNorm, LatentGNN, load_published, published_state_dict


@pytest.mark.parametrize("config", ["two_kernels", "graph_conv_two_kernels", "symmetric_graph_conv", "no_residual"])
def test_round_trip(config: str) -> None:
    source, target = make_layer(config), make_layer(config, seed=9)
    load_published(target, published_state_dict(source))
    for (name, value), expected in zip(target.state_dict().items(), source.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


def test_the_published_shapes() -> None:
    state = published_state_dict(make_layer("graph_conv"))
    assert state["down_channel_v2l.0.weight"].shape == (8, 32, 1, 1)
    assert state["LatentGNN_Kernel_0.psi_l2v.0.weight"].shape == (5, 8, 1, 1)
    assert state["LatentGNN_Kernel_0.GraphConvWeight.1.running_var"].shape == (8,)
    assert state["gamma"].shape == (1,)


@pytest.mark.parametrize("prefix", ["", "featureaug3.", "module.backbone.body.featureaug4."])
def test_a_single_layer_is_found_under_any_prefix(prefix: str) -> None:
    source, target = make_layer("graph_conv"), make_layer("graph_conv", seed=9)
    state = {f"{prefix}{key}": value for key, value in published_state_dict(source).items()}
    if prefix:
        state["backbone.body.stem.conv1.weight"] = torch.zeros(1)
    load_published(target, state)
    assert torch.equal(target.expand.weight, source.expand.weight)


@pytest.mark.parametrize("prefix", ["featureaug3.", "featureaug3", "body.featureaug3", "backbone.body.featureaug3."])
def test_one_of_several_layers_is_chosen_by_the_end_of_its_prefix(prefix: str) -> None:
    sources = {index: make_layer("graph_conv", seed=index) for index in (2, 3, 4)}
    state = {
        f"backbone.body.featureaug{index}.{key}": value
        for index, source in sources.items()
        for key, value in published_state_dict(source).items()
    }
    target = make_layer("graph_conv", seed=9)
    load_published(target, state, prefix=prefix)
    assert torch.equal(target.expand.weight, sources[3].expand.weight)
    with pytest.raises(ValueError, match=r"several.*prefix=.*featureaug2\.'.*featureaug4\.'"):
        load_published(target, state)
    with pytest.raises(ValueError, match="no published layer has the prefix 'featureaug5'"):
        load_published(target, state, prefix="featureaug5")


def test_an_empty_prefix_is_the_layer_itself() -> None:
    source, target = make_layer("graph_conv"), make_layer("graph_conv", seed=9)
    load_published(target, published_state_dict(source), prefix="")
    assert torch.equal(target.expand.weight, source.expand.weight)
    with pytest.raises(ValueError, match="no published layer has the prefix ''"):
        load_published(target, {f"a.{key}": value for key, value in published_state_dict(source).items()}, prefix="")


def test_frozen_statistics_take_batch_norms_and_leave_its_counter() -> None:
    source = make_layer("graph_conv")
    target = LatentGNN(32, num_latents=5, reduction=4, graph_conv=True, norm=FrozenBatchNorm, dtype=torch.float64)
    load_published(target, published_state_dict(source))
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(target(x), source(x))


def test_every_fault_is_named_and_nothing_is_loaded() -> None:
    target = make_layer("graph_conv")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    state = published_state_dict(make_layer("graph_conv", seed=9))
    del state["gamma"]
    state["LatentGNN_Kernel_1.psi_v2l.0.weight"] = torch.zeros(5, 8, 1, 1)
    state["up_channel.0.weight"] = torch.zeros(32, 9, 1, 1)
    with pytest.raises(ValueError, match="do not fit") as caught:
        load_published(target, state)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: gamma",
        "  unexpected: LatentGNN_Kernel_1.psi_v2l.0.weight",
        "  misshapen: up_channel.0.weight is (32, 9, 1, 1), the layer's is (32, 8)",
    ]
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_no_published_layer_at_all() -> None:
    with pytest.raises(ValueError, match=r"no key ends in 'up_channel\.0\.weight'"):
        load_published(make_layer("asymmetric"), {"conv1.weight": torch.zeros(1)})


def test_groups_have_no_published_names() -> None:
    with pytest.raises(ValueError, match="num_groups=1"):
        published_state_dict(make_layer("groups"))
