"""GPT-2's own byte-level BPE, through tiktoken."""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptlab.text.tokenizers.base import END_OF_TEXT, Tokenizer

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# What `\s` means to tiktoken: Unicode's White_Space, which is not quite Python's `\s`.
_SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
# tiktoken's regular expression recurses once per character of white space and overflows its stack between
# 100,000 and 1,000,000 of them. Runs this long are cut out and encoded as the single piece that they are.
_LONG = 20_000
_LONG_SPACE = re.compile(f"{_SPACE}{{{_LONG},}}")


def _may_have_long_space(text: str) -> bool:
    """Could `_LONG_SPACE` match? Such a run fills a block between two multiples of half its length."""
    step = _LONG // 2
    return len(text) >= _LONG and any(text[i : i + step].isspace() for i in range(0, len(text), step))


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's table of the printable characters that stand for the 256 bytes, in vocabulary order."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    table = {chr(b): b for b in printable}
    for b in range(256):
        if b not in printable:
            table[chr(256 + len(table) - len(printable))] = b
    return table


def _asset(name: str) -> bytes:
    return (importlib.resources.files("gptlab") / "assets" / "gpt2" / name).read_bytes()


def gpt2_merges() -> tuple[tuple[str, str], ...]:
    """The 50,000 merges of GPT-2's BPE in order of rank, in the byte alphabet."""
    lines = _asset("vocab.bpe").decode().split("\n")[1:-1]
    return tuple((a, b) for a, b in (line.split() for line in lines))


def gpt2_vocab() -> dict[str, int]:
    """GPT-2's vocabulary in the byte alphabet: the bytes, then each merge, then the end of text."""
    tokens = [*byte_alphabet(), *(a + b for a, b in gpt2_merges()), END_OF_TEXT]  # not kept: they take 15 MB
    return {token: i for i, token in enumerate(tokens)}


@functools.cache
def _gpt2_encoding() -> Any:
    """GPT-2's BPE as a ``tiktoken.Encoding``, which takes half a second to make."""
    import tiktoken

    alphabet = byte_alphabet()
    ranks = {bytes(alphabet[c] for c in token): i for token, i in gpt2_vocab().items() if token != END_OF_TEXT}
    return tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )


@functools.cache
def _gpt2_files() -> dict[str, bytes]:
    vocab = gpt2_vocab()
    return {
        "tokenizer.json": byte_level(vocab, gpt2_merges()).to_str().encode(),
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": _asset("vocab.bpe"),
    }


def byte_level(
    vocab: dict[str, int], merges: Sequence[tuple[str, str]], special: Sequence[str] = (END_OF_TEXT,)
) -> Any:
    """Return a ``tokenizers.Tokenizer`` that splits as GPT-2 does."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    engine = Engine(models.BPE(vocab=vocab, merges=list(merges)))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return engine


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE, from the ranks that the package carries, through tiktoken."""

    splits_as_gpt2 = True

    def __init__(self) -> None:
        self._encoding = _gpt2_encoding()
        self.end_of_text = self._encoding.eot_token
        self.vocab_size = self._encoding.n_vocab

    def _encode_ordinary(self, texts: Sequence[str]) -> list[list[int]]:
        if any(_may_have_long_space(text) for text in texts):
            return [self._encode_around_long_space(text) for text in texts]
        if len(texts) == 1:
            return [self._encoding.encode_ordinary(texts[0])]
        return self._encoding.encode_ordinary_batch(list(texts))

    def _encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [
            np.array(self._encode_around_long_space(text), dtype=np.uint32)
            if _may_have_long_space(text)
            else self._encoding.encode_to_numpy(text, disallowed_special=())
            for text in texts
        ]

    def _encode_around_long_space(self, text: str) -> list[int]:
        """Encode ``text`` with its very long runs of white space cut out.

        The cuts change nothing. The pattern never joins white space to what stands before it, and of a run
        that something follows it takes all but the last character as one piece (``\\s+(?!\\S)``).
        """
        ids: list[int] = []
        start = 0
        for run in _LONG_SPACE.finditer(text):
            end = run.end() if run.end() == len(text) else run.end() - 1
            ids += self._encoding.encode_ordinary(text[start : run.start()])
            ids += self._encoding._encode_single_piece(text[run.start() : end])
            start = end
        return ids + self._encoding.encode_ordinary(text[start:])

    def _decode(self, ids: list[int]) -> bytes:
        return self._encoding.decode_bytes(ids)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return {END_OF_TEXT: self._encoding.eot_token}

    def _encode_special(self, texts: Sequence[str]) -> list[list[int]]:
        joined: list[list[int]] = []
        for text in texts:
            ids: list[int] = []
            for i, part in enumerate(text.split(END_OF_TEXT)):
                ids += [self._encoding.eot_token] * (i > 0) + self._encode_ordinary([part])[0]
            joined.append(ids)
        return joined

    def files(self) -> dict[str, bytes]:
        return {**_gpt2_files(), **self._border_files()}
