"""Tokenizers made here: bytes, characters, and a BPE trained on any text."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from gptlab.errors import GptlabError, nearest
from gptlab.text.tokenizers.base import END_OF_TEXT, Tokenizer, refuse_surrogates
from gptlab.text.tokenizers.files import EVERY_CHARACTER, FileTokenizer
from gptlab.text.tokenizers.gpt2 import GPT2Tokenizer, byte_alphabet, byte_level

KINDS = ("gpt2", "bytes", "chars", "bpe")


def byte_tokenizer() -> FileTokenizer:
    """Return the tokenizer whose ids are the 256 bytes, and 256 for the end of text."""
    return FileTokenizer(byte_level(dict(byte_alphabet().items()), []))


def char_tokenizer(texts: Iterable[str], end_of_text: bool = True) -> FileTokenizer:
    """Return a tokenizer with one id for each character of ``texts``, in code-point order.

    Args:
        texts: any texts; only which characters they hold counts.
        end_of_text: add a last id for the end of a document.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    for text in texts:
        refuse_surrogates(text)
        seen[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] = True
    characters = [chr(i) for i in np.flatnonzero(seen)]
    if not characters:
        raise GptlabError("there is no text to take characters from; check the corpus")
    engine = Engine(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=END_OF_TEXT))
    engine.pre_tokenizer = pre_tokenizers.Split(Regex(EVERY_CHARACTER), "isolated")
    engine.decoder = decoders.Fuse()
    if end_of_text:
        engine.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return FileTokenizer(engine)


def train_bpe(texts: Iterable[str], vocab_size: int, progress: bool = False) -> FileTokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) on ``texts``.

    Args:
        texts: documents; merges never cross them.
        vocab_size: ids in all: 256 bytes, the merges, and the end of text (the last id). A text too small
            to fill it gives fewer.
        progress: show a progress bar.

    Raises:
        GptlabError: ``vocab_size`` below 257.
    """
    from tokenizers import trainers

    if vocab_size < 257:
        raise GptlabError(f"a byte-level vocabulary needs at least 257 entries, got {vocab_size}")
    engine = byte_level({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=list(byte_alphabet()), show_progress=progress
    )
    engine.train_from_iterator(_checked(texts), trainer)
    model = json.loads(engine.to_str())["model"]
    return FileTokenizer(byte_level(model["vocab"], [tuple(pair) for pair in model["merges"]]))


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        refuse_surrogates(text)
        yield text


def make_tokenizer(kind: str, texts: Iterable[str] = (), vocab_size: int = 4096) -> Tokenizer:
    """Make a tokenizer by name: ``gpt2``, ``bytes``, ``chars`` (of ``texts``) or ``bpe`` (trained on ``texts``).

    Raises:
        GptlabError: an unknown kind.
    """
    match kind:
        case "gpt2":
            return GPT2Tokenizer()
        case "bytes":
            return byte_tokenizer()
        case "chars":
            return char_tokenizer(texts)
        case "bpe":
            return train_bpe(texts, vocab_size)
    raise GptlabError(f"unknown tokenizer {kind!r}{nearest(kind, KINDS)}; there are {', '.join(KINDS)}")
