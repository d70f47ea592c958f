"""A study of blocks: what variants share, what a run is, what comes out of runs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from benchmarks import contexts, measure, questions, study, study_costs, study_report
from benchmarks.options import run
from benchmarks.questions import Pairs
from benchmarks.runs import run_folder
from latentgnn import LatentGNN
from latentgnn.errors import UserError
from tests.pages import ROOT, blocks

STUDY = """
name: small
data: benchmarks.questions:Pairs
options: {size: 6, columns: 1, marks: 7, channels: 8, batch: 2, tests: 4}
against: [none, two latents]
seeds: 2
steps: 2
variants:
  none: {}
  two latents: {block: "latentgnn:LatentGNN", num_latents: 2, reduction: 2}
  convolutions: {block: "benchmarks.contexts:Convolutions", count: 1}
"""
PAIRS = {"size": 10, "columns": 1, "marks": 12, "channels": 8, "batch": 2, "tests": 4}
PEERS: dict[str, dict[str, Any]] = {
    "latentgnn": {"block": "latentgnn:LatentGNN", "num_latents": 4, "reduction": 1},
    "convolutions": {"block": "benchmarks.contexts:Convolutions", "count": 2},
    "global": {"block": "benchmarks.contexts:GlobalContext"},
    "non-local": {"block": "benchmarks.contexts:NonLocal"},
    "slices": {"block": "benchmarks.contexts:SliceAttention", "slices": 4, "heads": 2},
    "queries": {"block": "benchmarks.contexts:LearnedQueries", "latents": 4, "reduction": 1},
}


@pytest.mark.parametrize("peer", PEERS)
def test_variants_share_their_start_and_their_data(peer: str) -> None:
    question = Pairs(**PAIRS)
    plain, other = (study.build(question, variant, seed=3) for variant in ({}, PEERS[peer]))
    shared = {name.replace("stages.0.", "stages.", 1): value for name, value in other.state_dict().items()}
    for name, value in plain.state_dict().items():
        assert torch.equal(shared[name], value), name
    assert not torch.equal(study.build(question, {}, seed=4).get_parameter("say.0.weight"), plain.say[0].weight)  # type: ignore[index,union-attr]
    for (x, said), (y, also) in zip(question.batches(3, 3), question.batches(3, 3), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(said, also)


def test_stops_go_on_and_all_runs_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, runs = tmp_path / "small.yaml", tmp_path / "runs"
    file.write_text(STUDY)
    argv = [str(file), "--runs", str(runs), "--out", str(tmp_path)]
    assert run(study.main, [*argv, "--seconds", "0"]) == 1
    assert "no run is finished" in capsys.readouterr().err
    assert json.loads((runs / "plan-small.json").read_text())[0]["runs"] == 0
    plan = study.read_study(file)
    (first, *_) = plan.runs()
    study.train(plan, *first, run_folder(runs, "none", "seed-0"), None)
    before = (runs / "none" / "seed-0" / "run.json").read_bytes()
    assert run(study.main, argv) == 0
    assert (runs / "none" / "seed-0" / "run.json").read_bytes() == before
    (path,) = tmp_path.glob("study-small-*.json")
    report = json.loads(path.read_text())
    assert {name: len(made) for name, made in report["runs"].items()} == {
        "none": 2,
        "two latents": 2,
        "convolutions": 2,
    }
    assert report["missing"] == []
    assert report["compared"]["accuracy"]["two latents"]["differences"]["none"]["seeds"] == [0, 1]
    assert str(tmp_path) not in path.read_text()
    assert path.with_suffix(".md").exists()
    assert path.with_suffix(".svg").exists()

    file.write_text(STUDY.replace("steps: 2", "steps: 3"))
    assert run(study.main, argv) == 1
    assert "was made otherwise" in capsys.readouterr().err


def test_the_pages_study_of_a_block_of_ones_own_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = {block.language: block.code for block in blocks(ROOT / "docs" / "when.md")}
    (tmp_path / "my_study.py").write_text(code["python"])
    (tmp_path / "mine.yaml").write_text(code["yaml"].replace("seeds: 5", "seeds: 2").replace("steps: 300", "steps: 1"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run(study.main, ["mine.yaml", "--runs", "runs", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert all(f"| {name} |" in told for name in ("my block", "more convolutions"))


def test_times_stand_beside_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(STUDY)
    argv = [str(file), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    plan = study.read_study(file)
    study.train(plan, "none", 0, run_folder(tmp_path / "runs", "none", "seed-0"), None)
    assert run(study.main, [*argv, "--seconds", "0", "--time", "2"]) == 0
    assert "ms a step, alone" in capsys.readouterr().out
    (path,) = tmp_path.glob("study-small-*.json")
    taken = json.loads(path.read_text())["times"]
    assert taken["batch"] == PAIRS["batch"]
    assert list(taken["seconds"]) == list(plan.variants)
    for times in taken["seconds"].values():
        assert all(len(times[what]["all"]) == 2 for what in ("step", "forward"))
        assert times["step"]["median"] > times["forward"]["median"] > 0
    assert path.with_name(f"{path.stem}-times.svg").exists()

    file.write_text(STUDY.replace("num_latents: 2", "num_latents: 4"))
    assert run(study.main, [*argv, "--seconds", "0"]) == 1
    assert "give --time again" in capsys.readouterr().err


class SquaresInTraining(torch.nn.Module):
    """Holds its input for the backward pass in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x if self.training else 2 * x


@pytest.mark.parametrize("training", [True, False])
def test_what_is_held_is_that_of_a_training_step(training: bool) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), SquaresInTraining()).train(training)
    # Both hold their inputs, 4 elements of float32 per sample each.
    assert study_costs.costs(network, torch.randn(8, 4)) == {"parameters": 20, "operations": 32, "held_bytes": 32}


@pytest.mark.parametrize("training", [True, False])
def test_costs_leave_batch_norms_as_they_were(training: bool) -> None:
    question = Pairs(**PAIRS)
    network = study.build(question, PEERS["latentgnn"], 0).train(training)
    network.get_submodule("stages.0.0").eval()
    modes = {name: module.training for name, module in network.named_modules()}
    state = {name: value.clone() for name, value in network.state_dict().items()}
    x, _ = next(question.batches(0, 1))
    found = study_costs.costs(network, x)
    trained, evaluated = copy.deepcopy(network).train(), copy.deepcopy(network).eval()
    assert found["held_bytes"] * len(x) == measure.held_bytes(trained, x, trained)
    assert found["held_bytes"] * len(x) > measure.held_bytes(evaluated, x, evaluated)
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert {"stages.0.0.1.num_batches_tracked", "stages.0.0.1.running_mean"} <= state.keys()
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_two_programs_share_the_runs(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(STUDY)
    argv = [str(file), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert run(study.main, [*argv, "--part", "2/3"]) == 0
    made = {(path.parts[-3], path.parts[-2]) for path in tmp_path.glob("runs/*/*/run.json")}
    assert made == {("two%20latents", "seed-0"), ("two%20latents", "seed-1")}
    (path,) = tmp_path.glob("study-small-*.json")
    assert len(json.loads(path.read_text())["missing"]) == 4


def test_intervals_are_those_of_scipy() -> None:
    first, second = [0.31, 0.35, 0.29, 0.4], [0.3, 0.31, 0.3, 0.33]
    pairs = [a - b for a, b in zip(first, second, strict=True)]
    expected = stats.ttest_rel(first, second).confidence_interval()
    assert study_report.interval(pairs)[1:] == pytest.approx(tuple(expected))


def test_differences_are_of_the_same_seeds() -> None:
    def runs(scores: dict[int, float]) -> list[dict[str, Any]]:
        return [{"seed": seed, "scores": {"error": score}} for seed, score in scores.items()]

    found = study_report.difference(
        {"a": runs({0: 1.0, 2: 3.0, 3: 9.0}), "b": runs({2: 2.0, 0: 0.5})}, "a", "b", "error"
    )
    assert found is not None
    assert found["seeds"] == [0, 2]
    assert found["mean"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\nsteps: 3\n", "a study has"),
        (STUDY.replace("against: [none", "against: ['no'"), "there is no variant 'no'"),
        (STUDY.replace("latentgnn:LatentGNN", "latentgnn:Latent"), "expected module:Name"),
        (STUDY.replace("none: {}", "none: {count: 1}"), "neither block nor network"),
        (STUDY.replace("none: {}", "none: {block_factor: 0.1}"), "neither block nor network"),
    ],
)
def test_a_users_mistakes(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)

    def build() -> None:
        plan = study.read_study(file)
        for variant in plan.variants.values():
            study.build(Pairs(**PAIRS), variant, 0)

    with pytest.raises(UserError, match=said):
        build()


def test_pairs_are_far_and_say_the_others_level() -> None:
    question = Pairs(size=8, columns=2, marks=20)
    x, said = question.maps(50, torch.Generator().manual_seed(0))
    assert x.shape == (50, 21, 8, 8)
    asked = torch.zeros(8, 8, dtype=torch.bool)
    asked[:, [0, 1, 6, 7]] = True
    assert ((said >= 0) == asked).all()
    assert (x[:, :20].sum(1) == asked).all()
    for marks, level, answers in zip(x[:, :20], x[:, 20], said, strict=True):
        for mark in marks[marks.flatten(1).any(1)]:
            first, other = sorted(mark.nonzero().tolist(), key=lambda place: place[1])
            assert other[1] - first[1] >= 5
            assert bool(answers[*first]) == bool(level[*other] > 0)
            assert bool(answers[*other]) == bool(level[*first] > 0)
    assert set(x[:, 20][said >= 0].tolist()) == {-1.0, 1.0}
    with pytest.raises(UserError, match="do not fit in 8 x 8"):
        Pairs(size=8, columns=2, marks=15)


def test_without_a_block_no_cell_knows_of_another() -> None:
    network = study.build(Pairs(**PAIRS), {}, 0).eval()
    x = torch.randn(1, 13, 10, 10, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x)[0, :, 4, 4].sum(), x)
    assert gradient[0].abs().sum(0).nonzero().tolist() == [[4, 4]]


def test_unmixed_is_the_layer_where_mixing_does_nothing() -> None:
    """One latent mixes with itself alone."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"reduction": 1, "node_scale": "mean", "norm": "group_norm", "gamma_init": 1.0}
    x = torch.randn(2, 8, 5, 5)

    def both(latents: int) -> tuple[Tensor, Tensor]:
        layer, unmixed = (kind(8, num_latents=latents, **options) for kind in (LatentGNN, contexts.Unmixed))
        unmixed.load_state_dict(layer.state_dict())
        return layer(x), unmixed(x)

    torch.testing.assert_close(*both(1))
    mixed, unmixed = both(4)
    assert (mixed - unmixed).abs().max() > 1e-3


def test_slices_are_those_of_the_equations() -> None:
    """Node by node, slice by slice, head by head."""
    torch.manual_seed(0)
    layer = contexts.SliceAttention(6, slices=4, heads=2)
    torch.nn.init.uniform_(layer.temperature, 0.3, 1.0)
    x = torch.randn(1, 6, 2, 3)
    nodes = [layer.norm(x[0, :, row, column]) for row in range(2) for column in range(3)]
    taken = []
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        values = [layer.values(node)[part] for node in nodes]
        weights = [
            torch.softmax(layer.project(layer.chooser(node)[part]) / layer.temperature[head, 0, 0], 0) for node in nodes
        ]
        slices = []
        for j in range(4):
            total = sum((w[j] * value for w, value in zip(weights, values, strict=True)), torch.zeros(3))
            slices.append(total / sum(w[j] for w in weights))
        mixed = []
        for z in slices:
            scores = torch.stack([layer.query(z) @ layer.key(other) / 3**0.5 for other in slices])
            parts = zip(torch.softmax(scores, 0), slices, strict=True)
            mixed.append(sum((weight * layer.value(other) for weight, other in parts), torch.zeros(3)))
        taken.append([sum((w[j] * mixed[j] for j in range(4)), torch.zeros(3)) for w in weights])
    expected = [layer.out(torch.cat([taken[0][node], taken[1][node]])) for node in range(6)]
    torch.testing.assert_close(layer(x) - x, torch.stack(expected, 1).view(1, 6, 2, 3))


class AddsTheNodes(torch.nn.Module):
    """Adds the number of nodes to every channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x + x[0, 0].numel()


def test_what_blocks_add_on_other_grids() -> None:
    question = questions.PointwiseDarcy(size=6, count=2, test_sizes=(6, 9, 12), batch=2, stages=2)
    variants = {"adds": {"block": "tests.test_study:AddsTheNodes"}, "none": {}}
    networks = {name: study.build(question, variant, 0) for name, variant in variants.items()}
    with torch.no_grad():
        scores = {name: question.score(network.eval()) for name, network in networks.items()}
    assert list(scores["adds"]) == list(question.scores)
    assert scores["adds"]["what the first block adds at 9 x 9"] == pytest.approx(81 / 36)
    assert scores["adds"]["what the first block adds at 12 x 12"] == pytest.approx(4)
    assert list(scores["none"]) == [f"relative error at {size} x {size}" for size in (6, 9, 12)]
    # The rest of the network is the same, and what is added by the blocks is not.
    for name, value in networks["none"].state_dict().items():
        assert torch.equal(networks["adds"].state_dict()[name], value)
    runs = {name: [{"seed": 0, "scores": made}] for name, made in scores.items()}
    assert list(study_report.compare(runs, ["none"], list(question.scores))["what the first block adds at 9 x 9"]) == [
        "adds"
    ]


def test_a_variant_may_be_another_network() -> None:
    question = Pairs(**PAIRS)
    channels = question.test[0].shape[1]
    variant = {"network": "torch.nn:Conv2d", "in_channels": channels, "out_channels": 2, "kernel_size": 1}
    network = study.build(question, variant, 0)
    assert isinstance(network, torch.nn.Conv2d)
    assert question.score(network.eval()).keys() == {"accuracy"}


def test_a_missing_package_is_told_before_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        STUDY.replace("convolutions: {block", "other: {network: 'not_installed:Net'}\n  convolutions: {block")
    )
    assert run(study.main, [str(file), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]) == 1
    assert "variant 'other': 'not_installed:Net': No module named 'not_installed'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("peer", PEERS)
def test_context_reaches_every_cell(peer: str) -> None:
    """All but more convolutions, once nothing is multiplied by a 0 that it starts with."""
    question = Pairs(**PAIRS)
    network = study.build(question, PEERS[peer], 0).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.stages[1].parameters():  # type: ignore[index,union-attr]
            parameter.normal_()
    x = torch.randn(1, 12 + 1, 10, 10, requires_grad=True)
    (gradient,) = torch.autograd.grad(network.stages(x)[0, :, 0, 0].sum(), x)  # type: ignore[operator]
    assert (gradient[0, :, -1, -1].abs().sum() > 0) == (peer != "convolutions")


def test_darcy_says_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train_16\.npz: there is no such file"):
        questions.Darcy(folder=str(tmp_path))
