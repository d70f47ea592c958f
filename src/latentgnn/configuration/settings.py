"""Typed configuration from plain values: dataclasses filled by jsonargparse; errors name the nearest options."""

import difflib
import os
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from latentgnn.errors import UserError, require

C = TypeVar("C")


@dataclass(frozen=True)
class Option:
    """One setting of a nested configuration.

    Args:
        type: its type hint.
        default: its value where none is given.
        help: its line in the documentation of its class.
    """

    type: Any
    default: Any
    help: str


def options(config_class: type) -> dict[str, Option]:
    """Every setting by its dotted name, for example ``training.optimizer.learning_rate``, in order."""
    hints, helps = get_type_hints(config_class), _argument_docs(config_class)
    settings: dict[str, Option] = {}
    for field in fields(config_class):
        hint = hints[field.name]
        if is_dataclass(hint):
            settings |= {f"{field.name}.{name}": option for name, option in options(cast(type, hint)).items()}
        else:
            settings[field.name] = Option(hint, _default(field), helps.get(field.name, ""))
    return settings


def parse_config(config_class: type[C], values: Mapping[str, Any], overrides: Sequence[tuple[str, str]] = ()) -> C:
    """A configuration from nested plain values, with single settings laid over it.

    Args:
        config_class: a dataclass whose fields are plain types and dataclasses.
        values: as read from YAML.
        overrides: dotted names and the text given for each; a later one wins.

    Raises:
        UserError: an unknown setting (with the nearest ones) or a value of the wrong type.
    """
    jsonargparse = require("jsonargparse", extra="train")
    known = options(config_class)
    _refuse_unknown(known, values, "")
    for name, _ in overrides:
        if name not in known:
            raise UserError(f"there is no setting {name!r}{nearest(name, known)}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class)
    try:
        parsed = parser.parse_object(dict(values))
        parsed = parser.parse_args([f"--{name}={text}" for name, text in overrides], namespace=parsed)
    except jsonargparse.ArgumentError as error:
        raise UserError(_bad_value(str(error), known, values, dict(overrides))) from None
    return _build(config_class, parsed, "")


def plain_data(value: Any) -> Any:
    """A configuration, or a part of one, as YAML and JSON hold it.

    Args:
        value: dataclasses and mappings become dicts, tuples lists, paths text; texts, numbers and ``None`` stay.

    Raises:
        TypeError: something else is in it.

    Example:
        >>> plain_data({"sizes": (1, 2)})
        {'sizes': [1, 2]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_data(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"a configuration holds plain data, got {type(value).__name__}: {value!r}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message: what the user may have meant by ``name``, or nothing."""
    known = list(known)
    last = name.rsplit(".", 1)[-1]
    # A setting given without its group, or under the wrong one, is likelier than a slip of the finger.
    close = [option for option in known if option.rsplit(".", 1)[-1] == last and "." in option][:3]
    close += [option for option in difflib.get_close_matches(name, known, n=3, cutoff=0.6) if option not in close]
    return f"; did you mean {' or '.join(close[:3])}?" if close else ""


def describe(hint: Any) -> str:
    """A type hint in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(str(value) for value in arguments) if len(arguments) < 3 else f"one of {_list(arguments)}"
    if origin in (Union, types.UnionType):
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


_SINGULARS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def _list(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values)


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _argument_docs(config_class: type) -> dict[str, str]:
    """The ``Args:`` of a docstring, one line each."""
    _, _, block = (config_class.__doc__ or "").partition("Args:\n")
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", block, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _refuse_unknown(known: Mapping[str, Option], values: Mapping[str, Any], prefix: str) -> None:
    for key, value in values.items():
        path = f"{prefix}{key}"
        if path in known:
            continue
        inside = any(name.startswith(f"{path}.") for name in known)
        if not inside:
            raise UserError(f"there is no setting {path!r}{nearest(path, known)}")
        if not isinstance(value, Mapping):
            raise UserError(f"{path} is a group of settings and takes a mapping; got {value!r}")
        _refuse_unknown(known, value, f"{path}.")


def _bad_value(
    message: str, known: Mapping[str, Option], values: Mapping[str, Any], overrides: Mapping[str, str]
) -> str:
    """jsonargparse's message in the words of `describe`."""
    parser_key = re.search(r'Parser key "([\w.]+)"', message)
    if parser_key is None or parser_key[1] not in known:
        return message
    name = parser_key[1]
    given: Any = values
    for part in name.split("."):
        given = given.get(part) if isinstance(given, Mapping) else None
    return f"{name}: expected {describe(known[name].type)}; got {overrides.get(name, given)!r}"


def _build(config_class: type[C], parsed: Any, prefix: str) -> C:
    hints = get_type_hints(config_class)
    arguments: dict[str, Any] = {}
    for field in fields(cast(Any, config_class)):
        hint, value, name = hints[field.name], parsed[field.name], f"{prefix}{field.name}"
        if is_dataclass(hint):
            value = _build(cast(type, hint), value, f"{name}.")
        else:
            _check(name, hint, value)
        arguments[field.name] = value
    return config_class(**arguments)


def _check(name: str, hint: Any, value: Any) -> None:
    """What jsonargparse lets through: null for anything, and any key of a mapping."""
    if value is None and type(None) not in get_args(hint):
        raise UserError(f"{name}: expected {describe(hint)}; got null")
    if get_origin(hint) is dict:
        key_hint = get_args(hint)[0]
        for key in value:
            if get_origin(key_hint) is Literal and key not in get_args(key_hint):
                raise UserError(f"{name}: expected {describe(hint)}; got the key {key!r}")
