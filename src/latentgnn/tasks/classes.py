"""Classes by the ids that files have for them; ids of the same name are one class."""

from collections.abc import Mapping

IGNORE = -1
"""The label of what is neither learnt nor scored."""


def class_names(classes: Mapping[int, str] | None) -> tuple[str, ...]:
    """The names of classes in the order of their labels, each once.

    Example:
        >>> class_names({2: "ground", 3: "vegetation", 4: "vegetation", 6: "building"})
        ('ground', 'vegetation', 'building')
    """
    return tuple(dict.fromkeys((classes or {}).values()))


def first_ids(classes: Mapping[int, str] | None) -> tuple[int, ...]:
    """The id that each class gets in a file, in the order of the labels: of several, the one that is named first.

    Example:
        >>> first_ids({2: "ground", 3: "vegetation", 4: "vegetation", 6: "building"})
        (2, 3, 6)
    """
    ids = {name: id for id, name in reversed(list((classes or {}).items()))}
    return tuple(ids[name] for name in class_names(classes))
