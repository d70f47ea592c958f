"""Train one block where far context decides, and see that it looks at the place that decides. No data, no network.

Each picture has two cues somewhere, one of each kind, and each of the two has one of two colours. A query in each
corner asks for the colour of one kind of cue: the upper corners of the first kind, the lower ones of the second. No
convolution here sees further than its own pixel, so that only the block can bring the answer to the corners.

    python examples/look_inside.py [--figure row.png]
"""

import argparse

import torch
from torch import Tensor, nn

import latentgnn

SIDE = 12
CORNERS = [(0, 0), (0, SIDE - 1), (SIDE - 1, 0), (SIDE - 1, SIDE - 1)]
KINDS = torch.tensor([0, 0, 1, 1])  # which kind of cue each corner asks for


def pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 5, SIDE, SIDE), the colour of both cues (B, 2) 0 or 1, and their places (B, 2), flattened.

    Channels 0 and 1 are colours, 2 and 3 kinds, 4 says that a node is a query.
    """
    x = 0.1 * torch.randn(count, 5, SIDE, SIDE, generator=generator)
    colours = torch.randint(0, 2, (count, 2), generator=generator)
    inside = torch.arange(SIDE * SIDE).view(SIDE, SIDE)[1:-1, 1:-1].flatten()
    places = torch.stack([inside[torch.randperm(len(inside), generator=generator)[:2]] for _ in range(count)])
    flat, every = x.flatten(2), torch.arange(count)
    for kind in (0, 1):
        flat[every, colours[:, kind], places[:, kind]] += 3
        flat[every, 2 + kind, places[:, kind]] += 3
    for (row, column), kind in zip(CORNERS, KINDS.tolist(), strict=True):
        x[:, 2 + kind, row, column] += 3
        x[:, 4, row, column] += 3
    return x, colours, places


def corners_of(scores: Tensor) -> Tensor:
    """The scores at the corners, (B, classes, 4)."""
    return torch.stack([scores[:, :, row, column] for row, column in CORNERS], -1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--figure", help="write the picture of a corner's row to this file")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(5, 32, 1),
        nn.ReLU(),
        latentgnn.LatentGNN(32, num_latents=16, reduction=2, norm="layer_norm", gamma_init=0.5),
        nn.Conv2d(32, 2, 1),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        x, colours, _ = pictures(32, generator)
        loss = nn.functional.cross_entropy(corners_of(model(x)), colours[:, KINDS])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    x, colours, places = pictures(100, generator)
    with latentgnn.capture(model) as seen, torch.no_grad():
        right = (corners_of(model(x)).argmax(1) == colours[:, KINDS]).float().mean()
    print(f"right answers: {right:.0%}\n")

    # Which cue does a corner take in more of: the one that it asks for, or the other?
    found = 0
    for sample in range(len(x)):
        for corner, kind in zip(CORNERS, KINDS.tolist(), strict=True):
            weights = seen.row("2", corner, sample=sample).flatten()[places[sample]]
            found += int(weights[kind] > weights[1 - kind])
    print(f"corners take in more of the cue that they ask for than of the other in {found} of {4 * len(x)} cases")

    for corner, kind in ((CORNERS[0], 0), (CORNERS[2], 1)):
        row = seen.row("2", corner)
        cue, other = places[0, kind], places[0, 1 - kind]
        times = [float(row.flatten()[place] / row.median()) for place in (cue, other)]
        print(f"\nfirst picture, row of the corner {corner}: X is its cue, {times[0]:.1f} times the median weight;")
        print(f"o is the other one, {times[1]:.1f} times\n{drawn(row, int(cue), int(other))}")
    print()
    print(latentgnn.report(model, x))
    if arguments.figure:
        seen.plot("2", CORNERS[0], image=x[0, :3]).savefig(arguments.figure)
        print(f"wrote {arguments.figure}")


def drawn(row: Tensor, cue: int, other: int) -> str:
    """A map in characters, from no weight to the largest."""
    marks = " .:-=+*#%@"
    levels = ((row / row.max()) * (len(marks) - 1)).round().long().flatten().tolist()
    nodes = [marks[level] for level in levels]
    nodes[cue], nodes[other] = "X", "o"
    return "\n".join("".join(nodes[first : first + SIDE]) for first in range(0, len(nodes), SIDE))


if __name__ == "__main__":
    main()
