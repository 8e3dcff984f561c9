from __future__ import annotations

import pytest

from gptlab.text.tokenizers import GPT2Tokenizer


@pytest.fixture(scope="session")
def gpt2_tokenizer() -> GPT2Tokenizer:
    return GPT2Tokenizer()
