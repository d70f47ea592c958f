"""What goes wrong inside a process: it is killed or told to stop; it lacks memory, disk, data or sense in them."""

import json
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from latentgnn.files import writing
from latentgnn.tasks.detection.task import DetectionTask
from latentgnn.tasks.pointcloud.task import PointCloudTask
from tests.training.killing import kill_in


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that goes wrong, at one place at most.

    Args:
        kind: for the table.
        after: seconds until ``signal`` comes from outside.
        signal: its name.
        file: the name of the file in whose writing the process is killed.
        number: for which time that file is written.
        place: where in it; see `tests.training.killing`.
        call: the number of the micro-batch, from 1 on, before whose losses ``what`` happens.
        what: one of `EVENTS`.
        rank: the process of the run that it happens in.
        path: that ``what`` concerns.
        largest: bytes that a file may have.
        disk: bytes of the file system that the run's folder lies on.
        record: a file that takes the name of each file that is written.
    """

    kind: str
    after: float | None = None
    signal: str = "SIGKILL"
    file: str = ""
    number: int = 0
    place: str = ""
    call: int = 0
    what: str = ""
    rank: int = 0
    path: str = ""
    largest: int = 0
    disk: int = 0
    record: str = ""

    @classmethod
    def from_json(cls, text: str) -> "Fault":
        """What `to_json` gave."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """As a text, without what is not given."""
        default = asdict(Fault(kind=""))
        return json.dumps({name: value for name, value in asdict(self).items() if value != default[name]})

    def install(self) -> None:
        """Have it happen in this process."""
        if int(os.environ.get("LOCAL_RANK", "0")) != self.rank:
            return
        if self.file:
            kill_in(self.file, self.number, self.place)
        if self.largest:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest, resource.RLIM_INFINITY))
        if self.record:
            _record(Path(self.record))
        if self.call:
            event = EVENTS[self.what]
            for task in (DetectionTask, PointCloudTask):
                _before_losses(task, self.call, lambda batch: event(self, batch))


def _kill(fault: Fault, batch: Any) -> Any:
    os.kill(os.getpid(), getattr(signal, fault.signal))
    return batch


def _take_memory(fault: Fault, batch: Any) -> Any:
    torch.empty(2**45)
    raise AssertionError("this machine has 128 TiB")


def _spoil(fault: Fault, batch: Any) -> Any:
    """The batch with a value that is not a number in what the model sees."""

    def spoil(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.view(-1)[0] = torch.nan
        return value

    # Images, or points and their features; what follows are targets, or neighbours.
    tree_map(spoil, batch[0])
    return batch


def _take_away(fault: Fault, batch: Any) -> Any:
    os.rename(fault.path, f"{fault.path}.gone")
    return batch


EVENTS: dict[str, Callable[[Fault, Any], Any]] = {
    "kill": _kill,
    "take memory": _take_memory,
    "spoil": _spoil,
    "take away": _take_away,
}


def _before_losses(task: Any, number: int, event: Callable[[Any], Any]) -> None:
    losses, calls = task.losses, 0

    def with_event(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        return losses(self, event(batch) if calls == number else batch)

    task.losses = with_event


def _record(names: Path) -> None:
    create = writing._create

    def recording(path: Path) -> Any:
        with names.open("a") as file:
            file.write(f"{path.name.removeprefix('.').rsplit('.', 2)[0]}\n")
        return create(path)

    writing._create = recording
