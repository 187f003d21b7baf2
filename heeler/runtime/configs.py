"""Frozen dataclasses to JSON and back. Where a field is a union of dataclasses, the JSON names the one chosen."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from heeler.types import HeelerError


def to_json(value: Any) -> Any:
    """Plain JSON values; a dataclass becomes an object with its class name under "type"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    return value


def _classes(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return [cls for part in typing.get_args(annotation) for cls in _classes(part)]
    if typing.get_origin(annotation) is typing.Annotated:
        return _classes(typing.get_args(annotation)[0])
    return []


def from_json(cls: type, data: Any, where: str = "config.json") -> Any:
    """Build `cls` from what `to_json` wrote.

    Raises:
        HeelerError: a class or a field that this version does not know, or one that is missing.
    """
    if not isinstance(data, dict):
        raise HeelerError(f"{where}: expected an object for {cls.__name__}")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name == "type":
            continue
        if name not in hints:
            raise HeelerError(f"{where}: {cls.__name__} has no setting {name!r}: was it written by another version?")
        choices = {c.__name__: c for c in _classes(hints[name])}
        if isinstance(value, dict) and choices:
            kind = value.get("type", next(iter(choices)))
            if kind not in choices:
                raise HeelerError(f"{where}: {name} is {kind!r}, but must be one of {', '.join(choices)}")
            values[name] = from_json(choices[kind], value, where)
        elif isinstance(value, list) and typing.get_origin(hints[name]) is tuple:
            values[name] = tuple(value)
        else:
            values[name] = value
    try:
        return cls(**values)
    except TypeError as error:
        raise HeelerError(f"{where}: {cls.__name__}: {error}") from error
