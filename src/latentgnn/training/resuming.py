"""Finds the checkpoint that a run resumes from, and checks that its data have not changed."""

from typing import Any

from latentgnn.errors import UserError
from latentgnn.training.checkpoints import Checkpoint, newest_checkpoint
from latentgnn.training.fingerprint import changes
from latentgnn.training.run_files import set_aside
from latentgnn.training.runs import RunFolder
from latentgnn.training.task import TrainingTask


def start_of(run: RunFolder, *, resume: bool) -> Checkpoint | None:
    """Return the checkpoint that a run resumes from, or ``None`` if it starts at the first step.

    Damaged checkpoints that are skipped are renamed, and a line says so.

    Raises:
        UserError: if all checkpoints are damaged, or there is one although the run is not to be resumed.
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
    """Return fingerprints of a task's sets for the run's checkpoints, after comparing them with the stored ones.

    Only the process that writes looks at the data; in the others the result is empty.

    Args:
        task: provides the sets.
        run: receives the messages.
        start: the checkpoint to resume from, if there is one.
        accept: print what differs and continue, instead of raising an error.

    Raises:
        UserError: if the data differ.
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
