"""What every tokenizer offers: text to ids and back, and the ids at which a text begins and ends."""

from __future__ import annotations

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from gptlab.errors import GptlabError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: ids are 0 to ``vocab_size - 1``.
        holes: ids below ``vocab_size`` that stand for nothing.
        end_of_text: the id that stands between documents, or None.
        splits_as_gpt2: texts are cut into words by GPT-2's pattern, or into something smaller, before anything else.
        before: ids that belong before a prompt, where the tokenizer has a template that says so.
        after: ids that belong after it.
        chat_template: how the messages of a conversation become a text, in Jinja's language, or None.
    """

    vocab_size: int
    holes: tuple[int, ...] = ()
    end_of_text: int | None
    splits_as_gpt2: bool
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    chat_template: str | None = None
    _start: int | None = None
    _ends: frozenset[int] | None = None

    @property
    def start_of_text(self) -> int | None:
        """The id from which a text without a prompt starts, or None."""
        return self.end_of_text if self._start is None else self._start

    @property
    def ends(self) -> frozenset[int]:
        """The ids of which each ends a text that is being generated."""
        if self._ends is not None:
            return self._ends
        return frozenset() if self.end_of_text is None else frozenset([self.end_of_text])

    @property
    def between(self) -> tuple[int, ...]:
        """The ids between two documents: the one that ends the first, and the one that opens the next if it is another.

        The last of them stands before the first document too. Empty where nothing ends a document.
        """
        if self.end_of_text is None:
            return ()
        return tuple(token for token in dict.fromkeys((self.end_of_text, self.start_of_text)) if token is not None)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The tokens that a text holds as such only when it is encoded with ``special``, with their ids."""
        return {}

    def set_borders(self, *, end_of_text: int | None, start: int | None, ends: Collection[int]) -> None:
        """Set the ids at which texts begin and end, where they are not all ``<|endoftext|>``.

        Args:
            end_of_text: see the class.
            start: see `start_of_text`; None is ``end_of_text``.
            ends: see `ends`.
        """
        if (end_of_text, frozenset(ends)) == (self.end_of_text, self.ends) and start in (None, end_of_text):
            return
        self.end_of_text, self._start, self._ends = end_of_text, start, frozenset(ends)

    def known_ids(self, rows: int) -> list[int]:
        """Return the ids below ``rows`` (those of a model's embedding) that stand for a token."""
        holes = set(self.holes)
        return [token for token in range(min(self.vocab_size, rows)) if token not in holes]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of ``text``.

        Args:
            text: any text; a special token such as ``<|endoftext|>`` in it is ordinary text unless ``special``. Tokens
                that were added to a vocabulary without being special are tokens in any case.
            special: read special tokens as what they are.

        Raises:
            GptlabError: a lone surrogate, or a character that the vocabulary lacks.
        """
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Return what `encode` returns for each text, on all cores where the engine can."""
        for text in texts:
            refuse_surrogates(text)
        return self._encode_special(texts) if special else self._encode_ordinary(texts)

    def encode_prompt(self, text: str, *, special: bool = False) -> list[int]:
        """Return what `encode` returns, between `before` and `after`."""
        return [*self.before, *self.encode(text, special=special), *self.after]

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
        """Return the text of ``ids``; bytes that are not valid UTF-8 become U+FFFD.

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

    def _encode_special(self, texts: Sequence[str]) -> list[list[int]]:
        raise GptlabError(f"this tokenizer has no {END_OF_TEXT} token, nor any other special one; leave special out")

    def _encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, dtype=np.uint32) for ids in self._encode_ordinary(texts)]

    @abstractmethod
    def _decode(self, ids: list[int]) -> bytes: ...

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Return the contents of the files that `read_tokenizer` reads, by name."""

    def _border_files(self) -> dict[str, bytes]:
        """Return what `files` adds to `tokenizer.json`.

        That is the chat template, and where texts begin and end, unless it is simply at ``<|endoftext|>``.
        """
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        if self._start is None and self._ends is None:
            return {"tokenizer_config.json": _json(template)} if template else {}
        names = {token: content for content, token in self.special_tokens.items()}
        named = {"bos_token": self.start_of_text, "eos_token": self.end_of_text}
        config = {name: names[token] for name, token in named.items() if token in names}
        ends = sorted(self.ends)
        generation = {"bos_token_id": self.start_of_text, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
        return {
            "tokenizer_config.json": _json({**config, **template, "tokenizer_class": "PreTrainedTokenizerFast"}),
            "generation_config.json": _json(generation),
        }


def _json(values: Mapping[str, object]) -> bytes:
    return json.dumps(values, indent=2).encode() + b"\n"


def refuse_surrogates(text: str) -> None:
    """Raise GptlabError when ``text`` cannot be written as UTF-8 (tiktoken would encode it silently)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GptlabError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, which"
            " is not Unicode text; decode the file with the right encoding, or with errors='replace'"
        ) from None
