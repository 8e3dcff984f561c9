"""Tokenizers of the `tokenizers` library, as a `tokenizer.json` describes them."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gptlab.errors import GptlabError
from gptlab.text.tokenizers.base import END_OF_TEXT, Tokenizer
from gptlab.text.tokenizers.gpt2 import byte_alphabet

EVERY_CHARACTER = "(?m)."
LARGEST_VOCABULARY = 2**21
"""Eight times the largest of any model; a table of tokens by id is made that long."""
_UNKNOWN = np.uint32(2**32 - 1)


class UnsupportedTokenizer(GptlabError):
    """A tokenizer that is in order and of a kind that gptlab does not read."""


class FileTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library: a trained BPE, bytes, or characters.

    Args:
        engine: a ``tokenizers.Tokenizer`` whose tokens are byte-level, or plain text without a decoder.

    Raises:
        UnsupportedTokenizer: a kind of tokenizer whose tokens do not say which bytes they stand for.
        ValueError: a token that is not byte-level though its decoder is.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        engine.encode_special_tokens = True  # special tokens in a text are text
        engine.no_truncation()  # some files carry the lengths of somebody's training batches
        engine.no_padding()
        self._values = json.loads(engine.to_str())
        vocab: dict[str, int] = engine.get_vocab()
        added: dict[int, Any] = engine.get_added_tokens_decoder()
        self._added = {token.content for token in added.values()}
        self._special = {token.content: i for i, token in sorted(added.items()) if token.special}
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ValueError(f"it has the id {self.vocab_size - 1}, where no vocabulary reaches {LARGEST_VOCABULARY:,}")
        self.end_of_text = vocab.get(END_OF_TEXT)
        byte_level = _is_byte_level(self._values)
        self._bytes: list[bytes | None] = [None] * self.vocab_size
        for token, i in vocab.items():
            self._bytes[i] = _bytes_of(token) if byte_level and token not in self._added else token.encode()
        self.holes = tuple(i for i, content in enumerate(self._bytes) if content is None)
        self._characters = None if byte_level else {token for token in vocab if token not in self._added}
        # Bytes that are never lost: those with a token of their own, or all where an unknown token stands for the rest.
        alphabet = byte_alphabet()
        unknown = self._values["model"].get("unk_token")
        known = alphabet.values() if unknown is not None else (b for c, b in alphabet.items() if c in vocab)
        self._known = bytes(known)
        self.splits_as_gpt2 = _splits_as_gpt2(self._values)
        self._table = _table_of(self._values)
        if self._values["post_processor"] is not None:
            self.before, self.after = _template(engine, [token for token in vocab if token not in self._added])

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special

    @functools.cached_property
    def _special_engine(self) -> Any:
        engine = copy.deepcopy(self._engine)
        engine.encode_special_tokens = False
        return engine

    def _encode_ordinary(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(self._engine, texts, ())

    def _encode_special(self, texts: Sequence[str]) -> list[list[int]]:
        return (
            self._encode(self._special_engine, texts, self._special)
            if self._special
            else super()._encode_special(texts)
        )

    def _encode(self, engine: Any, texts: Sequence[str], special: Collection[str]) -> list[list[int]]:
        if self._characters is not None:
            for text in texts:
                self._refuse_unknown(text, special)
        rows = [encoding.ids for encoding in engine.encode_batch_fast(list(texts), add_special_tokens=False)]
        if self._characters is None and len(self._known) < 256:
            for text, ids in zip(texts, rows, strict=True):
                self._refuse_lost(text, ids)
        return rows

    def _refuse_unknown(self, text: str, special: Collection[str]) -> None:
        """Refuse characters without a token, where tokens are characters."""
        assert self._characters is not None
        parts = re.split("|".join(map(re.escape, sorted(special, key=len, reverse=True))), text) if special else [text]
        if unknown := sorted({c for part in parts for c in part} - self._characters):
            raise GptlabError(
                f"the character {unknown[0]!r} is not among the {len(self._characters)} that this model knows; leave it"
                " out, or train with a byte-level tokenizer"
            )

    def _refuse_lost(self, text: str, ids: list[int]) -> None:
        """Refuse a text of which the engine dropped bytes without a word, as a BPE does that lacks some of the 256."""
        if self._engine.normalizer is not None:
            text = self._engine.normalizer.normalize_str(text)
        # What remains of both are the bytes without a token, which only an added token can have kept.
        rare = text.encode().translate(None, self._known)
        if rare and sorted(rare) != sorted(self._decode(ids).translate(None, self._known)):
            for content in self._added:
                text = text.replace(content, "")
            lost = sorted({c for c in text if c.encode().translate(None, self._known)})
            more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
            raise GptlabError(
                f"the tokenizer has no token for {', '.join(map(repr, lost[:5]))}{more}, and no unknown token that"
                " could stand there: it was trained without some of the 256 bytes; leave such characters out, or"
                " replace them"
            )

    def _encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._table is None:
            return super()._encode_arrays(texts)
        codec, table = self._table
        arrays = []
        for text in texts:
            units = np.frombuffer(text.encode(codec), dtype=np.uint8 if codec == "utf-8" else "<u4")
            ids = table[np.minimum(units, len(table) - 1)]
            if len(ids) and ids.max() == _UNKNOWN:
                self._encode_ordinary([text])  # refuses the character in words
            arrays.append(ids)
        return arrays

    def _decode(self, ids: list[int]) -> bytes:
        contents = [self._bytes[token] for token in ids]
        if None in contents:
            raise GptlabError(f"token id {ids[contents.index(None)]} stands for nothing in this tokenizer")
        return b"".join(content for content in contents if content is not None)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._engine.to_str().encode(), **self._border_files()}


def _is_byte_level(values: dict[str, Any]) -> bool:
    """Are the tokens of this `tokenizer.json` written in GPT-2's alphabet of bytes? If not, they are plain text.

    Raises:
        UnsupportedTokenizer: neither, or nothing says which.
    """
    decoders, splitters = (
        _steps(values[name], inner) for name, inner in (("decoder", "decoders"), ("pre_tokenizer", "pretokenizers"))
    )
    if other := [name for name in decoders if name not in ("ByteLevel", "Fuse")]:
        raise UnsupportedTokenizer(f"a tokenizer.json with a {other[0]} decoder is not supported; GPT-2's is ByteLevel")
    if "ByteLevel" in decoders or (not decoders and "ByteLevel" in splitters):
        return True
    if not decoders and (other := [name for name in splitters if name != "Split"]):
        raise UnsupportedTokenizer(
            f"a tokenizer.json with a {other[0]} pre-tokenizer and no decoder does not say how tokens become text"
            " again; add its decoder"
        )
    return False


def _steps(part: dict[str, Any] | None, inner: str) -> list[str]:
    """Return the types of a decoder or pre-tokenizer, which may be a sequence of several."""
    if part is None:
        return []
    return (
        [name for step in part[inner] for name in _steps(step, inner)] if part["type"] == "Sequence" else [part["type"]]
    )


def _bytes_of(token: str) -> bytes:
    alphabet = byte_alphabet()
    try:
        return bytes(alphabet[c] for c in token)
    except KeyError as error:
        raise ValueError(
            f"its token {token!r} has {error.args[0]!r}, which is not in GPT-2's alphabet of bytes"
        ) from None


def _template(engine: Any, tokens: Iterable[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the engine's post-processor puts before and after a text."""
    for token in tokens:
        bare = engine.encode(token, add_special_tokens=False).ids
        if bare:
            whole = engine.encode(token, add_special_tokens=True).ids
            places = range(len(whole) - len(bare) + 1)
            at = next((i for i in places if whole[i : i + len(bare)] == bare), None)
            if at is not None:
                return tuple(whole[:at]), tuple(whole[at + len(bare) :])
    return (), ()


def _splits_as_gpt2(values: dict[str, Any]) -> bool:
    """Does this `tokenizer.json` cut texts into GPT-2's words, or into characters, and look at nothing else?"""
    splitter = values["pre_tokenizer"] or {}
    words = (
        splitter.get("type") == "ByteLevel" and not splitter.get("add_prefix_space") and splitter.get("use_regex", True)
    )
    characters = splitter.get("type") == "Split" and splitter["pattern"] == {"Regex": EVERY_CHARACTER}
    special_alone = all(token["special"] for token in values["added_tokens"])
    return (words or characters) and values["normalizer"] is None and special_alone


def _table_of(values: dict[str, Any]) -> tuple[str, np.ndarray] | None:
    """Return what this `tokenizer.json` does as a table, when it gives each byte or each character an id.

    Returns:
        The codec that turns a text into indices, and the ids (uint32) by index. The last one serves for all indices
        beyond.
    """
    if not _splits_as_gpt2(values):
        return None
    model, splitter = values["model"], values["pre_tokenizer"]["type"]
    if (splitter, model["type"]) == ("Split", "WordLevel"):
        ids = {ord(token): i for token, i in model["vocab"].items() if len(token) == 1}
        table = np.full(max(ids) + 2, _UNKNOWN)
        table[list(ids)] = list(ids.values())
        return "utf-32-le", table
    more = ("merges", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if (splitter, model["type"]) == ("ByteLevel", "BPE") and not any(model.get(name) for name in more):
        by_byte = sorted(byte_alphabet().items(), key=lambda item: item[1])
        if all(character in model["vocab"] for character, _ in by_byte):
            return "utf-8", np.array([model["vocab"][character] for character, _ in by_byte], dtype=np.uint32)
    return None
