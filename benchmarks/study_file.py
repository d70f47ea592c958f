"""What a study compares: a file in YAML, and the blocks and networks that it names."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentgnn.errors import UserError
from latentgnn.files.reading import read_yaml


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared: the contents of a study file.

    Args:
        name: of the result files.
        data: ``module:Name`` of a question, see `benchmarks.questions.Question`.
        options: of the question.
        variants: a block each, ``block: module:Name`` and its options, called with the number of channels; or
            ``network: module:Name``, called with its options alone, in place of the question's; or neither. Factors of
            a block's rate are beside them, see `benchmarks.study_rates`.
        expected: the expectation before the first run, and why.
        against: the variants that the others are compared with.
        seeds: how many, from 0 on.
        steps: of training.
        rate: AdamW's, which falls to 0 along half a cosine.
        decay: weight decay.
    """

    name: str
    data: str
    options: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]]
    expected: str = ""
    against: Sequence[str] = ("none",)
    seeds: int = 5
    steps: int = 1000
    rate: float = 2e-3
    decay: float = 1e-4

    def __post_init__(self) -> None:
        if missing := [name for name in self.against if name not in self.variants]:
            raise UserError(f"against: there is no variant {missing[0]!r}; there are {', '.join(self.variants)}")

    def runs(self) -> list[tuple[str, int]]:
        """Every variant and seed, seed by seed, so that a stopped study still has complete pairs."""
        return [(name, seed) for seed in range(self.seeds) for name in self.variants]

    def training(self, variant: str) -> dict[str, Any]:
        """All that decides a run of a variant beside its seed."""
        shared = {key: getattr(self, key) for key in ("data", "options", "steps", "rate", "decay")}
        return {"variant": self.variants[variant], **shared}


def read_study(path: Path) -> Study:
    """A study from its file.

    Raises:
        UserError: it is no study.
    """
    read = read_yaml(path, "study")
    try:
        return Study(**read)
    except TypeError as error:
        known = ", ".join(Study.__dataclass_fields__)
        raise UserError(f"{path}: {error}; a study has {known}") from error


def find(name: str) -> Callable[..., Any]:
    """What ``module:Name`` names.

    Raises:
        UserError: there is no such thing.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{name!r}: {error}; expected module:Name of something that can be imported") from error
    return found


def check_names(study: Study) -> None:
    """Find every block and network before anything runs.

    Args:
        study: that names them.

    Raises:
        UserError: one is not there.
    """
    for name, variant in study.variants.items():
        for named in (variant[key] for key in ("block", "network") if key in variant):
            try:
                find(named)
            except UserError as error:
                raise UserError(f"variant {name!r}: {error}") from error
