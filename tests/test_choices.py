"""The made-up task behind the tables of the guide: the keys alone say what it asks."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import choices, pictures
from benchmarks.choices import FAMILIES, OBJECTS, Choice
from benchmarks.options import run


@pytest.mark.parametrize("local", [False, True])
def test_objects_say_what_their_familys_key_is_worth(local: bool) -> None:
    x, said = choices.maps(20, generator=torch.Generator().manual_seed(0), local=local)
    keys, objects, worth = x.unflatten(1, (3, FAMILIES)).unbind(1)
    marked = said >= 0
    assert (marked.flatten(1).sum(1) == FAMILIES * OBJECTS).all()
    for sample in range(20):
        for family in range(FAMILIES):
            of_key = worth[sample, family][keys[sample, family] > 0.5]
            assert of_key.shape == (1,)
            here = objects[sample, family] > 0.5
            assert (said[sample][here] == int(of_key > 0)).all()
            # Without context there is nothing to learn; with the key in the cell there is.
            assert (worth[sample, family][here].abs() > 0.5).all() == local


def test_every_parameter_has_one_group_with_the_rates_of_its_choice() -> None:
    choice = Choice(title="", rate=0.1, block_factor=5.0, gamma_factor=10.0, decay=0.2, gamma_decay=0.0)
    model = choices.network(choice)
    groups = choices.groups_of(model, choice)
    by_settings = {(group["lr"], group["weight_decay"]): group["params"] for group in groups}
    assert by_settings.keys() == {(0.1, 0.2), (0.5, 0.2), (1.0, 0.0)}
    counted = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(counted) == sorted(id(parameter) for parameter in model.parameters())
    assert by_settings[1.0, 0.0] == [model.get_parameter("1.latentgnn.gamma")]


def test_groups_that_are_measured_later_are_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--seeds", "1", "--steps", "2", "--out", str(tmp_path)]
    assert run(choices.main, [*argv, "--groups", "local"]) == 0
    assert run(choices.main, [*argv, "--groups", "gamma"]) == 0
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert list(report) == ["local", "gamma"]
    started = {title: runs[0]["gamma"][0] for title, runs in report["gamma"]["rows"].items()}
    assert started["gamma starts at 1"] == pytest.approx(1, abs=0.05)
    assert started["gamma starts at 0"] == pytest.approx(0, abs=0.05)
    assert path.with_suffix(".md").read_text().count("```json") == 2
    assert "written to" in capsys.readouterr().out


def test_pictures_of_a_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pictures.main, ["--steps", "1", "--out", str(tmp_path)]) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".svg", ".svg"]
    assert str(pictures.SIDE**2) in capsys.readouterr().out


def test_rank_and_likeness_of_rows() -> None:
    half = 0.5**0.5
    affinity = torch.tensor([[1.0, 0.0, 0.0], [2.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    figures = pictures.affinity_figures(affinity, torch.tensor([True, True, True]))
    assert figures["rank"] == 2
    assert figures["least_cosine"] == pytest.approx(half, abs=1e-3)
    assert figures["mean_cosine"] == pytest.approx((1 + 2 * half) / 3, abs=1e-3)
