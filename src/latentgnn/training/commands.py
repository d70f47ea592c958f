"""Code shared by the commands of all tasks: training into a run folder, comparisons, and reading trained models."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from latentgnn.configuration.settings import parse_config, plain_data
from latentgnn.errors import UserError, system_error, told
from latentgnn.files.outputs import quoted, refuse_to_replace, say_end, try_folder
from latentgnn.files.writing import write_bytes, write_json
from latentgnn.hub import CONFIG
from latentgnn.training.checkpoints import Checkpoint, newest_checkpoint, read_checkpoint
from latentgnn.training.comparison_report import write_comparison
from latentgnn.training.config import TrainingConfig
from latentgnn.training.lifeline import ProcessGone
from latentgnn.training.loggers import Pictures
from latentgnn.training.loop import fit
from latentgnn.training.records import Titles
from latentgnn.training.report import write_report
from latentgnn.training.runs import RunFolder
from latentgnn.training.stopping import TrainingStopped
from latentgnn.training.task import TrainingTask

Data = TypeVar("Data")

_COMPARED = ("with_blocks", "without_blocks")


@dataclass(frozen=True, kw_only=True)
class Job(Generic[Data]):
    """A task's part of a command.

    Args:
        load: reads and checks the data; takes the configuration, the folder for data that are generated, and whether
            the run in that folder is resumed.
        train: trains a configuration on the data in a run's folder, from the beginning or, if the last argument is
            true, from where it was stopped; returns the figures.
        titles: selects and names the figures that a comparison shows.
    """

    load: Callable[[Any, Path, bool], Data]
    train: Callable[[Any, RunFolder, Data, bool], dict[str, float]]
    titles: Titles


def train(job: Job[Data], config: Any, out: Path | None, *, name: str, resume: bool = False) -> dict[str, float]:
    """Check the data, train, score, and write everything into one run folder.

    Args:
        job: the task's part.
        config: the run's configuration.
        out: the run's folder: a new one, or with ``resume`` the one to continue; ``None`` creates one below ``runs/``.
        name: first part of the name of a folder that is created here.
        resume: continue the run in ``out``.

    Returns:
        The figures on the validation set.

    Raises:
        UserError: if data or configuration are wrong, or the run was interrupted.
    """
    run = _folder(out, name, resume=resume)
    if (run.path / _COMPARED[0]).exists():
        raise UserError(
            f"{run.path} holds a comparison; continue it with: latentgnn train --compare --resume {run.path}"
        )
    with run.held(), _resumable(run.path, "train"):
        if not resume:
            # Before the data are read or generated, which may take long: a run that is killed meanwhile can be resumed
            # too.
            run.write_config(plain_data(config))
        metrics = job.train(config, run, job.load(config, run.path, resume), resume)
        written = write_report(run, job.titles)
    if written is not None:
        print(f"report: {written}")
        say_end(run.path, *_after_training(run))
    return metrics


def report(job: Job[Any], path: Path) -> None:
    """Rewrite the report of a run, or of the runs of a comparison, from the files in its folder.

    Raises:
        UserError: if there is no run.
    """
    runs = {title: RunFolder.open(path / title) for title in _COMPARED if (path / title / "config.yaml").exists()}
    for run in runs.values():
        write_report(run, job.titles)
    whole = RunFolder.open(path)
    written = write_comparison(whole, runs, job.titles) if runs else write_report(whole, job.titles)
    if written is not None:
        say_end(written)


def compare(job: Job[Data], config: Any, out: Path | None, *, name: str, resume: bool = False) -> dict[str, Any]:
    """Run `train` with the blocks and without them, everything else being equal, and show both results.

    The runs are in ``with_blocks`` and ``without_blocks`` inside the folder, and the figures in ``comparison.json``.
    With ``resume``, a finished run is kept as it is, and the other one is continued or started.
    """
    if config.training.devices not in (1, "auto") or config.training.machines != 1:
        raise UserError(
            "--compare runs twice in one process, which several devices or machines do not allow: train with the "
            "blocks and then with --model.blocks {} instead, or take --training.devices 1"
        )
    both = _folder(out, name, resume=resume)
    if both.checkpoint("last").exists():
        raise UserError(f"{both.path} holds a single run; continue it with: latentgnn train --resume {both.path}")
    config = replace(config, training=replace(config.training, devices=1))
    runs = dict(zip(_COMPARED, (config, replace(config, model=replace(config.model, blocks={}))), strict=True))
    with both.held(), _resumable(both.path, "train --compare"):
        both.write_config(plain_data(config))
        data = job.load(config, both.path, resume)
        metrics: dict[str, dict[str, float]] = {}
        trained: dict[str, RunFolder] = {}
        for title, run_config in runs.items():
            print(f"\n{title.replace('_', ' ')}:")
            begun = (both.path / title / "config.yaml").exists()
            run = RunFolder.open(both.path / title) if begun else RunFolder.create(both.path / title, task=title)
            trained[title] = run
            with run.held():
                metrics[title] = job.train(run_config, run, data, begun)
                write_report(run, job.titles)
        comparison = {**metrics, "difference": _difference(*metrics.values())}
        # Printed before anything else is written, which may fail.
        print(f"\n{_comparison_table(comparison, job.titles(comparison['with_blocks']))}")
        write_json(both.path / "comparison.json", comparison)
        print(f"report: {write_comparison(both, trained, job.titles)}")
    say_end(both.path, *_after_training(trained[_COMPARED[0]]))
    return comparison


def fit_in(
    run: RunFolder,
    task: TrainingTask,
    config: Any,
    *,
    resume: bool,
    may_change: Collection[str],
    write_results: Callable[[], None],
    pictures: Pictures,
    titles: Titles,
) -> dict[str, float]:
    """Call `latentgnn.training.loop.fit` in a run's folder, and write configuration and environment there."""
    if resume and run.has_checkpoint:
        # The loop first compares this configuration with that of the checkpoint; until then the file is not changed.
        run.config = plain_data(config)
    else:
        run.write_config(plain_data(config))
    run.write_environment()

    def of_today(recorded: dict[str, Any]) -> dict[str, Any]:
        settings: dict[str, Any] = plain_data(parse_config(type(config), recorded, recorded=True))
        return settings

    metrics = fit(
        task,
        config.training,
        run,
        resume=resume,
        may_change=may_change,
        of_today=of_today,
        write_results=write_results,
        pictures=pictures,
        titles=titles,
    )
    run.write_config(plain_data(config))
    return metrics


def trained_weights(source: Path) -> Checkpoint:
    """Return the weights of a checkpoint, a saved model, or a run (its best checkpoint, or else its last)."""
    if not source.is_dir() or (source / CONFIG).is_file():
        return read_checkpoint(source)
    run = RunFolder.open(source)
    written = [file for file in (run.checkpoint("best"), run.checkpoint("last")) if file.exists()]
    if written:
        return read_checkpoint(written[0])
    checkpoint = newest_checkpoint(run.checkpoints)
    if checkpoint is None:
        both = [source / name for name in _COMPARED if (source / name).is_dir()]
        if both:
            raise UserError(f"{source} holds a comparison of two runs; name one of them: {' or '.join(map(str, both))}")
        raise UserError(f"the run in {source} has no checkpoint yet")
    return checkpoint


def device_of(accelerator: str) -> torch.device:
    """Return the device that ``training.accelerator`` names.

    Raises:
        UserError: if this machine has no such device.
    """
    if accelerator == "cpu":
        return torch.device("cpu")
    present = torch.accelerator.current_accelerator(check_available=True)
    if accelerator == "auto":
        return present or torch.device("cpu")
    if present is None or (accelerator != "gpu" and accelerator != present.type):
        available = present.type if present else "none"
        raise UserError(f"training.accelerator is {accelerator!r}; this machine has {available}")
    return present


def precision_of(config: TrainingConfig, device: torch.device) -> torch.autocast:
    """Return the mixed-precision context of training, so that figures equal those of validations during training."""
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    dtype = dtypes.get(config.precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def write_pictures(run: RunFolder, pictures: Iterable[tuple[Path, bytes]], *, reads: Collection[Path]) -> None:
    """Write a run's sample pictures, replacing earlier ones of the same run.

    Args:
        run: the folder.
        pictures: names relative to ``pictures/``, and the files' content.
        reads: data files, which must not be overwritten.
    """
    for name, content in pictures:
        path = run.pictures / name
        refuse_to_replace([path], reads=reads)
        write_bytes(path, content)


def _after_training(run: RunFolder) -> tuple[str, ...]:
    """Commands that can follow training; only a model with blocks has something to inspect."""
    name = quoted(run.path)
    look = (f"latentgnn diagnose {name}", f"latentgnn explain {name} INPUT ...")
    has_blocks = run.config.get("model", {}).get("blocks")
    return f"latentgnn evaluate {name}", f"latentgnn predict {name} INPUT ...", *(look if has_blocks else ())


def _folder(out: Path | None, name: str, *, resume: bool) -> RunFolder:
    run = RunFolder.open(out) if resume and out is not None else RunFolder.create(out, task=name)
    if run.writes:
        try_folder(run.path)
    return run


@contextmanager
def _resumable(run: Path, command: str) -> Iterator[None]:
    try:
        yield
    except (TrainingStopped, ProcessGone) as error:
        raise UserError(f"{error}\ncontinue with: latentgnn {command} --resume {run}") from error
    except KeyboardInterrupt as error:
        if not (run / "config.yaml").is_file():
            raise
        raise UserError(f"interrupted; continue with: latentgnn {command} --resume {run}") from error
    except (OSError, RuntimeError) as error:
        fault = system_error(error)
        if fault is None or not (run / "config.yaml").is_file():
            raise
        where = "standard output" if isinstance(fault, BrokenPipeError) else run
        hint = f"then continue with: latentgnn {command} --resume {run}"
        raise UserError(f"{told(fault, where)}\n{hint}") from error


def _difference(with_blocks: Mapping[str, float], without: Mapping[str, float]) -> dict[str, float]:
    # -1 marks an undefined figure.
    return {name: value - without[name] for name, value in with_blocks.items() if min(value, without[name]) >= 0}


def _comparison_table(comparison: Mapping[str, Mapping[str, float]], titles: Mapping[str, str]) -> str:
    widths = {name: max(9, len(title)) + 2 for name, title in titles.items()}
    lines = [" " * 15 + "".join(f"{title:>{widths[name]}}" for name, title in titles.items())]
    for row, figures in comparison.items():
        sign = "+" if row == "difference" else ""
        shown = (format(figures[name], f"{sign}.3f") if name in figures else "n/a" for name in titles)
        cells = "".join(f"{text:>{width}}" for text, width in zip(shown, widths.values(), strict=True))
        lines.append(f"{row.replace('_', ' '):15}{cells}")
    return "\n".join(lines)
