"""Fine-tuned GPT-2s with tokens of their own: transformers' tokenizer and `generate` on the same directory."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gptlab
from gptlab.errors import GptlabError
from gptlab.generation.sampling import Sampling
from gptlab.text.shards import prepare
from gptlab.text.tokenizers import END_OF_TEXT, byte_tokenizer

transformers = pytest.importorskip("transformers")

BYTES, END, START, STOP, ROWS = 256, 256, 257, 258, 270  # of which the last eleven are padding
ADDED = {"<|startoftext|>": START, "<|im_end|>": STOP}
MAP = {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"}
TEMPLATE = {"special_tokens_map": MAP, "tokenizer_config": {"add_bos_token": True}}


def fine_tuned(directory: Path, config: dict[str, Any] | None = None, **files: Any) -> Path:
    """Write a random GPT-2 as transformers saves it, whose tokens are the bytes and a few of its own."""
    torch.manual_seed(5)
    values = transformers.GPT2Config(
        vocab_size=ROWS, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5, **(config or {})
    )
    transformers.GPT2LMHeadModel(values).save_pretrained(str(directory))
    vocab = json.loads(byte_tokenizer().files()["tokenizer.json"])["model"]["vocab"]
    (directory / "vocab.json").write_text(json.dumps({**vocab, END_OF_TEXT: END}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    for name, content in {"added_tokens": ADDED, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def judged(directory: Path, prompt: str | list[int] | None, n: int = 30) -> tuple[list[int], list[int]]:
    """Return the ids that transformers makes of a prompt, and those with which `generate` goes on, greedily."""
    model = transformers.AutoModelForCausalLM.from_pretrained(str(directory))
    if isinstance(prompt, str):
        prompt = transformers.AutoTokenizer.from_pretrained(str(directory))(prompt).input_ids
    asked = None if prompt is None else torch.tensor([prompt])
    ids = model.generate(asked, max_new_tokens=n, do_sample=False, suppress_tokens=list(range(STOP + 1, ROWS)))[0]
    begun = [int(ids[0])] if prompt is None else prompt
    return begun, ids.tolist()[len(begun) :]


def ours(lm: gptlab.LanguageModel, prompt: Any, n: int = 30) -> list[int]:
    """Return the greedy continuation, with the token that ended it."""
    (continuation,) = grown = lm.new_continuations(1)
    for _ in lm.continue_all([prompt], grown, Sampling(0), n, special=isinstance(prompt, str)):
        pass
    return continuation.tokens


ENDS = {
    "the class's own": {},
    "one": {"bos_token_id": START, "eos_token_id": STOP},
    "several": {"bos_token_id": START, "eos_token_id": [STOP, 77, END]},
    "an ordinary token": {"bos_token_id": START, "eos_token_id": 44},
}
PROMPTS = ["the cat", "<|startoftext|>the<|im_end|>", [START, 5, 9, STOP, 200], None]


@pytest.mark.parametrize("files", [{}, {"special_tokens_map": MAP}, TEMPLATE], ids=["plain", "named", "template"])
@pytest.mark.parametrize("ends", ENDS.values(), ids=list(ENDS))
def test_texts_begin_and_end_as_in_transformers(tmp_path: Path, ends: dict[str, Any], files: dict[str, Any]) -> None:
    directory = fine_tuned(tmp_path / "model", ends, **files)
    lm = gptlab.load(directory)
    gptlab.save(lm, tmp_path / "saved")
    for prompt in PROMPTS:
        if prompt is None and "bos_token_id" not in ends:
            continue  # transformers then starts from 50256, which is not a row of this model
        begun, continued = judged(directory, prompt)
        assert lm.tokenizer is not None
        ends_here = [token for token in continued if token in lm.tokenizer.ends]
        kept = continued[: continued.index(ends_here[0])] if ends_here else continued
        assert ours(lm, prompt) == kept
        assert ours(gptlab.load(tmp_path / "saved"), prompt) == kept
        if isinstance(prompt, str):
            assert lm.tokenizer.encode_prompt(prompt, special=True) == begun
        if "eos_token_id" in ends and ends_here:
            assert len(continued) == len(kept) + 1  # transformers ended there too


@pytest.mark.parametrize(
    ("ends", "named"), [(ROWS, str(ROWS)), ([STOP, 50256, -1], "-1, 50256"), (STOP + 1, str(STOP + 1)), (STOP, None)]
)
def test_an_end_that_is_no_token_gets_a_line(tmp_path: Path, ends: Any, named: str | None) -> None:
    directory = fine_tuned(tmp_path, generation_config={"eos_token_id": ends})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lm = gptlab.load(directory)
    said = [str(warning.message) for warning in caught if "eos_token_id" in str(warning.message)]
    assert len(said) == (named is not None)
    assert all(f"eos_token_id {named} in its configuration" in line and "\n" not in line for line in said)
    assert lm.tokenizer is not None
    assert lm.tokenizer.ends <= set(range(STOP + 1))


def test_prompts_of_ids_and_special_tokens(tmp_path: Path) -> None:
    lm = gptlab.load(fine_tuned(tmp_path, ENDS["one"], special_tokens_map=MAP))
    ids = [START, *b"the cat", STOP, *b"sat"]
    text = "<|startoftext|>the cat<|im_end|>sat"
    arguments: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0}
    expected = lm.generate(text, special=True, **arguments)
    assert expected != lm.generate(text, **arguments)
    for prompts in (ids, tuple(ids), np.array(ids), torch.tensor(ids), [ids], torch.tensor([ids])):
        assert lm.generate(prompts, **arguments) == expected
    assert lm.generate([ids, "the"], **arguments) == [*expected, *lm.generate("the", **arguments)]
    assert "".join(lm.stream(ids, **arguments)) == "".join(lm.stream(text, special=True, **arguments)) == expected[0]


@pytest.mark.parametrize("prompts", [[1, 2.5], [[1], [None]], 3, None, b"the", [b"the"], ["a", 5], [[ROWS]], [-1]])
def test_prompts_that_are_no_prompts_are_refused(tmp_path: Path, prompts: Any) -> None:
    lm = gptlab.load(fine_tuned(tmp_path))
    with pytest.raises(GptlabError, match=r"a prompt is a text or a list of token ids|the prompt has the token id"):
        lm.generate(prompts)


def test_padding_rows_and_holes_are_never_drawn(tmp_path: Path) -> None:
    lm = gptlab.load(fine_tuned(tmp_path, ENDS["one"], added_tokens={"<a>": 259, "<b>": 263}))
    drawn = set()
    for seed in range(20):
        (continuation,) = grown = lm.new_continuations(1)
        list(lm.continue_all(["x"], grown, Sampling(1e6, seed=seed), 60))
        drawn |= set(continuation.tokens)
    assert drawn <= {*range(END + 1), 259, 263}
    assert {259, 263} <= drawn


def test_a_model_without_a_tokenizer_that_can_be_read_says_which_it_has(tmp_path: Path) -> None:
    directory = fine_tuned(tmp_path)
    (directory / "vocab.json").rename(directory / "vocab.txt")
    lm = gptlab.load(directory)
    with pytest.raises(GptlabError, match=r"is BERT's \(WordPiece, in vocab.txt\).*name another one"):
        lm.generate("a")
    assert gptlab.load(directory, tokenizer="bytes").generate("a", max_new_tokens=2)


def test_shards_and_what_is_trained_on_them_keep_the_tokens(tmp_path: Path) -> None:
    lm = gptlab.load(fine_tuned(tmp_path / "model", ENDS["several"], special_tokens_map=MAP))
    assert lm.tokenizer is not None
    (tmp_path / "a.txt").write_text("the cat sat\n" * 50)
    (tmp_path / "b.txt").write_text("on the mat\n" * 50)
    from gptlab.text.documents import open_documents

    dataset = prepare(open_documents([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]), lm.tokenizer, tmp_path / "d")
    for name in ("end_of_text", "start_of_text", "ends", "special_tokens", "sha256"):
        assert getattr(dataset.tokenizer, name) == getattr(lm.tokenizer, name), name
    ids = dataset.training.read(0, dataset.training.n_tokens).tolist()
    start, end = lm.tokenizer.start_of_text, lm.tokenizer.end_of_text
    assert start != end
    assert (ids[0], ids[-2:]) == (start, [end, start])


def test_a_saved_model_with_another_models_ends_is_refused(tmp_path: Path) -> None:
    gptlab.save(gptlab.load(fine_tuned(tmp_path / "model", ENDS["one"])), tmp_path / "saved")
    (tmp_path / "saved" / "generation_config.json").write_text('{"eos_token_id": 7}')
    with pytest.raises(GptlabError, match="belong to different saves"):
        gptlab.load(tmp_path / "saved")


def test_a_model_without_a_row_for_its_padding_token_can_be_trained(tmp_path: Path) -> None:
    from gptlab.text.documents import open_documents
    from gptlab.training.begin import first_model
    from gptlab.training.recipe import Recipe

    directory = fine_tuned(tmp_path / "model", added_tokens={"[PAD]": ROWS}, special_tokens_map={"pad_token": "[PAD]"})
    lm = gptlab.load(directory)
    assert lm.tokenizer is not None
    assert lm.tokenizer.vocab_size == ROWS + 1
    (tmp_path / "a.txt").write_text("".join(f"the cat[PAD] {i}\n<|endoftext|>\n" for i in range(50)))
    dataset = prepare(open_documents([str(tmp_path / "a.txt")]), lm.tokenizer, tmp_path / "d", held_out=0.2)
    assert dataset.training.read(0, dataset.training.n_tokens).max() == END
    assert first_model(Recipe.model_validate({"budget": {"steps": 1}}), dataset, lm) is lm.model


@pytest.mark.parametrize(
    "name", ["config", "vocab", "merges", "added_tokens", "special_tokens_map", "tokenizer_config", "generation_config"]
)
def test_a_byte_order_mark_is_no_character(tmp_path: Path, name: str) -> None:
    ends = ENDS["several"]
    directory = fine_tuned(tmp_path, ends, **TEMPLATE)
    expected = gptlab.load(directory).tokenizer
    path = next(directory.glob(f"{name}.*"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    lm = gptlab.load(directory)
    assert lm.tokenizer is not None
    assert expected is not None
    assert lm.tokenizer.sha256 == expected.sha256
    assert (lm.tokenizer.ends, lm.tokenizer.start_of_text) == (expected.ends, expected.start_of_text)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GptlabError, match="must be 'gpt2', 'bytes' or a Tokenizer, got int"):
        gptlab.load(fine_tuned(tmp_path), tokenizer=5)  # type: ignore[arg-type]
