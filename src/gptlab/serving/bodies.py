"""The bodies of requests, read as JSON and checked; whatever is wrong with one is said in a sentence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gptlab.errors import nearest
from gptlab.serving.errors import Refusal


class Body(BaseModel):
    """Types are taken at their word: "3" is not a number, and a name that is not known is an error."""

    model_config = ConfigDict(strict=True, extra="forbid")


T = TypeVar("T", bound=BaseModel)


def parse(body: bytes, kind: type[T]) -> T:
    """Read the body of a request.

    Raises:
        Refusal: it is not JSON, or not what ``kind`` describes; the first thing that is wrong is named.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else f"{error!s:.200}"
        raise Refusal(400, f"the body is not JSON: {reason}") from None
    if not isinstance(values, dict):
        raise Refusal(400, f"the body must be a JSON object, got {type(values).__name__}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_context=False), kind) from None


def _refusal(problems: Sequence[Any], kind: type[BaseModel]) -> Refusal:
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    path = [str(part) for part in first["loc"]]
    name = path[0] if path else None
    if first["type"] == "extra_forbidden":
        known = list(kind.model_fields) if len(path) == 1 else []
        return Refusal(
            400, f"there is no parameter {'.'.join(path):.100}{nearest(path[-1], known)}", param=f"{name:.100}"
        )
    if first["type"] == "missing":
        return Refusal(400, f"{'.'.join(path)} is missing", param=name)
    shown = repr(first["input"])
    given = shown if len(shown) <= 60 else f"{shown[:57]}..."
    message = first["msg"].removeprefix("Input should be ").replace("a valid ", "a ")
    return Refusal(400, f"{'.'.join(path[:3])} must be {message}, got {given}", param=name)
