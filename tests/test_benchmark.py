"""The benchmark measures what it says; no test here looks at a time."""

import json

import pytest
import torch
from torch import nn

from latentgnn import LatentGNN, benchmark
from latentgnn.cli import main
from latentgnn.errors import UserError

TINY = benchmark.Shape(1, 64, (9, 8), (5,))
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def result():
    peers = [name for name in benchmark.PEERS if name != "compiled reference"]
    return benchmark.compare(TINY, peers=peers, norm="frozen", rounds=2, **CPU)


def test_every_peer_is_measured(result):
    assert set(result["sides"]) == {"latentgnn", *benchmark.PEERS} - {"compiled reference"}
    assert result["refused"] == {}
    for side in result["sides"].values():
        assert side["forward_ratio"]["least"] <= side["forward_ratio"]["median"] <= side["forward_ratio"]["largest"]
        assert min(side["forward_seconds"], side["step_seconds"], side["held"], side["peak"]) > 0
    assert result["sides"]["latentgnn"]["forward_ratio"] == {"median": 1.0, "least": 1.0, "largest": 1.0}
    assert result["sides"]["reference"]["held"] > 2 * result["sides"]["latentgnn"]["held"]


def test_peers_that_a_shape_is_not_for_say_why():
    sequence = benchmark.Shape(1, 64, (400_000,), (5,))
    layer = LatentGNN(64, num_latents=5)
    for name, reason in (("LiteMLA", "two dimensions"), ("non-local", "GiB"), ("attention", "operations")):
        with pytest.raises(benchmark.Refused, match=reason):
            benchmark.PEERS[name](layer, sequence)


def test_a_wrong_peer_is_not_timed():
    x = torch.randn(1, 4, 6, 6)
    with pytest.raises(UserError, match="differs by"):
        benchmark.check("double", lambda x: 2 * x, x, x)
    with pytest.raises(UserError, match="not a finite map"):
        benchmark.check("smaller", lambda x: x[:, :2], x, None)
    with pytest.raises(UserError, match="does not feel the last"), torch.no_grad():
        benchmark.check("convolution", nn.Conv2d(4, 4, 3, padding=1), x, None)


def test_held_and_peak_bytes_are_counted():
    x = torch.randn(1000, requires_grad=True)
    size = x.numel() * 4
    module = nn.Linear(1000, 10)
    # A square keeps its input, a sine of it the square.
    assert benchmark.held_bytes(lambda x: (x * x).sin(), x, module) == 2 * size
    # Parameters are there anyway.
    assert benchmark.held_bytes(module, x, module) == size
    with torch.no_grad():
        assert benchmark.peak_bytes(lambda: (x + 1) + 1, x) == pytest.approx(3 * size, rel=0.02)
        assert benchmark.peak_bytes(lambda: x.clone().add_(1), x) == pytest.approx(2 * size, rel=0.02)


def test_sweeps_over_nodes():
    (one,) = benchmark.per_node(most=10_000, rounds=1)
    assert one["nodes"] == 10_000
    packed = benchmark.packed_against_padded([50, 3, 20], channels=16, latents=4, rounds=1)
    assert (packed["scenes"], packed["points"], packed["largest"]) == (3, 73, 50)


def test_the_plot_is_a_picture(result):
    assert benchmark.plot([result]).startswith(b"\x89PNG")


def test_the_command_writes_table_and_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "SHAPES", {"tiny": TINY})
    argv = ["benchmark", "layer", "--peers", "reference", "--rounds", "1", "--threads", "1", "--no-sweeps"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    assert "| tiny | training | reference |" in capsys.readouterr().out
    (report,) = tmp_path.glob("*.json")
    assert set(json.loads(report.read_text())["layer"]) == {"tiny frozen", "tiny training"}
    assert "| tiny | frozen | latentgnn |" in report.with_suffix(".md").read_text()


def test_unknown_names_are_refused(capsys):
    assert main(["benchmark", "layer", "--shapes", "C33"]) == 2
    assert "did you mean C3" in capsys.readouterr().err
    assert main(["benchmark", "layer", "--device", "cdua"]) == 2
    assert "choose from" in capsys.readouterr().err
    assert main(["benchmark", "layer", "--rounds", "0"]) == 2
    assert "1 or more" in capsys.readouterr().err


def test_the_cost_command_counts_the_layers_parameters(capsys):
    argv = ["cost", "--channels", "64", "--size", "10x12", "--latents", "8,4", "--graph-conv"]
    assert main(argv) == 0
    layer = LatentGNN(64, num_latents=(8, 4), graph_conv=True)
    shown = capsys.readouterr().out
    assert f"{sum(parameter.numel() for parameter in layer.parameters()):,}" in shown
    # What is not counted with batch statistics is not shown for them.
    (operations,) = [line for line in shown.splitlines() if line.startswith("forward operations")]
    assert operations.split().count("-") == 1
    assert main(["cost", "--channels", "60", "--size", "10", "--latents", "8"]) == 2
    assert "divisible" in capsys.readouterr().err
    assert main(["cost", "--channels", "64", "--size", "10x0", "--latents", "8"]) == 2
    assert "expected numbers from 1 on" in capsys.readouterr().err
