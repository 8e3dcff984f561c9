"""What a report is made of, before it is HTML or Markdown: sections of blocks, and the writing of numbers.

Text is Markdown's simplest part, which both forms understand: ``**strong**``, ``*emphasis*``, `` `code` `` and a
backslash before a character that is to be itself. What comes from a file goes through `literal` first.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gptlab.formatting import MINUS, signed
from gptlab.study.results import Interval

MARKUP = re.compile(r"\\(?P<itself>[\\`*_\[\]<>|#])|`(?P<code>[^`]+)`|\*\*(?P<strong>.+?)\*\*|\*(?P<em>.+?)\*")


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
        found = [0.0]
        for one in (row[column] for row in self.rows if row[column] is not None):
            found += [one.mean, *(ends(one) or ())]
        return min(found), max(found)


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


def literal(text: object) -> str:
    """Return text that stands for itself, whatever it holds."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def slug(name: str) -> str:
    """Return a name as it may stand in a file's name and in an identifier."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name)


def to_html(text: str) -> str:
    """Return a text's markup as HTML, everything else escaped."""
    found, end = [], 0
    for match in MARKUP.finditer(text):
        found.append(html.escape(text[end : match.start()]))
        end = match.end()
        kind, inner = match.lastgroup, match[match.lastgroup or 0]
        if kind == "itself":
            found.append(html.escape(inner))
        elif kind == "code":
            found.append(f"<code>{html.escape(inner)}</code>")
        else:
            found.append(f"<{kind}>{to_html(inner)}</{kind}>")
    return "".join([*found, html.escape(text[end:])])


def ends(interval: Interval) -> tuple[float, float] | None:
    """The ends of an interval; None where it has none."""
    return None if interval.low is None or interval.high is None else (interval.low, interval.high)


def in_noise(interval: Interval) -> bool:
    """Whether an interval covers zero."""
    found = ends(interval)
    return found is not None and found[0] <= 0 <= found[1]


def nats(difference: float | Interval) -> str:
    """A difference of the loss with its sign, in as many decimals as it, or its interval, needs."""
    if isinstance(difference, Interval):
        return signed(difference.mean, _places(difference.mean, ends(difference)))
    return signed(difference, _places(difference, None))


def span(interval: Interval) -> str:
    """The ends of an interval, or nothing where it has none."""
    found = ends(interval)
    return "" if found is None else " to ".join(signed(end, _places(interval.mean, found)) for end in found)


def verdict(interval: Interval) -> str:
    """What a difference of the loss says: its direction, its size, and whether it is more than noise."""
    if in_noise(interval):
        return f"inside the noise, {nats(interval)} nats a token (95% interval {span(interval)})"
    size = nats(interval).lstrip(f"+{MINUS}")
    words = f"{size} nats a token {'lower' if interval['mean'] < 0 else 'higher'}"
    if interval.low is None:
        return f"{words}, without an interval: it may be noise"
    return f"{words} (95% interval {span(interval)})"


def _places(mean: float, found: tuple[float, float] | None) -> int:
    """Decimals, three to five, in which both the difference and the width of its interval have two digits."""
    least = min(abs(mean), math.inf if found is None else found[1] - found[0])
    return next((n for n in (3, 4) if least >= 10 ** (1 - n)), 5)


def to_plain(text: str) -> str:
    """Return a text without its markup."""
    return MARKUP.sub(lambda m: m["itself"] if m.lastgroup == "itself" else to_plain(m[m.lastgroup or 0]), text)
