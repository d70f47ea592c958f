"""Put a block into a timm classifier, train it for some steps, and ask whether the block does something.

    python examples/timm_classifier.py                            # random weights, images made on the fly, seconds
    python examples/timm_classifier.py --model resnet50.a1_in1k   # any convolutional network of timm

Two patches in opposite corners have the same colour or two different ones, and the class says which.
"""

import argparse
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

import latentgnn


def images(count: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """Noise with a patch in two opposite corners, and whether both have the same colour."""
    x = 0.3 * torch.randn(count, 3, size, size)
    colours = torch.randint(2, (count, 2))
    for index, (first, second) in enumerate(colours.tolist()):
        x[index, first, : size // 4, : size // 4] += 1
        x[index, second, -size // 4 :, -size // 4 :] += 1
    return x, (colours[:, 0] == colours[:, 1]).long()


def stage_before_last(model: nn.Module) -> str:
    """The last stage but one, which in ResNets is C4."""
    return str(cast(Any, model).feature_info[-2]["module"])


def main() -> None:
    """Print the loss, gamma, and how much of the accuracy is lost when the block is switched off."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="resnet10t", help="a name of timm.list_models()")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = timm.create_model(arguments.model, pretrained=False, num_classes=2)
    stage = stage_before_last(model)
    new = set(latentgnn.insert(model, {stage: 16}, gamma_init=1.0))  # 1: all of the network learns from scratch
    print(f"a block after {stage}, {sum(p.numel() for n, p in model.named_parameters() if n in new):,} parameters")

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    for step in range(arguments.steps):
        x, labels = images(16)
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    gamma = model.get_parameter(f"{stage}.latentgnn.gamma")
    x, labels = images(128)
    model.eval()
    with torch.no_grad():
        was = gamma.item()
        found = (model(x).argmax(1) == labels).float().mean().item()
        gamma.zero_()  # the block is an identity again
        without = (model(x).argmax(1) == labels).float().mean().item()
    print(f"gamma {was:+.3f}; accuracy {found:.2f}, with the block switched off {without:.2f}")


if __name__ == "__main__":
    main()
