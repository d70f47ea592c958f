"""The time from a pointer event to the picture on the page of ``latentgnn explore``, measured in the browser.

python -m benchmarks.explore [--moves 60]

A detector without training has a block of 150 latents at C3; an image of 1344 x 800 pixels makes a map of 100 x 168
nodes, the size of the paper. Headless Chromium moves the pointer over it. The time runs from each pointer event to
the second picture after it, an upper bound, because it includes the browser's own painting. Writes
``explore-DATE.json``.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from benchmarks.explore_page import browser, served
from benchmarks.options import header, positive, program, result_stem, run, write_results
from latentgnn.configuration.recipes import load_recipe
from latentgnn.configuration.settings import parse_config
from latentgnn.inspection import capture
from latentgnn.tasks.detection.config import DetectionConfig
from latentgnn.tasks.detection.exploring import DetectorExplorer
from latentgnn.tasks.detection.loading import ImageTransform, TrainedDetector
from latentgnn.tasks.detection.model import build_detector

WIDTH, HEIGHT = 1344, 800
_SETTINGS = [
    ("model.blocks", "{C3: 150}"),
    ("model.backbone", "resnet18"),
    ("model.weights_backbone", "null"),
    ("model.min_size", "[800]"),
    ("model.max_size", "1344"),
]
_MEASURE = """() => {
  window.taken = [];
  document.getElementById("stage").addEventListener("pointermove", (event) => {
    requestAnimationFrame(() => requestAnimationFrame((now) => window.taken.push(performance.now() - event.timeStamp)));
  });
}"""


def main(argv: list[str]) -> None:
    """Measure, and write ``explore-DATE.json``.

    Args:
        argv: command-line arguments.
    """
    parser = program("explore", __doc__, out=True)
    parser.add_argument("--moves", type=positive, default=60, metavar="N", help="of the pointer (60)")
    given = parser.parse_args(argv)
    moves = given.moves
    config = parse_config(DetectionConfig, load_recipe("mask_rcnn_r50_c3"), _SETTINGS)
    torch.manual_seed(0)
    model = build_detector(replace(config.model, weights_backbone=None), 3).eval()
    trained = TrainedDetector(model, ((1, "a"), (2, "b"), (3, "c")), ImageTransform(model), config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise.png"
        noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(noise).save(path)
        explorer = DetectorExplorer(trained, "benchmark", [path])
        with served(explorer) as port, browser() as chromium:
            page = chromium.new_page(viewport={"width": 1400, "height": 1000})
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_function("() => explore.weights !== null", timeout=120_000)
            page.evaluate(_MEASURE)
            box = page.locator("#stage").bounding_box()
            for index in range(moves):
                x = box["x"] + box["width"] * (0.1 + 0.8 * ((7 * index) % moves) / moves)
                y = box["y"] + box["height"] * (0.1 + 0.8 * index / moves)
                page.mouse.move(x, y)
                page.wait_for_timeout(60)
            taken = sorted(page.evaluate("() => window.taken"))
            shape = page.evaluate("() => explore.weights.length")
            node, weights = page.evaluate("() => [explore.state.node, Array.from(explore.weights)]")
            version = chromium.version
        with capture(model) as seen:
            trained.predict(explorer.input(0))
        row = seen.row(0, node).flatten().double().numpy()
    found = {
        "chromium": version,
        "nodes": shape,
        "latents": 150,
        "moves": len(taken),
        "milliseconds": {
            "median": round(median(taken), 1),
            "95_percent": round(taken[int(0.95 * len(taken))], 1),
            "most": round(taken[-1], 1),
        },
        "largest_error_of_the_row": float(np.abs(np.array(weights) - row).max() / row.max()),
    }
    print(found)
    head = header("benchmarks.explore", argv, device="cpu", dtype="float32", threads=None)
    write_results(result_stem(given.out, "explore", head), head | found)


if __name__ == "__main__":
    sys.exit(run(main))
