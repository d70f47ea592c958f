"""Whether the categories of the embedded set are learnt, where the boxes are given: a quick guide to a question.

python -m benchmarks.given_boxes SET --side latentgnn --seed 0 [--rate 0.003] [--steps 300]

Backbone, pyramid and box head of the recipe ``context`` learn the two categories of the true boxes of a set that
`write_context_set` made, without proposals, boxes and masks; some fifty seconds on one thread. Prints the accuracy.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.embedded import SIDES, build, settings


def read(root: Path, split: str) -> tuple[Tensor, list[Tensor]]:
    """Images (N, 3, H, W), and of each the corners of its boxes and their category, (boxes, 5)."""
    dataset = json.loads((root / "annotations" / f"instances_{split}.json").read_text(encoding="utf-8"))
    files = [root / split / image["file_name"] for image in dataset["images"]]
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    boxes: dict[int, list[list[float]]] = {image["id"]: [] for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        x, y, width, height = annotation["bbox"]
        boxes[annotation["image_id"]].append([x, y, x + width, y + height, annotation["category_id"] - 1])
    return images, [torch.tensor(found) for found in boxes.values()]


def logits(model: Any, images: Tensor, targets: list[Tensor], spread: float) -> Tensor:
    """Of both categories, for boxes whose corners are moved by ``spread`` pixels, as proposals are not exact."""
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (model.transform.image_mean, model.transform.image_std)
    )
    whole = torch.ones(len(images), 1, *images.shape[2:])
    levels = model.backbone(torch.cat(((images.float() / 255 - mean) / std, whole), 1))
    boxes = [target[:, :4] + spread * torch.randn(len(target), 4) for target in targets]
    heads = model.roi_heads
    pooled = heads.box_roi_pool(levels, boxes, [tuple(images.shape[2:])] * len(images))
    classes: Tensor = heads.box_predictor(heads.box_head(pooled))[0][:, 1:]
    return classes


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.given_boxes", description=__doc__)
    parser.add_argument("set", type=Path)
    parser.add_argument("--side", choices=list(SIDES), default="latentgnn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.003)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model: Any = build(settings(given.side, seed=given.seed, steps=300, data=given.set), given.side)
    learnt = [model.backbone, model.roi_heads.box_head, model.roi_heads.box_predictor]
    parameters = [parameter for part in learnt for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=given.rate, weight_decay=0.01)

    def factor(step: int) -> float:
        return (step + 1) / 30 if step < 30 else 0.5 * (1 + math.cos(math.pi * (step - 30) / (given.steps - 30)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    images, targets = read(given.set, "train")
    generator, order = torch.Generator().manual_seed(given.seed), []
    for _ in range(given.steps):
        if len(order) < 8:
            order = torch.randperm(len(images), generator=generator).tolist()
        chosen, order = order[:8], order[8:]
        batch, boxes = images[chosen], [targets[index].clone() for index in chosen]
        for index in range(8):
            if torch.rand((), generator=generator) < 0.5:
                batch[index] = batch[index].flip(2)
                boxes[index][:, [0, 2]] = batch.shape[3] - boxes[index][:, [2, 0]]
        found = logits(model, batch, boxes, 2.0)
        optimizer.zero_grad()
        F.cross_entropy(found, torch.cat(boxes)[:, 4].long()).backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
    model.eval()
    images, targets = read(given.set, "val")
    right = []
    with torch.no_grad():
        for start in range(0, len(images), 20):
            part = slice(start, start + 20)
            right.append(logits(model, images[part], targets[part], 0.0).argmax(1) == torch.cat(targets[part])[:, 4])
    run = {"side": given.side, "seed": given.seed, "rate": given.rate, "steps": given.steps}
    print(json.dumps({**run, "accuracy": round(torch.cat(right).float().mean().item(), 3)}), flush=True)


if __name__ == "__main__":
    main()
