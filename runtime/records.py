"""JSON to records, strictly: a dataclass is read by its own type hints, and whatever does not fit is named in one line.

A file from elsewhere may hold anything. Its size is checked before it is parsed, unknown and missing keys are named, a truth
value is not a number, a number is finite and within its range, an enumerated word is one of its `Literal`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union

from leanvlm.runtime.errors import LeanVLMError

LIMIT = 16 << 20
"""Bytes of the largest JSON file that is parsed. Real ones have some megabytes at most; parsed, one byte can take 30 of
memory."""
SHOWN = 60
"""Characters of a wrong value that a message shows."""

NAMES: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    dict: "an object",
}

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Between:
    """The range of a number, both ends included; goes into a type hint as `Annotated[int, Between(1, 8)]`."""

    low: float
    high: float


Count = Annotated[int, Between(0, 2**53)]
"""A number of things that nothing is allocated for: bytes, an id."""
Size = Annotated[int, Between(1, 2**24)]
"""A dimension of a tensor."""


class _Misfit(Exception):
    """A value that does not fit: `where` it is and what it `must` be."""


def load_json(path: Path, error: type[LeanVLMError], limit: int = LIMIT) -> Any:
    """Parse a JSON file.

    Args:
        path: The file.
        error: What to raise.
        limit: Bytes that it may have.

    Returns:
        Its content; numbers are finite.

    Raises:
        LeanVLMError: As `error` says: it cannot be read, is too large, no UTF-8 or no JSON, or nested too deeply.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise error(f"{path} has {size} bytes; a file of its kind has at most {limit}")
        # Reads no more even of a pipe or a device, whose size is 0.
        with path.open("rb") as file:
            text = file.read(limit + 1).decode("utf-8")
        if len(text) > limit:
            raise error(f"{path} has more than {limit} bytes")
        return json.loads(text, parse_constant=_refuse_constant)
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}") from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} cannot be read as JSON: {shorten(cause)}") from cause


def read(kind: type[Kind], data: Any, name: str, error: type[LeanVLMError]) -> Kind:
    """Make a record of parsed JSON.

    Args:
        kind: A dataclass of numbers, strings, truth values, `Literal`, `None`, tuples, mappings, unions and such dataclasses.
        data: The parsed JSON.
        name: What holds it, for messages.
        error: What to raise.

    Raises:
        LeanVLMError: As `error` says: something does not fit, or the record's own check refuses it.
    """
    try:
        result: Kind = _value(kind, data, "")
    except _Misfit as misfit:
        raise error(f"{name}: {misfit}") from None
    return result


def plain(value: Any) -> Any:
    """Return what JSON holds of a record: dataclasses and mappings become objects, tuples lists. The inverse of `read`."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def shorten(value: object) -> str:
    """Return one line of a value from elsewhere, short enough for a message."""
    text = " ".join((value if isinstance(value, str) else str(value)).split())
    return _printable(text if len(text) <= 4 * SHOWN else f"{text[: 4 * SHOWN]}…")


def _printable(text: str) -> str:
    """Return a text with halves of characters, which JSON can spell and no stream takes, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _value(kind: Any, data: Any, where: str) -> Any:
    """Return `data` as `kind`; raises _Misfit, which names the path."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _in_range(_value(args[0], data, where), args[1], where)
    if origin in (Union, types.UnionType):
        return _one_of(args, data, where)
    if origin is Literal:
        return data if data in args and not isinstance(data, bool | list | dict) else _fail(where, data, f"one of {list(args)}")
    if origin is tuple:
        return _items(args, data, where)
    if origin is not None and issubclass(origin, Mapping):
        pairs = data.items() if isinstance(data, dict) else _fail(where, data, "an object")
        return {_key(args[0], key, where): _value(args[1], item, _below(where, key)) for key, item in pairs}
    if dataclasses.is_dataclass(kind):
        return _record(kind, data, where)
    return _scalar(kind, data, where)


def _scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return data
    if kind is float and type(data) in (int, float):
        return float(data) if abs(data) < 1e300 and math.isfinite(data) else _fail(where, data, "a finite number")
    return data if type(data) is kind else _fail(where, data, NAMES[kind])


def _in_range(value: Any, bounds: Between, where: str) -> Any:
    if not bounds.low <= value <= bounds.high:
        _fail(where, value, f"from {bounds.low} to {bounds.high}")
    return value


def _one_of(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    """Read a union as its member of the value's JSON type."""
    for kind in kinds:
        if type(data) in _json_types(kind):
            return _value(kind, data, where)
    return _fail(where, data, " or ".join(NAMES[_json_types(kind)[0]] for kind in kinds))


def _json_types(kind: Any) -> tuple[type, ...]:
    """Return the types that JSON of a member of a union is parsed to."""
    origin = typing.get_origin(kind)
    if origin is Annotated:
        return _json_types(typing.get_args(kind)[0])
    if origin is Literal:
        return tuple({type(word) for word in typing.get_args(kind)})
    if origin is tuple:
        return (list,)
    if kind is float:
        return (float, int)
    return (kind,) if kind in NAMES else (dict,)


def _items(kinds: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        _fail(where, data, "a list")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(data)
    if len(data) != len(kinds):
        _fail(where, data, f"a list of {len(kinds)}")
    return tuple(_value(kind, item, f"{where}[{at}]") for at, (kind, item) in enumerate(zip(kinds, data, strict=True)))


def _key(kind: Any, key: str, where: str) -> Any:
    """Return an object's key, which JSON has only as a string."""
    if kind is str:
        return key
    if not (key.isascii() and key.isdigit() and len(key) < 10 and key == str(int(key))):
        raise _Misfit(f"{where or 'it'} has the key {_show(key)}; its keys must be whole numbers")
    return int(key)


def _record(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        _fail(where, data, "an object")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    owner = where or "it"
    for key in data:
        if key not in fields:
            raise _Misfit(f"{owner} has the key {_show(key)}, which this version of leanvlm does not know")
    for name, field in fields.items():
        if name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise _Misfit(f"{owner} has no {name}")
    hints = _hints(kind)
    values = {key: _value(hints[key], item, _below(where, key)) for key, item in data.items()}
    try:
        return kind(**values)
    except LeanVLMError as error:  # Its own check of what its fields mean together.
        raise _Misfit(f"{where}: {error}" if where else str(error)) from error


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _below(where: str, key: str) -> str:
    shown = key if key.isidentifier() else _show(key)
    return f"{where}.{shown}" if where else shown


def _fail(where: str, data: Any, must: str) -> NoReturn:
    raise _Misfit(f"{where or 'it'} is {_show(data)}; it must be {must}")


def _show(data: Any) -> str:
    """Return a value as JSON spells it, cut; never long work for a long value."""
    if isinstance(data, str):
        text = _printable(json.dumps(data[: SHOWN + 1], ensure_ascii=False))
    elif isinstance(data, list | dict):
        text = f"{'a list' if isinstance(data, list) else 'an object'} of {len(data)}"
    elif isinstance(data, int) and not isinstance(data, bool) and data.bit_length() > 200:
        text = f"a number of {data.bit_length()} bits"
    else:
        text = json.dumps(data)
    return text if len(text) <= SHOWN + 2 else f"{text[:SHOWN]}…"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")
