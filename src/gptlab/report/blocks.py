"""What a report is made of, before it is HTML or Markdown: sections of blocks, and differences in words.

Text is inline Markdown: ``**strong**``, ``*emphasis*``, `` `code` `` and a backslash before a character that is to be
itself. What comes from a file goes through `literal` first.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from gptlab.errors import GptlabError
from gptlab.formatting import digits, signed
from gptlab.study.results import Interval

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

NOISE, IDENTICAL = "within noise", "identical"
ROUNDING = 5e-6
"""Nats per token below which a difference is arithmetic: the two models compute the same function."""
REQUIRED = "a report needs markdown-it-py, matplotlib and jinja2; install them: pip install 'gptlab[report]'"


@dataclass(frozen=True)
class Paragraph:
    """Text. ``kind`` is empty, ``note`` for small print, or ``warning``."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Bullets:
    """A list of texts."""

    items: Sequence[str]


@dataclass(frozen=True)
class Formula:
    """A displayed formula, in TeX for Markdown and MathML for HTML, where ``|`` parts what may break."""

    tex: str
    mathml: str


class Column(NamedTuple):
    """A table's column; ``kind`` is ``text``, ``number`` or ``range``, a drawn interval that only HTML has."""

    title: str
    kind: str = "number"


VARIANT = Column("variant", "text")


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: what it shows.
        setting: model, tokens trained and hardware that the figures belong to.
        columns: their titles and kinds.
        rows: cells of text; in a column of ranges, intervals or None.
        note: small print below.
    """

    title: str
    setting: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def limits(self, column: int) -> tuple[float, float]:
        """Return the ends of the scale of a column of ranges, zero included."""
        values = [0.0]
        for interval in (row[column] for row in self.rows if row[column] is not None):
            values += [interval.mean, *(ends(interval) or ())]
        return min(values), max(values)

    @property
    def markdown(self) -> str:
        """The table in Markdown, without the columns of drawn intervals."""
        shown = [i for i, column in enumerate(self.columns) if column.kind != "range"]
        rules = ("---:" if self.columns[i].kind == "number" else "---" for i in shown)
        lines = [" | ".join(self.columns[i].title for i in shown), "|".join(rules)]
        lines += [" | ".join(str(row[i]) for i in shown) for row in self.rows]
        return "\n".join(f"|{line}|" if n == 1 else f"| {line} |" for n, line in enumerate(lines))


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its name under ``figures/``, a caption that says what to see, and the drawing itself."""

    name: str
    caption: str
    drawing: Any = field(repr=False)


@dataclass(frozen=True)
class Pictures:
    """Figures that stand side by side where there is room."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Texts:
    """Generated text: under each prompt, what each variant made of it as (label, text)."""

    prompts: Sequence[tuple[str, Sequence[tuple[str, str]]]]


@dataclass(frozen=True)
class Calculator:
    """The interactive prediction, with everything that it computes from; Markdown does without."""

    data: dict[str, Any]


Block = Paragraph | Bullets | Formula | Table | Pictures | Texts | Calculator


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it; parts of a section are sections too."""

    name: str
    title: str
    blocks: Sequence[Block]
    parts: Sequence[Section] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing below the heading."""
        return not self.blocks and all(part.empty for part in self.parts)


def side_by_side(pictures: Sequence[Picture]) -> list[Block]:
    """Return pictures as a block, if there are any."""
    return [Pictures(pictures)] if pictures else []


def literal(text: object) -> str:
    """Return text that stands for itself, whatever it holds."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def slug(name: str) -> str:
    """Return a name as it may stand in a file's name and in an identifier."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name)


@functools.cache
def _parser() -> MarkdownIt:
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        raise GptlabError(REQUIRED) from None
    # Emphasis, code and escapes; whatever else a text holds is text.
    return MarkdownIt("zero").enable(["emphasis", "backticks", "escape"])


def to_html(text: str) -> str:
    """Return a text's markup as HTML, everything else escaped."""
    return str(_parser().renderInline(text))


def to_plain(text: str) -> str:
    """Return a text without its markup."""
    return "".join(token.content for line in _parser().parseInline(text) for token in line.children or ())


def ends(interval: Interval) -> tuple[float, float] | None:
    """Return the ends of an interval; None where it has none."""
    return None if interval.low is None or interval.high is None else (interval.low, interval.high)


def identical(interval: Interval) -> bool:
    """Return whether a difference and its interval are nothing but rounding: no noise, the same function."""
    return max(map(abs, (interval.mean, *(ends(interval) or ())))) < ROUNDING


def in_noise(interval: Interval) -> bool:
    """Return whether an interval covers zero, where there is a difference at all."""
    around = ends(interval)
    return around is not None and around[0] <= 0 <= around[1] and not identical(interval)


def nats(difference: Interval | float) -> str:
    """Return a difference of the loss with its sign, in as many decimals as it, or its interval, needs."""
    if isinstance(difference, Interval) and identical(difference):
        return IDENTICAL
    if isinstance(difference, Interval):
        return signed(difference.mean, _places(difference.mean, ends(difference)))
    return signed(difference, _places(difference, None))


def span(interval: Interval) -> str:
    """Return the ends of an interval, or nothing where it has none or nothing differs."""
    around = None if identical(interval) else ends(interval)
    return " to ".join(signed(end, _places(interval.mean, around)) for end in around or ())


def probability(p: float | None) -> str:
    """Return a p-value in two digits."""
    return "" if p is None else "< 0.0001" if p < 1e-4 else digits(p, 2)


def bracketed(interval: Interval) -> str:
    """Return a difference, in brackets where its interval covers zero."""
    return f"({nats(interval)})" if in_noise(interval) else nats(interval)


def direction(interval: Interval, below: str = "lower loss", above: str = "higher loss") -> str:
    """Return what a difference says in two words."""
    if identical(interval):
        return IDENTICAL
    if in_noise(interval):
        return NOISE
    return "no interval" if ends(interval) is None else below if interval.mean < 0 else above


def _places(mean: float, around: tuple[float, float] | None) -> int:
    """Decimals, three to five, in which both the difference and the width of its interval have two digits."""
    least = min(abs(mean), math.inf if around is None else around[1] - around[0])
    return next((n for n in (3, 4) if least >= 10 ** (1 - n)), 5)
