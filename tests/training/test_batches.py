"""Which tokens a step trains on, and which an evaluation looks at."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.trainings import make_dataset

import gptlab
from gptlab.text.datasets import Shard, Split
from gptlab.text.shards import Dataset
from gptlab.training.data import Batch, Batches, Items, Windows
from gptlab.training.loss import IGNORED
from gptlab.training.step import DTYPES, summed_loss


def stream(folder: Path, ids: np.ndarray, ends: list[int] | None = None) -> Split:
    """A split that holds these ids, on disk as any other."""
    (folder / "ids.bin").write_bytes(ids.astype("<u2").tobytes())
    shard = Shard(folder / "ids.bin", len(ids))
    if ends is None:
        return Split([shard], np.dtype("<u2"), 2**16)
    (folder / "ends.bin").write_bytes(np.array(ends, "<i8").tobytes())
    return Split([shard], np.dtype("<u2"), 2**16, n_documents=len(ends), ends=Shard(folder / "ends.bin", len(ends)))


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "targets", "origins"))


# --- windows --------------------------------------------------------------------------------------------------


def test_every_window_comes_once_an_epoch_and_targets_are_the_next_tokens(tmp_path: Path) -> None:
    split = stream(tmp_path, np.arange(1, 102))  # 100 tokens to predict: 10 windows of 10
    batches = Batches(Windows(split, 10), 5, seed=0)
    for epoch in range(3):
        firsts = []
        for step in (2 * epoch, 2 * epoch + 1):
            batch = batches[step]
            assert batch.ids.shape == batch.targets.shape == (5, 10)
            assert batch.ids.dtype == batch.targets.dtype == torch.int64
            assert batch.documents is None
            assert batch.n_targets == 50
            assert torch.equal(batch.ids + 1, batch.targets)
            assert torch.equal(batch.ids, batch.ids[:, :1] + torch.arange(10))
            assert torch.equal(batch.origins + 1, batch.ids[:, 0])
            firsts += batch.ids[:, 0].tolist()
        assert sorted(firsts) == list(range(1, 101, 10))


def test_an_epoch_that_is_no_whole_number_of_batches_still_shows_each_window_once(tmp_path: Path) -> None:
    batches = Batches(Windows(stream(tmp_path, np.arange(71)), 10), 3, seed=4)  # 7 windows
    firsts = [first for step in range(7) for first in batches[step].origins.tolist()]
    for epoch in range(3):
        assert sorted(firsts[7 * epoch : 7 * epoch + 7]) == list(range(0, 70, 10))


def test_a_batch_is_a_function_of_seed_and_step_alone(tmp_path: Path) -> None:
    rows = Windows(stream(tmp_path, np.random.default_rng(0).integers(0, 256, 5000)), 16)
    in_order = Batches(rows, 4, seed=3)
    expected = [in_order[step] for step in range(200)]
    again = Batches(rows, 4, seed=3)
    for step in (199, 0, 123, 77, 78, 5):  # any step, in any order, over several epochs
        assert equal(again[step], expected[step])
    assert equal(Batches(rows, 4, seed=3)[10**6], again[10**6])  # at once, however far
    assert not equal(Batches(rows, 4, seed=4)[0], expected[0])
    assert not equal(expected[78], expected[0])  # epochs are shuffled anew


@pytest.mark.parametrize("n_tokens", [2, 40])
def test_data_too_short_for_one_batch_is_refused(tmp_path: Path, n_tokens: int) -> None:
    with pytest.raises(
        gptlab.GptlabError, match="windows of 10 tokens, too few for one batch of 4; add text, or lower batch"
    ):
        Batches(Windows(stream(tmp_path, np.zeros(n_tokens)), 10), 4, seed=0)
    Batches(Windows(stream(tmp_path, np.zeros(41)), 10), 4, seed=0)  # just enough


@pytest.mark.parametrize("n_tokens", [1, 2, 10, 11, 12, 95, 101])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_in_order_every_token_but_the_first_is_predicted_once(tmp_path: Path, n_tokens: int, batch_size: int) -> None:
    rows = Windows(stream(tmp_path, np.arange(n_tokens)), 10)
    assert rows.n_targets == n_tokens - 1
    for asked in (None, n_tokens, 50, 21, 2):
        predicted: list[int] = []
        for batch in rows.in_order(batch_size, asked):
            assert batch.ids.shape == batch.targets.shape
            assert batch.ids.shape[0] <= batch_size
            assert batch.ids.shape[1] <= 10
            assert torch.equal(batch.ids + 1, batch.targets)
            predicted += batch.targets.flatten().tolist()
        assert predicted == list(range(1, min(n_tokens, asked or n_tokens)))


def test_rows_of_a_batch(tmp_path: Path) -> None:
    batch = Batches(Windows(stream(tmp_path, np.arange(101), [30, 55, 101]), 10, documents=True), 8, seed=0)[0]
    assert batch.documents is not None
    parts = [batch.rows(slice(i, i + 3)) for i in (0, 3, 6)]
    assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)
    assert torch.equal(torch.cat([part.documents for part in parts if part.documents is not None]), batch.documents)
    assert torch.equal(torch.cat([part.origins for part in parts]), batch.origins)


# --- documents ------------------------------------------------------------------------------------------------


def test_each_token_knows_its_document(tmp_path: Path) -> None:
    ends = [3, 4, 25, 31]  # within a window, next to each other, and across two borders of windows
    split = stream(tmp_path, np.arange(31), ends)
    owner = [sum(i >= end for end in ends) for i in range(31)]
    rows = Windows(split, 10, documents=True)
    batch = rows.take(np.array([2, 0, 1]))
    assert batch.documents is not None
    assert batch.documents.dtype == torch.int64
    assert batch.documents.tolist() == [owner[20:30], owner[0:10], owner[10:20]]
    in_order = [b.documents for b in rows.in_order(2)]
    assert torch.cat([d.flatten() for d in in_order if d is not None]).tolist() == owner[:30]


@pytest.mark.parametrize("length", [7, 10, 64])
def test_a_mark_is_the_first_token_of_the_document_after_it(tmp_path: Path, length: int) -> None:
    texts = ["one", "t", "three " * 5, "four\n"] * 3
    data = make_dataset(tmp_path / "data", texts, "bytes")
    rows = Windows(data.training, length, documents=True)
    batches = list(rows.in_order(4))
    ids = torch.cat([b.ids.flatten() for b in batches])
    documents = torch.cat([b.documents.flatten() for b in batches if b.documents is not None])
    assert ids[0] == 256  # the first document has one as well
    assert torch.equal(documents, (ids == 256).cumsum(0) - 1)
    predicted = torch.cat([b.targets.flatten() for b in batches])
    assert predicted[-1] == 256  # and the last is seen to end


def test_data_without_borders_cannot_keep_documents_apart(tmp_path: Path) -> None:
    with pytest.raises(gptlab.GptlabError, match=r"does not say where its documents end, so data\.documents has no"):
        Windows(stream(tmp_path, np.arange(31)), 10, documents=True)


@pytest.mark.parametrize("window", [None, 5])
def test_packed_documents_do_not_see_each_other(tmp_path: Path, window: int | None) -> None:
    # With rotary positions only distances count, so a document packed among others has the loss it has alone.
    lengths = [7, 1, 12, 3, 9]
    ends = np.cumsum(lengths).tolist()
    ids = np.random.default_rng(0).integers(0, 256, 33)
    rows = Windows(stream(tmp_path, ids, ends), 32, documents=True)
    config = gptlab.ModelConfig.preset("tiny", position="rope", window=window)
    model = gptlab.GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # attention that is far from uniform
    batch = rows.take(np.array([0]))
    packed = model(batch.ids, documents=batch.documents)[0]
    alone = [model(batch.ids[:, end - n : end])[0] for n, end in zip(lengths, ends, strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)
    # What training computes is the sum of these documents' losses; without the setting it is another.
    expected = torch.nn.functional.cross_entropy(torch.cat(alone), batch.targets[0], reduction="sum")
    assert summed_loss(model, batch, torch.float32).item() == pytest.approx(expected.item(), rel=1e-5)
    mixed = Batch(batch.ids, batch.targets, None, batch.origins)
    assert abs(summed_loss(model, mixed, torch.float32).item() - expected.item()) > 1e-3


# --- items ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    words = ["".join(w) for n in (1, 2, 3) for w in itertools.product("abcd", repeat=n)]
    return make_dataset(tmp_path_factory.mktemp("names") / "data", words, "chars", items=True)


def test_an_item_is_a_row_between_two_ends_of_text(names: Dataset) -> None:
    end = names.tokenizer.end_of_text
    assert end is not None
    rows = Items(names.training, 6, end)
    ends = names.training.document_ends
    assert ends is not None
    assert len(rows) == len(ends) == names.training.n_documents
    batch = rows.take(np.arange(len(rows)))
    assert batch.documents is None
    starts = [1, *ends[:-1].tolist()]  # after the mark that opens the first
    for row, (start, stop) in enumerate(zip(starts, ends.tolist(), strict=True)):
        item = names.training.read(start, stop).tolist()
        assert item[-1] == end  # part of what is learned
        n = len(item)
        assert batch.ids[row, :n].tolist() == [end, *item[:-1]]
        assert batch.targets[row].tolist() == item + [IGNORED] * (6 - n)
        assert set(batch.ids[row, n:].tolist()) <= {end}  # any id that exists will do for padding
    assert batch.n_targets == rows.n_targets == names.training.n_tokens - 1
    assert batch.origins.tolist() == list(range(len(rows)))


def test_every_item_comes_once_an_epoch(names: Dataset) -> None:
    batches = Batches(Items(names.training, 4, names.tokenizer.end_of_text), 7, seed=1)
    n = len(batches.rows)
    numbers = [i for step in range(2 * n) for i in batches[step].origins.tolist()]
    for epoch in range(14):
        assert sorted(numbers[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_items_in_order(names: Dataset) -> None:
    rows = Items(names.validation, 4, names.tokenizer.end_of_text)
    seen = [i for batch in rows.in_order(3) for i in batch.origins.tolist()]
    assert seen == list(range(len(rows)))
    first_size = int(rows.ends[0])
    assert [b.origins.tolist() for b in rows.in_order(3, first_size)] == [[0]]
    assert [b.origins.tolist() for b in rows.in_order(3, first_size + 1)] == [[0, 1]]


def test_padding_counts_nothing(names: Dataset) -> None:
    # The loss of a batch of items is the sum of each item's loss without any padding.
    end = names.tokenizer.end_of_text
    config = gptlab.ModelConfig.preset("tiny", vocab_size=names.tokenizer.vocab_size)
    model = gptlab.GPT(config)
    batch = Items(names.training, 8, end).take(np.array([0, 10, 40, 60]))
    expected = 0.0
    for ids, targets in zip(batch.ids, batch.targets, strict=True):
        n = int((targets != IGNORED).sum())
        logits = model(ids[None, :n])[0]
        expected += torch.nn.functional.cross_entropy(logits, targets[:n], reduction="sum").item()
    assert summed_loss(model, batch, DTYPES["float32"]).item() == pytest.approx(expected, rel=1e-5)


def test_an_item_that_does_not_fit(names: Dataset) -> None:
    with pytest.raises(gptlab.GptlabError, match=r"has 4 tokens with its end, the context is 3; leave"):
        Items(names.training, 3, names.tokenizer.end_of_text)


def test_items_need_an_end_of_text(names: Dataset, tmp_path: Path) -> None:
    for split, end in ((names.training, None), (stream(tmp_path, np.arange(9)), 0)):
        with pytest.raises(gptlab.GptlabError, match=r"items end with <\|endoftext\|>"):
            Items(split, 8, end)


def test_too_few_items(names: Dataset) -> None:
    rows = Items(names.validation, 4, names.tokenizer.end_of_text)
    with pytest.raises(
        gptlab.GptlabError, match=f"the training data has {len(rows)} items, too few for one batch of 100"
    ):
        Batches(rows, 100, seed=0)
