"""What `results.json` says of variants that are made by conversion; a study without them has none of it."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Interval(TypedDict):
    """A difference and its 95% interval, whose ends are None where there is none; below 0 the loss is lower."""

    mean: float
    low: float | None
    high: float | None
    n: int
    unit: str
    method: str


class Look(TypedDict):
    """A converted model after a share of the tokens that the base was trained on; 0 is right after the conversion.

    ``nats_per_token`` and ``by_run`` are the loss on the held-out text; ``difference`` is to the base trained on for as
    long, at 0 to the base; ``rivals`` are the differences to other variants of the same architecture. ``whole`` is the
    loss where the text is read in windows of the model's own context, for one that was extended.
    """

    share: float
    tokens: int
    nats_per_token: float
    by_run: list[float]
    difference: Interval | None
    rivals: dict[str, Interval]
    whole: NotRequired[float]


class Conversion(TypedDict):
    """How a variant was made: what was asked for, the steps taken, and settings of the uptraining that are its own.

    ``moved`` is the mean divergence KL(base || converted) in nats a token over ``moved_tokens`` of the held-out text.
    """

    changes: dict[str, Any]
    steps: list[str]
    uptrain: list[str]
    moved: float | None
    moved_tokens: int
    looks: list[Look]


class Converted(TypedDict):
    """The conversions of a study as a whole.

    ``calibration`` says what they were fitted on; ``yardstick`` is the variant that differences are taken to, the base
    trained on; ``of`` are the tokens that the base was trained on, of which the looks' shares are. The last two, and
    the recipe of the uptraining, are None where nothing was trained on.
    """

    calibration: str
    yardstick: str | None
    of: int | None
    recipe: dict[str, Any] | None
