"""Typed configuration from plain values: strict parsing into dataclasses, with errors that suggest similar settings."""

import copy
import difflib
import math
import os
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from latentgnn.errors import UserError
from latentgnn.files.reading import UnreadableError, parse_yaml

C = TypeVar("C")

_INT_END = 2**63


@dataclass(frozen=True)
class Option:
    """One setting of a nested configuration.

    Args:
        type: its type hint.
        default: its default value.
        help: its text in the docstring of its class.
    """

    type: Any
    default: Any
    help: str


def options(config_class: type) -> dict[str, Option]:
    """Return every setting by dotted name, for example ``training.optimizer.learning_rate``, in order."""
    hints, helps = get_type_hints(config_class), _argument_docs(config_class)
    settings: dict[str, Option] = {}
    for field in fields(config_class):
        hint = hints[field.name]
        if is_dataclass(hint):
            settings |= {f"{field.name}.{name}": option for name, option in options(cast(type, hint)).items()}
        else:
            settings[field.name] = Option(hint, _default(field), helps.get(field.name, ""))
    return settings


def renamed(config_class: type) -> dict[str, str]:
    """Return settings that had other names in earlier versions, as a mapping from old to new dotted name.

    A field declares it in its metadata: ``field(default=1, metadata={"was": "old_name"})``.
    """
    hints = get_type_hints(config_class)
    names: dict[str, str] = {}
    for field in fields(config_class):
        hint = hints[field.name]
        if is_dataclass(hint):
            inside = renamed(cast(type, hint))
            names |= {f"{field.name}.{old}": f"{field.name}.{new}" for old, new in inside.items()}
        elif "was" in field.metadata:
            names[field.metadata["was"]] = field.name
    return names


def no_setting(name: str, config_class: type) -> str:
    """Return a message about an unknown setting: its current name, or similar ones."""
    if now := renamed(config_class).get(name):
        return f"there is no setting {name!r} any more: it is called {now} now"
    return f"there is no setting {_short(name)}{nearest(name, options(config_class))}"


def parse_config(
    config_class: type[C],
    values: Mapping[str, Any],
    overrides: Sequence[tuple[str, str]] = (),
    *,
    recorded: bool = False,
) -> C:
    """Build a configuration from nested plain values and overrides of single settings.

    Values must have the types that the class declares: strings are not converted to numbers, nor numbers to strings; an
    integer is accepted as a float.

    Args:
        config_class: a dataclass whose fields are plain types and dataclasses.
        values: plain values as read from YAML.
        overrides: dotted names and their text, which is YAML unless the setting is a string; the last one wins.
        recorded: whether the values were written by a run, perhaps of an earlier version: then old names, and lists of
            pairs instead of mappings, are converted.

    Raises:
        UserError: for an unknown setting (with similar ones), a value of the wrong type, or one that the class refuses.
    """
    known = options(config_class)
    if recorded:
        values = _of_today(config_class, values)
    _refuse_unknown(config_class, known, values, "")
    typed = {name: _typed(name, known[name].type, value, _short(value)) for name, value in _leaves(known, values, "")}
    for name, text in overrides:
        if name not in known:
            raise UserError(no_setting(name, config_class))
        typed[name] = _typed(name, known[name].type, _from_text(name, known[name].type, text), _short(text))
    return _build(config_class, typed, "")


def plain_data(value: Any) -> Any:
    """Convert a configuration or a part of one to the data types of YAML and JSON.

    Args:
        value: dataclasses and mappings become dicts, tuples lists, and paths strings; strings, numbers and ``None`` are
            unchanged. Keys become strings, except integers.

    Raises:
        TypeError: if it contains something else.

    Example:
        >>> plain_data({"sizes": (1, 2)})
        {'sizes': [1, 2]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_data(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key if type(key) is int else str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"a configuration holds plain data, got {type(value).__name__}: {value!r}")


def expect(config: Any, expectations: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse values with a correct type but an invalid value; called by a configuration's ``__post_init__``.

    Args:
        config: a dataclass.
        expectations: for each field, whether its value is valid, and a description of valid values.

    Raises:
        UserError: for the first invalid value, with the field's name in ``config``; `parse_config` prepends the names
            of its groups.

    Example:
        >>> @dataclass
        ... class Sizes:
        ...     edge: float
        ...     def __post_init__(self) -> None:
        ...         expect(self, {"edge": (self.edge > 0, "more than 0")})
        >>> Sizes(-1.0)
        Traceback (most recent call last):
        ...
        latentgnn.errors.UserError: edge: expected more than 0; got -1.0
    """
    for name, (is_sound, expected) in expectations.items():
        if not is_sound:
            raise UserError(f"{name}: expected {expected}; got {_short(plain_data(getattr(config, name)))}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that suggests settings similar to ``name``, or an empty string."""
    known = list(known)
    last = name.rsplit(".", 1)[-1]
    # A setting without its group, or in the wrong group, is likelier than a typing error.
    close = [option for option in known if option.rsplit(".", 1)[-1] == last and "." in option][:3]
    close += [option for option in difflib.get_close_matches(name, known, n=3, cutoff=0.6) if option not in close]
    return f"; did you mean {' or '.join(close[:3])}?" if close else ""


def describe(hint: Any) -> str:
    """Describe a type hint in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        names = [str(value) for value in arguments]
        return " or ".join(names) if len(names) < 3 else f"one of {', '.join(names)}"
    if origin in _UNIONS:
        return " or ".join(describe(argument) for argument in arguments)
    if origin is tuple:
        if arguments[1:] == (Ellipsis,):
            return f"a list of {_PLURALS.get(arguments[0]) or f'({describe(arguments[0])})'}"
        if len(set(arguments)) == 1:
            return f"a list of {len(arguments)} {_PLURALS[arguments[0]]}"
        return f"a list of {' and '.join(describe(argument) for argument in arguments)}"
    if origin is dict:
        return f"a mapping from {describe(arguments[0])} to {describe(arguments[1])}"
    return _SINGULARS[hint]


_UNIONS = (Union, types.UnionType)
_SINGULARS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _argument_docs(config_class: type) -> dict[str, str]:
    """The entries under ``Args:`` in a docstring, one line each."""
    _, _, block = (config_class.__doc__ or "").partition("Args:\n")
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", block, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _of_today(config_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert recorded values to current names and forms; everything else is unchanged."""
    now: dict[str, Any] = copy.deepcopy(dict(values))
    for old, new in renamed(config_class).items():
        group, _, name = old.rpartition(".")
        inside = _group(now, group)
        if inside is not None and name in inside:
            # Renamed in place, so that the order stays the same.
            last = new.rpartition(".")[2]
            renewed = {last if key == name else key: value for key, value in inside.items()}
            inside.clear()
            inside.update(renewed)
    for name, option in options(config_class).items():
        group, _, last = name.rpartition(".")
        inside = _group(now, group)
        accepted = get_args(option.type) if get_origin(option.type) in _UNIONS else (option.type,)
        if inside is not None and any(get_origin(hint) is dict for hint in accepted):
            value = inside.get(last)
            if isinstance(value, list) and all(isinstance(item, list) and len(item) == 2 for item in value):
                inside[last] = dict(value)
    return now


def _group(values: dict[str, Any], path: str) -> dict[str, Any] | None:
    """The group of settings with a dotted name, or ``None`` if there is none."""
    for name in path.split(".") if path else ():
        inside = values.get(name)
        if not isinstance(inside, dict):
            return None
        values = inside
    return values


def _refuse_unknown(config_class: type, known: Mapping[str, Option], values: Mapping[str, Any], prefix: str) -> None:
    for key, value in values.items():
        path = f"{prefix}{key}"
        is_name = isinstance(key, str) and "." not in key
        if is_name and path in known:
            continue
        inside = is_name and any(name.startswith(f"{path}.") for name in known)
        if not inside:
            raise UserError(no_setting(path, config_class))
        if not isinstance(value, Mapping):
            raise UserError(f"{path} is a group of settings and takes a mapping; got {_short(value)}")
        _refuse_unknown(config_class, known, value, f"{path}.")


def _leaves(known: Mapping[str, Option], values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the settings in nested values, by dotted name."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if path in known:
            yield path, value
        else:
            yield from _leaves(known, value, f"{path}.")


def _from_text(name: str, hint: Any, text: str) -> Any:
    """Parse the text of a setting on the command line to a plain value."""
    accepted = get_args(hint) if get_origin(hint) in _UNIONS else (hint,)
    if str in accepted:
        return None if text == "null" and type(None) in accepted else text
    try:
        return parse_yaml(text)
    except UnreadableError as error:
        raise UserError(f"{name}: expected {describe(hint)}; got {_short(text)} ({error})") from None


def _typed(name: str, hint: Any, value: Any, came: str) -> Any:
    try:
        return _converted(hint, value)
    except TypeError:
        raise UserError(f"{name}: expected {describe(hint)}; got {came}") from None
    except UserError as error:
        raise UserError(f"{name}: expected {describe(hint)}; {error}") from None


def _converted(hint: Any, value: Any) -> Any:
    """Convert a plain value to its type hint: lists become tuples, and integers floats.

    Raises:
        TypeError: if it has another type.
        UserError: likewise, with what is wrong inside it.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        for argument in arguments:
            try:
                return _converted(argument, value)
            except (TypeError, UserError):
                continue
    elif origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        if arguments[1:] == (Ellipsis,):
            return tuple(_converted(arguments[0], item) for item in value)
        if len(value) == len(arguments):
            return tuple(map(_converted, arguments, value))
    elif origin is dict and isinstance(value, Mapping):
        key_hint, value_hint = arguments
        for key in value:
            if not (type(key) is key_hint if key_hint in (int, str) else key in get_args(key_hint)):
                raise UserError(f"got the key {_short(key)}")
        return {key: _converted(value_hint, item) for key, item in value.items()}
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool) and -_INT_END <= value < _INT_END:
            return value
    elif origin is None and isinstance(value, hint):
        return value
    raise TypeError


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _build(config_class: type[C], given: Mapping[str, Any], prefix: str) -> C:
    hints = get_type_hints(config_class)
    arguments: dict[str, Any] = {}
    for field in fields(cast(Any, config_class)):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        if is_dataclass(hint):
            arguments[field.name] = _build(cast(type, hint), given, f"{name}.")
        elif name in given:
            arguments[field.name] = given[name]
    try:
        return config_class(**arguments)
    except UserError as error:
        # The class only knows the name of its own field; the full name is known here.
        raise UserError(f"{prefix}{error}") from None
