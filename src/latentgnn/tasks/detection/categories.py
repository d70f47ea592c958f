"""Compares the categories of two sets."""

from collections.abc import Iterable

Category = tuple[int, str]
"""Id and name of a category."""


def differing(known: Iterable[Category], others: Iterable[Category]) -> tuple[Category, Category] | None:
    """Return the first category on which two sets disagree: one id with two names, or one name with two ids.

    A category that only one of them has is not a disagreement.

    Returns:
        The category as it is in ``known`` and in ``others``; ``None`` if they agree.
    """
    name_of = dict(known)
    id_of = {name: id for id, name in name_of.items()}
    for id, name in others:
        if id in name_of and name_of[id] != name:
            return (id, name_of[id]), (id, name)
        if id not in name_of and name in id_of:
            return (id_of[name], name), (id, name)
    return None
