from __future__ import annotations

from pathlib import Path

import pytest
from helpers.inspected import KNOWN, Theirs, inspected, text
from torch import Tensor

from gptlab import GPT


@pytest.fixture(params=KNOWN.values(), ids=KNOWN)
def known(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[GPT, Tensor, Theirs]:
    """A model, a text, and what transformers makes of both."""
    model, ids = inspected(**request.param), text()
    return model, ids, Theirs(model, ids, tmp_path)
