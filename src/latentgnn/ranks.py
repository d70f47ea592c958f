"""Sums over processes that each hold a part of the nodes of the same inputs.

A sum is one all-reduce: everything that is summed at the same time goes through one buffer. Its size is that of the
latents or of the channels, and does not depend on the number of nodes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

# Number of bytes of the facts, and of their digest, that each process sends to the others once.
_TOLD, _DIGEST = 1024, 16
# Seconds that the others have to answer after a sum has failed.
_GRACE = 5


@dataclass
class Ranks:
    """The processes that hold the nodes of the same inputs.

    Args:
        group: name of their process group: a name can be copied and pickled with a layer, a group cannot.
        count: number of processes.
        agreed: whether they have compared what they compute.
    """

    group: str
    count: int
    agreed: bool = False


def added(tensors: Sequence[Tensor], group: str) -> list[Tensor]:
    """Return the sum of each tensor over the processes of a group, by one all-reduce.

    The gradient of a process's input is the sum over all processes of the gradients of their outputs: one more
    all-reduce.

    Args:
        tensors: tensors of one dtype, with the same shapes in each process.
        group: name of a process group.

    Raises:
        RuntimeError: if processes are gone, or have other shapes; with their ranks, as far as they can be determined.
    """
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    parts = _Sum.apply(flat, group).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class _Sum(torch.autograd.Function):
    """One all-reduce forward, and one backward."""

    @staticmethod
    def forward(flat: Tensor, group: str) -> Tensor:
        return _all_reduced(flat, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad.contiguous(), ctx.group), None


def _all_reduced(flat: Tensor, group: str) -> Tensor:
    # The form of collectives that compilers support. Imported here: builds without distributed support lack it.
    from torch.distributed._functional_collectives import all_reduce, wait_tensor

    name: Any = group
    if torch.compiler.is_compiling():
        return wait_tensor(all_reduce(flat, "sum", name))
    try:
        return wait_tensor(all_reduce(flat, "sum", name))
    except RuntimeError as error:
        raise RuntimeError(_explained(group, error)) from error


def _explained(group: str, error: Exception) -> str:
    """Explain why a sum failed: find out who is gone by who answers."""
    from torch._C._distributed_c10d import _resolve_process_group

    name: Any = group
    try:
        process_group = _resolve_process_group(name)
    except (RuntimeError, ValueError):
        return (
            f"this process has no process group {group!r}, over which the layer's nodes were shared: call "
            "latentgnn.shard_nodes(layer, group) again in this process, or shard_nodes(layer, None) to compute alone"
        )
    told = str(error).splitlines()[0]
    absent = _silent(process_group)
    if absent is None:
        return f"the sum over the processes that share the nodes failed, and the store of rank 0 is gone: {told}"
    if absent:
        return (
            f"the sum over the processes that share the nodes failed, and rank {torch.distributed.get_rank()} ends "
            f"with it: {_named(absent)}: {told}"
        )
    return (
        f"the sum over the processes that share the nodes failed, though all of them are alive; do they call the same "
        f"layers, forward and backward, in the same order, on as many samples? (With TORCH_DISTRIBUTED_DEBUG=DETAIL "
        f"PyTorch compares every call.) {told}"
    )


def _named(absent: Sequence[int]) -> str:
    if len(absent) == 1:
        return f"rank {absent[0]} is gone, or does not answer"
    # Processes not directly affected keep waiting for others that wait for the one that is gone.
    return f"ranks {', '.join(map(str, absent))} do not answer: one of them is gone, and others may wait for it"


def _silent(process_group: Any) -> list[int] | None:
    """The ranks that do not answer within the grace period; ``None`` if the store itself does not."""
    from torch.distributed import get_process_group_ranks, get_rank
    from torch.distributed.distributed_c10d import _get_process_group_store

    store = _get_process_group_store(process_group)
    silent = []
    try:
        store.set(f"latentgnn/here/{get_rank()}", "")
        wait = timedelta(seconds=_GRACE)
        for rank in get_process_group_ranks(process_group):
            try:
                store.wait([f"latentgnn/here/{rank}"], wait)
            except torch.distributed.DistStoreError:
                silent.append(rank)
                # The first wait covers the delay; the others need not wait as long again.
                wait = timedelta(seconds=1)
    except torch.distributed.DistNetworkError:
        return None
    return silent


def agree(ranks: Ranks, facts: Mapping[str, object], device: torch.device) -> None:
    """Check by one all-gather that all processes are about to compute the same thing.

    Args:
        ranks: the processes.
        facts: names and values that must be the same in all of them.
        device: device that the process group can send from.

    Raises:
        ValueError: in all processes, if they differ; with the ranks and their values.
        RuntimeError: if processes are gone.
    """
    from torch._C._distributed_c10d import _resolve_process_group

    name: Any = ranks.group
    text = json.dumps(facts).encode()
    # The digest covers all facts, including those that are cut off after it.
    sent = blake2b(text, digest_size=_DIGEST).digest() + text[:_TOLD].ljust(_TOLD)
    own = torch.tensor(list(sent), dtype=torch.uint8, device=device)
    rows = [torch.empty_like(own) for _ in range(ranks.count)]
    try:
        torch.distributed.all_gather(rows, own, group=_resolve_process_group(name))
    except RuntimeError as error:
        raise RuntimeError(_explained(ranks.group, error)) from error
    told = [bytes(row.tolist()) for row in rows]
    if len(set(told)) > 1:
        raise ValueError(_difference([each[_DIGEST:].decode().rstrip() for each in told]))
    ranks.agreed = True


def _difference(told: Sequence[str]) -> str:
    try:
        each = [json.loads(text) for text in told]
    except json.JSONDecodeError:
        return f"the processes that share a layer's nodes disagree: {'; '.join(told)}"
    parts = []
    for name in each[0]:
        values: dict[str, list[int]] = {}
        for rank, facts in enumerate(each):
            values.setdefault(str(facts.get(name)), []).append(rank)
        if len(values) > 1:
            shown = [f"{value} in process {', '.join(map(str, ranks))}" for value, ranks in values.items()]
            parts.append(f"{name}: {'; '.join(shown)}")
    return (
        f"the processes that share a layer's nodes must compute the same, but differ in {', and in '.join(parts)} "
        "(counted from 0 within the group); give each of them the same layer, and its part of the same samples"
    )
