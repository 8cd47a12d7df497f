"""Plain values, typed or read from a file, checked against the settings they are meant for."""

import dataclasses
import difflib
import math
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pyrovae.errors import InputError
from pyrovae.settings import NAMES, Options

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = typing.TypeVar("C", bound="DataclassInstance")

# Of a whole number that has no limit of its own: sizes in torch are integers of the machine.
LARGEST = 2**31 - 1


def field_type(f: "dataclasses.Field[Any]") -> tuple[type, bool, bool]:
    """A field's element type, whether it may be None, and whether it is a tuple of them."""
    annotation: Any = f.type
    optional = False
    if isinstance(annotation, types.UnionType):
        (annotation,) = [a for a in typing.get_args(annotation) if a is not type(None)]
        optional = True
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], optional, True
    return (dict if annotation == Options else annotation), optional, False


def make(cls: type[C], values: Mapping[str, Any]) -> C:
    """Build a configuration from plain values (flags, TOML or JSON), checking each.

    Raises:
        InputError: for an unknown name, a value of the wrong type, or one out of range.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise InputError(
                f"unknown setting {name!r}{did_you_mean(name, known)}; settings are flags such as "
                "batch_size; --out, --resume and the like are given on the command line alone"
            )
    return cls(**{name: _checked(known[name], value) for name, value in values.items()})


def _checked(f: "dataclasses.Field[Any]", value: Any) -> Any:
    flag = "--" + f.name.replace("_", "-")
    kind, optional, many = field_type(f)
    if value is None and optional:
        return None
    if kind is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{flag} expects KEY=VALUE pairs, got {value!r}")
        return dict(value)
    if many:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_element(f, flag, kind, v) for v in values)
    return _element(f, flag, kind, value)


def _element(f: "dataclasses.Field[Any]", flag: str, kind: type, value: Any) -> Any:
    limits = f.metadata
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}
        raise InputError(f"{flag} expects {expected[kind]}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{flag} expects a finite number, got {value}")
    if limits["least"] is not None and value < limits["least"]:
        raise InputError(f"{flag} must be at least {limits['least']:g}, got {value}")
    most: Any = LARGEST if kind is int and limits["most"] is None else limits["most"]
    if most is not None and value > most:
        raise InputError(f"{flag} must be at most {most}, got {value}")
    if limits["above"] is not None and value <= limits["above"]:
        raise InputError(f"{flag} must be above {limits['above']:g}, got {value}")
    if limits["below"] is not None and value >= limits["below"]:
        raise InputError(f"{flag} must be below {limits['below']:g}, got {value}")
    if limits["names"] is not None and value not in NAMES[limits["names"]]:
        raise InputError(unknown_name(flag, str(value), NAMES[limits["names"]]))
    return value


def unknown_name(what: str, got: str, known: Iterable[str]) -> str:
    """One line: what was expected, what came, and the nearest name."""
    known = list(known)
    return f"{what} knows no {got!r}{did_you_mean(got, known)}; choose from {', '.join(known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)", or nothing if no name is near."""
    close = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Settings from a TOML file; names may be written with - or _."""
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except FileNotFoundError:
        raise InputError(f"there is no configuration file {path}; check --config") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}; write lines such as epochs = 10") from None
    return {name.replace("-", "_"): value for name, value in values.items()}
