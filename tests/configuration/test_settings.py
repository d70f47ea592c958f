from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from latentgnn.configuration.settings import describe, nearest, options, parse_config, plain_data, renamed
from latentgnn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Inner settings.

    Args:
        rate: how fast,
            in all.
        sizes: of things.
        kind: which.
    """

    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    kind: Literal["plain", "fancy"] = "plain"


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Outer settings.

    Args:
        steps: how many.
        name: of it.
        pair: two of them.
        latents: after each.
        on: whether.
        inner: see `Inner`.
    """

    steps: int = 3
    name: str | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    latents: dict[Literal["C3", "C4"], int | tuple[int, ...]] = field(default_factory=dict)
    on: bool = False
    inner: Inner = field(default_factory=Inner)


def test_options_are_the_leaves_with_their_documentation():
    settings = options(Outer)
    assert list(settings) == ["steps", "name", "pair", "latents", "on", "inner.rate", "inner.sizes", "inner.kind"]
    assert settings["inner.rate"].help == "how fast, in all."
    assert settings["inner.sizes"].default == (1, 2)
    assert settings["latents"].default == {}


def test_values_become_the_declared_types():
    values = {"steps": 7, "pair": [1, 2], "latents": {"C4": 5, "C3": [1, 2]}, "inner": {"sizes": [8]}}
    assert parse_config(Outer, values) == Outer(
        steps=7, pair=(1.0, 2.0), latents={"C4": 5, "C3": (1, 2)}, inner=Inner(sizes=(8,))
    )


def test_overrides_win_and_the_last_of_them_most():
    config = parse_config(
        Outer,
        {"steps": 7, "latents": {"C3": 9}, "inner": {"kind": "fancy"}},
        [
            ("steps", "8"),
            ("steps", "9"),
            ("latents", "{C4: 1}"),
            ("inner.rate", "1e-4"),
            ("name", "2017"),
            ("on", "true"),
            ("inner.sizes", "[4, 5]"),
        ],
    )
    assert config == Outer(
        steps=9, name="2017", latents={"C4": 1}, on=True, inner=Inner(rate=1e-4, sizes=(4, 5), kind="fancy")
    )


def test_a_value_may_begin_with_a_dash_or_hold_spaces():
    assert parse_config(Outer, {}, [("name", "-x y=z"), ("inner.rate", "-2")]) == Outer(
        name="-x y=z", inner=Inner(rate=-2.0)
    )


def test_plain_data_and_back():
    config = Outer(pair=(3.0, 4.0), latents={"C3": (1, 2)}, inner=Inner(kind="fancy"))
    values = plain_data(config)
    assert values["pair"] == [3.0, 4.0]
    assert values["latents"] == {"C3": [1, 2]}
    assert parse_config(Outer, values) == config


def test_plain_data_takes_paths_and_refuses_what_yaml_cannot_hold():
    assert plain_data({1: [Path("data"), None], Path("a"): 2}) == {1: ["data", None], "a": 2}
    with pytest.raises(TypeError, match="plain data, got set"):
        plain_data({"a": [{1, 2}]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stesp": 3}, r"no setting 'stesp'; did you mean steps\?"),
        ({"inner": {"ratte": 3}}, r"no setting 'inner.ratte'; did you mean inner.rate"),
        ({"rate": 3}, r"no setting 'rate'; did you mean inner.rate\?"),
        ({"inner": 3}, r"inner is a group of settings and takes a mapping; got 3"),
        ({"inner": None}, r"inner is a group of settings and takes a mapping; got null"),
        ({5: 1}, r"no setting '5'"),
        ({"steps": "many"}, r"steps: expected a whole number; got 'many'"),
        ({"steps": 1.5}, r"steps: expected a whole number; got 1.5"),
        ({"steps": True}, r"steps: expected a whole number; got True"),
        ({"steps": None}, r"steps: expected a whole number; got null"),
        ({"inner": {"kind": "odd"}}, r"inner.kind: expected plain or fancy; got 'odd'"),
        ({"steps": "5"}, r"steps: expected a whole number; got '5'"),
        ({"steps": 2**63}, r"steps: expected a whole number; got 9223372036854775808"),
        ({"inner.rate": 1}, r"no setting 'inner.rate'"),
        ({"name": 2017}, r"name: expected text or null; got 2017"),
        ({"pair": [1, float("inf")]}, r"pair: expected a list of 2 numbers; got \[1, inf\]"),
        ({"pair": [1, 2, 3]}, r"pair: expected a list of 2 numbers; got \[1, 2, 3\]"),
        ({"latents": {"C7": 3}}, r"latents: expected a mapping from C3 or C4 to .*; got the key 'C7'"),
        ({"latents": {"C3": "x"}}, r"latents: expected a mapping from C3 or C4 to a whole number or a list"),
    ],
)
def test_bad_values_say_what_was_expected(values, message):
    with pytest.raises(UserError, match=message):
        parse_config(Outer, values)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("inner.sizes", "4", r"inner.sizes: expected a list of whole numbers; got '4'"),
        ("on", "maybe", r"on: expected true or false; got 'maybe'"),
        ("steps", "null", r"steps: expected a whole number; got"),
        ("latents", "{C3", r"latents: expected a mapping .*; got '\{C3'"),
        ("latents", "{C3: 1, C3: 2}", r"latents: expected a mapping .* \(line 1, column 9: 'C3' is given twice\)"),
        ("steps", "9" * 23, r"steps: expected a whole number; got '9{23}' \(expected a number of at most 64 bits\)"),
        ("inner.rate", "1e999", r"inner.rate: expected a number; got '1e999' \(inf is not a finite number\)"),
        ("inner.rate", "nan", r"inner.rate: expected a number; got 'nan'"),
        ("inner", "{rate: 1}", r"no setting 'inner'"),
        ("inner.rat", "1", r"no setting 'inner.rat'; did you mean inner.rate"),
    ],
)
def test_bad_overrides_say_what_was_expected(name, text, message):
    with pytest.raises(UserError, match=message):
        parse_config(Outer, {}, [(name, text)])


@dataclass(frozen=True, kw_only=True)
class Renewed:
    """Settings of a later version.

    Args:
        size: was called edge.
        names: was a list of pairs.
        inner: see `Inner`.
    """

    size: int = field(default=1, metadata={"was": "edge"})
    names: dict[int, str] | None = None
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A group inside.

    Args:
        data: see `Renewed`.
    """

    data: Renewed = field(default_factory=Renewed)


def test_an_old_name_is_told_the_new_one():
    assert renamed(Whole) == {"data.edge": "data.size"}
    for values, overrides in (({"data": {"edge": 3}}, []), ({}, [("data.edge", "3")])):
        with pytest.raises(UserError, match=r"no setting 'data.edge' any more: it is called data.size now"):
            parse_config(Whole, values, overrides)


def test_what_an_earlier_version_recorded_is_taken_as_it_was_meant():
    recorded = {"data": {"edge": 3, "names": [[2, "ground"], [6, "building"]], "inner": {"sizes": [1, 2]}}}
    config = parse_config(Whole, recorded, recorded=True)
    assert config == Whole(data=Renewed(size=3, names={2: "ground", 6: "building"}))
    assert recorded["data"]["edge"] == 3
    assert parse_config(Whole, plain_data(config), recorded=True) == config
    with pytest.raises(UserError, match=r"no setting 'data.egde'"):
        parse_config(Whole, {"data": {"egde": 3}}, recorded=True)


def test_mappings_from_numbers():
    assert parse_config(Renewed, {}, [("names", "{2: ground, 3: ground}")]).names == {2: "ground", 3: "ground"}
    for text in ("{two: ground}", "{true: ground}", "[[2, ground]]", "{2: 3}"):
        with pytest.raises(UserError, match=r"names: expected a mapping from a whole number to text or null; got"):
            parse_config(Renewed, {}, [("names", text)])


def test_nearest_offers_at_most_three_and_nothing_for_noise():
    assert nearest("qqqqqq", ["steps", "name"]) == ""
    assert nearest("name1", ["name2", "name3", "name4", "name5"]).count(" or ") == 2


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (float | None, "a number or null"),
        (Literal["a", "b", "c"], "one of a, b, c"),
        (int | Literal["auto"], "a whole number or auto"),
        (tuple[int, int], "a list of 2 whole numbers"),
    ],
)
def test_describe(hint, words):
    assert describe(hint) == words
