"""Reports and summaries: what they say of blocks that are made so, and of networks that give whatever they give."""

import json
import sys

import pytest
import torch
from sweep import make_input, make_layer
from torch import Tensor, nn

import latentgnn
from latentgnn import LatentGNN, PackedLatentGNN, insert
from latentgnn.inspection import capture, summarize
from latentgnn.inspection.comparison import difference
from latentgnn.inspection.running import run


class Net(nn.Module):
    """Two blocks, one of which changes nothing, and an output of a chosen kind."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 1)
        self.alive = LatentGNN(16, num_latents=4, reduction=2, gamma_init=0.5)
        self.asleep = LatentGNN(16, num_latents=4)
        self.unused = LatentGNN(16, num_latents=4)
        self.head = nn.Conv2d(16, 2, 1)
        self.kind = kind

    def forward(self, x: Tensor) -> object:
        y = self.head(self.asleep(self.alive(self.stem(x))))
        return {"tensor": y, "dict": {"out": y, "aux": [y, y.argmax(1)]}, "text": "no tensor"}[self.kind]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_what_a_report_says(images: Tensor) -> None:
    net = Net()
    report = latentgnn.report(net, images)
    alive, asleep = report.blocks
    assert (alive.name, asleep.name, report.not_run) == ("alive", "asleep", ("unused",))
    assert [finding.name for finding in alive.findings] == ["alive"]
    assert [finding.name for finding in asleep.findings] == ["gamma_zero"]
    assert asleep.output_change == 0
    net.eval()
    with torch.no_grad():
        whole, without = net(images), net.head(net.stem(images))
        assert alive.output_change == pytest.approx(float((without - whole).norm() / whole.norm()), rel=1e-5)
        before = net.stem(images)
        changes = [(net.alive(x[None]) - x).norm() / x.norm() for x in before]
    assert alive.statistics.change.mean == pytest.approx(float(sum(changes) / 2), rel=1e-5)
    assert 0 < alive.time_share < 1
    assert 0 < alive.time_share + asleep.time_share < 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    text = str(report)
    for shown in ("alive", "asleep", "gamma is 0", "not run: unused", "measured once", "0 of 4"):
        assert shown in text, shown
    assert json.loads(json.dumps(report.to_dict()))["blocks"][0]["statistics"]["graphs"][0]["latents"] == 4


def test_modes_come_back(images: Tensor) -> None:
    net = Net().train()
    net.alive.eval()
    latentgnn.report(net, images)
    assert net.training
    assert net.stem.training
    assert not net.alive.training
    assert not net.alive.expand.norm.training


def test_memory_is_what_autograd_holds(images: Tensor) -> None:
    """Of a network without blocks but one, whose held tensors are counted by hand."""
    net = nn.Sequential(nn.Sigmoid(), LatentGNN(16, num_latents=4, gamma_init=0.5))
    x = torch.randn(1, 16, 8, 8, requires_grad=True)
    report = latentgnn.report(net, x)
    # The sigmoid holds its output, which the block holds too: it is counted once, where it was held first.
    assert report.held_bytes >= x.nbytes
    share = report.blocks[0].memory_share
    assert share == pytest.approx(1 - x.nbytes / report.held_bytes)


@pytest.mark.parametrize(("kind", "compared"), [("dict", True), ("text", False)])
def test_outputs_of_any_kind(kind: str, compared: bool, images: Tensor) -> None:
    report = latentgnn.report(Net(kind), images)
    assert (report.blocks[0].output_change is not None) == compared
    assert report.blocks[1].output_change == (0 if compared else None)


def test_arguments_of_any_kind(images: Tensor) -> None:
    net = Net().eval()
    results = [run(net, inputs) for inputs in (images, (images,), {"x": images})]
    for result in results[1:]:
        assert torch.equal(results[0], result)


def test_differences_of_outputs() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])
    assert difference(a, b) == pytest.approx(0.2)
    assert difference([a, {"x": a}], [b, {"x": a}]) == pytest.approx(0.1)
    assert difference(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 0])) == 0.25
    assert difference(torch.zeros(2), torch.zeros(2)) == 0
    assert difference(torch.zeros(2), torch.ones(2)) == 1
    assert difference(a, torch.ones(3)) is None
    assert difference("a", "b") is None


def test_differences_of_detections() -> None:
    def found(boxes: list[list[float]], labels: list[int], scores: list[float]) -> list[dict[str, Tensor]]:
        return [
            {
                "boxes": torch.tensor(boxes).reshape(-1, 4),
                "labels": torch.tensor(labels, dtype=torch.int64),
                "scores": torch.tensor(scores),
            }
        ]

    one, two = [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]
    moved = [1.0, 0.0, 11.0, 10.0]  # IoU 9 / 11
    both = found([one, two], [1, 2], [0.8, 0.6])
    assert difference(both, both) == 0
    assert difference(both, found([moved, two], [1, 2], [0.8, 0.6])) == pytest.approx(0)
    assert difference(both, found([one, two], [1, 3], [0.8, 0.6])) == pytest.approx(1 - 2 * 0.8 / 2.8)
    assert difference(both, found([one], [1], [0.4])) == pytest.approx(1 - 2 * 0.4 / 1.8)
    assert difference(both, found([], [], [])) == 1
    assert difference(found([], [], []), found([], [], [])) == 0
    # Two boxes cannot both be of one object.
    assert difference(found([one, moved], [1, 1], [0.8, 0.6]), found([one], [1], [0.8])) == pytest.approx(1 - 1.6 / 2.2)


def test_a_detector() -> None:
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    torch.manual_seed(0)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, box_score_thresh=0.0, min_size=64, max_size=64
    )
    insert(model, {"backbone.fpn.layer_blocks.0": 4}, gamma_init=1.0, example_input=[torch.rand(3, 64, 64)])
    report = latentgnn.report(model, [torch.rand(3, 64, 64), torch.rand(3, 48, 64)])
    assert len(report.blocks) == 1
    assert report.blocks[0].output_change is not None
    assert report.blocks[0].output_change > 0


def test_findings_of_blocks_that_are_made_so(images: Tensor) -> None:
    def named(**options: object) -> set[str]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 16, 1), LatentGNN(16, **options), nn.Conv2d(16, 2, 1))  # type: ignore[arg-type]
        return {finding.name for finding in latentgnn.report(net, images).blocks[0].findings}

    assert named(num_latents=4, gamma_init=0.0) == {"gamma_zero"}
    assert "small_change" in named(num_latents=4, gamma_init=1e-5)
    assert "large_change" in named(num_latents=4, gamma_init=1e3)
    assert "query_independent" in named(num_latents=1, gamma_init=1.0)


def test_packed_points() -> None:
    layer = PackedLatentGNN(16, num_latents=4, gamma_init=0.5)
    report = latentgnn.report(layer, {"x": torch.randn(20, 16), "offsets": torch.tensor([0, 8, 20])})
    assert report.blocks[0].name == ""
    assert report.blocks[0].statistics.samples == 2
    assert "(the network itself)" in str(report)


def test_networks_without_blocks_or_that_run_none() -> None:
    with pytest.raises(ValueError, match="Conv2d has no LatentGNN"):
        latentgnn.report(nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 2, 2))

    class Lazy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match="ran none of its blocks on this batch: '0'"):
        latentgnn.report(Lazy(LatentGNN(16, num_latents=4)), torch.zeros(1, 16, 2, 2))


def test_a_summary_is_that_of_all_samples_at_once() -> None:
    layer, x = make_layer("two_kernels"), make_input(5, 32, 3, 4)
    with capture(layer) as seen:
        layer(x)
    wanted = seen.statistics(0)
    layer.train()
    loader = [(x[:2], "targets"), (x[2:4], "targets"), (x[4:], "targets")]
    found = summarize(layer, loader)[""]
    assert layer.training
    assert found.samples == 5
    flat = [json.dumps(_rounded(statistics.to_dict())) for statistics in (found, wanted)]
    assert flat[0] == flat[1]
    named = summarize(layer, loader, inputs=lambda batch: {"x": batch[0]}, progress=False)[""]
    assert named == found
    with pytest.raises(ValueError, match="no block saw a sample"):
        summarize(layer, [])


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return round(value, 9) + 0.0 if isinstance(value, float) else value


def test_a_progress_bar_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, loader = make_layer("asymmetric"), [make_input(1, 32, 2, 2)] * 2
    summarize(layer, loader)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    summarize(layer, loader)
    assert "looking" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert summarize(layer, loader)[""].samples == 2
