"""Train one block where far context decides, and see that it looks at the place that decides. No data, no network.

Each picture has a cue, one pixel somewhere that is of one of two colours, and a query in each corner: the right answer
for a query is the cue's colour. No convolution here sees further than its own pixel, so that only the block can bring
the answer from the cue to the corners.

    python examples/look_inside.py [--figure row.png]
"""

import argparse

import torch
from torch import Tensor, nn

import latentgnn

SIDE = 12
CORNERS = [(0, 0), (0, SIDE - 1), (SIDE - 1, 0), (SIDE - 1, SIDE - 1)]


def pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 3, SIDE, SIDE), the cue's colour (B,) 0 or 1, and its place (B, 2)."""
    x = 0.1 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    colour = torch.randint(0, 2, (count,), generator=generator)
    place = torch.randint(1, SIDE - 1, (count, 2), generator=generator)
    x[torch.arange(count), colour, place[:, 0], place[:, 1]] += 3
    for row, column in CORNERS:
        x[:, 2, row, column] += 3
    return x, colour, place


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
        nn.Conv2d(3, 32, 1),
        nn.ReLU(),
        latentgnn.LatentGNN(32, num_latents=8, reduction=2, norm="layer_norm", gamma_init=0.5),
        nn.Conv2d(32, 2, 1),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        x, colour, _ = pictures(64, generator)
        loss = nn.functional.cross_entropy(corners_of(model(x)), colour[:, None].expand(-1, len(CORNERS)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    x, colour, place = pictures(200, generator)
    with latentgnn.capture(model) as seen, torch.no_grad():
        right = (corners_of(model(x)).argmax(1) == colour[:, None]).float().mean()
    print(f"right answers: {right:.0%}\n")

    # Which node has the largest share in a corner's context? Rows say how much is taken in from where; contributions
    # also count in which direction it pulls.
    found = 0
    for sample in range(len(x)):
        share = seen.contributions("2", (0, 0), sample=sample)
        found += divmod(int(share.argmax()), SIDE) == tuple(place[sample].tolist())
    print(f"the corner's context comes from the cue more than from any other node in {found} of {len(x)} pictures")

    row, (at, beside) = seen.row("2", (0, 0)), place[0].tolist()
    print(
        f"first picture, cue at {(at, beside)}: its weight is {row[at, beside] / row.median():.0f} times the median's"
    )
    print(f"the corner's row, x at the cue:\n{drawn(row, (at, beside))}\n")
    print(latentgnn.report(model, x))
    if arguments.figure:
        seen.plot("2", (0, 0), image=x[0]).savefig(arguments.figure)
        print(f"wrote {arguments.figure}")


def drawn(row: Tensor, cue: tuple[int, int]) -> str:
    """A map in characters, from the smallest weight to the largest."""
    marks = " .:-=+*#%@"
    levels = ((row / row.max()) * (len(marks) - 1)).round().long().tolist()
    lines = [[marks[level] for level in line] for line in levels]
    lines[cue[0]][cue[1]] = "x"
    return "\n".join("".join(line) for line in lines)


if __name__ == "__main__":
    main()
