"""Plain values as stored in files: values that a parser accepts, but that are refused here."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

MOST_DEPTH = 64
"""Maximum nesting of lists and mappings."""

_INT_END = 2**63
_SURROGATE = re.compile("[\ud800-\udfff]")

_Trail = tuple[Any, Any] | None


def first_fault(value: Any, within: Sequence[str | int] = (), *, finite: bool = True) -> tuple[str, str] | None:
    """Return the first value that is refused: its place, such as ``annotations[2].bbox``, and what is wrong with it.

    Refused are lists and mappings nested deeper than `MOST_DEPTH`, duplicate keys, lone surrogates, and numbers that
    are not finite or have more than 64 bits.

    Args:
        value: a value from `json_decoder`, or a plain one.
        within: the keys that lead to it in its file, outermost first.
        finite: refuse infinite numbers and NaN.
    """
    trail: _Trail = None
    for key in within[:-1]:
        trail = trail, key
    # Wrapped in a mapping: its key is part of the place, and 0 stands for the whole file.
    fault = _first_fault({within[-1] if within else 0: value}, len(within), trail, finite)
    if fault is None:
        return None
    trail, message = fault
    keys: list[Any] = []
    while trail is not None:
        trail, key = trail
        keys.insert(0, key)
    steps = [f"[{key}]" if isinstance(key, int) else f".{key}" for key in (keys if within else keys[1:])]
    place = "".join(steps if len(steps) <= 8 else [*steps[:4], "...", *steps[-2:]])
    return place.removeprefix(".").encode("ascii", "backslashreplace").decode(), message


def json_decoder() -> json.JSONDecoder:
    """Return a parser whose values must be given to `first_fault`, which then finds duplicate keys."""
    return json.JSONDecoder(object_pairs_hook=_mapping)


def shown(value: Any) -> str:
    """Format a value as short ASCII JSON for an error.

    Example:
        >>> shown({"size": [3, None]})
        '{"size": [3, null]}'
    """
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def too_deep() -> str:
    """Return the message about lists and mappings nested deeper than `MOST_DEPTH`."""
    return f"nested too deeply; expected at most {MOST_DEPTH} lists and mappings within one another"


class _GivenTwice(dict[str, Any]):
    """A mapping with a duplicate key, which is reported once its place is known."""


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    return mapping if len(mapping) == len(pairs) else _GivenTwice(_repeated(pairs))


def _repeated(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    seen: set[str] = set()
    return {key: value for key, value in pairs if key in seen or seen.add(key)}  # type: ignore[func-returns-value]


def _first_fault(container: Any, depth: int, trail: _Trail, finite: bool) -> tuple[_Trail, str] | None:
    """The keys that lead to the first fault in a list or mapping, innermost first, and the fault."""
    is_mapping = isinstance(container, dict)
    for key, value in container.items() if is_mapping else enumerate(container):
        if is_mapping and isinstance(key, str) and _is_torn(key):
            return trail, f"the key {shown(key)} contains a lone surrogate"
        kind = type(value)
        if kind is float:
            # For infinity and NaN, x - x is not zero.
            if finite and value - value != 0.0:
                return (trail, key), f"{value} is not a finite number"
        elif kind is int:
            if not -_INT_END <= value < _INT_END:
                return (trail, key), "expected a number of at most 64 bits"
        elif kind is str:
            if _is_torn(value):
                return (trail, key), f"{shown(value)} contains a lone surrogate"
        elif kind is dict or kind is list:
            if depth == MOST_DEPTH:
                return (trail, key), too_deep()
            if (fault := _first_fault(value, depth + 1, (trail, key), finite)) is not None:
                return fault
        elif kind is _GivenTwice:
            return (trail, key), f"the key {shown(next(iter(value)))} is given twice"
    return None


def _is_torn(text: str) -> bool:
    return not text.isascii() and _SURROGATE.search(text) is not None
