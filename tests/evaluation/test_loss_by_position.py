# Loss by position, against the plain logits of the same pieces of text.
from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.theirs import random_ids, small

from gptlab import GPT, GptlabError
from gptlab.evaluation.positions import loss_by_position, positions_in_text
from gptlab.model import kernels
from gptlab.text.tokenizers import byte_tokenizer


@torch.no_grad()
def losses(model: GPT, pieces: list[list[int]]) -> torch.Tensor:
    """(pieces, length) losses from the explicit softmax."""
    ids = torch.tensor(pieces)
    with kernels.use("reference"):
        logprobs = torch.log_softmax(model(ids[:, :-1]).double(), -1)
    return -logprobs.gather(2, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize(
    ("changes", "length", "ranges"),
    [
        ({}, 64, [(1, 16), (17, 32), (33, 64)]),
        ({"context_length": 50}, 50, [(1, 16), (17, 32), (33, 50)]),
        ({"context_length": 50}, 10, [(1, 10)]),
        ({"position": "rope", "context_length": 24}, 80, [(1, 16), (17, 24), (25, 32), (33, 64), (65, 80)]),
        ({"position": "rope", "window": 9}, 128, [(1, 16), (17, 32), (33, 64), (65, 128)]),
    ],
)
def test_means_of_each_range(changes: dict[str, object], length: int, ranges: list[tuple[int, int]]) -> None:
    model = small(**changes)
    sequences = [random_ids(2 * length + 1, 1), random_ids(length, 2), random_ids(length + 5, 3)]
    rows = loss_by_position(model, sequences, length=length)
    assert [(row.first, row.last) for row in rows] == ranges
    pieces = [sequences[0][: length + 1], sequences[0][length:], sequences[2][: length + 1]]
    expected = losses(model, pieces)
    for row in rows:
        part = expected[:, row.first - 1 : row.last]
        assert row.nats == pytest.approx(part.mean().item(), abs=1e-5)
        assert row.error == pytest.approx(part.mean(1).std().item() / math.sqrt(3), abs=1e-5)
        assert row.tokens == part.numel()


def test_one_piece_has_no_error() -> None:
    rows = loss_by_position(small(), [random_ids(33)], length=32)
    assert all(math.isnan(row.error) for row in rows)


def test_a_text_that_is_too_short_and_a_model_that_ends() -> None:
    with pytest.raises(GptlabError, match=r"no document has the 33 tokens.*the longest has 32"):
        loss_by_position(small(), [random_ids(32), random_ids(4)], length=32)
    with pytest.raises(GptlabError, match="exceeds the 64 learned positions"):
        loss_by_position(small(), [random_ids(100)], length=65)


@pytest.mark.parametrize(
    ("changes", "characters", "length"),
    [
        ({}, 5000, 64),
        ({}, 50, 32),
        ({"position": "rope"}, 5000, 1024),  # 16 times
        ({"position": "rope"}, 1023, 1024),
        ({"position": "rope"}, 1022, 512),
        ({"position": "none", "window": 8}, 300, 256),
    ],
)
def test_a_text_as_far_as_it_goes(changes: dict[str, object], characters: int, length: int, tmp_path: Path) -> None:
    text = "".join(chr(97 + i) for i in random_ids(characters, vocab_size=26))
    path = tmp_path / "text"
    path.write_text(f"{text}\n<|endoftext|>\nshort")
    model = small(**changes)
    rows = positions_in_text(model, byte_tokenizer(), str(path))
    assert rows[-1].last == length
    # From the end-of-text token on: a byte is a token of this tokenizer.
    ids = [256, *text.encode(), 10]
    pieces = [ids[i : i + length + 1] for i in range(0, len(ids) - length, length)]
    assert rows[0].nats == pytest.approx(losses(model, pieces)[:, :16].mean().item(), abs=1e-5)


def test_as_far_as_asked_and_as_many_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("a" * 100 + "\n<|endoftext|>\n" + "b" * 100)
    rows = positions_in_text(small(), byte_tokenizer(), str(path), context=20)
    assert rows[-1].last == 20
    assert rows[-1].tokens == 4 * 10
    rows = positions_in_text(small(), byte_tokenizer(), str(path), context=20, limit=1)
    assert rows[-1].tokens == 4 * 5
