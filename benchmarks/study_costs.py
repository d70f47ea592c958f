"""What a study's variants cost: counted once a run, and timed side by side on a machine that does nothing else."""

import statistics
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import held_bytes, take_turns
from benchmarks.questions import Question
from latentgnn.machine import processor_name


def costs(network: nn.Module, x: Tensor) -> dict[str, float]:
    """Parameters, operations of a forward pass a sample (two a multiply-add), bytes held for the backward pass."""
    with FlopCounterMode(display=False) as counter:
        network(x)
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "operations": counter.get_total_flops() / len(x),
        "held_bytes": held_bytes(network, x, network) / len(x),
    }


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

    def step_of(network: nn.Module) -> Callable[[], object]:
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)

        def step() -> None:
            optimizer.zero_grad()
            question.loss(network.train()(x), target).backward()
            optimizer.step()

        return step

    def forward_of(network: nn.Module) -> Callable[[], object]:
        @torch.no_grad()
        def forward() -> None:
            network.eval()(x)

        return forward

    taken = {}
    for what, call_of in (("step", step_of), ("forward", forward_of)):
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
