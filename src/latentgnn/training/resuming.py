"""Where a run goes on, and whether its data are still those that it was stopped with."""

from typing import Any

from latentgnn.errors import UserError
from latentgnn.training.checkpoints import Checkpoint, newest_checkpoint
from latentgnn.training.fingerprint import changes
from latentgnn.training.run_files import set_aside
from latentgnn.training.runs import RunFolder
from latentgnn.training.task import TrainingTask


def start_of(run: RunFolder, *, resume: bool) -> Checkpoint | None:
    """The checkpoint that a run goes on from, or ``None`` where it begins with the first step.

    Damaged checkpoints that are passed over get another name, and a line says so.

    Raises:
        UserError: all checkpoints are damaged, or there is one and the run is not to be resumed.
    """
    if not resume:
        if run.has_checkpoint:
            raise UserError(f"{run.path} holds a run with a checkpoint already: resume it, or use another folder")
        return None
    checkpoint = newest_checkpoint(run.checkpoints)
    if checkpoint is not None and run.writes:
        for path, error in checkpoint.lost.items():
            run.say(f"{error}; going on from {checkpoint.path}, step {checkpoint.step}")
            set_aside(path)
    return checkpoint


def check_data(task: TrainingTask, run: RunFolder, start: Checkpoint | None, *, accept: bool) -> dict[str, Any]:
    """The fingerprints of a task's sets for the run's checkpoints, after they are compared with those of its start.

    Only the process that writes looks at the data; elsewhere the result is empty.

    Args:
        task: gives the sets.
        run: where messages go.
        start: the checkpoint to go on from, if there is one.
        accept: say what differs and go on, instead of refusing it.

    Raises:
        UserError: the data are others.
    """
    if not run.writes:
        return {}
    now = task.fingerprints()
    before = start.data if start else {}
    differences = [
        f"{name}: {', '.join(found)}"
        for name, fingerprint in now.items()
        if name in before and (found := changes(before[name], fingerprint))
    ]
    if differences:
        told = f"the data are not those that the run was stopped with ({'; '.join(differences)})"
        if not accept:
            raise UserError(
                f"{run.path}: {told}: put them back, start a new run, or go on with these: "
                "--training.on_changed_data accept"
            )
        run.say(f"{told}; they are accepted")
    run.write_data({name: fingerprint.summary() for name, fingerprint in now.items()})
    return {name: fingerprint.to_plain() for name, fingerprint in now.items()}
