"""What `capture` sees is what the published equations say, and nothing stays behind."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from sweep import CONFIGS, NORMS, make_input, make_layer, relative_error
from torch import Tensor, nn

import latentgnn
from latentgnn import LatentGNN, PackedLatentGNN, insert, node_mask, reference
from latentgnn.inspection import capture
from latentgnn.norms import uses_batch_statistics


def lines(seen, block, count, sample, kernel, group, way="row") -> Tensor:
    ask = getattr(seen, way)
    return torch.stack([ask(block, n, sample=sample, kernel=kernel, group=group).flatten() for n in range(count)])


def dense(seen, block, sample=0) -> Tensor:
    """The affinities of all kernels and groups, row by row: (kernels, groups, N, N)."""
    found = seen.sample(block, sample)
    return torch.stack(
        [
            torch.stack([lines(seen, block, found.nodes, sample, k, g) for g in range(len(found.values))])
            for k in range(len(found.kernels))
        ]
    )


def as_packed(layer: LatentGNN) -> PackedLatentGNN:
    packed = PackedLatentGNN.from_config(layer.config, dtype=torch.float64).train(layer.training)
    packed.load_state_dict(layer.state_dict())
    return packed


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("config", CONFIGS)
def test_rows_and_columns_are_those_of_the_dense_affinity(config: str, norm: str, training: bool) -> None:
    layer, x = make_layer(config, norm, training=training), make_input(2, 32, 3, 4)
    wanted = reference.dense_affinity(make_layer(config, norm.removesuffix("2d"), training=training), x)
    with capture(layer) as seen:
        layer(x)
    for sample in range(2):
        found = dense(seen, 0, sample)
        assert relative_error(found, wanted[sample]) < 1e-10
        for way, expected in (("row", wanted[sample]), ("column", wanted[sample].mT)):
            mean = lines(seen, 0, 12, sample, None, None, way)
            assert relative_error(mean, expected.mean((0, 1))) < 1e-10


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "tracked_instance"])
def test_looking_changes_no_output_no_gradient_and_no_statistic(norm: str) -> None:
    layer, x = make_layer("graph_conv_two_kernels", norm, training=True), make_input(2, 32, 3, 4)
    twin = copy.deepcopy(layer)
    results = []
    for module, looked in ((layer, True), (twin, False)):
        given = x.clone().requires_grad_()
        if looked:
            with capture(module):
                out = module(given)
        else:
            out = module(given)
        out.square().sum().backward()
        results.append([out, given.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)


def test_off_it_costs_nothing() -> None:
    """No hook, no attribute, no tensor saved more: before, inside, and after."""
    layer, x = make_layer("asymmetric"), make_input(1, 32, 3, 4).requires_grad_()

    def traces() -> tuple[list[str], int, set[str]]:
        saved: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
            layer(x)
        hooks = sum(len(getattr(m, name)) for m in layer.modules() for name in vars(m) if "hooks" in name)
        return [str(shape) for shape in saved], hooks, {key for m in layer.modules() for key in vars(m)}

    before = traces()
    with capture(layer) as seen:
        inside = traces()
    assert len(seen) == 1
    assert traces() == before
    assert inside[0] == before[0]
    assert before[1] == 0
    assert inside[1] > 0


def test_the_layer_reads_nothing_of_it() -> None:
    package = Path(latentgnn.__file__).parent
    names = ("layer", "points", "paths", "functional", "norms", "projections")
    files = [*(package / f"{name}.py" for name in names)]
    files += [file for folder in ("plain", "core") for file in (package / folder).glob("*.py")]
    assert len(files) > 30
    assert [file.name for file in files if "inspection" in file.read_text()] == []


def test_an_error_inside_leaves_no_hook() -> None:
    layer = LatentGNN(16, num_latents=4)
    with pytest.raises(ValueError, match="channels"), capture(layer):
        layer(torch.randn(1, 8, 3, 3))
    assert not layer._forward_hooks


def test_masks() -> None:
    """Inside the mask the affinity is that of the valid nodes alone; outside it is zero."""
    layer, x = make_layer("two_kernels"), make_input(2, 32, 3, 4)
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[0, :2], mask[1, :, 1:] = True, True
    with capture(layer) as given:
        layer(x, mask=mask)
    with capture(layer) as told, node_mask(layer, mask):
        layer(x)
    for seen in (given, told):
        for sample in range(2):
            inside = mask[sample].flatten()
            wanted = torch.zeros(2, 1, 12, 12, dtype=x.dtype)
            affinity = reference.dense_affinity(layer, x[sample].flatten(1)[None, :, inside])[0]
            wanted[..., inside.nonzero(), inside.nonzero().mT] = affinity
            assert relative_error(dense(seen, 0, sample), wanted) < 1e-10


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
@pytest.mark.parametrize("way", ["offsets", "pointcept", "batch", "unsorted", "jagged"])
def test_packed_points(way: str, norm: str) -> None:
    """Each scene has the affinity that it has alone, with its points in the order in which they came."""
    layer = make_layer("groups", norm)
    packed = as_packed(layer)
    scenes = [make_input(n, 32, seed=n) for n in (5, 7)]
    points, offsets = torch.cat(scenes), torch.tensor([0, 5, 12])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([0] * 5 + [1] * 7)
    with capture(packed) as seen:
        if way == "offsets":
            packed(points, offsets)
        elif way == "pointcept":
            packed(points, offsets[1:])
        elif way == "batch":
            packed(points, batch=index)
        elif way == "jagged":
            packed(torch.nested.nested_tensor_from_jagged(points, offsets))
        else:
            packed(points[order], batch=index[order])
    assert len(seen[0].samples) == 2
    for sample, scene in enumerate(scenes):
        here = torch.arange(len(scene)) if way != "unsorted" else order[index[order] == sample] - 5 * sample
        wanted = reference.dense_affinity(layer, scene[here].mT[None])[0]
        assert relative_error(dense(seen, 0, sample), wanted) < 1e-10


def test_tokens_and_volumes() -> None:
    layer = make_layer("asymmetric")
    x = make_input(2, 32, 2, 3, 2)
    wanted = reference.dense_affinity(layer, x)[1, 0, 0]
    with capture(layer) as seen:
        layer(x)
    assert relative_error(seen.row(0, (1, 2, 0), sample=1), wanted[10].view(2, 3, 2)) < 1e-10
    packed = as_packed(layer)
    with capture(packed) as seen:
        packed(x.flatten(2).mT, mask=torch.ones(2, 12, dtype=torch.bool))
    assert relative_error(seen.column(0, 10, sample=1), wanted[:, 10]) < 1e-10


def test_blocks_of_nodes_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make_layer("mean_symmetric", "layer"), make_input(2, 32, 3, 4)
    mask = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) > 0.3
    with capture(layer) as whole:
        layer(x, mask=mask)
    monkeypatch.setattr("latentgnn.inspection.recording.nodes_per_block", lambda device, numbers: 5)
    with capture(layer) as parts:
        layer(x, mask=mask)
    for sample in range(2):
        assert relative_error(dense(parts, 0, sample), dense(whole, 0, sample)) < 1e-13


def test_names_and_the_last_call() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1))
    insert(net, ["0", "1"], num_latents=4)
    net.eval()
    with capture(net) as seen:
        with pytest.raises(KeyError, match="has not run"):
            seen["0"]
        net(torch.randn(1, 3, 4, 4))
        net(torch.randn(2, 3, 5, 5))
    assert list(seen) == ["0.latentgnn", "1.latentgnn"]
    assert seen["0"] is seen["0.latentgnn"] is seen[0]
    assert seen["1"].samples[0].shape == (5, 5)
    assert len(seen[-1].samples) == 2
    with pytest.raises(KeyError, match=r"no block 'nowhere'; there are '0.latentgnn', '1.latentgnn'"):
        seen["nowhere"]
    with pytest.raises(KeyError, match=r"no block number 2, counted from 0; there are '0.latentgnn', '1.latentgnn'"):
        seen[2]
    for node in (np.int64(7), torch.tensor([1, 2]), [1, 2], np.array([1, 2])):
        assert torch.equal(seen.row(0, node), seen.row(0, (1, 2)))
    for node in (25, -1, (5, 0), (0, 0, 0)):
        with pytest.raises(IndexError, match=r"shape \(5, 5\): a node is a number from 0 to 24"):
            seen.row(0, node)
    for node in (2.0, (1.5, 2), "3"):
        with pytest.raises(TypeError, match="whole numbers, of the block's map"):
            seen.row(0, node)
    with pytest.raises(IndexError, match="2 samples"):
        seen.row(0, 0, sample=2)
    with pytest.raises(IndexError, match="one kernel, 0; got kernel=1"):
        seen.row(0, 0, kernel=1)
    with pytest.raises(ValueError, match="no LatentGNN"), capture(nn.Conv2d(3, 3, 1)):
        pass


def test_training_norms_see_a_packed_batch_as_the_layer_does() -> None:
    """Batch norm in training takes its statistics over the points of all scenes."""
    layer = make_layer("asymmetric", "batch", training=True)
    assert uses_batch_statistics(layer.expand.norm)
    packed, points = as_packed(layer), make_input(12, 32)
    wanted = reference.dense_affinity(copy.deepcopy(layer), points.mT[None])[0, 0, 0]
    with capture(packed) as seen:
        packed(points[None])
    assert relative_error(seen.row(0, 3), wanted[3]) < 1e-10


def test_contributions_are_the_context_s_parts() -> None:
    layer, x = make_layer("groups_graph_conv"), make_input(1, 32, 3, 4)
    with capture(layer) as seen:
        layer(x)
    affinity, values = reference.dense_affinity(layer, x)[0], seen.sample(0).values
    node = 7
    parts = torch.einsum("kgm,grm->kgrm", affinity[:, :, node], values).flatten(0, 2)  # (K R, N)
    context = parts.sum(1)
    wanted = context @ parts / context.square().sum()
    found = seen.contributions(0, node)
    assert relative_error(found.flatten(), wanted) < 1e-10
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(seen.contributions(0, node, kernel=1, group=2).sum()) == pytest.approx(1.0, abs=1e-12)


def test_autocast() -> None:
    torch.manual_seed(0)
    layer, x = LatentGNN(32, num_latents=5).eval(), torch.randn(1, 32, 6, 6)
    with capture(layer) as exact:
        layer(x)
    with capture(layer) as half, torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert half.sample(0).kernels[0].scatter.dtype == torch.bfloat16
    assert half.sample(0).kernels[0].latents.dtype == torch.float32
    assert relative_error(half.row(0, 3), exact.row(0, 3)) < 0.05


def test_change() -> None:
    layer, x = make_layer("asymmetric"), make_input(2, 32, 3, 4)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, 2] = False
    with capture(layer) as seen:
        out = layer(x, mask=mask).detach()
    for sample in range(2):
        inside = mask[sample]
        wanted = (out - x)[sample][:, inside].norm() / x[sample][:, inside].norm()
        assert seen.sample(0, sample).change == pytest.approx(float(wanted), rel=1e-12)
