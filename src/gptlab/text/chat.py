"""From the messages of a conversation to the text that a model was taught to answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from gptlab.errors import GptlabError
from gptlab.text.tokenizers import Tokenizer


def render_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> str:
    """Return a conversation as the tokenizer's chat template writes it, up to where the model's answer begins.

    The template comes with a model and is a program: it runs in Jinja's sandbox, with what transformers gives it.

    Args:
        tokenizer: with a `chat_template`.
        messages: each with a ``role`` (``system``, ``user`` or ``assistant``) and its ``content``.
        answer: the answer is a message of its own; False has it continue the last message.

    Raises:
        GptlabError: no template, one that is damaged, or messages that it refuses.
    """
    if tokenizer.chat_template is None:
        raise GptlabError(
            "this model has no chat template: it continues texts and was not taught to answer; give it a text instead"
        )
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    names = {token: content for content, token in tokenizer.special_tokens.items()}
    borders = {"bos_token": tokenizer.start_of_text, "eos_token": tokenizer.end_of_text}
    known: dict[str, Any] = {name: names.get(token, "") for name, token in borders.items() if token is not None}
    try:
        template = environment.from_string(tokenizer.chat_template)
        text = template.render(messages=list(messages), add_generation_prompt=answer, **known)
    except GptlabError:
        raise
    except Exception as error:  # a template may fail in any way that a program can
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GptlabError(
            f"the model's chat template cannot be used ({reason}); give the model a text instead"
        ) from None
    if answer or not messages:
        return text
    # Without what the template puts after the last message; some templates strip the messages.
    last = messages[-1]["content"].strip()
    return text[: text.rindex(last) + len(last)] if last in text else text


def _refuse(message: str) -> NoReturn:
    raise GptlabError(f"the model's chat template refuses these messages: {message}")
