"""From tokens, texts and scores to the JSON that OpenAI's clients read."""

from __future__ import annotations

import codecs
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from gptlab.generation.rows import Row, TokenScore
from gptlab.text.tokenizers import Tokenizer

LEAST = -9999.0
"""In place of the logarithm of 0, which JSON cannot write."""


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""Return what a token is called: its text or, where it holds a part of a character only, ``bytes:\xe2\x82``."""
    content = tokenizer.decode_bytes([token])
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def finish_reason(finish: str | None) -> str | None:
    """Return OpenAI's word for why a text ended: a full context is ``length`` as well."""
    return {None: None, "end_of_text": "stop", "stop": "stop"}.get(finish, "length")


def usage(rows: Sequence[Row]) -> dict[str, int]:
    """Count tokens: each prompt once, and all that were drawn, those that ended a text among them."""
    prompts = {id(row.prompt): len(row.prompt.ids) for row in rows}
    read, drawn = sum(prompts.values()), sum(len(row.drawn) for row in rows)
    return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}


class LegacyLogprobs:
    """Writes the four lists of a completion's log-probabilities, in one go or piece by piece.

    ``text_offset`` counts characters of the returned text; a token that begins inside a character has that character's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def lists(self, tokens: Sequence[int], scores: Sequence[TokenScore | None]) -> dict[str, Any]:
        """Return the lists for some tokens more; a score of None is that of a text's first token."""
        name = self._tokenizer
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(name.decode_bytes([token])))
        names = [token_text(name, token) for token in tokens]
        tops: list[dict[str, float] | None] = []
        for text, score in zip(names, scores, strict=True):
            if score is None:
                tops.append(None)
                continue
            top: dict[str, float] = {}
            for token, logprob in score.top:
                top.setdefault(token_text(name, token), _written(logprob))
            top.setdefault(text, _written(score.logprob))
            tops.append(top)
        return {
            "tokens": names,
            "token_logprobs": [None if score is None else _written(score.logprob) for score in scores],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class CompletionForm:
    """Answers of ``/v1/completions``.

    Args:
        tokenizer: of the model.
        model: its name.
        rows: the texts, in the order of the choices.
        echo: give the prompts back before the texts.
        logprobs: whether log-probabilities were asked for.
    """

    def __init__(self, tokenizer: Tokenizer, model: str, rows: Sequence[Row], *, echo: bool, logprobs: bool) -> None:
        self._tokenizer, self._rows, self._echo = tokenizer, rows, echo
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._lists = [LegacyLogprobs(tokenizer) for _ in rows] if logprobs else None

    def whole(self) -> dict[str, Any]:
        """Return the answer when all rows are done."""
        choices = []
        for i, row in enumerate(self._rows):
            text = self._prompt_text(row) + row.grown.text
            tokens: list[int] = [*self._echoed(row), *row.drawn]
            scores = [*self._echoed_scores(row), *row.scores]
            choices.append(self._choice(i, text, tokens, scores, row.grown.finish))
        return {**self._head, "choices": choices, "usage": usage(self._rows)}

    def chunk(
        self, i: int, text: str, drawn: Sequence[int], scores: Sequence[TokenScore], finish: str | None, first: bool
    ) -> dict[str, Any] | None:
        """Return a part of a stream, or None where there is nothing to tell."""
        row = self._rows[i]
        tokens, all_scores = list(drawn), list[TokenScore | None](scores)
        if first:
            text = self._prompt_text(row) + text
            tokens, all_scores = [*self._echoed(row), *tokens], [*self._echoed_scores(row), *all_scores]
        if not text and finish is None and not (self._lists and tokens):
            return None
        return {**self._head, "choices": [self._choice(i, text, tokens, all_scores, finish)]}

    def closing(self) -> dict[str, Any]:
        """Return the last part of a stream that is to tell its usage."""
        return {**self._head, "choices": [], "usage": usage(self._rows)}

    def _choice(
        self, i: int, text: str, tokens: Sequence[int], scores: Sequence[TokenScore | None], finish: str | None
    ) -> dict[str, Any]:
        lists = None if self._lists is None else self._lists[i].lists(tokens, scores)
        return {"index": i, "text": text, "logprobs": lists, "finish_reason": finish_reason(finish)}

    def _prompt_text(self, row: Row) -> str:
        return self._tokenizer.decode(row.prompt.ids) if self._echo else ""

    def _echoed(self, row: Row) -> list[int]:
        return row.prompt.ids if self._echo else []

    def _echoed_scores(self, row: Row) -> list[TokenScore | None]:
        return [None, *row.prompt.scores] if self._echo and self._lists is not None else []


class ChatForm:
    """Answers of ``/v1/chat/completions``; arguments as those of `CompletionForm`."""

    def __init__(self, tokenizer: Tokenizer, model: str, rows: Sequence[Row], *, logprobs: bool) -> None:
        self._tokenizer, self._rows, self._logprobs = tokenizer, rows, logprobs
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self) -> dict[str, Any]:
        """Return the answer when all rows are done."""
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": row.grown.text, "refusal": None},
                "logprobs": self._content(row.drawn, row.scores),
                "finish_reason": finish_reason(row.grown.finish),
            }
            for i, row in enumerate(self._rows)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage(self._rows)}

    def chunk(
        self, i: int, text: str, drawn: Sequence[int], scores: Sequence[TokenScore], finish: str | None, first: bool
    ) -> dict[str, Any] | None:
        """Return a part of a stream, or None where there is nothing to tell."""
        delta = {**({"role": "assistant"} if first else {}), **({"content": text} if text or first else {})}
        if not delta and finish is None and not self._logprobs:
            return None
        choice = {
            "index": i,
            "delta": delta,
            "logprobs": self._content(drawn, scores),
            "finish_reason": finish_reason(finish),
        }
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def closing(self) -> dict[str, Any]:
        """Return the last part of a stream that is to tell its usage."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(self._rows)}

    def _content(self, tokens: Sequence[int], scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        listed = [
            {
                **self._entry(token, score.logprob),
                "top_logprobs": [self._entry(other, logprob) for other, logprob in score.top],
            }
            for token, score in zip(tokens, scores, strict=True)
        ]
        return {"content": listed, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        content = self._tokenizer.decode_bytes([token])
        text = content.decode("utf-8", errors="replace")
        return {"token": text, "logprob": _written(logprob), "bytes": list(content)}


def _written(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST
