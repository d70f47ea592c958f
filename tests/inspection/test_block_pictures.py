"""Pictures show the numbers: what lies in a figure's panels is compared with the affinity."""

import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sweep import make_input, make_layer

from latentgnn import LatentGNN, PackedLatentGNN, reference
from latentgnn.errors import UserError
from latentgnn.inspection import Seen, capture


def looked(layer: LatentGNN, *args: torch.Tensor, **kwargs: torch.Tensor) -> Seen:
    with capture(layer) as seen:
        layer(*args, **kwargs)
    return seen


def drawn(figure: Figure) -> None:
    """Lay it out, as saving would: errors come up only then."""
    figure.canvas.draw()


def test_a_row_over_a_map_and_over_the_image() -> None:
    layer, x = make_layer("two_kernels"), make_input(2, 32, 3, 4)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, :, 3] = False
    seen = looked(layer, x, mask=mask)
    figure = seen.plot(0, (2, 1), sample=1, kernel=0, image=torch.randn(3, 24, 32))
    drawn(figure)
    maps, over, _ = figure.axes
    wanted = reference.dense_affinity(layer, x[1:, :, :, :3])[0, 0, 0, 2 * 3 + 1].view(3, 3).detach().numpy()
    for axes, images in ((maps, 1), (over, 2)):
        assert len(axes.images) == images
        shown = np.ma.getdata(axes.images[-1].get_array())
        np.testing.assert_allclose(shown[:, :3], wanted, rtol=1e-9)
        assert np.ma.getmaskarray(axes.images[-1].get_array())[:, 3].all()
        assert [line.get_xydata().tolist() for line in axes.lines] == [[[1.5, 2.5]]]
    assert over.images[0].get_array().shape == (24, 32, 3)
    assert 0 <= over.images[0].get_array().min() < over.images[0].get_array().max() <= 1
    assert f"{wanted.sum():.3g}" in figure.get_suptitle()


def test_a_column_over_a_volume_and_a_sequence() -> None:
    layer, x = make_layer("asymmetric"), make_input(1, 32, 2, 3, 4)
    wanted = reference.dense_affinity(layer, x)[0, 0, 0, :, 17].view(2, 3, 4).detach().numpy()
    figure = looked(layer, x).plot(0, (1, 1, 1), listeners=True)
    drawn(figure)
    for axes, slices in zip(figure.axes, (wanted[1], wanted[:, 1], wanted[:, :, 1]), strict=False):
        np.testing.assert_allclose(axes.images[0].get_array(), slices, rtol=1e-9)
    figure = looked(layer, x.flatten(2)).plot(0, 17, listeners=True)
    drawn(figure)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), wanted.ravel(), rtol=1e-9)


@pytest.mark.parametrize("dims", [2, 3])
def test_points_from_above_and_in_perspective(dims: int) -> None:
    packed = PackedLatentGNN(16, num_latents=4).eval()
    seen = looked(packed, torch.randn(12, 16), torch.tensor([0, 5, 12]))
    points = torch.rand(7, dims)
    figure = seen.plot(0, 3, sample=1, points=points)
    drawn(figure)
    weights, above = seen.row(0, 3, sample=1), figure.axes[0]
    order = points[:, 2].argsort() if dims == 3 else torch.arange(7)
    np.testing.assert_allclose(above.collections[0].get_array(), weights[order], rtol=1e-6)
    np.testing.assert_allclose(above.collections[0].get_offsets(), points[order, :2], rtol=1e-6)
    np.testing.assert_allclose(above.lines[0].get_xydata()[0], points[3, :2], rtol=1e-6)
    assert len(figure.axes) == dims  # a bar of colours besides the views
    drawn(seen.plot_latents(0, sample=1, points=points, most=2))
    with pytest.raises(ValueError, match=r"\(7, 2\) or \(7, 3\); got \(5, 3\)"):
        seen.plot(0, 3, sample=1, points=torch.rand(5, 3))


@pytest.mark.parametrize("scatter", [False, True])
def test_a_gallery_of_latents(scatter: bool) -> None:
    seen = looked(make_layer("groups"), make_input(1, 32, 3, 4))
    figure = seen.plot_latents(0, group=1, scatter=scatter, most=2, image=np.zeros((6, 8)))
    drawn(figure)
    graph = seen.statistics(0).graphs[1]
    usage = np.array(graph.scatter_usage if scatter else graph.gather_usage)
    kernel = seen.sample(0).kernels[0]
    assert len(figure.axes) == 2
    for axes, latent in zip(figure.axes, (-usage).argsort()[:2], strict=True):
        wanted = (kernel.scatter if scatter else kernel.raw_gather)[1, latent].view(3, 4)
        np.testing.assert_allclose(axes.images[-1].get_array(), wanted, rtol=1e-9)
        assert axes.get_title() == f"latent {latent}: {usage[latent]:.1%}"
    assert f"where 2 of {len(usage)} latents {'scatter to' if scatter else 'gather from'}" in figure.get_suptitle()
    with pytest.raises(IndexError, match="2 groups"):
        seen.plot_latents(0, group=2)
    with pytest.raises(ValueError, match="the image must be"):
        seen.plot_latents(0, image=np.zeros((6, 8, 4)))


def test_without_matplotlib_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = looked(make_layer("asymmetric"), make_input(1, 32, 3, 4))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'latentgnn\[viz\]'"):
        seen.plot(0, 0)
