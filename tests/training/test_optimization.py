import pytest
import torch
from torch import nn

from latentgnn.blocks import blocks_of
from latentgnn.layer import LatentGNN
from latentgnn.training.config import OptimizerConfig
from latentgnn.training.optimization import build_optimizer, parameter_groups


@pytest.fixture
def model() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), LatentGNN(16, num_latents=4), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 2, 1)
    )
    model[4].requires_grad_(False)
    return model


CONFIG = OptimizerConfig(learning_rate=0.02, weight_decay=1e-4, norm_weight_decay=0.0, block_factor=10.0)


def test_each_learning_parameter_is_in_one_group(model: nn.Module) -> None:
    ids = [id(parameter) for group in parameter_groups(model, CONFIG) for parameter in group["params"]]
    assert len(set(ids)) == len(ids)
    assert set(ids) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_rates_and_decays(model: nn.Module) -> None:
    groups = {group["name"]: group for group in parameter_groups(model, CONFIG)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "host/weights": (0.02, 1e-4),
        "host/norms": (0.02, 0.0),
        "blocks/weights": (0.2, 1e-4),
        "blocks/norms": (0.2, 0.0),
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {name: [names[id(p)] for p in group["params"]] for name, group in groups.items()}
    assert members["host/weights"] == ["0.weight", "3.weight"]
    assert members["host/norms"] == ["0.bias", "1.weight", "1.bias", "3.bias"]
    assert "2.gamma" in members["blocks/norms"]
    assert all(name.startswith("2.") for name in members["blocks/weights"] + members["blocks/norms"])


def test_shared_parameters_count_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    groups = parameter_groups(nn.Sequential(first, second), CONFIG)
    assert [len(group["params"]) for group in groups] == [1, 2]


def test_decay_of_norms_is_the_weights_own_by_default() -> None:
    groups = parameter_groups(nn.Linear(2, 2), OptimizerConfig(weight_decay=0.3))
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3]


def test_optimizers(model: nn.Module) -> None:
    assert isinstance(build_optimizer(model, OptimizerConfig(name="adamw")), torch.optim.AdamW)
    sgd = build_optimizer(model, OptimizerConfig(name="sgd", momentum=0.7))
    assert isinstance(sgd, torch.optim.SGD)
    assert {group["momentum"] for group in sgd.param_groups} == {0.7}


def test_blocks_by_name(model: nn.Module) -> None:
    assert list(blocks_of(model)) == ["2"]


def test_what_began_trained_and_what_starts_anew_have_rates_of_their_own(model: nn.Module) -> None:
    config = OptimizerConfig(learning_rate=0.02, block_factor=10.0, trained_factor=0.1, new_factor=2.0)
    trained = ("0.weight", "0.bias", "1.weight", "1.bias", "4.weight")  # the last is frozen
    groups = parameter_groups(model, config, trained)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: round(group["lr"], 6) for group in groups for p in group["params"]}
    blocks = {name for name in names.values() if name.startswith("2.")}
    expected = (
        dict.fromkeys(blocks, 0.2) | dict.fromkeys(trained[:4], 0.002) | dict.fromkeys(("3.weight", "3.bias"), 0.04)
    )
    assert rates == expected
    assert {group["name"] for group in groups} == {
        f"{owner}/{kind}" for owner in ("trained", "host", "blocks") for kind in ("weights", "norms")
    }


def test_factors_count_only_where_there_are_trained_weights(model: nn.Module) -> None:
    config = OptimizerConfig(learning_rate=0.02, trained_factor=0.5, new_factor=0.5)
    assert {group["lr"] for group in parameter_groups(model, config)} == {0.02}
    # Both alike: the groups are those of a run without trained weights.
    both = parameter_groups(model, config, ["0.weight"])
    assert {group["name"]: group["lr"] for group in both} == {
        "host/weights": 0.01,
        "host/norms": 0.01,
        "blocks/weights": 0.02,
        "blocks/norms": 0.02,
    }
