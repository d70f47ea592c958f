"""Devices, precision and processes of a run, set up with Lightning Fabric."""

import atexit
import gc
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

from latentgnn.errors import UserError
from latentgnn.training.config import TrainingConfig

# Environment variables that a process needs in order to start the others of its machine if there are several machines.
_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")


class Started(NamedTuple):
    """The processes that a launcher has started.

    Args:
        by: the launcher.
        devices: number of processes per machine, one per device.
        machines: number of machines.
    """

    by: str
    devices: int
    machines: int


def started() -> Started | None:
    """Return the processes started by a launcher, according to the environment; ``None`` without a launcher.

    Raises:
        UserError: if machines have different numbers of processes.
    """
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        names, by = ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "WORLD_SIZE"), "torchrun"
        devices, machines, world = (int(os.environ[name]) for name in names)
    elif SLURMEnvironment.detect() and "SLURM_STEP_NUM_TASKS" in os.environ:
        # Started by srun. A batch script has the same variables in its environment, but is a single process.
        world, by = int(os.environ["SLURM_NTASKS"]), "Slurm"
        machines = int(os.environ.get("SLURM_NNODES", "1"))
        devices = world // machines
    else:
        return None
    if devices * machines != world:
        raise UserError(
            f"{by} started {world} processes on {machines} machines, {devices} on this one: start as many on each"
        )
    return Started(by, devices, machines)


def make_fabric(
    config: TrainingConfig, loggers: list[Logger], *, several: Callable[[int], str | Strategy] | None = None
) -> Fabric:
    """Create Fabric for a run, before `launch`; it knows at this point how many processes there will be.

    Under a launcher, ``devices`` and ``machines`` are those that it started.

    Args:
        config: the run's configuration.
        loggers: receive the figures.
        several: makes the strategy for a given number of processes, more than one; without it, each process holds a
            copy of the model.

    Raises:
        UserError: if this machine lacks such devices, or a launcher has started another number of processes.
    """
    placed = _placed(config)

    def make(strategy: str | Strategy) -> Fabric:
        return Fabric(
            accelerator=config.accelerator,
            devices=placed.devices,
            num_nodes=placed.machines,
            strategy=strategy,
            precision=config.precision,
            loggers=loggers,
        )

    with _told(config):
        fabric = make("auto")
        if fabric.world_size == 1:
            return fabric
        # Some heads of a model may get no input in one process while they get some in another.
        return make("ddp_find_unused_parameters_true" if several is None else several(fabric.world_size))


def launch(fabric: Fabric, config: TrainingConfig) -> Callable[[], None]:
    """Start processes for the other devices, which run the same command again, and connect all processes of a run.

    Processes that torchrun or Slurm has started already are only connected.

    Returns:
        A function to call when all processes are done: it closes the connections made here, whose threads would
        otherwise still run when the interpreter exits.

    Raises:
        UserError: if the processes are not those that the configuration asks for, or do not find one another.
    """
    before = _is_connected()
    with _told(config):
        try:
            fabric.launch()
        except torch.distributed.DistError as error:
            raise UserError(
                f"the {fabric.world_size} processes did not find one another ({' '.join(str(error).split())}): look "
                "whether all were started and none has ended, and whether all were given the same address and port of "
                "the first machine"
            ) from error
    if _is_connected():
        # Objects that still hold a connection, such as a sharded model, are in reference cycles. If they were collected
        # only at interpreter exit, their threads would sometimes abort the process.
        atexit.register(gc.collect)
    processes: list[subprocess.Popen[bytes]] = getattr(fabric.strategy.launcher, "procs", [])
    if processes:
        atexit.register(_wait_for, processes.copy())
        # Fabric watches its processes and silently kills all of them if one fails. Clearing its list turns this off:
        # `latentgnn.training.lifeline` notices such failures too, also on other machines, and says what happened.
        processes.clear()
    return torch.distributed.destroy_process_group if _is_connected() and not before else lambda: None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's progress messages, as this loop prints its own; warnings are still shown."""
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


class _Placed(NamedTuple):
    devices: Any
    machines: int


def _placed(config: TrainingConfig) -> _Placed:
    launcher = started()
    if launcher is not None:
        given = {"training.devices": (config.devices, launcher.devices)}
        if config.machines != 1:
            given["training.machines"] = (config.machines, launcher.machines)
        for name, (asked, present) in given.items():
            if asked not in ("auto", present):
                raise UserError(
                    f"{name} is {asked}, but {launcher.by} started {launcher.devices} processes on each of "
                    f"{launcher.machines} machines: start as many as that, or leave it to {launcher.by} with "
                    "--training.devices auto --training.machines 1"
                )
        return _Placed(launcher.devices, launcher.machines)
    missing = [name for name in _RENDEZVOUS if name not in os.environ]
    if config.machines > 1 and missing:
        raise UserError(
            f"training.machines is {config.machines}, but {', '.join(missing)} is not in the environment: start the "
            "command on each machine by torchrun or by Slurm, or with MASTER_ADDR and MASTER_PORT of the first machine "
            f"and NODE_RANK from 0 to {config.machines - 1}"
        )
    return _Placed(config.devices, config.machines)


@contextmanager
def _told(config: TrainingConfig) -> Iterator[None]:
    try:
        yield
    # Fabric has no exception class for missing hardware. ModuleNotFoundError: an accelerator that needs a package.
    except (MisconfigurationException, ValueError, RuntimeError, ModuleNotFoundError) as error:
        raise UserError(
            f"accelerator {config.accelerator!r}, devices {config.devices!r}, machines {config.machines} and precision "
            f"{config.precision!r} do not fit this machine: {' '.join(str(error).split())}"
        ) from error


def _wait_for(processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait for the other processes of this machine to end, so that none is left behind."""
    for process in processes:
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
