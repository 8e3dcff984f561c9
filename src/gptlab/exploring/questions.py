"""What the page may ask: the bodies of its requests."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gptlab.serving.bodies import Body

MOST_CHARACTERS = 200_000
"""Of a text; how many of its tokens are read is the model's own limit."""
MOST_STEPS = 200
"""Tokens to generate at a time."""
MOST_PIXELS = 512
"""Along each side of a map that is drawn small."""

Index = Annotated[int, Field(ge=0)]
LayerAndHead = Annotated[list[Index], Field(min_length=2, max_length=2)]


class OfModel(Body):
    """About a model, by one of the names that the command was given."""

    model: str


class OfText(OfModel):
    """About what a model makes of a text."""

    text: Annotated[str, Field(max_length=MOST_CHARACTERS)]


class Maps(OfText):
    """Where the heads of a layer look.

    Attributes:
        layer: from 0.
        head: one alone; None: all.
        size: pixels along each side; None: one for each token.
        n_kv_head: of the model after conversion; None: as it is.
        by: positions by which the text is moved.
    """

    layer: Index
    head: Index | None = None
    size: Annotated[int, Field(ge=8, le=MOST_PIXELS)] | None = None
    n_kv_head: int | None = None
    by: Index = 0


class Sharing(OfText):
    """What a smaller number of key/value heads would do."""

    n_kv_head: int


class Scores(OfText):
    """What a head's scores owe to distance."""

    layer: Index
    head: Index


class Effects(OfText):
    """What becomes of the loss without each head of a layer."""

    layer: Index


class Shift(OfText):
    """What becomes of a text that is moved."""

    by: Index


class Steps(OfText):
    """How a text goes on."""

    n: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    seed: int
    temperature: Annotated[float, Field(ge=0, le=100, strict=False)]


class Without(OfText):
    """What becomes of the loss without parts of a model: some heads, whole layers of attention, the sinks."""

    heads: Annotated[list[LayerAndHead], Field(default_factory=list)]
    attention: Annotated[list[Index], Field(default_factory=list)]
    sinks: bool = False


class Nothing(Body):
    """About the machine."""
