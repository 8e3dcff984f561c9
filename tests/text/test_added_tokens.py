"""Tokens that a fine-tuned model has of its own, and where its texts begin and end: judged by transformers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptlab.errors import GptlabError
from gptlab.text.tokenizers import (
    END_OF_TEXT,
    FileTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    UnsupportedTokenizer,
    read_tokenizer,
    train_bpe,
)

transformers = pytest.importorskip("transformers")

BASE = 285
TEXTS = (
    "the cat sat",
    "<|startoftext|>the cat<|endoftext|>",
    "a <mask>  b<mask>c <mask>",
    "my name is  the user , said the cat's mat",
    "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>",
    "[PAD][PAD] x <x> y<x><x> CAFÉ café <café>",
    "",
    "  <sep>\n\n<sep>  ",
)


@pytest.fixture(scope="module")
def bpe() -> dict[str, Any]:
    """The model of a small byte-level BPE: ``vocab`` without an end of text, and ``merges``."""
    text = "the cat sat on the mat, the cat's mat; they'll sit\n my name is the user naïve café "
    values = json.loads(train_bpe([text * 20], BASE).files()["tokenizer.json"])
    assert len(values["model"]["vocab"]) == BASE - 1
    return {"vocab": values["model"]["vocab"], "merges": [tuple(pair) for pair in values["model"]["merges"]]}


def write_old(directory: Path, bpe: dict[str, Any], vocab: dict[str, int] | None = None, **files: Any) -> Path:
    """Write the layout of before tokenizer.json: ``vocab.json``, ``merges.txt`` and small files, by name."""
    directory.mkdir(exist_ok=True)
    table = {**bpe["vocab"], END_OF_TEXT: len(bpe["vocab"])} if vocab is None else vocab
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in bpe["merges"])
    (directory / "vocab.json").write_text(json.dumps(table), encoding="utf-8")
    (directory / "merges.txt").write_text(merges, encoding="utf-8")
    for name, values in {"config": {"model_type": "gpt2"}, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return directory


def as_new(directory: Path, old: Path) -> Path:
    """Write what transformers makes of the old layout: tokenizer.json and tokenizer_config.json."""
    transformers.AutoTokenizer.from_pretrained(str(old)).save_pretrained(str(directory))
    (directory / "config.json").write_bytes((old / "config.json").read_bytes())
    return directory


def read(directory: Path) -> Tokenizer:
    tokenizer = read_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


def check(directory: Path) -> Tokenizer:
    """Compare ids, texts and templates with those of transformers."""
    judge = transformers.AutoTokenizer.from_pretrained(str(directory))
    ours = read(directory)
    for text in TEXTS:
        plain = judge(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text) == plain, text
        assert ours.encode(text, special=True) == judge(text, add_special_tokens=False).input_ids, text
        assert ours.encode_prompt(text, special=True) == judge(text).input_ids, text
        assert ours.encode_arrays([text])[0].tolist() == plain
    for content, token in judge.get_added_vocab().items():
        assert ours.decode([token]) == content
    assert ours.vocab_size == len(judge)
    special = {judge.convert_tokens_to_ids(token) for token in judge.all_special_tokens}
    assert set(ours.special_tokens.values()) == special
    return ours


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": True, **flags}


# Small files by name, as other programs leave them beside a vocabulary.
FILES: dict[str, dict[str, Any]] = {
    "only added tokens": {"added_tokens": {"<|startoftext|>": BASE, "[PAD]": BASE + 1}},
    "not in order": {"added_tokens": {"[PAD]": BASE + 1, "<|startoftext|>": BASE}},
    "named in the map": {
        "added_tokens": {"<|startoftext|>": BASE, "[PAD]": BASE + 1},
        "special_tokens_map": {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "[PAD]"},
    },
    "objects in the map": {
        "added_tokens": {"<|startoftext|>": BASE, "<mask>": BASE + 1},
        "special_tokens_map": {"bos_token": token("<|startoftext|>"), "mask_token": token("<mask>", lstrip=True)},
    },
    "chat": {
        "added_tokens": {"<|im_start|>": BASE, "<|im_end|>": BASE + 1},
        "tokenizer_config": {
            "added_tokens_decoder": {
                str(BASE): token("<|im_start|>", special=True),
                str(BASE + 1): token("<|im_end|>", special=True),
            },
            "additional_special_tokens": ["<|im_start|>"],
            "eos_token": "<|im_end|>",
        },
    },
    "decoder of added tokens": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                str(BASE - 1): token(END_OF_TEXT, special=True),
                str(BASE): token(" the user ", normalized=False, special=False),
                str(BASE + 1): token("<mask>", lstrip=True, rstrip=True, special=True, normalized=False),
                str(BASE + 2): token("<x>", rstrip=True, special=False),
                str(BASE + 3): token("<café>", special=False, single_word=True),
            },
            "mask_token": "<mask>",
        }
    },
    "named without ids": {
        "special_tokens_map": {
            "additional_special_tokens": ["<sep>"],
            "mask_token": token("<mask>", lstrip=True),
            "pad_token": "[PAD]",
            "eos_token": END_OF_TEXT,
            "bos_token": "<|startoftext|>",
        }
    },
    "a space in front": {"tokenizer_config": {"add_prefix_space": True}, "added_tokens": {"<sep>": BASE}},
    "begun by bos": {
        "tokenizer_config": {"add_bos_token": True, "bos_token": "<|startoftext|>"},
        "added_tokens": {"<|startoftext|>": BASE},
    },
    "begun by bos, ended by eos": {"tokenizer_config": {"add_bos_token": True, "add_eos_token": True}},
}


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("files", FILES.values(), ids=list(FILES))
def test_added_tokens_are_those_of_transformers(
    tmp_path: Path, bpe: dict[str, Any], files: dict[str, Any], layout: str
) -> None:
    old = write_old(tmp_path / "old", bpe, **files)
    check(old if layout == "old" else as_new(tmp_path / "new", old))


def test_a_word_of_the_vocabulary_may_be_an_added_token(tmp_path: Path, bpe: dict[str, Any]) -> None:
    decoder = {str(bpe["vocab"]["the"]): token("the"), str(BASE): token("my name", normalized=False)}
    tokenizer = check(write_old(tmp_path, bpe, tokenizer_config={"added_tokens_decoder": decoder}))
    the, space, rest = (tokenizer.encode(part) for part in ("the", " ", "ir "))
    assert tokenizer.encode("the their my name") == [*the, *space, *the, *rest, BASE]


def test_additional_special_tokens_are_special_wherever_they_are_named(tmp_path: Path, bpe: dict[str, Any]) -> None:
    # transformers 5 reads these as special tokens and forgets to add them as such; 4 did not.
    files = {"added_tokens": {"<x>": BASE}, "special_tokens_map": {"additional_special_tokens": ["<x>"]}}
    old = write_old(tmp_path / "old", bpe, **files)
    for directory in (old, as_new(tmp_path / "new", old)):
        tokenizer = read(directory)
        assert tokenizer.special_tokens == {END_OF_TEXT: BASE - 1, "<x>": BASE}
        assert tokenizer.decode(tokenizer.encode("<x>")) == "<x>"
        assert len(tokenizer.encode("<x>")) == 3
        judge = transformers.AutoTokenizer.from_pretrained(str(directory))
        assert tokenizer.encode("the<x> cat", special=True) == judge("the<x> cat").input_ids


def test_gpt2_with_tokens_of_its_own(tmp_path: Path) -> None:
    for name, content in GPT2Tokenizer().files().items():
        if name != "tokenizer.json":
            (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 50260}')
    assert isinstance(read(tmp_path), GPT2Tokenizer)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|startoftext|>": 50257, "[PAD]": 50258}))
    tokenizer = check(tmp_path)
    assert tokenizer.encode("<|startoftext|>Hello, my name is") == [50257, 15496, 11, 616, 1438, 318]
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.holes) == (50259, 50256, ())


# --- ids with holes, tokenizers without a decoder --------------------------------------------------------------


def test_each_added_token_keeps_its_id(tmp_path: Path, bpe: dict[str, Any]) -> None:
    # transformers 5 numbers them anew, 4 did not: the rows of a model are by the file's numbers.
    added = {"<b>": BASE + 40, "<a>": BASE + 1, "[PAD]": BASE + 2}
    tokenizer = read(write_old(tmp_path, bpe, added_tokens=added))
    assert tokenizer.encode("the<b> cat<a>") == [
        *tokenizer.encode("the"),
        BASE + 40,
        *tokenizer.encode(" cat"),
        BASE + 1,
    ]
    assert tokenizer.decode([BASE + 40, BASE + 1]) == "<b><a>"
    assert (tokenizer.vocab_size, len(tokenizer.holes)) == (BASE + 41, 38)
    assert tokenizer.known_ids(BASE + 2) == [*range(BASE), BASE + 1]
    with pytest.raises(GptlabError, match=f"token id {BASE} stands for nothing in this tokenizer"):
        tokenizer.decode([1, BASE])
    back = saved(tokenizer, tmp_path / "saved")
    assert back.encode("the<b> cat<a>") == tokenizer.encode("the<b> cat<a>")
    assert back.holes == tokenizer.holes


def saved(tokenizer: Tokenizer, directory: Path) -> Tokenizer:
    """Save and read back, in any directory of ours: of a model, a run or a dataset."""
    directory.mkdir()
    for name, content in tokenizer.files().items():
        (directory / name).write_bytes(content)
    back = read(directory)
    assert back.files() == tokenizer.files()
    return back


def test_a_vocabulary_with_holes(tmp_path: Path, bpe: dict[str, Any]) -> None:
    vocab = {content: 3 * i for content, i in bpe["vocab"].items()}
    tokenizer = read(write_old(tmp_path, bpe, vocab))
    whole = read(write_old(tmp_path / "whole", bpe))
    for text in TEXTS:
        assert tokenizer.encode(text) == [3 * token for token in whole.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.known_ids(1000) == list(range(0, 3 * BASE - 3, 3))
    assert (tokenizer.end_of_text, tokenizer.start_of_text, tokenizer.ends) == (None, None, frozenset())


def test_two_tokens_with_one_id_are_refused(tmp_path: Path, bpe: dict[str, Any]) -> None:
    with pytest.raises(GptlabError, match=r"the id 5 belongs to '&' and to '<a>'"):
        read(write_old(tmp_path, bpe, added_tokens={"<a>": 5}))


@pytest.mark.parametrize("decoder", ["none", "in a sequence"])
def test_a_byte_level_tokenizer_without_a_decoder(tmp_path: Path, bpe: dict[str, Any], decoder: str) -> None:
    whole = read(write_old(tmp_path, bpe, added_tokens={"<a>": BASE}))
    values = json.loads(whole.files()["tokenizer.json"])
    if decoder == "none":
        values["decoder"] = None
    else:
        values["decoder"] = {"type": "Sequence", "decoders": [values["decoder"]]}
        values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [values["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = read(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == whole.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_without_a_decoder_words_do_not_become_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Engine
    from tokenizers import models, pre_tokenizers

    engine = Engine(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UnsupportedTokenizer, match="a Whitespace pre-tokenizer and no decoder"):
        FileTokenizer(engine)


# --- a byte-level BPE without the 256 bytes --------------------------------------------------------------------


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The recipe of Hugging Face's course, whose trainer is not told of the 256 bytes."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers, trainers

    def make(unknown: str | None = None, **files: Any) -> Path:
        engine = Engine(models.BPE(unk_token=unknown))
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        special = [END_OF_TEXT, "<unk>"]
        text = ["the cat sat on the mat, ã"] * 9
        engine.train_from_iterator(
            text, trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
        )
        directory = tmp_path_factory.mktemp("course")
        engine.save(str(directory / "tokenizer.json"))
        for name, values in {"config": {"model_type": "gpt2"}, **files}.items():
            (directory / f"{name}.json").write_text(json.dumps(values))
        return directory

    return make


def test_characters_without_a_token_are_refused_by_name(course: Callable[..., Path]) -> None:
    tokenizer = read(course())
    assert tokenizer.decode(tokenizer.encode("the mat, ã")) == "the mat, ã"
    for text, names in (("café", "'f', 'é'"), ("é", "'é'"), ("X🦙", "'X', '🦙'"), ("東京 the", "'京', '東'")):
        for use in (
            tokenizer.encode,
            lambda t: tokenizer.encode(t, special=True),
            lambda t: tokenizer.encode_arrays([t]),
        ):
            with pytest.raises(GptlabError, match=f"no token for {names}, and no unknown token"):
                use(text)
    with pytest.raises(GptlabError, match="'A', 'B', 'C', 'D', 'E' and 22 more, and no unknown"):
        tokenizer.encode("".join(map(chr, range(65, 91))) + "é")
    assert tokenizer.encode(f"the{END_OF_TEXT}", special=True)[-1] == tokenizer.end_of_text


def test_an_unknown_token_stands_for_them(course: Callable[..., Path]) -> None:
    for directory in (course("<unk>"), course(special_tokens_map={"unk_token": "<unk>"})):
        tokenizer = read(directory)
        unknown = tokenizer.special_tokens["<unk>"]
        assert tokenizer.encode("the éQ")[-2:] == [unknown, unknown]
        assert tokenizer.decode(tokenizer.encode("the éQ")) == "the \ufffd<unk><unk>"
    judge = transformers.PreTrainedTokenizerFast(tokenizer_file=str(course("<unk>") / "tokenizer.json"))
    assert read(course("<unk>")).encode("é the Q") == judge("é the Q").input_ids


def test_the_end_of_text_is_no_unknown_token(course: Callable[..., Path]) -> None:
    # GPT-2's class in transformers calls it that by default, and its engine drops the character all the same.
    tokenizer = read(course(tokenizer_config={"unk_token": END_OF_TEXT, "eos_token": END_OF_TEXT}))
    with pytest.raises(GptlabError, match="no token for 'é'"):
        tokenizer.encode("é")


def test_an_added_token_may_hold_such_characters(course: Callable[..., Path]) -> None:
    tokenizer = read(course(added_tokens={"<café>": 200}))
    assert tokenizer.encode("the<café>")[-1] == 200
    with pytest.raises(GptlabError, match="no token for 'é', and"):
        tokenizer.encode("é<café>")


# --- where texts begin and end ---------------------------------------------------------------------------------

CHAT = {"added_tokens": {"<|im_start|>": BASE, "<|im_end|>": BASE + 1, "[PAD]": BASE + 2}}
MAP = {"special_tokens_map": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "[PAD]"}}
END, START, STOP, PAD = BASE - 1, BASE, BASE + 1, BASE + 2


def config(**values: Any) -> dict[str, Any]:
    return {"model_type": "gpt2", "vocab_size": BASE + 10, **values}


# Files, then the id between documents, the one from which a text starts, and those that end one.
BORDERS: dict[str, tuple[dict[str, Any], int, int, set[int]]] = {
    "nothing said": ({}, END, END, {END}),
    "the tokenizer's": (MAP, STOP, START, {STOP}),
    "the configuration's": ({"config": config(bos_token_id=START, eos_token_id=STOP)}, END, START, {STOP}),
    "generation first": (
        {
            "config": config(bos_token_id=0, eos_token_id=0),
            "generation_config": {"bos_token_id": START, "eos_token_id": PAD},
        },
        END,
        START,
        {PAD},
    ),
    "several": ({**MAP, "generation_config": {"eos_token_id": [STOP, END]}}, END, START, {STOP, END}),
    "several of its own": ({**MAP, "generation_config": {"eos_token_id": [PAD, STOP]}}, STOP, START, {STOP, PAD}),
    "an ordinary token": ({"generation_config": {"eos_token_id": [7]}}, END, END, {7}),
    "no such token": ({"config": config(bos_token_id=50256, eos_token_id=50256)}, END, END, {END}),
    "no such row": ({**MAP, "config": config(vocab_size=BASE, eos_token_id=STOP)}, END, END, {END}),
    "null": ({"generation_config": {"eos_token_id": None, "bos_token_id": None}}, END, END, {END}),
}


@pytest.mark.parametrize(("files", "between", "start", "ends"), BORDERS.values(), ids=list(BORDERS))
def test_where_texts_begin_and_end(
    tmp_path: Path, bpe: dict[str, Any], files: dict[str, Any], between: int, start: int, ends: set[int]
) -> None:
    tokenizer = read(write_old(tmp_path, bpe, **CHAT, **files))
    assert (tokenizer.end_of_text, tokenizer.start_of_text, tokenizer.ends) == (between, start, ends)
    back = saved(tokenizer, tmp_path / "saved")
    assert (back.end_of_text, back.start_of_text, back.ends) == (between, start, ends)
    assert back.special_tokens == tokenizer.special_tokens


@pytest.mark.parametrize("rows", [BASE, BASE + 1, BASE + 2])
def test_a_token_named_without_an_id_needs_a_row(tmp_path: Path, bpe: dict[str, Any], rows: int) -> None:
    named = {"pad_token": "[PAD]", "bos_token": "<|startoftext|>", "eos_token": END_OF_TEXT}
    directory = write_old(tmp_path, bpe, special_tokens_map=named, config=config(vocab_size=rows))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tokenizer = read(directory)
    added = ["<|startoftext|>", "[PAD]"][: rows - BASE]
    assert tokenizer.special_tokens == {END_OF_TEXT: END, **{content: BASE + i for i, content in enumerate(added)}}
    assert tokenizer.vocab_size == rows
    assert tokenizer.start_of_text == (BASE if added else END)
    assert len(said) == (not added)
    if not added:
        assert "names '<|startoftext|>' as its bos_token, which has no id" in str(said[0].message)


def test_no_end_of_text_is_invented(tmp_path: Path, bpe: dict[str, Any]) -> None:
    vocab = {**bpe["vocab"], "<s>": BASE - 1, "</s>": BASE}
    tokenizer = read(
        write_old(
            tmp_path, bpe, vocab, special_tokens_map={"bos_token": "<s>", "eos_token": "</s>", "unk_token": END_OF_TEXT}
        )
    )
    assert tokenizer.special_tokens == {"<s>": BASE - 1, "</s>": BASE}
    assert (tokenizer.end_of_text, tokenizer.start_of_text, tokenizer.ends) == (BASE, BASE - 1, {BASE})
    back = saved(tokenizer, tmp_path / "saved")
    assert (back.end_of_text, back.start_of_text, back.ends) == (BASE, BASE - 1, {BASE})


@pytest.mark.parametrize("name", ["added_tokens", "special_tokens_map", "tokenizer_config", "generation_config"])
@pytest.mark.parametrize("content", ["{", "[]", '{"a": '])
def test_a_damaged_small_file_is_named(tmp_path: Path, bpe: dict[str, Any], name: str, content: str) -> None:
    (write_old(tmp_path, bpe) / f"{name}.json").write_text(content)
    with pytest.raises(GptlabError, match=rf"{name}\.json is damaged \(no"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"added_tokens": {"<a>": "x"}}, "'<a>' has no id"),
        ({"added_tokens": {"<a>": -1}}, "'<a>' has no id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": token("<a>")}}}, "lists no tokens by id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": {}}}}, "lists no tokens by id"),
        ({"generation_config": {"eos_token_id": "</s>"}}, "eos_token_id='</s>'"),
        ({"config": config(bos_token_id=True)}, "bos_token_id=True"),
    ],
)
def test_nonsense_in_a_small_file_is_refused(
    tmp_path: Path, bpe: dict[str, Any], files: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(GptlabError, match=complaint) as caught:
        read(write_old(tmp_path, bpe, **files))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"), [("vocab.txt", "BERT's"), ("spiece.model", "SentencePiece"), ("tokenizer.model", "SentencePiece")]
)
def test_other_kinds_of_tokenizers_are_called_by_their_names(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(b"[PAD]\n")
    with pytest.raises(UnsupportedTokenizer, match=f"is {kind} .*{name}.*which gptlab does not read"):
        read(tmp_path)
