"""What the page begins with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gptlab

KNOWN = Path(gptlab.__file__).parent / "assets" / "known_text.txt"


def examples() -> dict[str, str]:
    """Return texts to begin with, by what they show."""
    article = KNOWN.read_text(encoding="utf-8").split("\n\n")
    sentence = "The old harbour of Vellmar was built by twelve fishermen and a priest. "
    return {
        "two paragraphs, longer than a window": "\n\n".join(article[:3]).strip(),
        "half a page, near the whole context": "\n\n".join(article[:4]).strip(),
        "one sentence": article[1].partition(". ")[0] + ".",
        "a sentence four times: who copies?": (sentence * 4).strip(),
    }


def beginning(names: Sequence[str], chosen: Sequence[str], text: str | None) -> dict[str, Any]:
    """Return what the page shows before a model is there.

    Args:
        names: of the models.
        chosen: those that are looked at side by side when the page opens.
        text: to begin with; None: the first of the examples.
    """
    texts = examples()
    return {
        "models": list(names),
        "chosen": list(chosen),
        "examples": texts,
        "text": next(iter(texts.values())) if text is None else text,
        "version": gptlab.__version__,
    }
