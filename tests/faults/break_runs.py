"""Breaks real runs of both tasks, as processes, and writes what came of it.

    python -m tests.faults.break_runs --kills 200 --others 5

Every run goes on after its faults, and is compared with one that met none: its weights, its optimizer's state, its
figures and pictures, bit for bit. The exit code is 1 if anything is wrong, and the folders of such runs are kept.
"""

import argparse
import itertools
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import __version__ as fabric_version

from benchmarks.report import markdown_table
from latentgnn.machine import processor_name
from tests.faults.inside import Fault
from tests.faults.jobs import STEPS, Job, make_job
from tests.faults.processes import Starter, command
from tests.faults.rounds import Round, Runner, Whole
from tests.training.killing import PLACES

TASKS = ("detection", "pointcloud")
SIGNALS = ("SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1")
_TWO = ("--training.devices", "2")

_MEANING = """Tiny runs of both tasks, each a process, met up to three faults, and went on after each.
After each fault, no file under its own name is partial, nothing of the user's is touched, and the newest sound
checkpoint is found. At the end, weights, optimizer state, figures and pictures are those of a run that met no
fault, bit for bit. A fault that did not happen came too late: the run was at its end."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run and what it meets: the arguments of `Runner.take`."""

    faults: Sequence[Fault]
    own_data: bool = False
    between: str = ""
    two: bool = False


def kills(whole: Whole, draw: random.Random) -> Iterator[Plan]:
    """Endless plans of up to three kills of a run: at random moments, and in the writing of each file in turn."""
    places = [
        (name, number, place)
        for name, count in whole.written.items()
        for number in range(1, count + 1)
        for place in (*PLACES, *(("linked", "previous") if name == "last.ckpt" and number > 1 else ()))
    ]
    draw.shuffle(places)
    in_writing = itertools.cycle(places)
    while True:
        faults = []
        for _ in range(draw.randint(1, 3)):
            if draw.random() < 0.5:
                faults.append(Fault(kind="killed at a random moment", after=draw.uniform(0.02, 0.9) * whole.seconds))
            else:
                name, number, place = next(in_writing)
                faults.append(Fault(kind="killed in the writing of a file", file=name, number=number, place=place))
        yield Plan(faults=faults, own_data=whole.job.task == "detection" and draw.random() < 0.3)


def others(whole: Whole, draw: random.Random, *, mounts: bool) -> list[Plan]:
    """One plan of each kind of fault that is no kill alone."""
    middle = draw.randint(3, STEPS)
    largest = max(file.stat().st_size for file in (whole.folder / "run").rglob("*.ckpt"))
    killed = Fault(kind="", call=draw.randint(4, STEPS), what="kill")
    disk = replace(killed, kind="disk full", call=0, what="", disk=int(largest * draw.uniform(0.2, 3)))
    name = draw.choice(SIGNALS)
    return [
        Plan(faults=[Fault(kind="asked to stop in a step", call=middle, what="kill", signal=name)]),
        Plan(faults=[Fault(kind="asked to stop at a random moment", after=draw.random() * whole.seconds, signal=name)]),
        *([Plan(faults=[disk])] if mounts else []),
        Plan(faults=[Fault(kind="file too large", largest=int(largest * draw.uniform(0.2, 0.99)))]),
        Plan(faults=[replace(killed, kind="checkpoint cut short")], between="cut"),
        Plan(faults=[replace(killed, kind="a bit of the checkpoint flipped")], between="flip"),
        Plan(faults=[replace(killed, kind="data replaced")], between="replace data"),
        Plan(
            faults=[
                Fault(
                    kind="data vanished",
                    call=draw.randint(2, STEPS - 1),
                    what="take away",
                    path=str(whole.job.training_files),
                )
            ]
        ),
        Plan(faults=[Fault(kind="not numbers in the data", call=middle, what="spoil")]),
        Plan(faults=[Fault(kind="out of memory", call=middle, what="take memory")]),
    ]


def of_two(draw: random.Random) -> Plan:
    """A run of two processes, of which one is killed."""
    fault = Fault(kind="a process of two killed", call=draw.randint(2, STEPS), what="kill", rank=1)
    return Plan(faults=[fault], two=True)


def break_runs(
    folder: Path,
    tasks: Sequence[str],
    *,
    number: int,
    rounds_of_others: int,
    of_two_processes: int,
    seed: int,
    seconds: float,
) -> tuple[list[Round], float]:
    """All rounds, and the seconds that they took.

    Args:
        folder: for runs.
        tasks: whose runs.
        number: kills that must have happened, of runs of one process.
        rounds_of_others: how often each other kind of fault is tried on each task.
        of_two_processes: how many runs of two processes lose one, of each task.
        seed: of all that is drawn.
        seconds: after which no round begins.
    """
    starter = Starter()
    start = time.monotonic()
    draw = random.Random(seed)
    mounts = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("mount") is not None
    rounds: list[Round] = []

    def take(runner: Runner, plan: Plan) -> None:
        if time.monotonic() - start < seconds:
            one = runner.take(plan.faults, own_data=plan.own_data, between=plan.between)
            rounds.append(one)
            for met in one.met:
                print(f"{one.task}: {met.kind}: {met.code if met.happened else 'at its end before'}", flush=True)
            for problem in one.problems:
                print(f"    WRONG: {problem}", flush=True)

    wholes = {task: Whole(make_job(task, folder / task / "user"), folder / task / "whole", starter) for task in tasks}
    runners = {task: Runner(whole, folder / task / "rounds") for task, whole in wholes.items()}
    for _ in range(rounds_of_others):
        for task in tasks:
            for plan in others(wholes[task], draw, mounts=mounts):
                take(runners[task], plan)
    for task in tasks if of_two_processes else ():
        job = Job(task, folder / task / "user", _TWO)
        whole = Whole(job, folder / task / "whole of two", starter)
        runner = Runner(whole, folder / task / "rounds of two")
        for _ in range(of_two_processes):
            take(runner, of_two(draw))
    plans = {task: kills(whole, draw) for task, whole in wholes.items()}
    for task in itertools.cycle(tasks):
        done = sum(met.happened and met.kind.startswith("killed") for one in rounds for met in one.met)
        if done >= number or time.monotonic() - start >= seconds:
            break
        take(runners[task], next(plans[task]))
    starter.close()
    return rounds, time.monotonic() - start


def report_of(rounds: Sequence[Round], *, seconds: float, seed: int, arguments: Sequence[str]) -> dict[str, Any]:
    """What the result file holds: the machine, and counts by kind of fault and by how the run ended."""
    kinds: dict[str, dict[str, Any]] = {}
    for one in rounds:
        for met in one.met:
            counters = {name: Counter() for name in ("ended with", "kept step", "in the writing of")}
            row = kinds.setdefault(met.kind, {"tried": 0, "happened": 0, "in runs gone wrong": 0, **counters})
            row["tried"] += 1
            if met.happened:
                row["happened"] += 1
                row["ended with"][f"{one.task}: {met.code}"] += 1
                row["kept step"][str(met.kept)] += 1
                if met.file:
                    row["in the writing of"][met.file] += 1
            row["in runs gone wrong"] += bool(one.problems)
    deaths = [met for one in rounds for met in one.met if met.happened and (met.code == -9 or "of two" in met.kind)]
    return {
        "command": " ".join(["python", "-m", "tests.faults.break_runs", *arguments]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fabric": fabric_version,
        "seed": seed,
        "minutes": round(seconds / 60, 1),
        "processes killed": len(deaths),
        "runs": len(rounds),
        "runs that ended as the uninterrupted one": sum(not one.problems for one in rounds),
        "problems": [
            {"task": one.task, "met": [asdict(met) for met in one.met], "problems": one.problems}
            for one in rounds
            if one.problems
        ],
        "kinds": kinds,
    }


def markdown_of(report: dict[str, Any]) -> str:
    """The result file for reading."""
    head = {key: value for key, value in report.items() if key not in ("kinds", "problems")}
    columns = ("tried", "happened", "in runs gone wrong")
    rows = [[kind, *(str(row[column]) for column in columns)] for kind, row in report["kinds"].items()]
    told = "\n".join(f"- {one['task']}: {'; '.join(one['problems'])}" for one in report["problems"]) or "None."
    parts = [
        "# Runs that were broken",
        f"```json\n{json.dumps(head, indent=2)}\n```",
        _MEANING,
        markdown_table(["fault", *columns], rows),
        f"What went wrong:\n\n{told}",
    ]
    return "\n\n".join(parts) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.break_runs", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="that must have happened (200)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="whose runs (both)")
    parser.add_argument("--others", type=int, default=5, metavar="N", help="rounds of all other kinds of faults (5)")
    parser.add_argument("--of-two", type=int, default=5, metavar="N", help="lost processes of two, of each task (5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")
    parser.add_argument("--minutes", type=float, default=60, metavar="M", help="after which no run begins (60)")
    parser.add_argument("--out", type=Path, metavar="NAME", help="writes NAME.json and NAME.md")
    return parser


def main() -> int:
    """Run the program; the exit code is 1 if anything went wrong."""
    given = _parser().parse_args()
    folder = Path(tempfile.mkdtemp(prefix="broken-runs-"))
    rounds, seconds = break_runs(
        folder,
        given.tasks,
        number=given.kills,
        rounds_of_others=given.others,
        of_two_processes=given.of_two,
        seed=given.seed,
        seconds=60 * given.minutes,
    )
    report = report_of(rounds, seconds=seconds, seed=given.seed, arguments=sys.argv[1:])
    print(markdown_of(report))
    if given.out is not None:
        given.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        given.out.with_suffix(".md").write_text(markdown_of(report))
    if report["problems"]:
        print(f"kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    # `child FAULT COMMAND ...` is what Fabric runs again for the further processes of a run.
    if sys.argv[1:2] == ["child"]:
        command(sys.argv[3:], Fault.from_json(sys.argv[2]))
    sys.exit(main())
