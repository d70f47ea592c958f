"""Does a block help in segmentation? The recipe `camvid_small` with its block and without, over seeds, on CamVid.

    python -m benchmarks.camvid FOLDER --work runs/camvid --out benchmarks/results/camvid-DATE

With the same seed, both sides see the same crops in the same order. Networks are validated only at the end, and scored
once on the test split. Finished runs in the work folder are kept and stopped ones resume, so the same command can be
run again. ``--report`` only writes the result files of the runs that exist, and says which are missing.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import program, run, write_results
from benchmarks.report import markdown_table
from benchmarks.runs import header_line, run_folder, runs_header, train
from benchmarks.study_costs import costs
from benchmarks.study_report import compare, interval
from latentgnn import load_run
from latentgnn.cli import main as latentgnn
from latentgnn.errors import UserError
from latentgnn.tasks.segmentation.programs import Logits

SIDES: dict[str, tuple[str, ...]] = {"no block": ("--model.blocks", "{}"), "latentgnn": ()}
MEANS = ("mIoU", "mAcc", "OA")


def score(run: Path) -> None:
    """Score a run on the test split, unless that is done already."""
    if not (run / "test" / "metrics.json").exists():
        options = ["--data.val", "test", "--evaluation.sample_pictures", "0", "--out", str(run / "test")]
        if code := latentgnn(["evaluate", str(run), *options, "--overwrite"]):
            raise SystemExit(code)


def read(work: Path, seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """The finished runs of each side."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for side, seed in ((side, seed) for side in SIDES for seed in seeds):
        run = run_folder(work, f"{side}-{seed}")
        if not (run / "test" / "metrics.json").exists():
            continue
        val, test = (json.loads((path / "metrics.json").read_text())["metrics"] for path in (run, run / "test"))
        trained = load_run(run)
        # Two samples, because batch norm in training needs more than one; costs are per sample.
        images = torch.rand(2, 3, 160, 208)
        cost = costs(Logits(trained.model, trained.config).train(), images)
        runs[side].append({"seed": seed, "scores": test, "val": val, **cost})
    return runs


def table(compared: Mapping[str, Any], sides: Sequence[str]) -> str:
    """A row a score: both sides' means with their deviations, and the paired difference."""
    rows = []
    for score, of in compared.items():
        cells = []
        for side in sides:
            spread = "" if of[side]["deviation"] is None else f" ± {of[side]['deviation']:.3f}"
            cells.append(f"{of[side]['mean']:.3f}{spread}")
        found = of[sides[1]]["differences"][sides[0]]
        gap = "" if found is None else f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
        rows.append([score.removeprefix("IoU/"), *cells, gap])
    return markdown_table(["test split", *sides, "difference (95%)"], rows)


def write_report(out: Path, work: Path, seeds: Sequence[int], settings: Sequence[str]) -> None:
    """Write the result files of the finished runs, and print the table."""
    runs = read(work, seeds)
    missing = [f"{side} seed {seed}" for side in SIDES for seed in seeds if seed not in {r["seed"] for r in runs[side]}]
    if not all(runs.values()):
        raise UserError(f"{work}: no run is finished of one side; missing: {', '.join(missing)}")
    scores = [*MEANS, *(name for name in runs["latentgnn"][0]["scores"] if name.startswith("IoU/"))]
    compared = compare(runs, ["no block"], scores)
    shown = table(compared, list(SIDES))
    print(shown)
    given = f"--seeds {' '.join(map(str, seeds))}"
    head = runs_header(" ".join(["python -m benchmarks.camvid FOLDER", given, *settings]))
    values = {"missing": missing, "compared": compared, "runs": runs}
    half = ""
    if len(runs["latentgnn"]) > 1:
        _, low, high = interval([run["scores"]["mIoU"] for run in runs["latentgnn"]])
        mean = statistics.mean(run["val"]["mIoU"] for run in runs["latentgnn"])
        half = f" mIoU with the block: {low:.3f} to {high:.3f} (95%, over seeds); on the val split {mean:.3f}."
    absent = f" Missing: {', '.join(missing)}." if missing else ""
    paired = "Differences are paired by seed, with Student's interval."
    text = f"# CamVid\n\n{header_line(head)}. {paired}{half}{absent}\n\n{shown}\n"
    write_results(out, {**head, **values}, text)


def main(argv: list[str]) -> None:
    """Train what is missing, print the table, and write it with all figures.

    Args:
        argv: command-line arguments.
    """
    parser = program("camvid", __doc__)
    parser.add_argument("folder", type=Path, help="CamVid with images/ and labels/ of the splits train, val and test")
    parser.add_argument("--work", type=Path, default=Path("runs/camvid"), help="where the runs lie")
    parser.add_argument("--out", type=Path, required=True, help="the result files' name without its end")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="train nothing")
    # Options that are not known here are settings of the recipe, such as --training.steps 200.
    arguments, settings = parser.parse_known_args(argv)
    if not arguments.report:
        for seed in arguments.seeds:
            # Seed by seed, so that what a stop leaves is paired.
            for side, own in SIDES.items():
                options = ["--config", "camvid_small", "--data.root", str(arguments.folder), *own, *settings]
                options += ["--training.seed", str(seed), "--evaluation.sample_pictures", "0"]
                folder = run_folder(arguments.work, f"{side}-{seed}")
                train(folder, options)
                score(folder)
    write_report(arguments.out, arguments.work, arguments.seeds, settings)


if __name__ == "__main__":
    sys.exit(run(main))
