"""The layer beside its peers, in one run: time, memory held for the backward pass, peak memory, and the floor.

All sides take turns, round after round, and what is reported are medians of the rounds' ratios, because the speed of
a shared machine drifts; what is timed is each side's second call, because the first finds the memory as another
side has left it. Each peer's output is checked before it is timed. Peers come from their own packages.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentgnn import reference
from latentgnn.errors import UserError, require
from latentgnn.files import write_bytes, write_json, write_text
from latentgnn import LatentGNN, PackedLatentGNN
from latentgnn.kernels import wants_triton
from latentgnn.norms import FrozenBatchNorm

Forward = Callable[[Tensor], Tensor]

REDUCTION = 8


@dataclass(frozen=True)
class Shape:
    """One input and the layer for it."""

    batch: int
    channels: int
    spatial: tuple[int, ...]
    latents: tuple[int, ...]
    graph_conv: bool = True

    @property
    def size(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.spatial)


SHAPES: Mapping[str, Shape] = {
    # The paper's detection settings at 800 x 1333.
    "C3": Shape(2, 512, (100, 168), (150,)),
    "C4": Shape(2, 1024, (50, 84), (100,)),
    "C5": Shape(2, 2048, (25, 42), (50,)),
    "published": Shape(8, 1024, (30, 30), (100, 100), graph_conv=False),
    "map": Shape(1, 256, (512, 512), (64,), graph_conv=False),
    "video": Shape(1, 512, (8, 56, 56), (64,), graph_conv=False),
    "million": Shape(1, 96, (1_000_000,), (64,), graph_conv=False),
}

NORMS: Mapping[str, Callable[[int], nn.Module]] = {"frozen": FrozenBatchNorm, "training": nn.BatchNorm1d}


class Refused(Exception):
    """A peer that a shape is not for, or too large for."""


class AllNodes(nn.Module):
    """`scaled_dot_product_attention` over all nodes, as wide inside as the layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = channels // REDUCTION
        self.query, self.key, self.value = (nn.Linear(channels, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        nodes = x.flatten(2).mT
        mixed = F.scaled_dot_product_attention(self.query(nodes), self.key(nodes), self.value(nodes))
        return x + self.out(mixed).mT.unflatten(2, x.shape[2:])


class LearnedQueries(nn.Module):
    """Gather and scatter by two `scaled_dot_product_attention` with learned latent queries, as FLARE does."""

    def __init__(self, channels: int, latents: int) -> None:
        super().__init__()
        width = channels // REDUCTION
        self.queries = nn.Parameter(torch.randn(latents, width))
        self.key, self.value = (nn.Linear(channels, width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        nodes = x.flatten(2).mT
        key, queries = self.key(nodes), self.queries.expand(x.shape[0], -1, -1)
        latents = F.scaled_dot_product_attention(queries, key, self.value(nodes))
        mixed = F.scaled_dot_product_attention(key, queries, latents)
        return x + self.out(mixed).mT.unflatten(2, x.shape[2:])


def _reference(layer: LatentGNN, shape: Shape) -> tuple[nn.Module, Forward]:
    return layer, lambda x: reference.forward(layer, x)


def _compiled_reference(layer: LatentGNN, shape: Shape) -> tuple[nn.Module, Forward]:
    torch._dynamo.reset()
    return layer, torch.compile(lambda x: reference.forward(layer, x))


def _non_local(layer: LatentGNN, shape: Shape) -> tuple[nn.Module, Forward]:
    require("timm", extra="detection")
    from timm.layers.non_local_attn import NonLocalAttn

    nodes = prod(shape.spatial)
    affinity = 3 * shape.batch * nodes**2 * 4
    if affinity > 8 << 30:
        raise Refused(f"its affinity and the softmax of it take {affinity / 2**30:,.0f} GiB")
    block: nn.Module = NonLocalAttn(shape.channels, rd_ratio=0.5, rd_divisor=1)  # type: ignore[no-untyped-call]
    # It starts as an identity, which would leave nothing to check.
    nn.init.ones_(block.norm.weight)  # type: ignore[union-attr, arg-type]
    return block, lambda x: block(x.flatten(2).unsqueeze(-1)).view_as(x)


def _all_nodes(layer: LatentGNN, shape: Shape) -> tuple[nn.Module, Forward]:
    operations = 4 * shape.batch * prod(shape.spatial) ** 2 * shape.channels // REDUCTION
    if operations > 2e12:
        raise Refused(f"its products of all pairs take {operations / 1e12:,.0f} T operations")
    block = AllNodes(shape.channels)
    return block, block


def _lite_mla(layer: LatentGNN, shape: Shape) -> tuple[nn.Module, Forward]:
    require("timm", extra="detection")
    from timm.models.efficientvit_mit import LiteMLA

    if len(shape.spatial) != 2:
        raise Refused("it takes maps of two dimensions")
    block = LiteMLA(shape.channels, shape.channels, dim=REDUCTION, heads_ratio=1 / REDUCTION)
    return block, block


def _learned_queries(layer: LatentGNN, shape: Shape) -> tuple[nn.Module, Forward]:
    block = LearnedQueries(shape.channels, sum(shape.latents))
    return block, block


PEERS: Mapping[str, Callable[[LatentGNN, Shape], tuple[nn.Module, Forward]]] = {
    "reference": _reference,
    "compiled reference": _compiled_reference,
    "non-local": _non_local,
    "attention": _all_nodes,
    "LiteMLA": _lite_mla,
    "latent queries": _learned_queries,
}


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def settled(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of the second of two calls: the first finds the memory as another side has left it."""
    call()
    return seconds(call, device)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square product, now."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, a, out=out), device) for _ in range(5))


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes, now."""
    a = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    out = torch.empty_like(a)
    return 2 * a.numel() / min(seconds(lambda: out.copy_(a), device) for _ in range(3))


def remaining_operations(shape: Shape) -> int:
    """Operations of a forward pass that the algebra leaves, without what does not grow with the nodes."""
    channels, reduced, latents = shape.channels, shape.channels // REDUCTION, sum(shape.latents)
    kernels = len(shape.latents)
    each = 4 * channels * reduced + 6 * reduced * latents
    each += 2 * channels * kernels * reduced + 2 * reduced * latents if shape.graph_conv else 2 * channels * latents
    return shape.batch * prod(shape.spatial) * each


def held_bytes(forward: Forward, x: Tensor, module: nn.Module) -> int:
    """Bytes of all memory that the backward pass keeps alive, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    held: dict[int, tuple[int, Tensor]] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            # The tensor is kept too: a freed address would be given to another and counted once.
            held[storage.data_ptr()] = (storage.nbytes(), saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        output = forward(x)
    del output
    return sum(size for size, _ in held.values())


def peak_bytes(call: Callable[[], object], x: Tensor) -> int:
    """Most bytes of tensors alive during a call, the input included."""
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        call()
        return x.numel() * x.element_size() + torch.cuda.max_memory_allocated(x.device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    alive = most = x.numel() * x.element_size()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


def check(name: str, forward: Forward, x: Tensor, expected: Tensor | None) -> None:
    """Refuse to time a peer that is wrong.

    A reference must give the layer's output; any other must give finite numbers in the input's shape, and its
    first node must feel its last: otherwise it is no context for all.
    """
    output = forward(x)
    if output.shape != x.shape or not output.isfinite().all():
        raise UserError(f"{name}: the output is not a finite map of shape {tuple(x.shape)}; it was not timed")
    if expected is not None:
        error = float((output - expected).abs().max() / expected.abs().max())
        if error > (1e-4 if x.dtype == torch.float32 else 5e-2):
            raise UserError(f"{name}: its output differs by {error:.1e} from the layer's; it was not timed")
        return
    moved = x.clone()
    moved.flatten(2)[..., -1] += 100
    if torch.equal(forward(moved).flatten(2)[..., 0], output.flatten(2)[..., 0]):
        raise UserError(f"{name}: the first node does not feel the last; it was not timed")


def compare(
    shape: Shape,
    *,
    peers: Iterable[str],
    norm: str,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    steps: bool = True,
) -> dict[str, Any]:
    """The layer and its peers at one shape.

    Returns:
        For each side its seconds, held and peak bytes over the input's, and for each peer the medians, least and
        largest of the rounds' ratios to the layer; and the layer's time over the floor.
    """
    torch.manual_seed(0)
    layer = LatentGNN(
        shape.channels,
        num_latents=shape.latents,
        reduction=REDUCTION,
        graph_conv=shape.graph_conv,
        norm=NORMS[norm],
        gamma_init=0.5,
        device=device,
        dtype=dtype,
    )
    x = torch.randn(shape.size, device=device, dtype=dtype, requires_grad=steps)
    grad = torch.randn_like(x) if steps else None
    sides: dict[str, tuple[nn.Module, Forward]] = {"latentgnn": (layer, layer)}
    refused: dict[str, str] = {}
    with torch.no_grad():
        expected = layer(x)
        for name in peers:
            try:
                module, forward = PEERS[name](layer, shape)
                module.to(device=device, dtype=dtype)
                # Without statistics of the batch, by which every node would feel every other.
                module.train(norm == "training" and "reference" in name)
                check(name, forward, x.detach(), expected if "reference" in name else None)
                module.train(norm == "training")
            except Refused as reason:
                refused[name] = str(reason)
            else:
                sides[name] = (module, forward)
        del expected

    forwards: dict[str, list[float]] = {name: [] for name in sides}
    both: dict[str, list[float]] = {name: [] for name in sides}
    floors: list[float] = []
    operations, size = remaining_operations(shape), x.numel() * x.element_size()

    def step(module: nn.Module, forward: Forward) -> None:
        module.zero_grad()
        x.grad = None
        forward(x).backward(grad)

    for turn in range(-1, rounds):
        warm = turn < 0
        # Each begins in its turn.
        first = turn % len(sides)
        order = [*list(sides.items())[first:], *list(sides.items())[:first]]
        limits = [operations / product_rate(device, dtype)]
        if device.type == "cuda":
            limits.append(3 * size / bandwidth(device))
        for name, (_, forward) in order:
            with torch.no_grad():
                taken = settled(lambda forward=forward: forward(x), device)  # type: ignore[misc]
            forwards[name] += [] if warm else [taken]
        for name, (module, forward) in order if steps else ():
            taken = settled(lambda module=module, forward=forward: step(module, forward), device)  # type: ignore[misc]
            both[name] += [] if warm else [taken]
        floors += [] if warm else [max(limits)]

    def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
        values = [a / b for a, b in zip(above, below, strict=True)]
        return {"median": statistics.median(values), "least": min(values), "largest": max(values)}

    result: dict[str, Any] = {"shape": list(shape.size), "latents": list(shape.latents), "norm": norm}
    result |= {"graph_conv": shape.graph_conv, "dtype": str(dtype).removeprefix("torch."), "refused": refused}
    result["floor_seconds"] = statistics.median(floors)
    result["sides"] = {}
    for name, (module, forward) in sides.items():
        one: dict[str, Any] = {"forward_seconds": statistics.median(forwards[name])}
        one["over_floor"] = ratios(forwards[name], floors)
        one["forward_ratio"] = ratios(forwards[name], forwards["latentgnn"])
        if steps:
            one["step_seconds"] = statistics.median(both[name])
            one["step_ratio"] = ratios(both[name], both["latentgnn"])
            one["held"] = held_bytes(forward, x, module) / size
        with torch.no_grad():
            one["peak"] = peak_bytes(lambda forward=forward: forward(x), x) / size  # type: ignore[misc]
        result["sides"][name] = one
    return result


def packed_against_padded(
    sizes: Sequence[int], *, channels: int = 96, latents: int = 64, rounds: int
) -> dict[str, Any]:
    """Scenes one after another against the same scenes padded to the largest, with a mask."""
    torch.manual_seed(0)
    layer = PackedLatentGNN(channels, num_latents=latents, norm=FrozenBatchNorm, gamma_init=0.5)
    x = torch.randn(sum(sizes), channels)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    times: dict[str, list[float]] = {"packed": [], "padded": []}

    def padded() -> Tensor:
        dense = x.new_zeros(len(sizes), max(sizes), channels)
        dense[mask] = x
        return layer(dense, mask=mask)[mask]

    device = torch.device("cpu")
    with torch.no_grad():
        error = float((layer(x, offsets) - padded()).abs().max())
        if error > 1e-3:
            raise UserError(f"packed and padded differ by {error:.1e}; they were not timed")
        for _ in range(rounds):
            times["packed"].append(settled(lambda: layer(x, offsets), device))
            times["padded"].append(settled(padded, device))
    ratio = [a / b for a, b in zip(times["padded"], times["packed"], strict=True)]
    return {
        "scenes": len(sizes),
        "points": sum(sizes),
        "largest": max(sizes),
        "packed_seconds": statistics.median(times["packed"]),
        "padded_over_packed": {"median": statistics.median(ratio), "least": min(ratio), "largest": max(ratio)},
    }


def per_node(
    *, channels: int = 96, latents: int = 64, most: int = 10_000_000, rounds: int = 5
) -> list[dict[str, float]]:
    """The forward pass's time for each node, from 10,000 nodes on, ten times more each."""
    layer = LatentGNN(channels, num_latents=latents, norm=FrozenBatchNorm, gamma_init=0.5)
    counts = [count for count in (10_000, 100_000, 1_000_000, 10_000_000) if count <= most]
    inputs = {count: torch.randn(1, channels, count) for count in counts}
    times: dict[int, list[float]] = {count: [] for count in counts}

    def repeated(x: Tensor, repeats: int) -> None:
        for _ in range(repeats):
            layer(x)

    with torch.no_grad():
        for _ in range(rounds):
            for count, x in inputs.items():
                # Small inputs several times, so that each measurement takes about as long.
                repeats = max(1_000_000 // count, 1)
                taken = settled(lambda x=x, repeats=repeats: repeated(x, repeats), x.device)  # type: ignore[misc]
                times[count].append(taken / repeats / count)
    return [{"nodes": count, "nanoseconds": 1e9 * statistics.median(values)} for count, values in times.items()]


def by_nodes(peers: Sequence[str], *, rounds: int, channels: int = 256, latents: int = 64) -> list[dict[str, Any]]:
    """All peers at square maps of growing size."""
    sides = (16, 32, 64, 128, 256)
    return [
        compare(
            Shape(1, channels, (side, side), (latents,), graph_conv=False),
            peers=peers,
            norm="frozen",
            rounds=rounds,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        for side in sides
    ]


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Results by the name of their shape, in Markdown."""
    lines = [
        "| shape | norm | side | forward | over floor | its time over latentgnn's (spread) | training step | "
        "over latentgnn's (spread) | held / input | peak / input |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def spread(ratio: Mapping[str, float]) -> str:
        return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['largest']:.2f})"

    for name, result in results.items():
        shape = name.split()[0]
        for side, one in result["sides"].items():
            step = f"{1e3 * one['step_seconds']:.0f} ms | {spread(one['step_ratio'])}" if "step_ratio" in one else "|"
            held = f"{one['held']:.2f}" if "held" in one else ""
            lines.append(
                f"| {shape} | {result['norm']} | {side} | {1e3 * one['forward_seconds']:.1f} ms "
                f"| {one['over_floor']['median']:.2f} | {spread(one['forward_ratio'])} | {step} | {held} "
                f"| {one['peak']:.2f} |"
            )
        lines += [
            f"| {shape} | {result['norm']} | {peer} | not run: {reason} | | | | | | |"
            for peer, reason in result["refused"].items()
        ]
    return "\n".join(lines)


def plot(results: Sequence[Mapping[str, Any]]) -> bytes:
    """Time and memory against the number of nodes, on logarithmic axes, as PNG."""
    require("matplotlib", extra="viz")
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    drawn = (("forward_seconds", "forward, seconds"), ("step_seconds", "training step, seconds"), ("held", "held, MiB"))
    for axes, (key, title) in zip(panels, drawn, strict=True):
        for name in ("latentgnn", *PEERS):
            points = [
                (prod(result["shape"][2:]), one[key] * (4 * prod(result["shape"]) / 2**20 if key == "held" else 1))
                for result in results
                if (one := result["sides"].get(name)) is not None
            ]
            if points:
                axes.loglog(*zip(*points, strict=True), marker="o", label=name, lw=2.5 if name == "latentgnn" else 1.2)
        axes.set_title(title)
        axes.set_xlabel("nodes")
        axes.grid(visible=True, which="major", alpha=0.3)
    panels[0].legend(fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def processor() -> str:
    """The name of the processor, with the flags that matter to products."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return f"{name} ({', '.join(flag for flag in ('avx2', 'avx512f', 'amx_tile') if flag in flags)})"


def run(
    *,
    shapes: Sequence[str],
    peers: Sequence[str],
    norms: Sequence[str],
    rounds: int,
    threads: int,
    device: str,
    dtype: str,
    sweeps: bool,
    out: Path,
    command: str,
) -> dict[str, Any]:
    """Measure, print, and write ``layer-DATE-DEVICE[-DTYPE][-triton]`` as JSON, Markdown and PNG."""
    torch.set_num_threads(threads)
    place, kind = torch.device(device), getattr(torch, dtype)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here")
    now = datetime.now(UTC)
    hardware = torch.cuda.get_device_name() if place.type == "cuda" else processor()
    report: dict[str, Any] = {
        "command": command,
        "date": now.isoformat(timespec="seconds"),
        "hardware": hardware,
        "dtype": dtype,
        "triton": wants_triton(place),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "square_product_gflops": product_rate(place, kind) / 1e9,
        "layer": {},
    }
    special = [] if kind == torch.float32 else [dtype]
    special += ["triton"] if wants_triton(place) else []
    stem = out / "-".join([f"layer-{now:%Y-%m-%d}-{place.type}", *special])

    def keep(part: str, value: Any) -> None:
        """Write what there is after every part: a long run that is stopped has not been in vain."""
        report[part] = value
        write_json(stem.with_suffix(".json"), report)
        write_text(stem.with_suffix(".md"), markdown(report))

    for name in shapes:
        for norm in norms:
            result = compare(SHAPES[name], peers=peers, norm=norm, rounds=rounds, device=place, dtype=kind)
            keep("layer", report["layer"] | {f"{name} {norm}": result})
            head = 0 if len(report["layer"]) == 1 else 2
            print("\n".join(table({name: result}).splitlines()[head:]), flush=True)
    sweeps = sweeps and place.type == "cpu"
    if sweeps:
        keep("per_node", per_node())
        # One scene, many alike, one large among small ones.
        scenes = ([1_000_000], [1000] * 1000, [100_000, *[1000] * 9])
        keep("packed", [packed_against_padded(sizes, rounds=rounds) for sizes in scenes])
        keep("by_nodes", by_nodes([peer for peer in peers if peer != "compiled reference"], rounds=rounds))
        write_bytes(stem.with_suffix(".png"), plot(report["by_nodes"]))
    print(f"written to {stem}.json, .md{' and .png' if sweeps else ''}")
    return report


def markdown(report: Mapping[str, Any]) -> str:
    """A report for reading."""
    known = ("layer", "per_node", "packed", "by_nodes")
    head = json.dumps({key: value for key, value in report.items() if key not in known}, indent=2)
    parts = ["# The layer beside its peers", f"```json\n{head}\n```", table(report["layer"])]
    if "per_node" in report:
        rows = [f"| {one['nodes']:,} | {one['nanoseconds']:.0f} ns |" for one in report["per_node"]]
        parts += [
            "Forward time a node, 96 channels, 64 latents:",
            "| nodes | each |\n| --- | --- |\n" + "\n".join(rows),
        ]
    if "packed" in report:
        rows = [
            f"| {one['scenes']:,} | {one['points']:,} | {one['largest']:,} | {1e3 * one['packed_seconds']:.0f} ms "
            f"| {one['padded_over_packed']['median']:.2f} |"
            for one in report["packed"]
        ]
        head = "| scenes | points | largest | packed | padded over packed |\n| --- | --- | --- | --- | --- |\n"
        parts += ["Scenes packed against padded to the largest, forward:", head + "\n".join(rows)]
    return "\n\n".join(parts) + "\n"
