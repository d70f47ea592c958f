"""Train a network with blocks, save its weights, and load them into a fresh network with the same blocks."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import resnet18

import latentgnn


def extended() -> nn.Module:
    """A ResNet-18 with blocks: whoever loads the weights inserts the same blocks first."""
    model: nn.Module = resnet18(weights=None, num_classes=10)
    latentgnn.insert(model, {"layer2": 32, "layer3": 16}, graph_conv=True)
    return model


def main() -> None:
    """Print how far the outputs of the saved and the loaded network are apart."""
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([1, 3, 5, 7])
    trained = extended()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        loss = nn.functional.cross_entropy(trained(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "extended.safetensors")
        save_file(trained.state_dict(), weights)
        loaded = extended()
        loaded.load_state_dict(load_file(weights))

    with torch.no_grad():
        difference = (loaded.eval()(images) - trained.eval()(images)).abs().max()
    print(f"{len(trained.state_dict())} tensors saved and loaded; the outputs differ by {difference:.1e}")


if __name__ == "__main__":
    main()
