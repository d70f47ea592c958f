"""Devices, precision and processes of a run, by Lightning Fabric."""

import atexit
import logging
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.utilities.exceptions import MisconfigurationException

from latentgnn.errors import UserError
from latentgnn.training.config import TrainingConfig


def make_fabric(config: TrainingConfig, loggers: list[Logger]) -> Fabric:
    """Fabric for a run, before `launch`; it knows by then how many processes there will be.

    Raises:
        UserError: this machine has no such devices.
    """

    def make(strategy: str) -> Fabric:
        return Fabric(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.machines,
            strategy=strategy,
            precision=config.precision,
            loggers=loggers,
        )

    with _told(config):
        fabric = make("auto")
        # Some heads of a model may get no input in one process's batch and some in another's.
        return make("ddp_find_unused_parameters_true") if fabric.world_size > 1 else fabric


def launch(fabric: Fabric, config: TrainingConfig) -> Callable[[], None]:
    """Start the processes for further devices, which run the same command again, and connect all of a run.

    Processes that are there already, by torchrun or Slurm, are connected alone.

    Returns:
        To be called where all of them have done their part: lets go of what was connected here, whose threads would
        otherwise meet the end of the interpreter.

    Raises:
        UserError: they are not those that the configuration asks for, or do not find one another.
    """
    before = _is_connected()
    with _told(config):
        fabric.launch()
    processes: list[subprocess.Popen[bytes]] = getattr(fabric.strategy.launcher, "procs", [])
    if processes:
        atexit.register(_wait_for, processes.copy())
        # Fabric watches its processes, and kills all without a word where one has failed. With none left on its list it
        # gives up: `latentgnn.training.lifeline` sees it too, also on other machines, and says what happened.
        processes.clear()
    return torch.distributed.destroy_process_group if _is_connected() and not before else lambda: None


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's reports of its stages, for this loop has its own; its warnings stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.fabric", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _is_connected() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def _told(config: TrainingConfig) -> Iterator[None]:
    try:
        yield
    # Fabric has no error of its own for what a machine lacks. ModuleNotFoundError: an accelerator that needs a package.
    except (MisconfigurationException, ValueError, RuntimeError, ModuleNotFoundError) as error:
        raise UserError(
            f"accelerator {config.accelerator!r}, devices {config.devices!r}, machines {config.machines} and precision "
            f"{config.precision!r} do not fit this machine: {' '.join(str(error).split())}"
        ) from error


def _wait_for(processes: list[subprocess.Popen[bytes]]) -> None:
    """Let the other processes of this machine come to their end; none is left behind."""
    for process in processes:
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
