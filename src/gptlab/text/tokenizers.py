"""Text to token ids and back: GPT-2's own BPE, bytes, characters, and a BPE trained on any text.

On disk a tokenizer is a `tokenizer.json` in the format of the `tokenizers` library, which other programs
read too; GPT-2's own is written with its original `vocab.json` and `merges.txt` beside it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.errors import GptlabError, nearest

END_OF_TEXT = "<|endoftext|>"
KINDS = ("gpt2", "bytes", "chars", "bpe")

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


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: ids are 0 to ``vocab_size - 1``.
        end_of_text: the id that ends a document, or None.
        splits_as_gpt2: texts are cut into words by GPT-2's pattern, or into something smaller, before anything else.
    """

    vocab_size: int
    end_of_text: int | None
    splits_as_gpt2: bool

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of ``text``.

        Args:
            text: any text; ``<|endoftext|>`` in it is ordinary text unless ``special``.
            special: read ``<|endoftext|>`` as the end of a document.

        Raises:
            GptlabError: a lone surrogate, or a character that the vocabulary lacks.
        """
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Return what `encode` returns for each text, on all cores where the engine can."""
        for text in texts:
            refuse_surrogates(text)
        if not special:
            return self._encode_ordinary(texts)
        if self.end_of_text is None:
            raise GptlabError("this tokenizer has no <|endoftext|> token")
        joined: list[list[int]] = []
        for text in texts:
            ids: list[int] = []
            for i, part in enumerate(text.split(END_OF_TEXT)):
                ids += [self.end_of_text] * (i > 0) + self._encode_ordinary([part])[0]
            joined.append(ids)
        return joined

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return what `encode` returns for each text as uint32 arrays; several threads may do so at a time."""
        for text in texts:
            refuse_surrogates(text)
        return self._encode_arrays(texts)

    @functools.cached_property
    def sha256(self) -> str:
        """What tells this tokenizer from others: the hash of its `tokenizer.json`, in hexadecimal."""
        return hashlib.sha256(self.files()["tokenizer.json"]).hexdigest()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; bytes that are no valid UTF-8 become U+FFFD.

        Raises:
            GptlabError: an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes of ``ids``: a token may hold part of a character only."""
        ids = list(ids)
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise GptlabError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return self._decode(ids)

    @abstractmethod
    def _encode_ordinary(self, texts: Sequence[str]) -> list[list[int]]: ...

    def _encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, dtype=np.uint32) for ids in self._encode_ordinary(texts)]

    @abstractmethod
    def _decode(self, ids: list[int]) -> bytes: ...

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Return the contents of the files that `read_tokenizer` reads, by name."""


def refuse_surrogates(text: str) -> None:
    """Raise GptlabError when ``text`` cannot be written as UTF-8 (tiktoken would encode it silently)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GptlabError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, which"
            " is no Unicode text; decode the file with the right encoding, or with errors='replace'"
        ) from None


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


@functools.cache
def gpt2_merges() -> tuple[tuple[str, str], ...]:
    """The 50,000 merges of GPT-2's BPE in order of rank, in the byte alphabet."""
    lines = _asset("vocab.bpe").decode().split("\n")[1:-1]
    return tuple((a, b) for a, b in (line.split() for line in lines))


@functools.cache
def gpt2_vocab() -> dict[str, int]:
    """GPT-2's vocabulary in the byte alphabet: the bytes, then each merge, then the end of text."""
    tokens = [*byte_alphabet(), *(a + b for a, b in gpt2_merges()), END_OF_TEXT]
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
    return {
        "tokenizer.json": _byte_level(gpt2_vocab(), gpt2_merges()).to_str().encode(),
        "vocab.json": json.dumps(gpt2_vocab()).encode(),
        "merges.txt": _asset("vocab.bpe"),
    }


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

    def files(self) -> dict[str, bytes]:
        return dict(_gpt2_files())


class FileTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library: a trained BPE, bytes, or characters.

    Args:
        engine: a ``tokenizers.Tokenizer`` whose tokens are byte-level, or plain text without a decoder.

    Raises:
        GptlabError: a kind of tokenizer whose tokens do not say which bytes they stand for.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        engine.encode_special_tokens = True  # special tokens in a text are text
        engine.no_truncation()  # some files carry the lengths of somebody's training batches
        engine.no_padding()
        self.vocab_size = engine.get_vocab_size()
        self.end_of_text = engine.token_to_id(END_OF_TEXT)
        values = json.loads(engine.to_str())
        decoder = values["decoder"]
        if decoder is not None and decoder["type"] not in ("ByteLevel", "Fuse"):
            raise GptlabError(
                f"a tokenizer.json with a {decoder['type']} decoder is not supported; GPT-2's is ByteLevel"
            )
        byte_level = decoder is not None and decoder["type"] == "ByteLevel"
        alphabet = byte_alphabet()
        special = {str(token) for token in (t.content for t in engine.get_added_tokens_decoder().values())}
        self._bytes = [b""] * self.vocab_size
        for token, i in engine.get_vocab().items():
            plain = token in special or not byte_level
            self._bytes[i] = token.encode() if plain else bytes(alphabet[c] for c in token)
        self._characters = None if byte_level else {token for token in engine.get_vocab() if token not in special}
        self.splits_as_gpt2 = _splits_as_gpt2(values)
        self._table = _table_of(values)

    def _encode_ordinary(self, texts: Sequence[str]) -> list[list[int]]:
        if self._characters is not None:
            for text in texts:
                if unknown := sorted(set(text) - self._characters):
                    raise GptlabError(
                        f"the character {unknown[0]!r} is not among the {len(self._characters)} that this"
                        " model knows; leave it out, or train with a byte-level tokenizer"
                    )
        return [encoding.ids for encoding in self._engine.encode_batch_fast(list(texts), add_special_tokens=False)]

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
        return b"".join(self._bytes[token] for token in ids)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._engine.to_str().encode()}


_UNKNOWN = np.uint32(2**32 - 1)
_EVERY_CHARACTER = "(?m)."


def _splits_as_gpt2(values: dict[str, Any]) -> bool:
    """Does this `tokenizer.json` cut texts into GPT-2's words, or into characters, and look at nothing else?"""
    splitter = values["pre_tokenizer"] or {}
    words = (
        splitter.get("type") == "ByteLevel" and not splitter.get("add_prefix_space") and splitter.get("use_regex", True)
    )
    characters = splitter.get("type") == "Split" and splitter["pattern"] == {"Regex": _EVERY_CHARACTER}
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


def _byte_level(vocab: dict[str, int], merges: Sequence[tuple[str, str]]) -> Any:
    """Return a ``tokenizers.Tokenizer`` that splits as GPT-2 does."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    engine = Engine(models.BPE(vocab=vocab, merges=list(merges)))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return engine


def byte_tokenizer() -> FileTokenizer:
    """Return the tokenizer whose ids are the 256 bytes, and 256 for the end of text."""
    return FileTokenizer(_byte_level(dict(byte_alphabet().items()), []))


def char_tokenizer(texts: Iterable[str]) -> FileTokenizer:
    """Return a tokenizer with one id for each character of ``texts``, in code-point order."""
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
    engine.pre_tokenizer = pre_tokenizers.Split(Regex(_EVERY_CHARACTER), "isolated")
    engine.decoder = decoders.Fuse()
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
    engine = _byte_level({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=list(byte_alphabet()), show_progress=progress
    )
    engine.train_from_iterator(_checked(texts), trainer)
    model = json.loads(engine.to_str())["model"]
    return FileTokenizer(_byte_level(model["vocab"], [tuple(pair) for pair in model["merges"]]))


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


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """Read the tokenizer of a model directory; None when there is none.

    Raises:
        GptlabError: its files are damaged, or of a kind that is not supported.
    """
    from tokenizers import Tokenizer as Engine

    path, vocab, merges = (directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if path.exists():
            text = path.read_text(encoding="utf-8")
            return GPT2Tokenizer() if _is_gpt2(json.loads(text)) else FileTokenizer(Engine.from_str(text))
        if not (vocab.exists() and merges.exists()):
            return None
        lines = merges.read_text(encoding="utf-8").splitlines()
        pairs = tuple(
            (a, b) for a, b in (line.split(" ") for line in lines if line and not line.startswith("#version"))
        )
        table = json.loads(vocab.read_text(encoding="utf-8"))
        if pairs == gpt2_merges() and table == gpt2_vocab():
            return GPT2Tokenizer()
        return FileTokenizer(_byte_level(table, pairs))
    except GptlabError:
        raise
    except Exception as error:  # the Rust side raises bare Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GptlabError(f"the tokenizer in {directory} cannot be read ({reason}); restore its files") from None


def _is_gpt2(values: dict[str, Any]) -> bool:
    """Is this `tokenizer.json` GPT-2's own, so that the faster engine may take its place?"""
    model = values.get("model") or {}
    merges = tuple(tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges") or ())
    splitter = values.get("pre_tokenizer") or {}
    return (
        merges == gpt2_merges()
        and model.get("vocab") == gpt2_vocab()
        and values.get("normalizer") is None
        and splitter.get("type") == "ByteLevel"
        and not splitter.get("add_prefix_space")
        and splitter.get("use_regex", True)
        and all(token["content"] == END_OF_TEXT for token in values.get("added_tokens", ()))
    )
