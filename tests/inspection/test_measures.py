"""Measures from D x D sums are those of the dense affinity."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sweep import make_input, make_layer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from latentgnn import LatentGNN, PackedLatentGNN, reference
from latentgnn.inspection import capture


def looked(layer: LatentGNN, x: Tensor, **kwargs: Tensor):
    with capture(layer) as seen:
        layer(x, **kwargs)
    return seen


def dense_measures(affinity_NN: Tensor) -> tuple[float, float, float]:
    """Effective rank, difference between rows, and mean row sum, of a dense affinity."""
    if not affinity_NN.any():
        return 0.0, 0.0, 0.0
    values = torch.linalg.svdvals(affinity_NN)
    share = values / values.sum()
    share = share[share > 1e-12]
    unit = torch.nn.functional.normalize(affinity_NN[affinity_NN.norm(dim=1) > 0], dim=1)
    return (
        math.exp(-float((share * share.log()).sum())),
        1 - float((unit @ unit.mT).mean()),
        float(affinity_NN.sum(1).mean()),
    )


@pytest.mark.parametrize("config", ["two_kernels", "groups_graph_conv", "mean_symmetric", "symmetric", "asymmetric"])
def test_against_the_dense_affinity(config: str) -> None:
    layer, x = make_layer(config), make_input(2, 32, 4, 5)
    seen, affinity = looked(layer, x), reference.dense_affinity(layer, x).detach()
    of_all = seen.statistics(0)
    for graph in of_all.graphs:
        wanted = [dense_measures(affinity[sample, graph.kernel, graph.group]) for sample in range(2)]
        for place, name in enumerate(("effective_rank", "row_difference", "row_sum")):
            numbers = [measured[place] for measured in wanted]
            spread = getattr(graph, name)
            assert spread.mean == pytest.approx(np.mean(numbers), rel=1e-6), name
            assert spread.std == pytest.approx(np.std(numbers), rel=1e-4, abs=1e-9), name
            assert (spread.least, spread.most) == pytest.approx((min(numbers), max(numbers)), rel=1e-6), name
            one = seen.statistics(0, sample=1).graphs[of_all.graphs.index(graph)]
            assert getattr(one, name).mean == pytest.approx(numbers[1], rel=1e-6), name
        svd = torch.linalg.svdvals(affinity[:, graph.kernel, graph.group]).mean(0)[: graph.latents]
        assert graph.singular_values == pytest.approx(svd.tolist(), rel=1e-6, abs=1e-6)
        alive = affinity[:, graph.kernel, graph.group].flatten(1).any(1).double().mean()
        assert sum(graph.gather_usage) == pytest.approx(float(alive))
        assert sum(graph.scatter_usage) == pytest.approx(float(alive))
    assert len(of_all.graphs) == len(layer.config.latents) * layer.config.num_groups
    assert of_all.samples == 2
    assert of_all.nodes.mean == 20


def test_usage_is_the_part_of_all_weights_that_passes_a_latent() -> None:
    layer, x = make_layer("asymmetric"), make_input(1, 32, 4, 5)
    seen = looked(layer, x)
    kernel = seen.sample(0).kernels[0]
    p, q, a = kernel.gather[0], kernel.scatter[0], kernel.affinity[0]
    whole = float((q.mT @ a @ p).sum())
    graph = seen.statistics(0).graphs[0]
    for latent in range(5):
        only = torch.zeros(5, dtype=p.dtype)
        only[latent] = 1
        assert graph.gather_usage[latent] == pytest.approx(float((q.mT @ a @ (only[:, None] * p)).sum()) / whole)
        assert graph.scatter_usage[latent] == pytest.approx(float(((only[:, None] * q).mT @ a @ p).sum()) / whole)


def test_masked_nodes_do_not_count() -> None:
    layer, x = make_layer("asymmetric"), make_input(2, 32, 4, 5)
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[0, :3] = True
    statistics = looked(layer, x, mask=mask).statistics(0)
    alone = looked(layer, x[:1, :, :3]).statistics(0)
    assert statistics.samples == 1  # the other has no node at all
    assert statistics.nodes.mean == 15
    assert statistics.effective_rank == pytest.approx(alone.effective_rank, rel=1e-9)
    assert statistics.row_difference == pytest.approx(alone.row_difference, rel=1e-9)
    with pytest.raises(ValueError, match="no sample with a node"):
        looked(layer, x[1:], mask=mask[1:]).statistics(0)


def doctored() -> LatentGNN:
    """Without norms, so that rows of the assignments' matrices say what latents do."""
    torch.manual_seed(0)
    layer = LatentGNN(8, num_latents=5, reduction=1, norm="none", gamma_init=1.0, dtype=torch.float64)
    with torch.no_grad():
        kernel = layer.kernel_list[0]
        kernel.gather_assign.weight.abs_()
        kernel.scatter_assign.weight.abs_()
        layer.gather_reduce.weight.abs_()
        layer.scatter_reduce.weight.abs_()
    return layer


def test_dead_latents_and_duplicates_are_named() -> None:
    layer, x = doctored(), torch.rand(2, 8, 4, 4, dtype=torch.float64)
    kernel = layer.kernel_list[0]
    kernel.gather_assign.weight.data[1] *= -1  # with values that are not negative, the ReLU lets nothing through
    kernel.scatter_assign.weight.data[2] *= 1e-4
    for projection in (kernel.gather_assign, kernel.scatter_assign):
        projection.weight.data[4] = 0.5 * projection.weight.data[3]
    graph = looked(layer, x).statistics(0).graphs[0]
    assert graph.gathers_nothing == (1,)
    assert graph.is_not_read == (2,)
    assert graph.dead == (1, 2)
    assert (3, 4) in graph.duplicates
    assert graph.gather_usage[1] == 0
    assert graph.scatter_usage[2] < 1e-3


def test_one_latent_gives_rows_that_do_not_differ() -> None:
    torch.manual_seed(0)
    layer = LatentGNN(8, num_latents=1, norm="none", gamma_init=1.0).eval()
    statistics = looked(layer, torch.randn(1, 8, 5, 5)).statistics(0)
    assert statistics.effective_rank == pytest.approx(1, abs=1e-6)
    assert statistics.row_difference == pytest.approx(0, abs=1e-6)


def test_an_affinity_of_zeros() -> None:
    layer = LatentGNN(8, num_latents=2, norm="none")
    layer.kernel_list[0].gather_assign.weight.data.zero_()
    statistics = looked(layer, torch.randn(1, 8, 3, 3)).statistics(0)
    assert statistics.effective_rank == 0
    assert statistics.row_difference == 0
    assert statistics.dead == 2
    assert statistics.change.mean == 0


def test_scenes_of_packed_points_are_samples() -> None:
    layer = make_layer("asymmetric")
    packed = PackedLatentGNN.from_config(layer.config, dtype=torch.float64).eval()
    packed.load_state_dict(layer.state_dict())
    points = make_input(12, 32)
    seen = looked(packed, points, offsets=torch.tensor([0, 5, 5, 12]))
    statistics = seen.statistics(0)
    assert statistics.samples == 2
    assert (statistics.nodes.least, statistics.nodes.most) == (5, 7)
    wanted = dense_measures(reference.dense_affinity(layer, points[5:].mT[None])[0, 0, 0].detach())
    assert seen.statistics(0, sample=2).row_difference == pytest.approx(wanted[1], rel=1e-6)


class Largest(TorchDispatchMode):
    """The largest tensor, in numbers, that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_a_million_nodes_take_memory_for_a_million_nodes() -> None:
    layer = LatentGNN(8, num_latents=4, reduction=2, gamma_init=0.5).eval()
    x = torch.randn(1, 8, 1000, 1000, generator=torch.Generator().manual_seed(0))
    with Largest() as looking, torch.no_grad(), capture(layer) as seen:
        layer(x)
    assert looking.numbers <= x.numel()
    with Largest() as asking:
        row, statistics = seen.row(0, (500, 3)), seen.statistics(0)
        seen.column(0, 7)
        seen.contributions(0, 7)
    assert asking.numbers <= x.numel()
    assert row.shape == (1000, 1000)
    # The same as of every hundredth node would be, but for chance.
    with capture(layer) as fewer:
        layer(x[:, :, ::10, ::10])
    assert statistics.row_difference == pytest.approx(fewer.statistics(0).row_difference, rel=0.05)


def test_saved_arrays_give_the_affinity(tmp_path: Path) -> None:
    layer, x = make_layer("groups"), make_input(2, 32, 3, 4)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    seen = looked(layer, x, mask=mask)
    path = tmp_path / "deep" / "seen.npz"
    seen.save(path)
    with np.load(path) as arrays:
        place = "/1/kernel0"
        p, q, a = (arrays[f"{place}/{name}"] for name in ("gather", "scatter", "affinity"))
        wanted = reference.dense_affinity(layer, x)[1, 0].detach().numpy()
        np.testing.assert_allclose(q.transpose(0, 2, 1) @ a @ p, wanted, rtol=1e-10)
        np.testing.assert_allclose(arrays[f"{place}/mixed"], a @ arrays[f"{place}/latents"], rtol=1e-10)
        assert arrays["/1/shape"].tolist() == [3, 4]
        assert arrays["/1/mask"].all()
        assert float(arrays["/gamma"]) == pytest.approx(0.7)
    assert [entry.name for entry in path.parent.iterdir()] == ["seen.npz"]
