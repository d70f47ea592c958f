"""Time of two sides that take turns, bytes held for the backward pass, and bytes alive at the peak."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn

# One measurement lasts at least this long, so that calls of microseconds are not lost in the clock and the scheduler.
LEAST_SECONDS = 0.02

# More than any GPU's clock rate, so that the waiting kernel lasts long enough; and by how much longer it lasts.
_CYCLES_PER_SECOND = 2e9
_SLACK = 1e-3


class Ratio(NamedTuple):
    """Median, minimum and maximum of the rounds' ratios."""

    median: float
    least: float
    largest: float


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """The ratios of two series, round by round.

    Args:
        above: numerators.
        below: denominators, as many.

    Example:
        >>> ratio([2.0, 6.0, 8.0], [1.0, 2.0, 2.0])
        Ratio(median=3.0, least=2.0, largest=4.0)
    """
    values = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(statistics.median(values), min(values), max(values))


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Wall-clock time of a call, the mean of several in a row.

    Args:
        call: what is timed.
        device: where it runs.
        repeats: calls in a row.
    """
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def take_turns(
    calls: Sequence[Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    least_seconds: float = LEAST_SECONDS,
    between: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Seconds of each call in each round: A B, then B A, and so on.

    Before each measurement the call runs once untimed, because the other side has just used the memory.

    Args:
        calls: the sides.
        rounds: measurements per side.
        device: where they run.
        least_seconds: a measurement repeats its call until it lasts about this long.
        between: runs at the beginning of each round.

    Returns:
        One list a side.
    """
    repeats = []
    for call in calls:
        for _ in range(2):
            call()
        repeats.append(max(ceil(least_seconds / max(seconds(call, device), 1e-9)), 1))
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds):
        between()
        order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
        for side in order:
            calls[side]()
            taken[side].append(seconds(calls[side], device, repeats[side]))
    return taken


def step_of(forward: Callable[[], Tensor], tensors: Iterable[Tensor], grad: Tensor | None = None) -> Callable[[], None]:
    """A step, forward and backward, as it is timed.

    Args:
        forward: gives the output, or a loss.
        tensors: the tensors that take gradients; each step begins without them.
        grad: the output's gradient; ``None`` for a loss.
    """
    tensors = list(tensors)

    def step() -> None:
        for tensor in tensors:
            tensor.grad = None
        forward().backward(grad)

    return step


def device_seconds(call: Callable[[], object], *, repeats: int = 5) -> float:
    """Time that a call keeps the current CUDA device busy, without waits for kernel launches.

    Each measurement first starts a kernel that lasts longer than the launches, so that all kernels of the call are
    queued when the first one starts. If the call itself waits for the device, that time counts.

    Args:
        call: what is measured.
        repeats: measurements, of which the median is returned; smaller in tests.
    """
    device = torch.device("cuda")
    launching = seconds(call, device)
    taken = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(ceil((launching + _SLACK) * _CYCLES_PER_SECOND))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def held_bytes(forward: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> int:
    """Bytes of all memory that the backward pass keeps alive, without parameters and buffers.

    Args:
        forward: the function.
        x: its input, which counts where it is kept.
        module: whose parameters and buffers do not count.

    Example:
        >>> x = torch.zeros(1000, requires_grad=True)
        >>> held_bytes(lambda x: x * x, x, nn.Identity())
        4000
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    held: dict[int, tuple[int, Tensor]] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            # Keep the tensor too: otherwise its address could be reused, and both would count once.
            held[storage.data_ptr()] = (storage.nbytes(), saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        output = forward(x)
    del output
    return sum(size for size, _ in held.values())


def peak_bytes(call: Callable[[], object], x: Tensor) -> int:
    """Most bytes of tensors alive during a call, including the input.

    Args:
        call: what is measured.
        x: its input, which is there before.
    """
    size = x.numel() * x.element_size()
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        call()
        return size + torch.cuda.max_memory_allocated(x.device) - before
    from torch.profiler import ProfilerActivity, profile

    # PyTorch 2.11 warns that events of other cycles would be lost unless they are asked for; there is only one.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    alive = most = size
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most
