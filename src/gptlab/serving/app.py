"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gptlab.errors import GptlabError
from gptlab.generation.continuation import Continuation
from gptlab.generation.engine import longest_text
from gptlab.generation.rows import Prompt, Row
from gptlab.language_model import LanguageModel
from gptlab.serving.answers import ChatForm, CompletionForm
from gptlab.serving.bodies import parse
from gptlab.serving.errors import Refusal
from gptlab.serving.http import ERRORS, JSON, Guard, endpoint, read_body
from gptlab.serving.requests import Chat, Completion, Detokenize, Generation, Tokenize
from gptlab.serving.streams import Outbox, Post, answer
from gptlab.serving.worker import Job, Worker

DEFAULT_MAX_TOKENS = 16
"""New tokens of a completion, as with OpenAI."""


@dataclass(frozen=True)
class Served:
    """What the routes share.

    Attributes:
        lm: the model.
        name: what clients call it.
        max_length: tokens that a text may have, its prompt among them.
        worker: what computes.
        post: carries what it computes to the requests.
        began: seconds since 1970.
    """

    lm: LanguageModel
    name: str
    max_length: int
    worker: Worker
    post: Post
    began: int


def make_app(
    lm: LanguageModel,
    name: str,
    *,
    max_length: int | None = None,
    slots: int | None = None,
    queue: int = 256,
    api_key: str | None = None,
) -> Starlette:
    """Make the application; its worker runs as long as it does.

    Args:
        lm: with a tokenizer; it must not change afterwards.
        name: what clients call it.
        max_length: tokens that a text may have, its prompt among them; by default the model's context.
        slots: texts at a time; None: as many as memory suggests.
        queue: texts that may wait.
        api_key: that clients must show, or None.

    Raises:
        GptlabError: no tokenizer, or a number that makes no sense.
    """
    lm.needs_tokenizer()
    limit = longest_text(lm.config)
    max_length = lm.config.context_length if max_length is None else max_length
    if not 2 <= max_length <= limit:
        most = f"at most {limit}, which its learned positions end at" if limit < 2**62 else "no more than memory allows"
        raise GptlabError(f"the longest text must have at least 2 tokens and {most}, got {max_length}")
    if slots is not None and slots < 1:
        raise GptlabError(f"at least 1 text must be continued at a time, got {slots}")
    if queue < 0:
        raise GptlabError(f"the number of texts that may wait cannot be negative, got {queue}")
    worker = Worker(lm, max_length=max_length, slots=slots, queue=queue)
    served = Served(lm, name, max_length, worker, Post(), int(time.time()))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.close()

    posts = {
        "/v1/completions": completions,
        "/v1/chat/completions": chat,
        "/tokenize": tokenize,
        "/detokenize": detokenize,
    }
    gets = {
        "/v1/models": models,
        "/v1/models/{model:path}": model,
        "/tokenizer_info": tokenizer_info,
        "/health": health,
    }

    def answering(route: Callable[[Served, Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        return endpoint(functools.partial(route, served))

    app = Starlette(
        routes=[
            *(
                Route(path, endpoint(functools.partial(route, served)), methods=["POST"])
                for path, route in posts.items()
            ),
            *(Route(path, answering(route), methods=["GET"]) for path, route in gets.items()),
        ],
        exception_handlers=ERRORS,
        middleware=[Middleware(Guard, key=api_key)],
        lifespan=lifespan,
    )
    app.state.worker = worker
    return app


async def completions(served: Served, request: Request) -> Response:
    """Continue texts."""
    asked = parse(await read_body(request), Completion)
    asked.check()
    _check_model(served, asked.model)
    with_usage = asked.with_usage
    max_tokens = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    echo = bool(asked.echo)
    prompts = await asyncio.to_thread(_prompt_ids, served, asked, len(asked.prompts()))
    rows = _rows(served, asked, prompts, max_tokens, asked.logprobs, asked.logprobs if echo else None)
    form = CompletionForm(
        served.lm.needs_tokenizer(), served.name, rows, echo=echo, logprobs=asked.logprobs is not None
    )
    return await _answer(served, request, asked, rows, form, with_usage)


async def chat(served: Served, request: Request) -> Response:
    """Answer a conversation, by the model's chat template."""
    asked = parse(await read_body(request), Chat)
    _check_model(served, asked.model)
    with_usage, top = asked.with_usage, asked.top
    messages = [message.plain() for message in asked.messages]
    try:
        ids = await asyncio.to_thread(served.lm.chat_ids, messages)
    except GptlabError as error:
        raise Refusal(400, str(error), param="messages") from None
    max_tokens = asked.max_completion_tokens or asked.max_tokens or served.max_length
    rows = _rows(served, asked, [ids], max_tokens, top, None)
    form = ChatForm(served.lm.needs_tokenizer(), served.name, rows, logprobs=bool(asked.logprobs))
    return await _answer(served, request, asked, rows, form, with_usage)


async def _answer(
    served: Served,
    request: Request,
    asked: Generation,
    rows: Sequence[Row],
    form: CompletionForm | ChatForm,
    with_usage: bool,
) -> Response:
    outbox = Outbox(asyncio.get_running_loop(), served.post)
    job = Job(rows, outbox.deliver, stream=bool(asked.stream))
    served.worker.submit(job)
    return await answer(request, outbox, form, functools.partial(served.worker.cancel, job), job.stream, with_usage)


def _prompt_ids(served: Served, asked: Completion, n: int) -> list[list[int]]:
    """Ids of the prompts; special tokens in a text are tokens, as the harness and other servers have it."""
    special = bool(served.lm.needs_tokenizer().special_tokens)
    _check_number(served, n * (asked.n or 1))
    try:
        prompts = [served.lm.prompt_ids(prompt, special=special) for prompt in asked.prompts()]
        if asked.echo:  # before anything is computed: ids may have no text
            for ids in prompts:
                served.lm.needs_tokenizer().decode(ids)
        return prompts
    except GptlabError as error:
        raise Refusal(400, str(error), param="prompt") from None


def _check_number(served: Served, n: int) -> None:
    if n > served.worker.most:
        raise Refusal(
            400,
            f"the request asks for {n} texts, the server holds at most {served.worker.most} at a time; ask for fewer",
        )


def _rows(
    served: Served,
    asked: Generation,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    top: int | None,
    prompt_top: int | None,
) -> list[Row]:
    """Make a request's rows: prompt by prompt, ``n`` of each."""
    sampling, stops, n = asked.sampling(), asked.stops(), asked.n or 1
    tokenizer = served.lm.needs_tokenizer()
    _check_number(served, n * len(prompts))
    rows: list[Row] = []
    for ids in prompts:
        if len(ids) > served.max_length:
            raise Refusal(
                400,
                f"the prompt has {len(ids)} tokens, a text here at most {served.max_length}; shorten the prompt",
                param="prompt" if isinstance(asked, Completion) else "messages",
                code="context_length_exceeded",
            )
        # One token more than fits can be drawn, as it need not be read.
        most = min(max_tokens, served.max_length + 1 - len(ids))
        prompt = Prompt(ids, n, prompt_top)
        rows += [Row(prompt, Continuation(tokenizer, stops), sampling, len(rows) + i, most, top) for i in range(n)]
    return rows


def _check_model(served: Served, name: str | None) -> None:
    if name is not None and name != served.name:
        raise Refusal(
            404, f"there is no model {name!r:.100} here, only {served.name!r}", param="model", code="model_not_found"
        )


async def models(served: Served, request: Request) -> Response:
    """List the one model."""
    return JSON({"object": "list", "data": [_model(served)]})


async def model(served: Served, request: Request) -> Response:
    """Describe the model."""
    _check_model(served, request.path_params["model"])
    return JSON(_model(served))


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.began,
        "owned_by": "gptlab",
        "max_model_len": served.max_length,
    }


async def tokenize(served: Served, request: Request) -> Response:
    """Turn a text into ids. Special tokens in it are tokens; ``add_special_tokens`` adds those of the template."""
    asked = parse(await read_body(request), Tokenize)
    _check_model(served, asked.model)
    tokenizer = served.lm.needs_tokenizer()
    encode = tokenizer.encode_prompt if asked.add_special_tokens else tokenizer.encode
    ids = await asyncio.to_thread(encode, asked.prompt, special=bool(tokenizer.special_tokens))
    return JSON({"count": len(ids), "max_model_len": served.max_length, "tokens": ids})


async def detokenize(served: Served, request: Request) -> Response:
    """Turn ids into a text."""
    asked = parse(await read_body(request), Detokenize)
    _check_model(served, asked.model)
    return JSON({"prompt": await asyncio.to_thread(served.lm.needs_tokenizer().decode, asked.tokens)})


async def tokenizer_info(served: Served, request: Request) -> Response:
    """Say what lm-eval wants to know of the tokenizer."""
    tokenizer = served.lm.needs_tokenizer()
    borders = {"bos_token": tokenizer.start_of_text, "eos_token": tokenizer.end_of_text}
    named = {name: None if token is None else tokenizer.decode([token]) for name, token in borders.items()}
    return JSON({**named, "pad_token": None, "chat_template": tokenizer.chat_template, "tokenizer_class": "gptlab"})


async def health(served: Served, request: Request) -> Response:
    """Say that the server is up, and what it is doing."""
    running, waiting = served.worker.load
    return JSON({"status": "ok", "running": running, "waiting": waiting})
