"""What the page begins with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gptlab

BUILT_IN = ("pocket", "pocket-rope", "pocket-gqa", "pocket-swa", "pocket-rope-gqa-swa")
"""The models that are on every page."""
AT_FIRST = ("pocket", "pocket-rope-gqa-swa")
"""Those that a page begins with that was not told any: GPT-2's attention, and all three changes."""
SMALL = 128
"""Pixels along each side of a map among many."""
SHIFTS = (0, 1, 16, 64, 100, 1000)
"""Positions by which a text can be moved."""
STEPS = {"n": 32, "seed": 0, "temperature": 0.8}
"""How a text goes on at first."""
KNOWN = Path(gptlab.__file__).parent / "assets" / "known_text.txt"


def examples() -> dict[str, str]:
    """Return texts to begin with, by what they show."""
    article = KNOWN.read_text(encoding="utf-8").split("\n\n")
    sentence = "The old harbour of Vellmar was built by twelve fishermen and a priest. "
    return {
        "two paragraphs, longer than a window of 128": "\n\n".join(article[:3]).strip(),
        "half a page, near a context of 512": "\n\n".join(article[:4]).strip(),
        "an article, for longer contexts": "\n\n".join(article).strip(),
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
        "settings": {"small": SMALL, "shifts": SHIFTS, "steps": STEPS},
    }
