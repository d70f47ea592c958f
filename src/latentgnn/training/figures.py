"""Figures of an evaluation, which may be undefined."""

import numpy as np
from numpy.typing import NDArray

UNDEFINED = -1.0
"""COCO's value for an undefined figure, such as AP_large without large objects or the IoU of an absent class."""


def mean_of_defined(figures: NDArray[np.float64]) -> float:
    """Return the mean of the figures that are defined, or `UNDEFINED` if none is.

    Example:
        >>> mean_of_defined(np.array([0.5, UNDEFINED, 1.0]))
        0.75
    """
    defined = figures[figures != UNDEFINED]
    return float(defined.mean()) if defined.size else UNDEFINED


def figure_text(figure: float | None) -> str:
    """Return a figure with three decimals, or without any from 1000 on; ``n/a`` if it is undefined or missing.

    Example:
        >>> figure_text(0.5), figure_text(UNDEFINED), figure_text(12345.6)
        ('0.500', 'n/a', '12,346')
    """
    if figure is None or figure == UNDEFINED:
        return "n/a"
    return f"{figure:.3f}" if abs(figure) < 1000 else f"{figure:,.0f}"
