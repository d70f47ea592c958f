"""What people and broken disks make of a file: sound content with a few things wrong in it."""

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

ODD_TEXTS = (
    "",
    " ",
    "null",
    "-",
    "\x00",
    "a\nb",
    "\u00e9\u4e2d",
    "x" * 5000,
    "../..",
    "1e999",
    "2020-99-99",
    "&a [*a]",
)
ODD_NUMBERS = (
    *(0, -1, 1, 2, 255, 256, 2**31, -(2**31), 2**53, 2**63 - 1, 2**63, 10**22, 10**400),
    *(0.0, -0.5, 1.5, 1e-320, 1e12, 1e300, -1e308, float("inf"), float("-inf"), float("nan")),
)


def odd_values() -> st.SearchStrategy[Any]:
    """Values that may stand anywhere in JSON, few of which make sense where they stand."""
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(ODD_NUMBERS),
        st.sampled_from(ODD_TEXTS),
        st.integers(-5, 60),
        st.floats(-50, 50),
        st.text(max_size=8),
        st.just("\ud800"),
    )
    nested = st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    )
    return nested | st.integers(60, 3000).map(_deep)


def _deep(levels: int) -> Any:
    value: Any = 0
    # Deeper than this, Python's own encoder gives up; text that is deeper is made as text.
    for _ in range(min(levels, 300)):
        value = [value]
    return value


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(inner for key, item in items for inner in _places(item, (*place, key)))]


@st.composite
def mutated(draw: st.DrawFn, sound: Any, most: int = 3) -> Any:
    """A copy of a JSON value in which some things are replaced, left out or there twice."""
    value = copy.deepcopy(sound)
    for _ in range(draw(st.integers(0, most))):
        place = draw(st.sampled_from(_places(value)))
        if not place:
            if draw(st.integers(0, 9)) == 0:
                return draw(odd_values())
            continue
        parent = value
        for key in place[:-1]:
            parent = parent[key]
        what = draw(st.sampled_from(("replace", "replace", "remove", "repeat")))
        if what == "remove":
            del parent[place[-1]]
        elif what == "repeat" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[place[-1]]))
        else:
            parent[place[-1]] = draw(odd_values())
    return value


@st.composite
def json_files(draw: st.DrawFn, sound: Any) -> bytes:
    """The bytes of a JSON file that says something like ``sound``."""
    content = json.dumps(draw(mutated(sound))).encode()
    how = draw(st.sampled_from(("as it is",) * 6 + ("bytes", "twice", "deep", "digits")))
    if how == "bytes":
        return draw(damaged([content]))
    if how == "twice":
        return content.replace(b'"id": ', b'"id": 3, "id": ', 1)
    if how == "deep":
        return content.replace(b"[", b"[" * draw(st.sampled_from((70, 990, 100_000))), 1)
    if how == "digits":
        return content.replace(b"1", b"1" * draw(st.sampled_from((25, 400, 5000))), 1)
    return content


@st.composite
def damaged(draw: st.DrawFn, files: Sequence[bytes]) -> bytes:
    """One of the files with bytes changed, cut off, put in or repeated."""
    content = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(0, 4))):
        # Most of what a format says about itself stands at the beginning.
        end = draw(st.sampled_from((64, 400, len(content))))
        position = draw(st.integers(0, max(0, min(end, len(content)) - 1)))
        how = draw(st.sampled_from(("flip", "number", "number", "cut", "insert", "repeat")))
        if how == "flip" and content:
            content[position] ^= 1 << draw(st.integers(0, 7))
        elif how == "number":
            size = draw(st.sampled_from((1, 2, 4, 8)))
            number = draw(st.sampled_from((0, 1, 2**31 - 1, 2**31, 2**63, 2**64 - 1)) | st.integers(0, 2**64 - 1))
            order = draw(st.sampled_from(("little", "big")))
            content[position : position + size] = (number % 256**size).to_bytes(size, order)
        elif how == "cut":
            del content[position:]
        elif how == "insert":
            content[position:position] = draw(st.binary(max_size=12))
        else:
            content[position:position] = content[position : position + draw(st.integers(1, 200))]
    return bytes(content)
