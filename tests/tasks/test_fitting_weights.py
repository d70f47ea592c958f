"""Weights of another model: what is taken over, in whole and in rows, and what is told of the rest."""

import pytest
import torch
from torch import nn

from latentgnn.errors import UserError
from latentgnn.tasks.weights import Rows, fit_lines, fit_weights


def network(classes: int, hidden: int = 4, *, extra: bool = False) -> nn.ModuleDict:
    layers: dict[str, nn.Module] = {"body": nn.Sequential(nn.Linear(3, hidden), nn.BatchNorm1d(hidden))}
    if extra:
        layers["block"] = nn.Sequential(nn.Linear(hidden, 2), nn.Linear(2, hidden))
    layers["head"] = nn.Linear(hidden, classes)
    return nn.ModuleDict(layers)


HEAD = ("head.weight", "head.bias")


def test_the_same_model_is_taken_over_whole() -> None:
    there, model = network(5), network(5)
    fit = fit_weights(there.state_dict(), model.state_dict(), source="run")
    model.load_state_dict(fit.state)
    assert all(torch.equal(value, there.state_dict()[name]) for name, value in model.state_dict().items())
    assert (fit.in_part, fit.anew, fit.left_out) == ({}, (), {})
    assert fit_lines(fit, "run") == ["weights: 9 of the model's 9 tensors from run"]


def test_rows_of_the_same_meaning_are_taken_over_and_the_others_keep_the_fresh_values() -> None:
    there, model = network(5), network(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pairs = [(2, 0), (0, 4)]
    rows = {"head.weight": Rows(pairs=pairs), "head.bias": Rows(pairs=pairs)}
    fit = fit_weights(there.state_dict(), model.state_dict(), source="run", rows=rows)
    model.load_state_dict(fit.state)
    for name in ("weight", "bias"):
        old, new = getattr(there["head"], name), getattr(model["head"], name)
        assert torch.equal(new[2], old[0])
        assert torch.equal(new[0], old[4])
        assert torch.equal(new[1], before[f"head.{name}"][1])
    assert fit.in_part == {"head.weight": (2, 3), "head.bias": (2, 3)}
    assert fit_lines(fit, "run")[0] == "weights: 7 of the model's 9 tensors, 2 more in part from run"
    assert "  in part: head.weight (2 of 3 rows), head.bias (2 of 3 rows)" in fit_lines(fit, "run")


def test_columns_are_rows_of_another_dimension() -> None:
    there, fresh = {"w": torch.arange(6.0).reshape(2, 3)}, {"w": torch.zeros(2, 2)}
    fit = fit_weights(there, fresh, source="run", rows={"w": Rows(pairs=[(1, 2)], dim=1)})
    assert fit.state["w"].tolist() == [[0, 2], [0, 5]]
    assert fresh["w"].sum() == 0


def test_rows_in_another_order_are_not_taken_for_the_same() -> None:
    there, fresh = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.zeros(2)}
    fit = fit_weights(there, fresh, source="run", rows={"w": Rows(pairs=[(0, 1), (1, 0)])})
    assert fit.state["w"].tolist() == [2, 1]


def test_what_does_not_fit_is_told_by_modules() -> None:
    there, model = network(5), network(3, extra=True)
    fit = fit_weights(there.state_dict(), model.state_dict(), source="run")
    assert set(fit.anew) == {
        "head.weight",
        "head.bias",
        *(f"block.{i}.{n}" for i in (0, 1) for n in ("weight", "bias")),
    }
    lines = fit_lines(fit, "run")
    assert lines[1] == "  started anew: block (4 tensors), head (2 tensors)"
    assert lines[2] == "  left out: head (2 tensors; (5, 4) instead of (3, 4); (5,) instead of (3,))"


def test_a_module_that_is_taken_together_is_not_mixed() -> None:
    there = {"a": torch.ones(1), "block.gamma": torch.ones(1), "block.w": torch.ones(7), "block.old": torch.ones(1)}
    fresh = {"a": torch.zeros(1), "block.gamma": torch.zeros(1), "block.w": torch.zeros(5)}
    fit = fit_weights(there, fresh, source="run", together=["block"])
    assert fit.state["block.gamma"].item() == 0
    assert fit.anew == ("block.gamma", "block.w")
    assert fit.left_out == {
        "block.gamma": "only a part of block fits",
        "block.w": "(7,) instead of (5,)",
        "block.old": "the model has none of this name",
    }
    del there["block.old"]
    there["block.w"] = torch.ones(5)
    assert fit_weights(there, fresh, source="run", together=["block"]).state["block.gamma"].item() == 1


def test_half_precision_is_taken_and_whole_numbers_for_broken_ones_are_not() -> None:
    fresh = {"w": torch.zeros(2), "n": torch.zeros(2)}
    fit = fit_weights({"w": torch.ones(2).half(), "n": torch.ones(2).long()}, fresh, source="run")
    assert fit.taken == ("w",)
    assert fit.left_out == {"n": "torch.int64 instead of torch.float32"}


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(UserError, match=r"^run: none of its 1 tensors fits the model; it has x, ..., and the model w"):
        fit_weights({"x": torch.ones(2)}, {"w": torch.ones(2)}, source="run")
