"""Does a block help? Variants x seeds on one question, with paired differences and what each costs.

python -m benchmarks.study benchmarks/studies/darcy.yaml --runs runs/darcy [--processes 2] [--seconds 100] [--time 7]

Every run is a folder, written completely or not at all; started again, the program continues with the missing runs. The
plan is written before the first run, and every later change with its date. With the same seed, all variants see the
same data in the same order, and what they have in common starts from the same weights. Writes ``study-NAME-DATE.json``,
``.md`` and ``.svg``, and with ``--time`` a second plot of score against time. docs/when.md shows how to study your own
blocks and data.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import study_report
from benchmarks.options import header, positive, program, result_stem, run, write_results
from benchmarks.questions import Question
from benchmarks.runs import run_folder
from benchmarks.study_costs import costs, take_times
from benchmarks.study_file import Study, check_names, find, read_study
from benchmarks.study_rates import FACTORS, parameter_groups
from latentgnn.errors import UserError
from latentgnn.files.reading import read_json
from latentgnn.files.writing import write_json

# Packages that blocks and networks of the studies here come from.
PEERS = ("timm", "neuraloperator")


def build(question: Question, variant: Mapping[str, Any], seed: int) -> nn.Module:
    """The network of a run. It is initialized before the blocks, so that it is the same for every variant.

    Args:
        question: gives the network, and the places of blocks in it.
        variant: the block, or another network, see `Study`.
        seed: of both.
    """
    torch.manual_seed(seed)
    options = {key: value for key, value in variant.items() if key not in ("block", "network", *FACTORS)}
    if "network" in variant:
        if factors := [key for key in FACTORS if key in variant]:
            raise UserError(f"{factors[0]}: there is no block whose rate it could be; leave it out")
        other: nn.Module = find(variant["network"])(**options)
        return other
    network = question.network()
    if "block" in variant:
        for place in [question.place] if isinstance(question.place, str) else question.place:
            block = find(variant["block"])(question.channels, **options)
            network.set_submodule(place, nn.Sequential(network.get_submodule(place), block))
    elif variant:
        raise UserError(f"a variant has options ({', '.join(variant)}) and neither block nor network")
    return network


def ask(study: Study, data: str | None) -> Question:
    """The question of a study.

    Args:
        study: names it.
        data: its option ``folder``, where it reads files.
    """
    question: Question = find(study.data)(**study.options, **({} if data is None else {"folder": data}))
    return question


def train(study: Study, variant: str, seed: int, folder: Path, data: str | None) -> None:
    """One run, written to ``folder/run.json``."""
    torch.set_num_threads(1)
    question = ask(study, data)
    options = study.variants[variant]
    network = build(question, options, seed).train()
    groups = parameter_groups(network, question.place, options, study.rate)
    optimizer = torch.optim.AdamW(groups, weight_decay=study.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, study.steps)
    losses, taken = [], []
    for x, target in question.batches(seed, study.steps):
        begin = time.perf_counter()
        loss = question.loss(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        taken.append(time.perf_counter() - begin)
        losses.append(loss.item())
    network.eval()
    with torch.no_grad():
        scores = question.score(network)
    run = {
        "directions": dict(question.scores),
        "made": study.training(variant),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "scores": scores,
        "last_loss": statistics.mean(losses[-50:]),
        "seconds_a_step": statistics.median(taken),
        **costs(network, x),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", run)


def plan(study: Study, folder: Path) -> list[dict[str, Any]]:
    """Write the plan before anything runs; a changed plan is added after the earlier ones.

    Args:
        study: what is planned now.
        folder: of the runs.

    Returns:
        All plans, the first first, each with its date and the number of runs that were there.
    """
    path = folder / f"plan-{study.name}.json"
    plans: list[dict[str, Any]] = read_json(path, "plan") if path.exists() else []
    planned = asdict(study)
    if not plans or plans[-1]["study"] != planned:
        done = sum(1 for _ in folder.glob("*/*/run.json"))
        plans.append({"date": datetime.now(UTC).isoformat(timespec="seconds"), "runs": done, "study": planned})
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, plans)
    return plans


def finished(study: Study, folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The finished runs of each variant, by seed.

    Raises:
        UserError: a run was made otherwise than the study says now.
    """
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in study.variants}
    for variant, seed in study.runs():
        path = run_folder(folder, variant, f"seed-{seed}") / "run.json"
        if not path.exists():
            continue
        run = read_json(path, "run")
        if run["made"] != study.training(variant):
            raise UserError(f"{path.parent}: this run was made otherwise; give other --runs, or move the folder away")
        runs[variant][seed] = run
    return runs


def run_missing(
    study: Study, folder: Path, *, data: str | None, processes: int, seconds: float, part: tuple[int, int]
) -> None:
    """Run what is missing, side by side, and begin no run after so many seconds.

    Args:
        study: what is planned.
        folder: of the runs.
        data: see `ask`.
        processes: at a time.
        seconds: after which no run begins.
        part: (k, n): run only the k-th of n parts of the planned runs; for several programs with one folder.
    """
    begin = time.monotonic()
    done = finished(study, folder)
    missing = [(variant, seed) for variant, seed in study.runs()[part[0] - 1 :: part[1]] if seed not in done[variant]]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        while missing and time.monotonic() - begin < seconds:
            together, missing = missing[:processes], missing[processes:]
            futures = [
                pool.submit(train, study, variant, seed, run_folder(folder, variant, f"seed-{seed}"), data)
                for variant, seed in together
            ]
            for (variant, seed), future in zip(together, futures, strict=True):
                future.result()
                print(f"{variant}, seed {seed}", flush=True)


def time_variants(study: Study, folder: Path, *, data: str | None, rounds: int) -> None:
    """Time the variants side by side, and keep it beside the runs.

    Args:
        study: what is planned.
        folder: of the runs.
        data: see `ask`.
        rounds: measurements per side.
    """
    question = ask(study, data)
    networks = {name: build(question, variant, 0) for name, variant in study.variants.items()}
    made = {name: study.training(name) for name in networks}
    write_json(times_path(study, folder), {"made": made, **take_times(question, networks, rounds)})


def times_path(study: Study, folder: Path) -> Path:
    """The file with the times of a study's variants."""
    return folder / f"times-{study.name}.json"


def times(study: Study, folder: Path) -> dict[str, Any] | None:
    """What `time_variants` kept; ``None`` where it was not asked to.

    Raises:
        UserError: the variants that it timed were others.
    """
    path = times_path(study, folder)
    if not path.exists():
        return None
    taken: dict[str, Any] = read_json(path, "times")
    if taken.pop("made") != {name: study.training(name) for name in study.variants}:
        raise UserError(f"{path}: the variants were others when they were timed; give --time again")
    return taken


def versions() -> dict[str, str]:
    """Versions of the peers' packages, if installed."""
    found = {}
    for package in PEERS:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def write_report(study: Study, plans: Sequence[Mapping[str, Any]], given: argparse.Namespace) -> None:
    """Write all finished runs as JSON, Markdown and a plot, and print the table."""
    runs = {variant: list(made.values()) for variant, made in finished(study, given.runs).items()}
    there = {(variant, run["seed"]) for variant, made in runs.items() for run in made}
    if not there:
        raise UserError(f"{given.runs}: no run is finished; give more --seconds")
    command = [given.study.name, "--runs", "FOLDER", *(["--data", "FOLDER"] if given.data else [])]
    scores: dict[str, str] = next(iter(run for made in runs.values() for run in made))["directions"]
    report = {
        "name": study.name,
        **header("benchmarks.study", command, device="cpu", dtype="float32", threads=1),
        "packages": versions(),
        "scores": scores,
        "against": list(study.against),
        "plans": plans,
        "times": times(study, given.runs),
        "missing": [run for run in study.runs() if run not in there],
        "compared": study_report.compare(runs, study.against, list(scores)),
        "runs": runs,
    }
    print(study_report.tables(report))
    stem = result_stem(given.out, f"study-{study.name}", report)
    study_report.plot(report, stem.with_name(f"{stem.name}.svg"))
    if report["times"]:
        study_report.plot_times(report, stem.with_name(f"{stem.name}-times.svg"))
    write_results(stem, report, study_report.markdown(report))


def part_of(text: str) -> tuple[int, int]:
    """An option's value as one of several parts.

    Args:
        text: as given, such as ``1/2``.

    Raises:
        argparse.ArgumentTypeError: it is no part.

    Example:
        >>> part_of("2/3")
        (2, 3)
    """
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected K/N with K from 1 to N, got {text!r}")
    return int(first), int(count)


def main(argv: list[str]) -> None:
    """Run what is missing, and report on all that is there.

    Args:
        argv: command-line arguments.
    """
    parser = program("study", __doc__, out=True)
    parser.add_argument("study", type=Path, help="a study's file")
    parser.add_argument("--runs", type=Path, required=True, metavar="FOLDER", help="where the runs are kept")
    parser.add_argument("--processes", type=positive, default=1, metavar="N", help="runs at a time, a thread each (1)")
    parser.add_argument("--part", type=part_of, default=(1, 1), metavar="K/N", help="run the K-th of N parts (1/1)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run afterwards (no limit)")
    parser.add_argument("--time", type=positive, metavar="N", help="time the variants, N times each, on one thread")
    parser.add_argument("--data", metavar="FOLDER", help="the question's option `folder`, which is not reported")
    given = parser.parse_args(argv)
    study = read_study(given.study)
    check_names(study)
    plans = plan(study, given.runs)
    run_missing(study, given.runs, data=given.data, processes=given.processes, seconds=given.seconds, part=given.part)
    if given.time:
        time_variants(study, given.runs, data=given.data, rounds=given.time)
    write_report(study, plans, given)


if __name__ == "__main__":
    sys.exit(run(main))
