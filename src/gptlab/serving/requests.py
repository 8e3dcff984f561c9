"""What clients may ask for: the bodies of requests, checked before anything is computed."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from pydantic import Field

from gptlab.errors import GptlabError
from gptlab.generation.sampling import Sampling
from gptlab.serving.bodies import Body
from gptlab.serving.errors import Refusal

MOST_LOGPROBS = 20
"""Likeliest tokens that may be asked for in each place."""
MOST_STOPS = 16
"""Stop strings of a request."""

Stop = Annotated[list[str], Field(max_length=MOST_STOPS)]


class StreamOptions(Body):
    """Of a stream."""

    include_usage: bool | None = None


class Generation(Body):
    """What both ways of asking for a text have in common; null is the default everywhere."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | Stop | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Beyond OpenAI's, as in vLLM.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    # OpenAI's that have no effect here unless they are neutral.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    def sampling(self) -> Sampling:
        """Return how to choose tokens; OpenAI's defaults, and a new seed where none was given.

        Raises:
            Refusal: a value that makes no sense, or one of OpenAI's that is not supported.
        """
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name):
                raise Refusal(400, f"{name} is not supported; leave it out (repetition_penalty is)", param=name)
        try:
            return Sampling(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                seed=secrets.randbits(32) if self.seed is None else self.seed,
                min_p=self.min_p,
                repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            )
        except GptlabError as error:
            raise Refusal(400, str(error), param=str(error).split()[0]) from None

    def stops(self) -> list[str]:
        """Return the stop strings.

        Raises:
            Refusal: an empty one.
        """
        words = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in words:
            raise Refusal(400, "a stop string is empty; leave it out", param="stop")
        return words

    @property
    def with_usage(self) -> bool:
        """Whether a stream is to end with what it has used.

        Raises:
            Refusal: it is not a stream.
        """
        if self.stream_options is not None and not self.stream:
            raise Refusal(
                400, "stream_options are for streams; leave them out, or ask for stream", param="stream_options"
            )
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Completion(Generation):
    """The body of ``POST /v1/completions``."""

    prompt: Any = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    def check(self) -> None:
        """Refuse what is not supported, by name.

        Raises:
            Refusal: ``best_of`` other than ``n``, ``suffix``.
        """
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise Refusal(400, "best_of is not supported; leave it out, or make it equal to n", param="best_of")
        if self.suffix:
            raise Refusal(
                400, "suffix is not supported: these models only continue a text; leave it out", param="suffix"
            )

    def prompts(self) -> list[str | list[int] | None]:
        """Return the prompts; None begins a new document, as a prompt that is missing or empty does.

        Raises:
            Refusal: something else than a text, ids, or a list of either.
        """
        value = self.prompt
        if value is None or isinstance(value, str):
            return [value or None]
        if isinstance(value, list) and value:
            if all(type(token) is int for token in value):
                return [value]
            if all(isinstance(text, str) for text in value):
                return [text or None for text in value]
            if all(isinstance(ids, list) and ids and all(type(token) is int for token in ids) for ids in value):
                return value
        raise Refusal(
            400, "prompt must be a text, a list of token ids, or a list of texts or of lists of ids", param="prompt"
        )


class TextPart(Body):
    """A part of a message."""

    type: str
    text: str | None = None


class Message(Body):
    """A message of a conversation."""

    role: str
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return it as `gptlab.text.chat.render_chat` takes it.

        Raises:
            Refusal: a part that is not text.
        """
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        if any(part.type != "text" or part.text is None for part in self.content):
            raise Refusal(400, "a message may hold text only", param="messages")
        return {"role": self.role, "content": "".join(part.text or "" for part in self.content)}


class Chat(Generation):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens to list in each place; None: no log-probabilities.

        Raises:
            Refusal: some are to be listed, but log-probabilities were not asked for.
        """
        if self.top_logprobs and not self.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class Tokenize(Body):
    """The body of ``POST /tokenize``."""

    prompt: str
    add_special_tokens: bool = True
    model: str | None = None


class Detokenize(Body):
    """The body of ``POST /detokenize``."""

    tokens: list[int]
    model: str | None = None
