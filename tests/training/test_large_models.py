import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import convnext_tiny, mobilenet_v3_small, resnet18
from training_toy import ToyTask, config, new_run, same, state_of

from latentgnn import LatentGNN, insert
from latentgnn.errors import UserError
from latentgnn.tasks.detection.config import ModelConfig
from latentgnn.tasks.detection.model import build_detector
from latentgnn.tasks.pointcloud.model import PointNetwork
from latentgnn.training.large_models import recompute, units
from latentgnn.training.loop import fit
from latentgnn.training.runs import RunFolder


def kinds(module: nn.Module) -> dict[str, int]:
    names = [type(unit).__name__ for unit in units(module)]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def test_units_are_what_a_network_repeats() -> None:
    with torch.device("meta"):
        assert kinds(resnet18()) == {"BasicBlock": 8}
        assert kinds(convnext_tiny()) == {"Conv2dNormActivation": 1, "CNBlock": 18, "Sequential": 3}
        assert kinds(mobilenet_v3_small())["InvertedResidual"] == 11
        points = PointNetwork(2, 3, widths=(8, 16), depths=(2, 1), grids=(1.0,), neighbors=4)
        assert kinds(points) == {"Stage": 2, "FeaturePropagation": 1}
    backbone = {"backbone": "timm/test_resnet", "weights_backbone": None, "blocks": {"C4": 4}, "fpn_channels": 16}
    body = build_detector(ModelConfig(**backbone), 2).backbone.body
    assert units(body)
    assert not [unit for unit in units(body) for inner in unit.modules() if isinstance(inner, LatentGNN)]


def test_no_unit_has_a_block_inside() -> None:
    points = PointNetwork(2, 3, widths=(8, 16), depths=(2, 1), grids=(1.0,), neighbors=4)
    insert(points, {"encoder.0": 4}, example_input=points.example_input())
    assert kinds(points) == {"ResidualBlock": 2, "Stage": 1, "FeaturePropagation": 1}


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


@pytest.mark.parametrize("build", [resnet18, lambda: nn.Sequential(*[Dropping() for _ in range(3)])])
def test_what_is_computed_again_is_the_same(build: Callable[[], nn.Module]) -> None:
    """Outputs, gradients and all statistics, to the bit; and what is held in between is less."""
    torch.manual_seed(0)
    model = build()
    again = copy.deepcopy(model)
    recompute(units(again))
    x = torch.randn(2, 3 if build is resnet18 else 8, 40, 40)
    held = []
    for network in (model, again):
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = network(x)
        held.append(sum(sizes.values()))
        output.square().mean().backward()
    assert same(model.state_dict(), again.state_dict())
    assert len(model.state_dict()) > 5
    gradients = [{name: value.grad for name, value in network.named_parameters()} for network in (model, again)]
    assert same(*gradients)
    parameters = sum(value.nbytes for value in model.parameters())
    assert held[1] - parameters < 0.5 * (held[0] - parameters) or build is not resnet18
    # In evaluation too, where statistics are used and not made.
    model.eval(), again.eval()
    assert torch.equal(model(x), again(x))


def nested() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(Dropping(), Dropping()), nn.Flatten(), nn.Linear(288, 1))


def test_a_run_with_activation_checkpointing_ends_as_one_without(tmp_path: Path) -> None:
    for name, on in (("with", True), ("without", False)):
        fit(ToyTask(model=nested), config(activation_checkpointing=on), new_run(tmp_path / name))
    assert same(*(state_of(RunFolder.open(tmp_path / name)) for name in ("with", "without")))


def test_combinations_that_cannot_be_right() -> None:
    with pytest.raises(UserError, match="16-mixed"):
        config(strategy="fsdp", precision="16-mixed")
    with pytest.raises(UserError, match="channels_last"):
        config(strategy="fsdp", channels_last=True)
