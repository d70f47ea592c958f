"""The layer over chunks of its nodes: the result is that of one pass over all of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file
from sweep import CONFIGS, NORMS, make_layer, relative_error
from torch import Tensor, nn

from latentgnn import (
    Chunk,
    LatentGNN,
    LatentSums,
    PackedLatentGNN,
    backward_chunk,
    gather_chunks,
    reference,
    scatter_chunk,
    shard_nodes,
)
from latentgnn.core import inputs
from latentgnn.errors import UserError
from latentgnn.streaming import gather_chunk

OF_A_NODE = ["batch", "torchvision_frozen", "layer", "rms", "none"]
ROWS = [3, 0, 1, 5, 2]  # of each strip of an image of 11 rows


def strips(x: Tensor, mask: Tensor | None = None) -> list[Chunk]:
    masks = [None] * len(ROWS) if mask is None else mask.split(ROWS, 1)
    return [Chunk(part, own) for part, own in zip(x.split(ROWS, 2), masks, strict=True)]


def by_strips(layer: LatentGNN, chunks: Sequence[Chunk]) -> Tensor:
    sums = gather_chunks(layer, chunks)
    return torch.cat([scatter_chunk(layer, chunk, sums) for chunk in chunks], 2)


def packed(config: str = "asymmetric", norm: str = "batch", **options: Any) -> PackedLatentGNN:
    layer = PackedLatentGNN(32, reduction=4, norm=NORMS[norm], dtype=torch.float64, **CONFIGS[config], **options)
    layer.load_state_dict(make_layer(config, norm).state_dict())
    return layer.eval()


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("norm", OF_A_NODE)
@pytest.mark.parametrize("config", sorted(CONFIGS))
def test_strips_of_images_are_as_the_image(
    config: str, norm: str, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "nodes_per_block", lambda *_: 4)
    torch.manual_seed(0)
    layer, x = make_layer(config, norm), torch.randn(2, 32, 11, 3, dtype=torch.float64)
    mask = torch.rand(2, 11, 3) > 0.3
    with torch.set_grad_enabled(recorded):
        assert relative_error(by_strips(layer, strips(x)), reference.forward(layer, x)) < 1e-12
        masked = strips(x.masked_fill(~mask[:, None], torch.nan), mask)
        found = by_strips(layer, masked)
    expected = layer(x, mask)
    inside = mask[:, None].expand_as(x)
    assert relative_error(found[inside], expected[inside]) < 1e-12
    assert found[~inside].isnan().all()


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("config", ["groups_graph_conv", "mean_symmetric", "asymmetric"])
def test_parts_of_scenes_are_as_the_scenes(config: str, norm: str, recorded: bool) -> None:
    """Three scenes, of which each chunk has some points or none."""
    torch.manual_seed(0)
    layer, scenes = packed(config, norm), [torch.randn(count, 32, dtype=torch.float64) for count in (40, 25, 7)]
    counts = [(10, 0, 3), (0, 0, 0), (30, 20, 0), (0, 5, 4)]
    parts = list(zip(*(scene.split([c[i] for c in counts]) for i, scene in enumerate(scenes)), strict=True))
    chunks = [
        Chunk(torch.cat(part), offsets=torch.tensor([0, *np.cumsum(count)]))
        for part, count in zip(parts, counts, strict=True)
    ]
    with torch.set_grad_enabled(recorded):
        sums = gather_chunks(layer, chunks)
        outputs = [
            scatter_chunk(layer, chunk, sums).split(list(count)) for chunk, count in zip(chunks, counts, strict=True)
        ]
    assert sums.nodes == 72
    for index, scene in enumerate(scenes):
        found = torch.cat([output[index] for output in outputs])
        assert relative_error(found, layer(scene[None])[0]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("mode", ["parameters", "autocast"])
def test_half_precision(mode: str, norm: str, dtype: torch.dtype) -> None:
    """As far from one pass as one pass in half precision is from float64, or less."""
    torch.manual_seed(0)
    exact = make_layer("graph_conv_two_kernels", norm)
    x = torch.randn(2, 32, 11, 30, dtype=torch.float64)
    layer = make_layer("graph_conv_two_kernels", norm).to(dtype if mode == "parameters" else torch.float32)
    given = x.to(layer.expand.weight.dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=mode == "autocast"):
        found, whole = by_strips(layer, strips(given)), layer(given)
    assert found.dtype == whole.dtype
    wanted = reference.forward(exact, x)
    assert relative_error(found.double(), wanted) < 1.5 * relative_error(whole.double(), wanted)


@pytest.mark.parametrize("norm", ["batch", "frozen", "layer"])
@pytest.mark.parametrize("config", sorted(CONFIGS))
def test_three_sweeps_give_the_gradients_of_one_pass(config: str, norm: str) -> None:
    torch.manual_seed(0)
    layer, matrix = make_layer(config, norm), nn.Parameter(torch.randn(32, 4, dtype=torch.float64))
    x, target = torch.randn(2, 4, 11, 3, dtype=torch.float64), torch.randn(2, 32, 11, 3, dtype=torch.float64)
    mask = torch.rand(2, 11, 3) > 0.2
    wanted_x = x.clone().requires_grad_()
    parameters = [*layer.parameters(), matrix]

    def before(x: Tensor) -> Tensor:
        return torch.einsum("oc,bchw->bohw", matrix, x)

    ((layer(before(wanted_x), mask) - target) ** 2).sum().div(x.numel()).backward()
    wanted = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None

    parts = [part.clone().requires_grad_() for part in x.split(ROWS, 2)]
    masks, targets = mask.split(ROWS, 1), target.split(ROWS, 2)

    def chunks() -> Iterator[Chunk]:
        return (Chunk(before(part), own) for part, own in zip(parts, masks, strict=True))

    sums = gather_chunks(layer, chunks()).requires_grad_()
    for chunk, part in zip(chunks(), targets, strict=True):
        ((scatter_chunk(layer, chunk, sums) - part) ** 2).sum().div(x.numel()).backward()
    for chunk in chunks():
        backward_chunk(layer, chunk, sums)

    assert relative_error(torch.cat([part.grad for part in parts], 2), wanted_x.grad) < 1e-10
    for parameter, grad in zip(parameters, wanted, strict=True):
        assert (grad is None) == (parameter.grad is None)
        if grad is not None:
            assert relative_error(parameter.grad, grad) < 1e-10


def test_arrays_of_a_file_are_taken_as_they_are(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    points = generator.standard_normal((500, 32)).astype(np.float16)
    np.save(tmp_path / "points.npy", points)
    save_file({"points": torch.from_numpy(points)}, tmp_path / "points.safetensors")
    layer = packed().float()
    expected = layer(torch.from_numpy(points.astype(np.float32))[None])[0]

    mapped = np.load(tmp_path / "points.npy", mmap_mode="r")
    chunks = np.array_split(mapped, 3)
    sums = gather_chunks(layer, chunks)
    found = torch.cat([scatter_chunk(layer, chunk, sums) for chunk in chunks])
    assert relative_error(found, expected) < 1e-6

    with safetensors.safe_open(tmp_path / "points.safetensors", framework="pt") as file:
        of_file = file.get_slice("points")
        parts = [of_file[first : first + 150].float() for first in range(0, 500, 150)]
    sums = gather_chunks(layer, iter(parts))
    found = torch.cat([scatter_chunk(layer, part, sums) for part in parts])
    assert relative_error(found, expected) < 1e-6


def test_points_of_a_scan_are_taken_as_its_reader_gives_them(tmp_path: Path) -> None:
    laspy = pytest.importorskip("laspy")
    scan = laspy.LasData(laspy.LasHeader(point_format=3, version="1.4"))
    scan.xyz = np.random.default_rng(0).uniform(0, 100, (1000, 3))
    scan.write(tmp_path / "scan.laz")
    torch.manual_seed(0)
    layer = PackedLatentGNN(3, num_latents=4, reduction=1, gamma_init=0.5, dtype=torch.float64).eval()

    def chunks() -> Iterator[np.ndarray[Any, Any]]:
        with laspy.open(tmp_path / "scan.laz") as file:
            for points in file.chunk_iterator(300):
                yield np.stack([points.x, points.y, points.z], 1) / 100

    sums = gather_chunks(layer, chunks())
    found = torch.cat([scatter_chunk(layer, chunk, sums) for chunk in chunks()])
    whole = torch.from_numpy(np.array(laspy.read(tmp_path / "scan.laz").xyz) / 100)
    assert relative_error(found, layer(whole[None])[0]) < 1e-12


def test_sums_add_and_are_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, x = packed("groups"), torch.randn(100, 32, dtype=torch.float64)
    chunks = x.split(30)
    (gather_chunks(layer, chunks[2:]) + gather_chunks(layer, chunks[:1])).save(tmp_path / "sums.safetensors")
    sums = gather_chunks(layer, chunks[1:2], start=LatentSums.load(tmp_path / "sums.safetensors"))
    assert (sums.nodes, len(sums.counts)) == (100, 4)
    found = torch.cat([scatter_chunk(layer, chunk, sums) for chunk in chunks])
    assert relative_error(found, layer(x[None])[0]) < 1e-12


def test_the_second_sweep_may_have_other_chunks() -> None:
    torch.manual_seed(0)
    layer, x = packed("mean"), torch.randn(100, 32, dtype=torch.float64)
    sums = gather_chunks(layer, x.split(30), check=False)
    found = torch.cat([scatter_chunk(layer, chunk, sums, check=False) for chunk in x.split(7)])
    assert relative_error(found, layer(x[None])[0]) < 1e-12
    with pytest.raises(UserError, match="gathered with check=False"):
        scatter_chunk(layer, x[:30], sums)


@pytest.mark.parametrize("change", ["a number", "its sign", "the channels' order", "a node less", "the mask"])
def test_a_chunk_that_has_changed_is_told(change: str) -> None:
    torch.manual_seed(0)
    layer = packed()
    x, mask = torch.randn(1, 64, 32, dtype=torch.float64), torch.ones(1, 64, dtype=torch.bool)
    sums = gather_chunks(layer, [Chunk(x, mask)])
    scatter_chunk(layer, Chunk(x.clone(), mask), sums)
    if change == "a number":
        x[0, 3, 4] += 1e-9
    elif change == "its sign":
        x = -x
    elif change == "the channels' order":
        x = x.flip(-1)
    elif change == "a node less":
        x, mask = x[:, :-1], mask[:, :-1]
    else:
        mask[0, 5] = False
    with pytest.raises(UserError, match=r"none of the 1 that the sums were gathered from, or has changed.*check=False"):
        scatter_chunk(layer, Chunk(x, mask), sums)


def test_another_layer_or_other_weights_are_refused() -> None:
    layer, x = packed(), torch.ones(5, 32, dtype=torch.float64)
    sums = gather_chunks(layer, [x])
    with pytest.raises(UserError, match=r"fingerprint .* gather again"):
        scatter_chunk(packed("mean"), x, sums)
    with torch.no_grad():
        layer.gamma += 1
    with pytest.raises(UserError, match=r"fingerprint .* gather again"):
        scatter_chunk(layer, x, sums)
    with pytest.raises(UserError, match="two layers, or other weights of one"):
        sums + gather_chunks(layer, [x])


def test_another_type_is_refused() -> None:
    layer, x = packed().float(), torch.ones(5, 32)
    sums = gather_chunks(layer, [x])
    with (
        pytest.raises(UserError, match="products in float32, this chunk is scattered with bfloat16"),
        torch.autocast("cpu"),
    ):
        scatter_chunk(layer, x, sums)


@pytest.mark.parametrize(
    ("norm", "training", "reason"),
    [
        ("batch", True, r"BatchNorm1d in training takes statistics of all nodes: call layer.eval\(\)"),
        ("group", False, "GroupNorm may take statistics of all nodes"),
        ("instance", False, "InstanceNorm1d may take statistics of all nodes"),
    ],
)
def test_norms_over_nodes_are_refused(norm: str, training: bool, reason: str) -> None:
    layer = make_layer("asymmetric", norm, training=training)
    with pytest.raises(TypeError, match=f"LatentGNN cannot take its nodes in chunks: {reason}"):
        gather_chunks(layer, [torch.ones(1, 32, 4, dtype=torch.float64)])


def test_a_layer_whose_nodes_processes_share_is_refused(tmp_path: Path) -> None:
    layer = packed()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        shard_nodes(layer, torch.distributed.group.WORLD)
        with pytest.raises(TypeError, match=r"between processes: call latentgnn.shard_nodes\(layer, None\) first"):
            gather_chunks(layer, [torch.zeros(4, 32, dtype=torch.float64)])
    finally:
        torch.distributed.destroy_process_group()
    assert gather_chunks(shard_nodes(layer, None), [torch.zeros(4, 32, dtype=torch.float64)]).nodes == 4


def test_what_is_no_chunk_is_refused() -> None:
    layer, x = packed(), torch.ones(1, 5, 32, dtype=torch.float64)
    sums = gather_chunks(layer, [x])
    with pytest.raises(ValueError, match="there is no chunk"):
        gather_chunks(layer, [])
    with pytest.raises(
        TypeError, match="floating-point tensor or NumPy array, or a Chunk of them; got an array of int64"
    ):
        gather_chunks(layer, [np.ones((5, 32), np.int64)])
    with pytest.raises(TypeError, match="got list"):
        gather_chunks(layer, [[1.0]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"chunk 1 .*of 1 and 2 samples"):
        gather_chunks(layer, [x, torch.ones(2, 5, 32, dtype=torch.float64)])
    with pytest.raises(ValueError, match="sums are of 1 samples, this chunk has 2"):
        scatter_chunk(layer, torch.ones(2, 5, 32, dtype=torch.float64), sums, check=False)
    with pytest.raises(UserError, match=r"chunk 1 .*not finite"):
        gather_chunks(layer, [x, x * torch.nan])
    with pytest.raises(ValueError, match="have no gradients"):
        backward_chunk(layer, x, sums)
    with pytest.raises(ValueError, match="without offsets"):
        gather_chunks(make_layer("mean"), [Chunk(torch.ones(1, 32, 4, dtype=torch.float64), offsets=torch.tensor([0]))])


def test_a_file_that_holds_no_sums_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sums.safetensors"
    save_file({"sums": torch.ones(3)}, path)
    with pytest.raises(UserError, match="holds no sums of a layer"):
        LatentSums.load(path)
    path.write_bytes(b"not one")
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        LatentSums.load(path)
    with pytest.raises(UserError, match="there is no such file"):
        LatentSums.load(tmp_path / "absent.safetensors")


def test_sums_of_a_chunk_are_sums_over_its_nodes() -> None:
    """Worked out: every node has the same values and assignments, so that twice the nodes give twice the sums."""
    layer = packed()
    one, two = (gather_chunk(layer, torch.ones(count, 32, dtype=torch.float64)) for count in (1, 2))
    assert torch.allclose(two.sums, 2 * one.sums, rtol=1e-12)
    assert torch.allclose(two.weights, 2 * one.weights, rtol=1e-12)
    assert one.sums.norm() > 0
    added = one + one
    assert torch.allclose(two.sums, added.sums, rtol=1e-12)
    assert torch.allclose(two.weights, added.weights, rtol=1e-12)
    assert (two.nodes, added.nodes) == (2, 2)
