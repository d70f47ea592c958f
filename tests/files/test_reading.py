import json
import os
from pathlib import Path

import pytest

from latentgnn.errors import UserError
from latentgnn.files.plain_values import MOST_DEPTH
from latentgnn.files.reading import parse_yaml, read_json, read_yaml, regular_file


def bomb(levels: int) -> str:
    """Ten times as many values a level."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": [1, {"b": 1, "c": 2, "b": 3}]}', r'a\[1\]: the key "b" is given twice'),
        (b'{"a": [NaN]}', r"a\[0\]: nan is not a finite number"),
        (b"[1, -Infinity]", r"\[1\]: -inf is not a finite number"),
        (b'{"area": 1e999}', r"area: inf is not a finite number"),
        (b"[18446744073709551616]", r"\[0\]: expected a number of at most 64 bits"),
        (b'{"a":\n ' + b"7" * 5000 + b"}", r"line 2, column 2: a number of thousands of digits"),
        (b'["\\ud800"]', r'\[0\]: "\\ud800" contains a lone surrogate'),
        (b'{"a": {"\\udfff": 1}}', r'a: the key "\\udfff" contains a lone surrogate'),
        (b"\xed\xa0\x80", r"line 1, column 1: malformed JSON: not UTF-8"),
        (b"[" * 100_000, r"nested too deeply"),
        (b"[" * (MOST_DEPTH + 2) + b"]" * (MOST_DEPTH + 2), r"\[0\].*nested too deeply"),
        (b"[1,\n2 3]", r"line 2, column 3: malformed JSON: Expecting ',' delimiter"),
        (b"", r"line 1, column 1: malformed JSON: Expecting value"),
    ],
)
def test_json_faults_say_where(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"file\.json: {message}") as told:
        read_json(path)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 500


def test_sound_json_is_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    value = {"a": [1, 2.5, None, True, "\U0001f600", {"b": -(2**63), "c": 2**63 - 1}], "d": {}}
    path.write_text(json.dumps(value))
    assert read_json(path) == value
    # A text that begins with a byte order mark, as some editors write it.
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(path) == [1]
    deep = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    path.write_text(deep)
    assert json.dumps(read_json(path)) == deep


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(9), r"line 5, column 5: more than 100,000 values, with aliases written out"),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100)), r"line 65.*nested too deeply"),
        ("a: &a [1, *a]", r"line 1, column 11: an alias refers to a value that contains it"),
        ("a: &a {b: *a}", r"line 1, column 11: an alias refers to a value that contains it"),
        ("[" * 100_000, r"line 1, column 66: nested too deeply"),
        ("- " * 5000, r"line 1, column 131: nested too deeply"),
        ("a: !!timestamp foo", r"line 1, column 4: the tag .*timestamp' is not taken"),
        ("a: !!python/object/apply:os.system ['true']", r"line 1, column 4: the tag .*os\.system' is not taken"),
        ("a: !!set {b}", r"line 1, column 4: the tag .*set' is not taken"),
        ("a: !!int x", r"line 1, column 4: 'x' is no whole number"),
        ("a: !!bool x", r"line 1, column 4: 'x' is neither true nor false"),
        ("a: 0x" + "f" * 5000, r"line 1, column 4: a number of 5002 characters"),
        ("a: " + "9" * 23, r"a: expected a number of at most 64 bits"),
        ("a: [.nan]", r"a\[0\]: nan is not a finite number"),
        ("a: -.inf", r"a: -inf is not a finite number"),
        ('a: "\\ud800"', r"a: .*contains a lone surrogate"),
        ('a: "\\UFFFFFFFF"', r"malformed YAML"),
        ("b: 1\na: \x00", r"line 2, column 4: the character #x0000"),
        ("1: a\n0x1: b", r"line 2, column 1: '0x1' is given twice"),
        ("? [1]\n: 2", r"line 1, column 3: expected a text or a number as key"),
        ("a: 1\n---\nb: 2", r"line 2, column 1: expected a single document"),
        ("%YAML 1." + "9" * 5000 + "\n---\na: 1", r"malformed YAML"),
    ],
)
def test_yaml_faults_say_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"file\.yaml: {message}") as told:
        read_yaml(path)
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match=f"^{message}"):
        parse_yaml(text)


def test_dates_are_texts_and_aliases_are_what_they_stand_for() -> None:
    assert parse_yaml("a: 2020-99-99") == {"a": "2020-99-99"}
    assert parse_yaml("x: &x {a: 1, b: 2}\ny: {<<: *x, a: 3}\nz: [*x, *x]") == {
        "x": {"a": 1, "b": 2},
        "y": {"a": 3, "b": 2},
        "z": [{"a": 1, "b": 2}] * 2,
    }


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "file").write_bytes(b"[]")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    assert regular_file(tmp_path / "link") == tmp_path / "link"
    for path, message in (
        (tmp_path / "pipe.json", "expected a file; this is a pipe"),
        (Path("/dev/zero"), "expected a file; this is a device"),
        (tmp_path, "expected a file; this is a folder"),
        (tmp_path / "absent.json", "there is no such list"),
        (tmp_path / "a\0b", "there is no such list"),
        (tmp_path / "\ud800", "there is no such list"),
        (tmp_path / "file" / "x", "not a directory"),
        (tmp_path / "loop", "in a circle"),
        (tmp_path / ("x" * 5000), "name too long"),
    ):
        with pytest.raises(UserError, match=message):
            regular_file(path, "list")
        with pytest.raises(UserError, match=message):
            read_json(path, "list")


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        # No block of it is on the disk.
        file.truncate(2**33)
    with pytest.raises(UserError, match="has 8,589,934,592 bytes; expected at most 4,294,967,296"):
        read_json(path)
    with pytest.raises(UserError, match="expected at most 1,048,576"):
        read_yaml(path)
