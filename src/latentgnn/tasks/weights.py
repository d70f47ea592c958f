"""Initialises a model from another model's weights: which of them fit, and what happens to the rest.

The functions work on two state dicts without knowing the network. Names are compared literally; whoever loads weights
with another layout renames them first.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentgnn.errors import UserError

_SHOWN = 6  # number of modules that a line lists; the others are only counted


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The corresponding rows of a tensor in a model and in weights, such as those of a class that both have.

    Args:
        pairs: index in the model and index in the weights; the model's other rows keep their fresh values.
        dim: dimension of the rows; 1 for columns.
    """

    pairs: Sequence[tuple[int, int]]
    dim: int = 0


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The part of some weights that a model starts from.

    Args:
        state: for ``load_state_dict``; tensors that are not loaded have the model's own values.
        taken: names of the tensors that are loaded whole.
        in_part: names of tensors of which only some rows are loaded, with the numbers of these rows and of all rows.
        anew: names of the model's other tensors.
        left_out: names of the weights that are not used, and why.
    """

    state: dict[str, Tensor]
    taken: tuple[str, ...]
    in_part: dict[str, tuple[int, int]]
    anew: tuple[str, ...]
    left_out: dict[str, str]


def fit_weights(
    weights: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    *,
    source: str,
    rows: Mapping[str, Rows] | None = None,
    together: Collection[str] = (),
) -> Fit:
    """Load all tensors with the same name, shape and kind of dtype.

    Args:
        weights: the available weights, with the model's names.
        model: the state dict of the freshly made model.
        source: origin of the weights, for the error.
        rows: for tensors whose shape or order of rows may differ, the rows that are loaded.
        together: names of modules that are loaded whole or not at all, because a part of a block or a head is useless.

    Raises:
        UserError: if nothing fits.

    Example:
        >>> there = {"a.weight": torch.ones(2, 3), "head.weight": torch.ones(5, 2)}
        >>> fresh = {"a.weight": torch.zeros(2, 3), "head.weight": torch.zeros(4, 2)}
        >>> fit = fit_weights(there, fresh, source="a file", rows={"head.weight": Rows(pairs=[(0, 4), (3, 1)])})
        >>> fit.taken, fit.in_part, fit.state["head.weight"][:, 0].tolist()
        (('a.weight',), {'head.weight': (2, 4)}, [1.0, 0.0, 0.0, 1.0])
    """
    rows = rows or {}
    reasons = {name: reason for name in weights if (reason := _unfit(weights[name], model.get(name), rows.get(name)))}
    for module in together:
        inside = [name for name in {**model, **weights} if name.startswith(f"{module}.")]
        if any(name in reasons or name not in weights for name in inside):
            reasons = {name: f"only a part of {module} fits" for name in inside if name in weights} | reasons
    state, taken, in_part, anew = {}, [], {}, []
    for name, fresh in model.items():
        state[name] = fresh
        if name not in weights or name in reasons:
            anew.append(name)
        elif name in rows and not _is_whole(rows[name], weights[name], fresh):
            state[name] = _with_rows(fresh, weights[name], rows[name])
            in_part[name] = (len(rows[name].pairs), fresh.shape[rows[name].dim])
        else:
            state[name] = weights[name]
            taken.append(name)
    if not taken and not in_part:
        raise UserError(
            f"{source}: none of its {len(weights)} tensors fits the model; it has {_some(weights)}, "
            f"and the model {_some(model)}"
        )
    return Fit(state=state, taken=tuple(taken), in_part=in_part, anew=tuple(anew), left_out=reasons)


def fit_lines(fit: Fit, source: str) -> list[str]:
    """Return a few lines for the user: what was loaded, what starts untrained, what was left out.

    Example:
        >>> there = {"a.weight": torch.ones(2), "b.weight": torch.ones(2), "b.bias": torch.ones(1)}
        >>> fresh = {"a.weight": torch.zeros(2), "c.weight": torch.zeros(2), "c.bias": torch.zeros(1)}
        >>> print("\\n".join(fit_lines(fit_weights(there, fresh, source="file.pt"), "file.pt")))
        weights: 1 of the model's 3 tensors from file.pt
          started anew: c (2 tensors)
          left out: b (2 tensors; the model has none of this name)
    """
    whole = {*fit.taken, *fit.in_part, *fit.anew}
    partly = f", {len(fit.in_part)} more in part" if fit.in_part else ""
    lines = [f"weights: {len(fit.taken)} of the model's {len(whole)} tensors{partly} from {source}"]
    if fit.in_part:
        lines.append("  in part: " + _list(f"{name} ({n} of {of} rows)" for name, (n, of) in fit.in_part.items()))
    if fit.anew:
        lines.append("  started anew: " + _list(_modules(dict.fromkeys(fit.anew, ""), whole)))
    if fit.left_out:
        lines.append("  left out: " + _list(_modules(fit.left_out, {*fit.taken, *fit.in_part, *fit.left_out})))
    return lines


def _unfit(there: Tensor, fresh: Tensor | None, rows: Rows | None) -> str:
    """Why a tensor cannot be loaded; empty if it can."""
    if fresh is None:
        return "the model has none of this name"
    if there.is_floating_point() != fresh.is_floating_point() or there.is_complex() != fresh.is_complex():
        return f"{there.dtype} instead of {fresh.dtype}"
    shapes = [list(there.shape), list(fresh.shape)]
    if rows is not None and there.ndim == fresh.ndim:
        if not rows.pairs:
            return "no row has the same meaning"
        for shape in shapes:
            del shape[rows.dim]
    return "" if shapes[0] == shapes[1] else f"{tuple(there.shape)} instead of {tuple(fresh.shape)}"


def _is_whole(rows: Rows, there: Tensor, fresh: Tensor) -> bool:
    return there.shape == fresh.shape and sorted(rows.pairs) == [(row, row) for row in range(fresh.shape[rows.dim])]


def _with_rows(fresh: Tensor, there: Tensor, rows: Rows) -> Tensor:
    into, taken = (torch.tensor(places) for places in zip(*rows.pairs, strict=True))
    return fresh.index_copy(rows.dim, into, there.index_select(rows.dim, taken).to(fresh))


def _modules(names: Mapping[str, str], all_names: Collection[str]) -> list[str]:
    """Group names by the largest modules that contain nothing else, with their number and the reasons."""
    others = {prefix for name in all_names if name not in names for prefix in _prefixes(name)}
    gathered: dict[str, list[str]] = {}
    for name in names:
        module = next(prefix for prefix in _prefixes(name) if prefix not in others)
        gathered.setdefault(module, []).append(name)
    texts = []
    for module, inside in gathered.items():
        notes = [f"{len(inside)} tensors"] if inside != [module] else []
        notes += dict.fromkeys(names[name] for name in inside if names[name])
        texts.append(f"{module} ({'; '.join(notes[:3])})" if notes else module)
    return texts


def _prefixes(name: str) -> list[str]:
    """Split ``a.b.c`` into ``a``, ``a.b``, ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _list(texts: Iterable[str]) -> str:
    listed = list(texts)
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f", and {more} more" if more > 0 else "")


def _some(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3]) + ", ..."
