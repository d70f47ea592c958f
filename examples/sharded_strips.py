"""An image too large for one process, in strips: a small convolutional network with a block, forward and backward.

    torchrun --nproc-per-node 4 examples/sharded_strips.py --height 2048 --width 2048 --no-check

A convolution needs a row of each neighbouring strip; the block needs the latents' sums alone. PyTorch's own convolution
of DTensors gives no gradients to its input where an image is spread over processes (2.14), so the rows are exchanged
here.
"""

import argparse
import copy
import resource
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from latentgnn import LatentGNN, shard_nodes


class StripConv2d(nn.Conv2d):
    """A convolution of stride 1 on strips of rows, padded by the neighbours' rows and at the image's edges by zeros."""

    alone = False

    def forward(self, x: Tensor) -> Tensor:
        rows = self.kernel_size[0] // 2
        above, below = (None, None) if self.alone else neighbours(x, rows)
        nothing = x.new_zeros(x.shape[0], x.shape[1], rows, x.shape[3])
        x = torch.cat([nothing if above is None else above, x, nothing if below is None else below], 2)
        return F.conv2d(x, self.weight, self.bias, padding=(0, self.kernel_size[1] // 2))


class Exchange(torch.autograd.Function):
    """As many rows from each process as are sent to it; gradients go back the way the rows came."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes, got = sizes, torch.empty_like(sent)
        dist.all_to_all_single(got, sent, sizes, sizes)
        return got

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Exchange.apply(grad.contiguous(), ctx.sizes), None


def neighbours(x: Tensor, rows: int) -> tuple[Tensor | None, Tensor | None]:
    """The last rows of the strip above and the first of that below, ``None`` at an edge; with gradients."""
    rank, count = dist.get_rank(), dist.get_world_size()
    sizes = [rows if abs(other - rank) == 1 else 0 for other in range(count)]
    if not any(sizes):
        return None, None
    sent = [x[:, :, :rows]] * (rank > 0) + [x[:, :, -rows:]] * (rank < count - 1)
    # Rows first: that is the dimension that is dealt out.
    got = Exchange.apply(torch.cat(sent, 2).transpose(0, 2).contiguous(), sizes)
    parts = list(got.transpose(0, 2).split(rows, 2))
    return parts.pop(0) if rank > 0 else None, parts.pop(0) if rank < count - 1 else None


def network(channels: int) -> nn.Sequential:
    """Two convolutions, a block, and a convolution to two maps."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(StripConv2d(3, channels, 3), nn.ReLU(), StripConv2d(channels, channels, 3), nn.ReLU()),
        LatentGNN(channels, num_latents=16, norm="batch_norm", gamma_init=1.0),
        StripConv2d(channels, 2, 3),
    )


def strip(image: Tensor) -> Tensor:
    """This process's rows; the first strips have one more where the rows do not divide."""
    return image.tensor_split(dist.get_world_size(), 2)[dist.get_rank()]


def step(model: nn.Module, x: Tensor, pixels: int) -> Tensor:
    """The output, with gradients of a mean over all pixels, of which a strip gives its share."""
    out = model(x)
    (out.square().sum() / pixels).backward()
    return out.detach()


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Of its parameters."""
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def main() -> None:
    """Print how far outputs and gradients are from one process's, and each process's memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=50)
    parser.add_argument("--width", type=int, default=40)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group()
    else:  # alone
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]

    model = shard_nodes(network(given.channels), dist.group.WORLD)
    # In real use each process reads its own rows.
    image = torch.rand(1, 3, given.height, given.width, generator=torch.Generator().manual_seed(1))
    pixels, own = given.height * given.width, strip(image).clone()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = step(model, own, pixels)
    gradients = gradients_of(model)
    for gradient in gradients:
        dist.all_reduce(gradient)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    said = f"process {dist.get_rank()} of {dist.get_world_size()}: {own.shape[2]} rows, {memory:.0f} MiB"

    if given.check:
        whole = shard_nodes(copy.deepcopy(model), None)
        whole.load_state_dict(network(given.channels).state_dict())
        whole.zero_grad()
        for module in whole:
            if isinstance(module, StripConv2d):
                module.alone = True
        expected = strip(step(whole, image, pixels))
        of_output = (out - expected).abs().max() / expected.abs().max()
        pairs = zip(gradients, gradients_of(whole), strict=True)
        of_gradients = max((one - other).norm() / other.norm().clamp_min(1e-3) for one, other in pairs)
        said += f"; from one process's: output {of_output:.1e}, gradients {of_gradients:.1e}"
    print(said, flush=True)
    # Who ends early closes its connections under the others.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
