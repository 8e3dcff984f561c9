"""The examples of docs/inspecting.md print what stands beneath them."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "inspecting.md"
NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")


def test_the_examples_print_what_the_page_says(one_thread: None) -> None:
    if not PAGE.exists():
        pytest.skip("docs/ comes with a checkout alone")
    examples = re.findall(r"```python\n(.*?)```\n```\n(.*?)```\n", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert len(examples) == 8
    names: dict[str, Any] = {}
    for code, said in examples:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, names)
        printed = out.getvalue()
        assert NUMBER.sub("#", printed) == NUMBER.sub("#", said)
        for one, other in zip(NUMBER.findall(printed), NUMBER.findall(said), strict=True):
            unit = 10.0 ** -len(other.partition(".")[2])  # rounding differs from one processor to another
            assert float(one.replace(",", "")) == pytest.approx(float(other.replace(",", "")), abs=1.01 * unit), code
