"""Put a block into a trained torchvision classifier, and fine-tune it with three learning rates.

    python examples/finetune_classifier.py                                        # random weights, stripes, seconds
    python examples/finetune_classifier.py --weights IMAGENET1K_V1 --data photos  # photos/CLASS/*.jpg; downloads once

The block starts as an identity: before the first step, the network is as good as it was without.
"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split
from torchvision.datasets import ImageFolder
from torchvision.models import get_model
from torchvision.transforms import v2

import latentgnn


def stripes(number: int, size: int = 64) -> TensorDataset:
    """Noisy stripes of any width and colour: lying, standing or slanting."""
    labels = torch.arange(number) % 3
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    across = torch.stack([y, x, (x + y) / 2**0.5]).float()[labels]
    wave = torch.sin(across * (0.5 + torch.rand(number, 1, 1)) + 6 * torch.rand(number, 1, 1))
    images = wave[:, None] * torch.randn(number, 3, 1, 1) + 0.5 * torch.randn(number, 3, size, size)
    return TensorDataset(images, labels)


def photographs(folder: str) -> tuple[Dataset[tuple[Tensor, Tensor]], int]:
    """A folder with a folder of pictures for every class, as torchvision's classifiers take them."""
    steps = [v2.ToImage(), v2.RandomResizedCrop(224, scale=(0.5, 1.0)), v2.RandomHorizontalFlip()]
    to_numbers = [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    pictures = ImageFolder(folder, transform=v2.Compose([*steps, *to_numbers]))
    return pictures, len(pictures.classes)


def groups(model: nn.Module, new: set[str], head: str, rate: float) -> list[dict[str, Any]]:
    """Parameters by what they are: trained, the head that starts anew, and the block."""
    factors = {"trained": 0.1, "head": 1.0, "block": 1.0}
    members: dict[str, list[Tensor]] = {kind: [] for kind in factors}
    for name, parameter in model.named_parameters():
        kind = "block" if name in new else "head" if name.startswith(f"{head}.") else "trained"
        members[kind].append(parameter)
    return [{"name": kind, "params": members[kind], "lr": rate * factor} for kind, factor in factors.items()]


def accuracy(model: nn.Module, data: DataLoader[Any]) -> float:
    """Part of the images whose class is found."""
    model.eval()
    with torch.no_grad():
        right = [(model(images).argmax(dim=1) == labels).float() for images, labels in data]
    return torch.cat(right).mean().item()


def main() -> None:
    """Print how far the block moves the network at first, and the loss and accuracy of each epoch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="resnet18", help="a torchvision ResNet")
    parser.add_argument("--weights", help="trained weights, such as IMAGENET1K_V1 or DEFAULT; random ones without")
    parser.add_argument("--data", help="a folder with a folder of pictures for every class; stripes without")
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    data, classes = photographs(arguments.data) if arguments.data else (stripes(180), 3)
    train, val = random_split(data, [0.8, 0.2])
    batches, held_out = DataLoader(train, 16, shuffle=True, drop_last=True), DataLoader(val, 16)

    model = get_model(arguments.model, weights=arguments.weights)
    model.fc = nn.Linear(model.fc.in_features, classes)
    images, _ = next(iter(held_out))
    before = model.eval()(images)
    new = set(latentgnn.insert(model, {"layer3": 32}))
    difference = (model(images) - before).abs().max()
    print(f"{len(new)} new parameters in the block; it moves the output by {difference:.1e}")

    optimizer = torch.optim.AdamW(groups(model, new, "fc", rate=1e-3 if arguments.weights else 1e-2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs * len(batches))
    print("rates: " + ", ".join(f"{group['name']} {group['lr']:g}" for group in optimizer.param_groups))
    for epoch in range(arguments.epochs):
        model.train()
        losses = []
        for images, labels in batches:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        gamma = model.layer3.latentgnn.gamma.item()
        mean = sum(losses) / len(losses)
        print(f"epoch {epoch}: loss {mean:.3f}, accuracy {accuracy(model, held_out):.2f}, gamma {gamma:+.4f}")


if __name__ == "__main__":
    main()
