"""Blocks of studies: what stays as it was drawn, and rates of a block's own."""

from typing import Any

import pytest
import torch

from benchmarks import contexts, study
from benchmarks.questions import Pairs
from benchmarks.study_rates import parameter_groups
from latentgnn import LatentGNN
from latentgnn.errors import UserError

BLOCK: dict[str, Any] = {"block": "latentgnn:LatentGNN", "num_latents": 4, "reduction": 1}
QUERIES: dict[str, Any] = {"block": "benchmarks.contexts:LearnedQueries", "latents": 4, "reduction": 1}


@pytest.mark.parametrize("reductions", [False, True])
def test_fixed_assignments_stay_and_the_rest_learns_as_in_the_layer(reductions: bool) -> None:
    """Drawn as the layer's are; the other parameters get the layer's gradients."""
    options: dict[str, Any] = {"num_latents": 4, "reduction": 1, "norm": "group_norm", "gamma_init": 1.0}
    layers = []
    for kind, more in ((LatentGNN, {}), (contexts.FixedAssignments, {"reductions": reductions})):
        torch.manual_seed(0)
        layers.append(kind(8, **options, **more))
    layer, fixed = layers
    before = {name: value.clone() for name, value in fixed.named_parameters()}
    x = torch.randn(2, 8, 5, 5)
    for each in layers:
        each(x).square().sum().backward()
    torch.optim.AdamW(fixed.parameters(), lr=0.1, weight_decay=0.1).step()
    stay = ("_assign", "_reduce") if reductions else ("_assign",)
    for name, parameter in fixed.named_parameters():
        if any(part in name for part in stay):
            assert torch.equal(parameter, before[name]), name
        else:
            torch.testing.assert_close(parameter.grad, layer.get_parameter(name).grad, msg=name)
            assert not torch.equal(parameter, before[name]), name


def test_a_block_has_a_rate_of_its_own() -> None:
    question = Pairs(size=6, columns=1, marks=6, channels=8)

    def rates(**factors: float) -> dict[str, float]:
        variant = BLOCK | factors
        network = study.build(question, variant, 0)
        of = {
            parameter: group["lr"]
            for group in parameter_groups(network, question.place, variant, 0.5)
            for parameter in group["params"]
        }
        return {name: of[parameter] for name, parameter in network.named_parameters()}

    assert set(rates().values()) == {0.5}
    assert {name.startswith("stages.1.") for name, rate in rates(block_factor=4.0).items() if rate == 2.0} == {True}
    assert {name for name, rate in rates(gamma_factor=2.0).items() if rate == 1.0} == {"stages.1.gamma"}
    both = rates(block_factor=4.0, gamma_factor=2.0)
    assert both["stages.1.gamma"] == 1.0
    assert both["stages.1.expand.weight"] == 2.0
    assert both["stages.0.0.0.weight"] == both["say.0.weight"] == 0.5
    network = study.build(question, QUERIES, 0)
    with pytest.raises(UserError, match="has no parameter gamma"):
        parameter_groups(network, question.place, QUERIES | {"gamma_factor": 2.0}, 0.5)
