"""Lists that stay in their JSON file, beside `json` and `latentgnn.files.reading.read_json`, which hold all of it."""

import json
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgnn.errors import UserError
from latentgnn.files import json_lists
from latentgnn.files.json_lists import read_json_lists
from latentgnn.files.reading import UnreadableError, read_json
from latentgnn.files.stored_lists import StoredList, part_of

ELEMENTS = [{"id": 1, "name": "Käfer ☃ 𝄞", "box": [0.1, -2, 3e5]}, "text", None, [], 17, -0.5, {"a": {"b": [True]}}]
VALUE = {"info": {"é": "ü"}, "images": ELEMENTS, "annotations": [], "other": [1, 2], "last": 3.25}
NAMES = ("images", "annotations")

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
tops = st.dictionaries(st.sampled_from(["images", "annotations", "info", "é"]), values | st.lists(values), max_size=4)


def outcome(read: Any) -> Any:
    try:
        return read()
    except UnreadableError:
        return "refused"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lists") / "file.json"


def read_in_chunks(path: Path, size: int) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lists, "_CHUNK", size)
        return read_json_lists(path, NAMES)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 4096])
@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"ensure_ascii": False}, {"separators": (",", ":")}])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_all_layouts_and_chunks_say_the_same(path: Path, size: int, layout: dict[str, Any], mark: str) -> None:
    path.write_text(mark + json.dumps(VALUE, **layout), encoding="utf-8")
    read = read_in_chunks(path, size)
    assert isinstance(read["images"], StoredList)
    assert isinstance(read["annotations"], StoredList)
    assert {**read, "images": list(read["images"]), "annotations": list(read["annotations"])} == VALUE
    assert [read["images"][index] for index in range(len(ELEMENTS))] == ELEMENTS


@settings(max_examples=150, deadline=None)
@given(value=tops | values, size=st.integers(1, 30), ascii_alone=st.booleans())
def test_any_value_is_what_the_parser_makes_of_it(path: Path, value: Any, size: int, ascii_alone: bool) -> None:
    path.write_bytes(json.dumps(value, ensure_ascii=ascii_alone).encode("utf-8", "surrogatepass"))
    assert outcome(lambda: read_in_chunks(path, size)) == outcome(lambda: read_json(path))


@settings(max_examples=150, deadline=None)
@given(value=tops, size=st.integers(1, 30), place=st.integers(0, 200), change=st.sampled_from('{}[]",:\\ 1.eu\nx\x00é'))
def test_damage_is_refused_where_the_parser_refuses_it(
    path: Path, value: Any, size: int, place: int, change: str
) -> None:
    text = json.dumps(value)
    place = min(place, len(text))
    for damaged in (text[:place] + change + text[place:], text[:place] + text[place + 1 :], text[:place]):
        path.write_text(damaged, encoding="utf-8")
        assert outcome(lambda: read_in_chunks(path, size)) == outcome(lambda: read_json(path)), damaged


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1, column 1: malformed JSON: Expecting value"),
        (b'{"images": [1, 2],\n "annotations": [}', "line 2, column 18: malformed JSON: Expecting value"),
        (b'{"images": [1\n 2]}', "line 2, column 2: malformed JSON: Expecting ',' delimiter"),
        (b'{"images" [1]}', "line 1, column 11: malformed JSON: Expecting ':' delimiter"),
        (b'{"images": [\n\n"ab', "line 3, column 1: malformed JSON: Unterminated string starting at"),
        (b'{"images": []} x', "line 1, column 16: malformed JSON: Extra data"),
        (b'{"images": [],\n "images": []}', 'the key "images" is given twice'),
        (b'{"images": [{"a": 1, "a": 2}]}', 'images[0]: the key "a" is given twice'),
        (b'{"images": [0, {"b": [1, NaN]}]}', "images[1].b[1]: nan is not a finite number"),
        (b'{"images": [0, 9223372036854775808]}', "images[1]: expected a number of at most 64 bits"),
        (b'{"images": [1' + 5000 * b"0" + b"]}", "line 1, column 13: a number of thousands of digits"),
        (b'{"images": ["\\ud800"]}', 'images[0]: "\\ud800" contains a lone surrogate'),
        (b'{"images": [' + 63 * b"[" + 63 * b"]" + b"]}", "nested too deeply"),
        (b'{"images": [' + 100_000 * b"[", "nested too deeply"),
        (b'{"images": ["\xc3\xa4",\n"\xc3\xa4", "\xff"]}', "line 2, column 8: malformed JSON: not UTF-8 text"),
        (b'{"images": ["\xc3', "line 1, column 14: malformed JSON: not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("size", [1, 5, 10_000])
def test_faults_say_where_they_are(path: Path, content: bytes, message: str, size: int) -> None:
    path.write_bytes(content)
    with pytest.raises(UnreadableError) as caught:
        read_in_chunks(path, size)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_limits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(json.dumps({"images": ["x" * 1000, 1]}))
    with pytest.raises(UnreadableError, match=r"the list has 1,019 bytes; expected at most 1,000"):
        read_json_lists(path, NAMES, "list", most_bytes=1000)
    monkeypatch.setattr(json_lists, "_CHUNK", 64)
    monkeypatch.setattr(json_lists, "MOST_ELEMENT_CHARACTERS", 200)
    with pytest.raises(UnreadableError, match="line 1, column 13: a value of more than 200 characters"):
        read_json_lists(path, NAMES)
    with pytest.raises(UnreadableError, match="there is no such list"):
        read_json_lists(path.with_name("absent"), NAMES, "list")


@pytest.mark.parametrize("stored", ["file", "memory"])
def test_a_stored_list_is_a_list(path: Path, stored: str) -> None:
    numbers = [{"n": number, "text": "é" * (number % 7)} for number in range(1000)]
    path.write_text(json.dumps({"images": numbers}))
    values = read_json_lists(path, NAMES)["images"] if stored == "file" else StoredList.of(numbers)
    assert (len(values), values[-1], values[10:900:300]) == (1000, numbers[-1], numbers[10:900:300])
    assert values == numbers
    assert values != numbers[1:]
    assert values != [*numbers[:-1], 0]
    assert values.values([999, 3, 3]) == [numbers[999], numbers[3], numbers[3]]
    assert values.values([]) == []
    assert list(values.part([5, 2])) == part_of(numbers, [5, 2]) == [numbers[5], numbers[2]]
    assert values.mapped(lambda value: value["n"]).part(np.array([7, 1]))[:] == [7, 1]
    assert StoredList.of(values) is values
    assert pickle.loads(pickle.dumps(values)) == numbers
    with pytest.raises(IndexError):
        values[1000]


def test_threads_and_copies_read_side_by_side(path: Path) -> None:
    numbers = list(range(20_000))
    path.write_text(json.dumps({"images": numbers}))
    values = read_json_lists(path, NAMES)["images"]
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(list(values))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == 4 * [numbers]


@pytest.mark.parametrize("content", [b'{"images": [9, 9, 9]} ', b'{"images": [9'])
def test_a_file_that_changed_is_not_read_as_if_it_had_not(path: Path, content: bytes) -> None:
    path.write_bytes(b'{"images": [1, 2, 3]}')
    opened, unopened = (read_json_lists(path, NAMES)["images"] for _ in range(2))
    assert opened[0] == 1
    path.write_bytes(content)
    for values in (opened, unopened):
        with pytest.raises(UserError, match=r"file\.json has changed since it was checked: start again"):
            values[2]
