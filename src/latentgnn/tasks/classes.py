"""Classes by the ids that files use for them; ids with the same name are one class."""

from collections.abc import Mapping

IGNORE = -1
"""The label of nodes that are neither trained on nor scored."""


def class_names(classes: Mapping[int, str] | None) -> tuple[str, ...]:
    """Return the names of classes in the order of their labels, without repetitions.

    Example:
        >>> class_names({2: "ground", 3: "vegetation", 4: "vegetation", 6: "building"})
        ('ground', 'vegetation', 'building')
    """
    return tuple(dict.fromkeys((classes or {}).values()))


def first_ids(classes: Mapping[int, str] | None) -> tuple[int, ...]:
    """Return the id of each class in files, in the order of the labels: if a class has several, the one named first.

    Example:
        >>> first_ids({2: "ground", 3: "vegetation", 4: "vegetation", 6: "building"})
        (2, 3, 6)
    """
    ids = {name: id for id, name in reversed(list((classes or {}).items()))}
    return tuple(ids[name] for name in class_names(classes))
