"""Put blocks into a timm backbone that gives features at every stage, train them for a few steps, take them out."""

import timm
import torch

import latentgnn


def main() -> None:
    """Print what was inserted and how gamma moves away from 0."""
    torch.manual_seed(0)
    backbone = timm.create_model("resnet18", pretrained=False, features_only=True, out_indices=(1, 2, 3, 4))
    names = latentgnn.insert(backbone, {"layer2": {"num_latents": 32}, "layer3": {"num_latents": 16}}, graph_conv=True)
    print(f"{len(names)} new parameters, the first is {names[0]}")

    parameters = dict(backbone.named_parameters())
    optimizer = torch.optim.SGD([parameters[name] for name in names], lr=0.1)
    images = torch.randn(2, 3, 64, 64)
    for step in range(3):
        features = backbone(images)
        loss = features[2].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gammas = {name: round(parameters[name].item(), 4) for name in names if name.endswith("gamma")}
        print(f"step {step}: loss {loss.item():.4f}, {gammas}")

    latentgnn.remove(backbone)
    print(f"removed: {sum(parameter.numel() for parameter in backbone.parameters())} parameters are left")


if __name__ == "__main__":
    main()
