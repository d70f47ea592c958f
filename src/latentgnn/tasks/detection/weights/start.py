"""Initialises a detector from trained weights: loads what fits, keeps the fresh rest, and reports both."""

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from latentgnn.attachment import CHILD
from latentgnn.blocks import blocks_of
from latentgnn.checkpoints import load_published
from latentgnn.errors import UserError
from latentgnn.layer import LatentGNN
from latentgnn.tasks.detection.config import ModelConfig
from latentgnn.tasks.detection.weights.layouts import number_of_rows
from latentgnn.tasks.detection.weights.sources import Source, find_source
from latentgnn.tasks.starting import SETTING, Start, taken_parameters
from latentgnn.tasks.weights import Fit, Rows, fit_lines, fit_weights

# Loaded whole or not at all, as parts of them are useless.
_PARTS = (
    "backbone.fpn",
    "rpn.head.conv",
    "rpn.head.cls_logits",
    "rpn.head.bbox_pred",
    "roi_heads.box_head",
    "roi_heads.box_predictor",
    "roi_heads.mask_head",
    "roi_heads.mask_predictor",
    "head.classification_head.conv",
    "head.classification_head.cls_logits",
    "head.regression_head.conv",
    "head.regression_head.bbox_reg",
)
_BODY, _COUNTER = "backbone.body.", "num_batches_tracked"
_STATISTICS = ("running_mean", "running_var")
_IN_BLOCK = f".{CHILD}."
_UNUSED = "N/A"  # torchvision's name for COCO ids without a category


def start_from(model: nn.Module, config: ModelConfig, categories: Sequence[tuple[int, str]]) -> Start:
    """Load ``config.weights`` into a freshly built detector.

    The last layers load the rows of categories with the same name. If no name is the same, they keep their fresh
    weights. If the names of the weights' rows are unknown, rows are taken in order if their number is the same.

    Args:
        model: from `latentgnn.tasks.detection.model.build_detector`.
        config: its settings.
        categories: id and name of each category, in the order of the labels, which start at 1.

    Raises:
        UserError: if the weights cannot be loaded, or are for another backbone.
    """
    source = find_source(config)
    fresh = model.state_dict()
    weights = dict(source.state)
    for name in [name for name in {**weights, **fresh} if name.endswith(_COUNTER)]:
        # Nothing is learnt in these buffers, so they may be missing, superfluous, or in half precision like the rest.
        if name not in fresh:
            del weights[name]
        elif name in weights:
            weights[name] = weights[name].to(fresh[name].dtype)
        elif f"{name.removesuffix(_COUNTER)}running_mean" in weights:
            weights[name] = fresh[name]
    blocks = blocks_of(model)
    published, faults = _published_blocks(blocks, source)
    weights |= published
    names = ["__background__", *(name for _, name in categories)]
    pairs, taken = _pairs(source.categories, names, number_of_rows(weights))
    fit = fit_weights(
        weights,
        fresh,
        source=f"{SETTING}: {source.name}",
        rows=_rows(weights, fresh, pairs),
        together=(*_PARTS, *blocks),
    )
    _refuse_other_body(fit, source, config, blocks)
    model.load_state_dict(fit.state)
    lines = [*fit_lines(fit, source.name), *(f"  {line}" for line in (*taken, *faults, *source.notes))]
    return Start(lines=tuple(lines), trained=taken_parameters(model, fit))


def body_parameters(model: nn.Module) -> frozenset[str]:
    """Return the parameters that ``model.weights_backbone`` loads: those of the backbone without its blocks."""
    in_blocks = tuple(f"{name}." for name in blocks_of(model))
    names = (name for name, _ in model.named_parameters() if name.startswith(_BODY))
    return frozenset(name for name in names if not name.startswith(in_blocks))


def _pairs(there: list[str] | None, here: list[str], rows: int | None) -> tuple[list[tuple[int, int]], tuple[str, ...]]:
    """Match rows of the last layers with rows of the weights; also return lines that describe it."""
    if there is None:
        if rows == len(here):
            line = f"categories: the weights do not name them; their {rows - 1} are used in order"
            return [(row, row) for row in range(len(here))], (line,)
        return [], ()
    if _plain(there) == _plain(here):
        return [(row, row) for row in range(len(here))], ()
    place = {name: row for row, name in reversed(list(enumerate(_plain(there)))) if name != _UNUSED.casefold()}
    pairs = [(row, place[name]) for row, name in enumerate(_plain(here)) if name in place]
    if len(pairs) < 2:
        return [], (f"categories: none of {_some(here[1:])} is among those of the weights: their layers start anew",)
    same = [here[row] for row, _ in pairs[1:]]
    return pairs, (f"categories: {len(same)} of {len(here) - 1} taken over by their names: {_some(same)}",)


def _plain(names: Sequence[str]) -> list[str]:
    return [" ".join(name.replace("_", " ").replace("-", " ").split()).casefold() for name in names]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _rows(
    weights: Mapping[str, Tensor], fresh: Mapping[str, Tensor], pairs: Sequence[tuple[int, int]]
) -> dict[str, Rows]:
    """The rows of categories in each tensor of the last layers."""
    there, here = number_of_rows(weights), number_of_rows(fresh)
    if there is None or here is None:
        return {}
    pairs = [(row, source) for row, source in pairs if source < there]
    found = {}
    for part in ("weight", "bias"):
        found[f"roi_heads.box_predictor.cls_score.{part}"] = list(pairs)
        found[f"roi_heads.mask_predictor.mask_fcn_logits.{part}"] = list(pairs)
        found[f"roi_heads.box_predictor.bbox_pred.{part}"] = [
            (4 * row + side, 4 * source + side) for row, source in pairs for side in range(4)
        ]
        name = f"head.classification_head.cls_logits.{part}"
        if name in fresh:
            found[name] = [
                (anchor * here + row, anchor * there + source)
                for anchor in range(fresh[name].shape[0] // here)
                for row, source in pairs
            ]
    each = {name: fresh[name].shape[0] // here for name in found if name in fresh}
    # If the number of anchors or of rows differs, rows do not correspond.
    same = {name for name in each if name in weights and list(weights[name].shape[:1]) == [each[name] * there]}
    return {name: Rows(pairs=places if name in same else []) for name, places in found.items()}


def _published_blocks(blocks: Mapping[str, LatentGNN], source: Source) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Published blocks with our names, for the model's blocks at the same stages, and notes on what did not fit."""
    state: dict[str, Tensor] = {}
    faults = []
    places = {f"C{index + 1}": f"{_BODY}layer{index}.latentgnn" for index in range(1, 5)}
    for stage, weights in source.blocks.items():
        name = places.get(stage, "")
        if name not in blocks:
            faults.append(f"left out: the block at {stage}, where this model has none (--model.blocks)")
            continue
        block = copy.deepcopy(blocks[name])
        try:
            load_published(block, weights)
        except ValueError as error:
            faults.append(f"started anew: the block at {stage} ({' '.join(str(error).split()[:30])} ...)")
            continue
        state |= {f"{name}.{key}": value for key, value in block.state_dict().items()}
    return state, tuple(faults)


def _refuse_other_body(fit: Fit, source: Source, config: ModelConfig, blocks: Mapping[str, LatentGNN]) -> None:
    """Refuse weights of another backbone, as the other trained layers would compute something else with it."""
    in_blocks = tuple(f"{name}." for name in blocks)
    wrong = [
        name
        for name in dict.fromkeys((*fit.anew, *fit.left_out))
        if name.startswith(_BODY) and not name.startswith(in_blocks) and _IN_BLOCK not in name
        if not name.endswith(_COUNTER)
    ]
    if not wrong:
        return
    if all(name.endswith(_STATISTICS) for name in wrong):
        if wrong[0] in fit.left_out:
            there, fitting = "has batch norm in its backbone", "batch_norm, or frozen_batch_norm"
        else:
            there, fitting = "has no batch norm in its backbone", "group_norm"
        raise UserError(
            f"{SETTING}: {source.name} {there} and does not fit norm {config.norm!r} ({len(wrong)} statistics such as "
            f"{wrong[0]}); set --model.norm {fitting}"
        )
    faults = [
        f"{name} is {fit.left_out[name]}"
        if name in fit.left_out and name in fit.anew
        else f"{name} is {'too many' if name in fit.left_out else 'not among them'}"
        for name in wrong[:3]
    ]
    kinds = {fit.left_out.get(name, "") for name in wrong}
    if all(kind.startswith("torch.") for kind in kinds):
        raise UserError(
            f"{SETTING}: {source.name} has other dtypes than a detector with norm {config.norm!r} "
            f"({len(wrong)} tensors do not fit: {'; '.join(faults)}); save them as floating point numbers"
        )
    raise UserError(
        f"{SETTING}: {source.name} has another backbone than {config.backbone!r} with norm {config.norm!r} "
        f"({len(wrong)} tensors do not fit: {'; '.join(faults)}); set --model.backbone as it was trained"
    )
