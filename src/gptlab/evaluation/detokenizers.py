"""From the spaced-out text of a benchmark back to text as people write it, as each protocol does it.

WikiText separates punctuation by spaces and marks hyphens and separators inside numbers (``1 @,@ 000``). A model of
plain text should not be asked to predict that; what the loss is divided by stays the count in the original.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

# EleutherAI's harness, task `wikitext`, in its order. Three of its rules do what they hardly were meant to (the regular
# expression with slashes never matches, `" N "` becomes `" 1 "`, "s '" swallows a space before an opening quotation
# mark): the same text is what makes scores comparable.
_NUMBERS = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
_PUNCTUATION = tuple((f" {mark} ", f"{mark} ") for mark in ":;.!?,")
_PAIRS = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def wikitext(page: str) -> str:
    """Return a page of WikiText as plain text, character for character as lm-evaluation-harness does.

    Args:
        page: one article, as `pages` gives it.
    """
    text = page.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for old, new in _NUMBERS + _PUNCTUATION:
        text = text.replace(old, new)
    for pattern, new in _PAIRS:
        text = re.sub(pattern, new, text)
    for old, new in _REST:
        text = text.replace(old, new)
    return text


def pages(text: str) -> Iterator[str]:
    """Yield the articles of a WikiText file: each begins with its heading `` = Title = ``.

    Joined by newlines they are the file again, but for blank lines before the first heading. As the data set
    `EleutherAI/wikitext_document_level` divides it.
    """
    page: list[str] = []
    for line in text.split("\n"):
        # A heading of the first level has one equals sign on each side, one of a lower level several.
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            if "\n".join(page).strip():
                yield "\n".join(page)
            page = []
        page.append(line)
    yield "\n".join(page)


def wikitext_lines(text: str) -> str:
    """Return a WikiText file as Hugging Face's guide to perplexity reads it: its rows joined by two newlines.

    A row is a line with its line end, or nothing for a line of white space.
    """
    # `str.splitlines` would also divide at U+2028 and its like.
    return "\n\n".join(line if line.strip() else "" for line in io.StringIO(text))


def hellaswag(text: str) -> str:
    """Return a part of a HellaSwag item as lm-evaluation-harness asks it: without WikiHow's marks in brackets."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
