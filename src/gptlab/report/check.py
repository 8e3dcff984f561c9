"""Are a study's files what their format says? Asked before a report is written from them."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints

from gptlab.errors import GptlabError
from gptlab.formatting import listed


def check(value: Any, kind: Any, path: Path, where: str = "") -> None:
    """Refuse a value that is not of the type that the format says.

    Args:
        value: as JSON gave it.
        kind: a type as `gptlab.study.results` writes it.
        path: of the file, for the message.
        where: what leads to the value.

    Raises:
        GptlabError: the first thing that is missing or of another type.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or origin is NotRequired:
        for inner in arguments:
            check(value, inner, path, where)
    elif typing.is_typeddict(kind):
        _refuse(not isinstance(value, dict), path, where, "an object")
        for name, inner in get_type_hints(kind, include_extras=True).items():
            if name in value:
                check(value[name], inner, path, f"{where}.{name}")
            else:
                _refuse(get_origin(inner) is not NotRequired, path, f"{where}.{name}", "there")
    elif origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return
        check(value, next(inner for inner in arguments if inner is not type(None)), path, where)
    elif origin is list:
        _refuse(not isinstance(value, list), path, where, "a list")
        for i, item in enumerate(value):
            check(item, arguments[0], path, f"{where}[{i}]")
    elif origin is dict:
        _refuse(not isinstance(value, dict), path, where, "an object")
        for name, item in value.items():
            check(item, arguments[1], path, f"{where}.{name}")
    elif origin is Literal:
        _refuse(value not in arguments, path, where, f"one of {listed(list(arguments))}")
    else:
        accepted = (int, float) if kind is float else kind
        wrong = not isinstance(value, accepted) or (kind in (int, float) and isinstance(value, bool))
        _refuse(wrong, path, where, {int: "a whole number", float: "a number", str: "text"}.get(kind, kind.__name__))


def _refuse(wrong: bool, path: Path, where: str, wanted: str) -> None:
    if wrong:
        raise GptlabError(
            f"{path} is damaged: {where.lstrip('.') or 'it'} is not {wanted}; make it again by gptlab study"
        )
