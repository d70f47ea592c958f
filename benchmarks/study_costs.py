"""What a study's variants cost: counted once a run, and timed side by side on a machine that does nothing else."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import held_bytes, step_of, take_turns
from benchmarks.questions import Question
from latentgnn.machine import processor_name


def counted(network: nn.Module, forward: Callable[[], object]) -> dict[str, int]:
    """Parameters of a network, and operations of a call; a multiply-add is two.

    Args:
        network: the network whose parameters are counted.
        forward: the call.
    """
    with FlopCounterMode(display=False) as counter:
        forward()
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "operations": counter.get_total_flops(),
    }


def costs(network: nn.Module, x: Tensor) -> dict[str, float]:
    """Parameters; operations of a forward pass per sample; bytes per sample held for a training step's backward pass.

    Operations are those of the mode that the network is in, bytes those of training mode, whatever the mode.

    Args:
        network: the network; afterwards its modes and buffers, such as running statistics, are as before.
        x: a batch.
    """
    with left_as_it_was(network):
        found = counted(network, partial(network, x))
        held = held_bytes(network.train(), x, network)
    return {**found, "operations": found["operations"] / len(x), "held_bytes": held / len(x)}


@contextmanager
def left_as_it_was(network: nn.Module) -> Iterator[None]:
    """Give a network its modes and the values of its buffers back after a ``with`` block.

    Args:
        network: the network.
    """
    modes = {module: module.training for module in network.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)


def take_times(question: Question, networks: Mapping[str, nn.Module], rounds: int) -> dict[str, Any]:
    """Seconds of a training step and of a forward pass of each variant, which take turns on one thread.

    Args:
        question: gives the batch and the loss.
        networks: of the variants.
        rounds: measurements per side.

    Returns:
        Medians and all measurements, with date and processor.
    """
    torch.set_num_threads(1)
    ((x, target),) = question.batches(0, 1)

    def learn_of(network: nn.Module) -> Callable[[], object]:
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)

        step = step_of(lambda: question.loss(network.train()(x), target), network.parameters())

        def learn() -> None:
            step()
            optimizer.step()

        return learn

    def forward_of(network: nn.Module) -> Callable[[], object]:
        @torch.no_grad()
        def forward() -> None:
            network.eval()(x)

        return forward

    taken = {}
    for what, call_of in (("step", learn_of), ("forward", forward_of)):
        calls = [call_of(network) for network in networks.values()]
        taken[what] = take_turns(calls, rounds=rounds, device=torch.device("cpu"))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor_name(),
        "batch": len(x),
        "seconds": {
            name: {
                what: {"median": statistics.median(times[side]), "all": times[side]} for what, times in taken.items()
            }
            for side, name in enumerate(networks)
        },
    }
