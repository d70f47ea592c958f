"""Two clips of different length in one padded batch: with a mask, each comes out as if it were alone."""

import torch

from latentgnn import FrozenBatchNorm, LatentGNN


def main() -> None:
    """Print how far padding moves the result, with the mask and without it."""
    torch.manual_seed(0)
    layer = LatentGNN(64, num_latents=8, norm=FrozenBatchNorm, gamma_init=1.0).eval()
    long, short = torch.randn(1, 64, 100), torch.randn(1, 64, 60)
    batch = torch.cat([long, torch.nn.functional.pad(short, (0, 40))])
    mask = torch.arange(100).expand(2, -1) < torch.tensor([[100], [60]])

    with torch.no_grad():
        alone = layer(short)
        masked = layer(batch, mask)[1:, :, :60]
        # Ones instead of zeros: what padding holds matters only where it is not masked.
        dirty = layer(batch + (~mask).unsqueeze(1))[1:, :, :60]
    print(f"with a mask: {(masked - alone).abs().max():.1e}")
    print(f"without:     {(dirty - alone).abs().max():.1e}")


if __name__ == "__main__":
    main()
