"""Sums over the processes that each hold a part of the nodes of the same inputs.

A sum is one all-reduce, whatever it is of: what is added at once goes through one buffer. Its size is that of the
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

# Bytes of the facts, and of their digest, that each process sends to the others once.
_TOLD, _DIGEST = 1024, 16
# Seconds that the others have to answer, once a sum has failed.
_GRACE = 5


@dataclass
class Ranks:
    """The processes that hold the nodes of the same inputs.

    Args:
        group: the name of their process group: a name can be copied and pickled with a layer, a group cannot.
        count: how many they are.
        agreed: whether they have compared what they compute.
    """

    group: str
    count: int
    agreed: bool = False


def added(tensors: Sequence[Tensor], group: str) -> list[Tensor]:
    """The sum of each tensor over the processes of a group, by one all-reduce.

    The gradient of what a process gives is the sum of all processes' gradients of what they get: one more all-reduce.

    Args:
        tensors: of one type; of the same shapes in each process.
        group: the name of a process group.

    Raises:
        RuntimeError: processes are gone, or give other shapes; with their ranks, as far as that can be found out.
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
    # The form of a collective that compilers know. Imported here: builds without distributed support lack it.
    from torch.distributed._functional_collectives import all_reduce, wait_tensor

    name: Any = group
    if torch.compiler.is_compiling():
        return wait_tensor(all_reduce(flat, "sum", name))
    try:
        return wait_tensor(all_reduce(flat, "sum", name))
    except RuntimeError as error:
        raise RuntimeError(_explained(group, error)) from error


def _explained(group: str, error: Exception) -> str:
    """Why a sum failed: who is gone, by who answers."""
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
    # Far from the one that is gone, processes go on waiting for those that wait for it.
    return f"ranks {', '.join(map(str, absent))} do not answer: one of them is gone, and others may wait for it"


def _silent(process_group: Any) -> list[int] | None:
    """The ranks that do not answer within the time of grace; ``None`` where the store itself does not."""
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
                # Who comes so late is found by the first wait.
                wait = timedelta(seconds=1)
    except torch.distributed.DistNetworkError:
        return None
    return silent


def agree(ranks: Ranks, facts: Mapping[str, object], device: torch.device) -> None:
    """Compare with the other processes what this one is about to compute, by one all-gather.

    Args:
        ranks: the processes.
        facts: what must be the same in all of them, in words and numbers.
        device: where the process group can send from.

    Raises:
        ValueError: they differ, in all processes alike; with the ranks and their values.
        RuntimeError: processes are gone.
    """
    from torch._C._distributed_c10d import _resolve_process_group

    name: Any = ranks.group
    text = json.dumps(facts).encode()
    # The digest is of all facts, also of those that are cut off behind it.
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
