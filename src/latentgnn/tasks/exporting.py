"""Exports a trained model to an exchange format, and compares it with the original before anything is written."""

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentgnn.errors import UserError, first_line, require, system_error
from latentgnn.files.outputs import Results
from latentgnn.files.writing import replacing
from latentgnn.hub import CONFIG, WEIGHTS
from latentgnn.saved import CARD, files_of, read_saved

Format = Literal["onnx", "safetensors", "torch"]

FILES: Mapping[Format, str] = {"onnx": "model.onnx", "safetensors": WEIGHTS, "torch": "model.pt2"}
"""The file name for each format."""

TOLERANCE = 1e-3
"""Maximum difference to the model that is accepted, relative to the largest value of an output."""

_USAGE: Mapping[Format, str] = {
    "torch": """import torch

program = torch.export.load("model.pt2").module()
outputs = program(**inputs)  # tensors by the names below; those of levels as a list of lists, `levels`""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
outputs = session.run(None, inputs)  # arrays by the names below""",
}

_QUIET = ("onnxscript", "onnx_ir", "torch.onnx")


@dataclass(frozen=True, kw_only=True)
class Program:
    """The part of a model that can be a program without Python.

    Args:
        network: computes it from named inputs; its outputs are tensors, possibly nested.
        samples: inputs by name, of at least two sizes; the first is traced, and all are compared.
        dynamic: dimensions of the inputs that may vary, in the form of `torch.export.export`.
        inputs: name and meaning of each input tensor, in order.
        outputs: name and meaning of each output tensor, in order.
        part: description of what it computes.
        left_out: what is missing from it, and what to do about it; empty if nothing is missing.
    """

    network: nn.Module
    samples: Sequence[dict[str, Any]]
    dynamic: dict[str, Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    part: str
    left_out: str = ""


@dataclass(frozen=True, kw_only=True)
class Exporting:
    """A trained model to export.

    Args:
        model: the model in evaluation mode, on the CPU.
        record: see `latentgnn.saved.new_record`.
        program: makes the part that is exported to ``onnx`` and ``torch``.
        rebuild: loads the model again from a saved folder.
        run: returns some outputs of a model for a fixed input.
        card: returns the text of ``README.md``, given lines about the export, and usage code if it differs from the
            usual.
    """

    model: nn.Module
    record: Mapping[str, Any]
    program: Callable[[], Program]
    rebuild: Callable[[Path], nn.Module]
    run: Callable[[nn.Module], list[Tensor]]
    card: Callable[[Sequence[str], str | None], str]


def export(exporting: Exporting, to: Format, out: Path, *, overwrite: bool) -> None:
    """Write the model's file, ``config.json`` and ``README.md``; nothing if the file computes something else.

    Args:
        exporting: the model.
        to: the format.
        out: output folder, new or empty.
        overwrite: replace the results of an earlier command in it.

    Raises:
        UserError: if the model cannot be exported to this format, or the exported file computes something else.
    """
    if to == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            require(module, extra="export")
    names = (FILES[to], CONFIG, CARD)
    with Results(out, names, overwrite=overwrite) as written, TemporaryDirectory(prefix="latentgnn-") as place:
        folder = Path(place)
        if to == "safetensors":
            record, lines, tensors = dict(exporting.record), _save(exporting, folder), []
        else:
            program = exporting.program()
            difference = _check(_exported(program, to, folder / FILES[to]), program, to)
            lines, tensors = _told(program, difference), _tensors(program)
            described = {"inputs": dict(program.inputs), "outputs": dict(program.outputs), "part": program.part}
            record = {**exporting.record, "export": {"format": to, **described, "largest_difference": difference}}
        print("\n".join(lines))
        with replacing(written.place(FILES[to])) as target, (folder / FILES[to]).open("rb") as made:
            shutil.copyfileobj(made, target)
        written.write_json(CONFIG, record)
        written.write(CARD, exporting.card([*lines, *tensors], _USAGE.get(to)).encode())


def _save(exporting: Exporting, folder: Path) -> list[str]:
    for name, data in files_of(exporting.record, exporting.model.state_dict()).items():
        (folder / name).write_bytes(data)
    # Only this file is read, as somebody may pass it on alone.
    there, here = read_saved(folder / WEIGHTS).weights, exporting.model.state_dict()
    other = [name for name, value in here.items() if name not in there or not torch.equal(value, there[name])]
    with torch.no_grad():
        before, after = (exporting.run(model) for model in (exporting.model, exporting.rebuild(folder / WEIGHTS)))
    if other or not all(map(torch.equal, before, after)):
        raise UserError(
            f"the model that was read back from the file computes something else (other tensors: {other[:3]}); nothing "
            "is written: this is a fault, please report it"
        )
    return [f"all {len(here)} tensors and the configuration; read back, the model gives the same outputs, bit for bit"]


def _exported(program: Program, to: Format, path: Path) -> Callable[[dict[str, Any]], list[Tensor]]:
    """Write the file, read it back, and return the function that it computes."""
    try:
        with _quiet(), torch.no_grad():
            exported = torch.export.export(
                program.network, (), program.samples[0], dynamic_shapes=program.dynamic, strict=False
            )
            if to == "torch":
                torch.export.save(exported, path)
                network: Any = torch.export.load(path).module()
                return lambda sample: pytree.tree_leaves(network(**sample))
            made: Any = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                verbose=False,
                input_names=list(program.inputs),
                output_names=list(program.outputs),
            )
            made.save(path, external_data=False)
    except Exception as error:  # exporters raise many kinds of errors for unsupported operations
        if system_error(error) is not None:
            raise
        raise UserError(
            f"{program.part} cannot be exported to {to} ({type(error).__name__}: {first_line(error)[:300]}): take "
            "--to safetensors, which every model has, and load it in Python with latentgnn.load_run"
        ) from error
    return _in_onnxruntime(path, list(program.inputs))


def _in_onnxruntime(path: Path, names: list[str]) -> Callable[[dict[str, Any]], list[Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    present = {value.name for value in session.get_inputs()}

    def run(sample: dict[str, Any]) -> list[Tensor]:
        given = zip(names, pytree.tree_leaves(sample), strict=True)
        found = session.run(None, {name: value.numpy() for name, value in given if name in present})
        return [torch.from_numpy(value) for value in found]

    return run


def _check(run: Callable[[dict[str, Any]], list[Tensor]], program: Program, to: Format) -> float:
    """The largest difference between outputs of file and model, relative to the largest value of each output."""
    differences = [0.0]
    for sample in program.samples:
        with torch.no_grad():
            expected = pytree.tree_leaves(program.network(**sample))
            found = run(sample)
        for name, ours, theirs in zip(program.outputs, expected, found, strict=True):
            if ours.shape != theirs.shape:
                raise UserError(
                    f"{to}: the output {name} has the shape {tuple(theirs.shape)} instead of {tuple(ours.shape)}; "
                    "nothing is written"
                )
            differences.append(relative_difference(ours, theirs))
    # Python's own max would ignore NaN.
    largest = float(torch.tensor(differences, dtype=torch.float64).max())
    if not largest <= TOLERANCE:
        raise UserError(
            f"{to}: what was exported differs from the model by {largest:.1e} of an output's largest number, more than "
            f"{TOLERANCE:.0e}; nothing is written: take --to safetensors, and please report it"
        )
    return largest


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest value.

    Example:
        >>> relative_difference(torch.tensor([2.0, -4.0]), torch.tensor([2.0, -3.0]))
        0.25
    """
    if not ours.numel():
        return 0.0
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-30))


def _told(program: Program, difference: float) -> list[str]:
    lines = [f"exported: {program.part}"]
    if program.left_out:
        lines.append(f"left out: {program.left_out}")
    return [
        *lines,
        f"checked: on {len(program.samples)} inputs of different sizes the largest difference to the model is "
        f"{difference:.1e} of an output's largest number (up to {TOLERANCE:.0e} is let through)",
    ]


def _tensors(program: Program) -> list[str]:
    named = {"input": program.inputs, "output": program.outputs}
    return [f"{title} {name}: {text}" for title, tensors in named.items() for name, text in tensors.items()]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what exporters print about their own internals."""
    before = {name: logging.getLogger(name).level for name in _QUIET}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in before:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
