import copy
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.multiprocessing as mp
from sweep import make_input, make_layer, relative_error
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from latentgnn import FrozenBatchNorm, LatentGNN, reference
from latentgnn.batch_statistics import update_running
from latentgnn.norms import NORMS, group_norm


def test_frozen_batch_norm_is_torchvisions() -> None:
    ours, theirs = FrozenBatchNorm(5), FrozenBatchNorm2d(5)
    state = {name: torch.rand(5) + 0.5 for name in ours.state_dict()}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(ours(x.flatten(2)).view_as(x), theirs(x))
    assert not list(ours.parameters())


def test_frozen_batch_norm_made_without_data_can_be_reset() -> None:
    layer = LatentGNN(16, num_latents=3, norm=FrozenBatchNorm, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    fresh = FrozenBatchNorm(layer.expand.norm.num_features).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in layer.expand.norm.state_dict().items())


@pytest.mark.parametrize("channels", [1, 5, 32, 48, 150, 256])
def test_group_norm_fits_any_channel_count(channels: int) -> None:
    norm = group_norm(channels)
    assert norm.num_groups <= 32
    assert channels % norm.num_groups == 0


@pytest.mark.parametrize("name", NORMS)
def test_every_named_norm_makes_a_layer(name: str) -> None:
    layer = LatentGNN(32, num_latents=6, norm=NORMS[name], gamma_init=1.0)
    assert layer(torch.randn(2, 32, 5, 5)).isfinite().all()


@pytest.mark.parametrize(
    ("norm", "options", "growth"),
    [
        ("none", {}, 2),
        ("none", {"symmetric": True}, 4),
        ("none", {"node_scale": "mean"}, 1),
        ("none", {"node_scale": "mean", "symmetric": True}, 1),
        ("batch_norm", {}, 2),
        ("frozen_batch_norm", {}, 2),
        ("batch_norm", {"node_scale": "mean"}, 1),
        ("group_norm", {}, 1),
        ("layer_norm", {}, 1),
    ],
)
def test_what_is_added_on_a_grid_twice_as_fine(norm: str, options: dict[str, object], growth: int) -> None:
    """Every node four times over: the published scale doubles it, unless a norm's own statistics divide it out."""
    torch.manual_seed(0)
    layer = LatentGNN(32, num_latents=6, reduction=2, norm=norm, gamma_init=1.0, **options).double().eval()
    x = torch.randn(2, 32, 5, 6, dtype=torch.float64)
    fine = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    added, on_fine = layer(x) - x, layer(fine) - fine
    torch.testing.assert_close(on_fine[:, :, ::2, ::2], growth * added, rtol=0.05, atol=0.05 * added.std().item())


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _synchronised_process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(make_layer("graph_conv", training=True))
    # An uneven share of the batch: two samples here, one there.
    x = make_input(3, 32, 4, 5)[[slice(0, 2), slice(2, 3)][rank]].clone().requires_grad_()
    output = layer(x)
    output.sin().sum().backward()
    for parameter in layer.parameters():
        torch.distributed.all_reduce(parameter.grad)
    result = {
        "output": output.detach(),
        "input": x.grad,
        **{f"grad.{name}": parameter.grad for name, parameter in layer.named_parameters()},
        **{f"state.{name}": value for name, value in layer.state_dict().items()},
    }
    torch.save(result, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("frozen", [0, -1])
def test_frozen_and_evaluated_batch_norms_are_affine_together(frozen: int) -> None:
    layer, x = make_layer("graph_conv", "batch").eval(), make_input(2, 32, 9, 11)
    projection = layer.projections[frozen]
    norm = FrozenBatchNorm(projection.norm.num_features).double()
    norm.load_state_dict(projection.norm.state_dict(), strict=False)
    projection.norm = norm
    assert layer.arrangement().norm_kind == "affine"
    assert relative_error(layer(x), reference.forward(layer, x)) < 1e-12


def test_synchronised_batch_norm_is_one_batch_over_processes(tmp_path: Path) -> None:
    mp.spawn(_synchronised_process, args=(_free_port(), str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    layer = make_layer("graph_conv", training=True)
    x = make_input(3, 32, 4, 5).requires_grad_()
    output = layer(x)
    output.sin().sum().backward()
    assert relative_error(torch.cat([result["output"] for result in results]), output) < 1e-11
    assert relative_error(torch.cat([result["input"] for result in results]), x.grad) < 1e-10
    for name, parameter in layer.named_parameters():
        assert relative_error(results[0][f"grad.{name}"], parameter.grad) < 1e-10, name
    for name, value in layer.state_dict().items():
        assert relative_error(results[1][f"state.{name}"], value) < 1e-11, name


def test_untouched_by_deepcopy() -> None:
    layer = make_layer("two_kernels")
    x = make_input(1, 32, 6)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


class _Shifted(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class _Renamed(nn.LayerNorm):
    pass


def test_norms_that_compute_something_else_than_their_base_are_refused() -> None:
    with pytest.raises(TypeError, match=r"_Shifted derives from a norm of PyTorch's.*has a forward of its own"):
        LatentGNN(16, num_latents=3, norm=_Shifted)
    x = torch.randn(1, 16, 3, 4)
    for norm in (_Renamed, partial(timm.layers.LayerNorm2d, eps=1e-5)):
        layer, plain = (LatentGNN(16, num_latents=3, norm=each, gamma_init=0.5) for each in (norm, nn.LayerNorm))
        plain.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), plain(x))


def test_running_variances_are_never_negative() -> None:
    """They are taken from the inverse standard deviation, less eps: rounding gave -9e-13 for equal nodes."""
    norm = nn.BatchNorm1d(3, momentum=1.0)
    equal = torch.full((3,), norm.eps).rsqrt()
    update_running([norm], [torch.zeros(3)], [equal.nextafter(equal + 1)], 100)
    assert norm.running_var.min() == 0


def test_norms_for_other_channels_are_told_at_construction() -> None:
    with pytest.raises(ValueError, match="called with 2, it gave a BatchNorm1d with num_features 3"):
        LatentGNN(16, num_latents=4, norm=lambda channels: nn.BatchNorm1d(channels + 1))
    with pytest.raises(TypeError, match=r"LazyBatchNorm1d learns its size in a call.*pass BatchNorm1d"):
        LatentGNN(16, num_latents=4, norm=lambda channels: nn.LazyBatchNorm1d())


def test_layers_are_made_with_a_device_and_a_type_in_fake_tensor_mode() -> None:
    program = "import torch; from latentgnn import LatentGNN; from torch._subclasses import FakeTensorMode\n"
    program += "with FakeTensorMode(): layer = LatentGNN(16, num_latents=4, device='cpu', dtype=torch.float64)\n"
    program += "assert layer.expand.norm.running_mean.dtype == layer.expand.norm.weight.dtype == torch.float64"
    subprocess.run([sys.executable, "-c", program], check=True)
