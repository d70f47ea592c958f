"""Exported to ONNX, the layer runs in onnxruntime as it does here, at every batch and size."""

from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import torch
from sweep import make_input, make_layer, relative_error
from torch import Tensor, nn

from latentgnn import PackedLatentGNN

pytestmark = pytest.mark.filterwarnings("default")  # the exporter warns of its own internals
BATCH, HEIGHT, WIDTH, POINTS, BOUNDS = (torch.export.Dim(name, min=2) for name in ("b", "h", "w", "t", "s"))


def in_onnxruntime(
    layer: nn.Module, inputs: dict[str, Tensor], dynamic: dict[str, dict[int, Any]], path: Path
) -> onnxruntime.InferenceSession:
    torch.onnx.export(layer, (), path, kwargs=inputs, dynamic_shapes=dynamic, dynamo=True, verbose=False)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, **inputs: Tensor) -> Tensor:
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    assert isinstance(found, numpy.ndarray)
    return torch.from_numpy(found)


@pytest.mark.parametrize(
    ("config", "norm"), [("graph_conv_two_kernels", "batch"), ("groups_symmetric", "frozen"), ("mean", "group")]
)
def test_maps_with_dynamic_batch_and_size(config: str, norm: str, tmp_path: Path) -> None:
    layer = make_layer(config, norm).float()
    example = {"x": make_input(2, 32, 6, 8).float()}
    session = in_onnxruntime(layer, example, {"x": {0: BATCH, 2: HEIGHT, 3: WIDTH}}, tmp_path / "layer.onnx")
    for shape in [(2, 32, 6, 8), (1, 32, 9, 3), (3, 32, 1, 7)]:
        x = make_input(*shape).float()
        assert relative_error(run(session, x=x), layer(x)) < 1e-5


def test_masks(tmp_path: Path) -> None:
    layer = make_layer("graph_conv", "group").float()
    mask = torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(0)) > 0.3
    dynamic = {0: BATCH, 1: HEIGHT, 2: WIDTH}
    session = in_onnxruntime(
        layer,
        {"x": make_input(2, 32, 6, 8).float(), "mask": mask},
        {"x": {0: BATCH, 2: HEIGHT, 3: WIDTH}, "mask": dynamic},
        tmp_path / "layer.onnx",
    )
    for batch, height, width in [(2, 6, 8), (3, 4, 5)]:
        x = make_input(batch, 32, height, width).float()
        mask = torch.rand(batch, height, width, generator=torch.Generator().manual_seed(1)) > 0.3
        dirty = torch.where(mask[:, None], x, 1e3)
        assert relative_error(run(session, x=dirty, mask=mask), layer(dirty, mask)) < 1e-5


def packed(config: str, norm: str) -> PackedLatentGNN:
    layer = make_layer(config, norm)
    twin = PackedLatentGNN.from_config(layer.config).eval()
    twin.load_state_dict(layer.state_dict())
    return twin


@pytest.mark.parametrize(
    ("config", "norm"), [("graph_conv_two_kernels", "frozen"), ("symmetric", "layer"), ("mean", "group")]
)
def test_packed_points_with_any_number_of_points_and_scenes(config: str, norm: str, tmp_path: Path) -> None:
    layer = packed(config, norm)
    session = in_onnxruntime(
        layer,
        {"x": torch.randn(20, 32), "offsets": torch.tensor([0, 12, 20])},
        {"x": {0: POINTS}, "offsets": {0: BOUNDS}},
        tmp_path / "layer.onnx",
    )
    # The last leaves out the leading 0, and has an empty scene.
    for offsets in [[0, 12, 20], [0, 5, 6, 30, 41], [0, 9], [7, 7, 25]]:
        x, bounds = torch.randn(offsets[-1], 32), torch.tensor(offsets)
        assert relative_error(run(session, x=x, offsets=bounds), layer(x, bounds)) < 1e-5


def test_tokens(tmp_path: Path) -> None:
    layer = packed("groups", "batch")
    mask = torch.ones(2, 7, dtype=torch.bool)
    session = in_onnxruntime(
        layer,
        {"x": torch.randn(2, 7, 32), "mask": mask},
        {"x": {0: BATCH, 1: POINTS}, "mask": {0: BATCH, 1: POINTS}},
        tmp_path / "layer.onnx",
    )
    x, mask = torch.randn(3, 11, 32), torch.rand(3, 11, generator=torch.Generator().manual_seed(2)) > 0.4
    assert relative_error(run(session, x=x, mask=mask), layer(x, mask=mask)) < 1e-5


def test_an_index_of_scenes_cannot_be_exported() -> None:
    with pytest.raises(ValueError, match="give offsets"):
        torch.export.export(packed("asymmetric", "frozen"), (torch.randn(9, 32),), {"batch": torch.arange(9) // 3})
