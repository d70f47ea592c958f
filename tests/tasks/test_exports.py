"""Exported models compute what the run's model computes, and say what they are."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch import Tensor, nn

import latentgnn
from latentgnn.cli import main
from latentgnn.errors import UserError
from latentgnn.files.outputs import LIST
from latentgnn.tasks.exporting import Exporting, Program, export
from tests.tasks.made_runs import DETECTOR, write_detector, write_network, write_segmenter

pytestmark = pytest.mark.filterwarnings("default")  # exporters warn of their own internals


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("runs") / "detector")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("runs") / "network")


def test_a_whole_detector_goes_to_one_file(detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(detector), "--to", "safetensors"]) == 0
    out = detector / "export" / "safetensors"
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.json", "README.md", LIST}
    assert "same outputs, bit for bit" in capsys.readouterr().out
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8))
    before = latentgnn.load_run(detector)
    expected = before.predict(picture)
    assert len(expected["boxes"])
    shutil.copy(out / "model.safetensors", tmp_path / "alone.safetensors")
    before.save_pretrained(tmp_path / "saved")
    for source in (out, tmp_path / "alone.safetensors", tmp_path / "saved"):
        run = latentgnn.load_run(source)
        assert run.categories == ((3, "red"), (7, "a|blue"))
        # What is on the machine that trained goes to nobody.
        assert run.config == replace(before.config, data=replace(before.config.data, root=None))
        assert all(torch.equal(value, expected[name]) for name, value in run.predict(picture).items())
    with pytest.raises(UserError, match=r"has model\.safetensors and config\.json already"):
        before.save_pretrained(tmp_path / "saved")
    # Commands take it where they take a run.
    picture.save(tmp_path / "photo.png")
    options = ["--out", str(tmp_path / "found"), "--no-pictures"]
    assert main(["predict", str(tmp_path / "alone.safetensors"), str(tmp_path / "photo.png"), *options]) == 0


def test_the_card_has_the_figures_of_the_run(detector: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(detector), "--to", "safetensors", "--out", str(out)]) == 0
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "latentgnn"
    assert card.data.pipeline_tag == "image-segmentation"
    assert card.data.license is None
    assert "Not chosen yet" in card.text
    results = card.data.eval_results
    assert results is not None
    figures = {result.metric_type: result.metric_value for result in results}
    assert figures == {"box AP": 0.25, "box AP50": 0.5, "mask AP": 0.125, "mask AP50": 0.75}
    assert "| AP50 | 0.500 | 0.750 |" in card.text
    assert "red, a\\|blue" in card.text
    assert "step 20" in card.text
    assert "/home/somebody" not in card.content
    # Alone, nothing is known of its training, and nothing is made up.
    assert main(["export", str(out), "--to", "safetensors", "--out", str(tmp_path / "again")]) == 0
    card = ModelCard.load(tmp_path / "again" / "README.md")
    assert card.data.eval_results is None
    assert "is not known" in card.text


def test_the_dense_part_of_a_detector_is_a_program(
    detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(detector), "--to", "torch", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "left out: proposals" in told
    assert "--to safetensors" in told
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    model: Any = latentgnn.load_run(detector).model
    images = [torch.rand(3, 128, 160), torch.rand(3, 96, 128)]
    model.transform.min_size, model.transform.max_size = (96,), 1000
    images[0] = images[0][:, :96, :128]
    # What torchvision's own transform makes of images that it need not resize, one of them narrower.
    images[1] = images[1][:, :, :96]
    with torch.no_grad():
        maps = model.backbone(model.transform(images)[0].tensors)
        objectness, deltas = model.rpn.head(list(maps.values()))
        batch, mask = torch.zeros(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.bool)
        for index, image in enumerate(images):
            batch[index, :, :, : image.shape[2]], mask[index, :, : image.shape[2]] = image, True
        found = program(images=batch, mask=mask)
    expected = [*maps.values(), *objectness, *deltas]
    flat = [value for values in found for value in values]
    record = json.loads((tmp_path / "out" / "config.json").read_text())["export"]
    assert len(flat) == len(expected) == len(record["outputs"])
    for ours, theirs in zip(expected, flat, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_a_point_network_runs_in_onnxruntime(network: Path, tmp_path: Path) -> None:
    assert main(["export", str(network), "--to", "onnx", "--out", str(tmp_path / "out")]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    run = latentgnn.load_run(network)
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(333, 3, generator=generator) * 6
    features = torch.rand(333, 1, generator=generator)
    hierarchy = run.model.hierarchy(points, torch.tensor([0, 100, 210, 333]))
    named = {"features": features}
    for number, level in enumerate(hierarchy):
        named |= {f"{name}_{number}": tensor for name, tensor in level._asdict().items()}
    present = {value.name for value in session.get_inputs()}
    [found] = session.run(["logits"], {name: value.numpy() for name, value in named.items() if name in present})
    with torch.no_grad():
        expected = run.model(features, hierarchy)
    assert float(expected.std(dim=0).min()) > 1e-3
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    # Classes whose ids are numbers come back from JSON.
    saved = tmp_path / "saved"
    run.save_pretrained(saved)
    assert latentgnn.load_run(saved).config.data.classes == {2: "ground", 6: "building"}


@pytest.mark.slow
def test_a_segmenter_of_images_of_any_size_runs_in_onnxruntime(tmp_path: Path) -> None:
    run = write_segmenter(tmp_path / "run")
    assert main(["export", str(run), "--to", "onnx"]) == 0
    session = onnxruntime.InferenceSession(run / "export/onnx/model.onnx", providers=["CPUExecutionProvider"])
    trained = latentgnn.load_run(run)
    generator = torch.Generator().manual_seed(5)
    # None of the sizes that it was traced with; 75 x 101 are no multiple of the network's stride.
    for shape in ((1, 3, 64, 64), (4, 3, 75, 101)):
        images = torch.rand(shape, generator=generator)
        # As the file's record says: red, green and blue in 0..1, with ImageNet's mean and deviation inside.
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        with torch.no_grad():
            expected = trained.model((images - mean) / std)["out"]
        [found] = session.run(["logits"], {"images": images.numpy()})
        assert float(expected.std()) > 1e-3
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mask_rcnn", "retinanet"])
def test_the_dense_part_of_a_detector_runs_in_onnxruntime(kind: str, tmp_path: Path) -> None:
    values = {**DETECTOR, "model": {**DETECTOR["model"], "detector": kind}}
    run = write_detector(tmp_path / "run", values)
    assert main(["export", str(run), "--to", "onnx"]) == 0
    session = onnxruntime.InferenceSession(run / "export/onnx/model.onnx", providers=["CPUExecutionProvider"])
    model: Any = latentgnn.load_run(run).model
    model.transform.min_size, model.transform.max_size = (160,), 1000
    image, mask = torch.rand(3, 160, 192), torch.ones(1, 160, 192, dtype=torch.bool)
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"images": image[None].numpy(), "mask": mask.numpy()}), strict=True))
    with torch.no_grad():
        maps = model.backbone(model.transform([image])[0].tensors)
    for level, expected in maps.items():
        torch.testing.assert_close(torch.from_numpy(found[f"map_{level}"]), expected, rtol=1e-4, atol=1e-4)


class Counts(nn.Module):
    """What a trace cannot know: each call gives something else."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Chooses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Counts(), r"torch: what was exported differs from the model by .* nothing is written"),
        (Chooses(), r"a toy cannot be exported to torch \(.*\): take --to safetensors"),
    ],
)
def test_what_computes_something_else_is_not_written(module: nn.Module, message: str, tmp_path: Path) -> None:
    program = Program(
        network=module,
        samples=[{"x": torch.ones(2)}, {"x": torch.ones(3)}],
        dynamic={"x": {0: torch.export.Dim.DYNAMIC}},
        inputs={"x": "numbers"},
        outputs={"y": "others"},
        part="a toy",
    )
    exporting = Exporting(
        model=module,
        record={},
        program=lambda: program,
        rebuild=lambda path: module,
        run=lambda model: [],
        card=lambda lines, usage: "",
    )
    with pytest.raises(UserError, match=message):
        export(exporting, "torch", tmp_path / "out", overwrite=False)
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line(detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, message in (
        ([str(tmp_path / "none"), "--to", "onnx"], 1, "there is no run folder or checkpoint at"),
        ([str(detector)], 2, "the following arguments are required: --to"),
        ([str(detector), "--to", "tflite"], 2, "invalid choice: 'tflite'"),
        ([str(detector), "--to", "torch", "--out", str(detector)], 1, "is not empty"),
    ):
        assert main(["export", *arguments]) == code
        told = capsys.readouterr().err
        assert message in told
        assert "Traceback" not in told
