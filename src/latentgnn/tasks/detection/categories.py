"""Whether the categories of two sets mean the same."""

from collections.abc import Iterable

Category = tuple[int, str]
"""Id and name."""


def differing(known: Iterable[Category], others: Iterable[Category]) -> tuple[Category, Category] | None:
    """The first category that is not the same in both: one id with two names, or one name with two ids.

    A category that only one of them has is no difference.

    Returns:
        It, as it is in ``known`` and in ``others``; ``None`` where they agree.
    """
    name_of = dict(known)
    id_of = {name: id for id, name in name_of.items()}
    for id, name in others:
        if id in name_of and name_of[id] != name:
            return (id, name_of[id]), (id, name)
        if id not in name_of and name in id_of:
            return (id_of[name], name), (id, name)
    return None
