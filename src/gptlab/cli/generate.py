"""`gptlab generate`."""

from __future__ import annotations

import json
import secrets
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gptlab.generation.continuation import Continuation
    from gptlab.language_model import LanguageModel

ENDINGS = {
    "end_of_text": "the model ended the text",
    "stop": "a stop string was reached",
    "length": "as many tokens as asked for",
    "context": "the model's context is full",
}


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; none starts a new document.")] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(help='Token ids in place of a prompt, as "15496 11 50256".', metavar="IDS")
    ] = None,
    special: Annotated[
        bool,
        typer.Option("--special", help="Read special tokens such as <|endoftext|> in the prompt as what they are."),
    ] = False,
    model: Annotated[
        str, typer.Option(help="A built-in model, a directory, gpt2 ... gpt2-xl, or owner/name.")
    ] = "pocket",
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 100,
    num_samples: Annotated[int, typer.Option(help="How many continuations.")] = 1,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(help="Below 1 is safer, above 1 wilder.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k best tokens only.")] = 40,
    top_p: Annotated[float | None, typer.Option(help="Draw from the best tokens with probability p in all.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="gpt2 or bytes, for weights without a tokenizer.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Continue a text."""
    from gptlab.errors import GptlabError
    from gptlab.generation.sampling import Sampling

    seed = secrets.randbits(32) if seed is None else seed
    sampling = Sampling(0.0 if greedy else temperature, top_k, top_p, seed)
    if num_samples < 1:
        raise GptlabError(f"--num-samples must be at least 1, got {num_samples}")
    if prompt == "":
        raise GptlabError("the prompt is empty; give it some text, or leave it out to start a new document")
    ids = None if prompt_ids is None else _ids(prompt_ids)
    if ids is not None and (prompt is not None or special):
        other = "a prompt" if prompt is not None else "--special, which is about the text of a prompt"
        raise GptlabError(f"--prompt-ids stands in place of a prompt; leave out either it or {other}")
    lm = _load(model, dtype, tokenizer)
    if prompt is not None and not special:
        _hint(prompt, lm)
    continuations = lm.new_continuations(num_samples, stop or [])
    started = time.perf_counter()
    rows = [prompt if ids is None else ids] * num_samples
    pieces = lm.continue_all(rows, continuations, sampling, max_new_tokens, special=special)
    if ids is not None:
        prompt = lm.needs_tokenizer().decode(ids)
    live = num_samples == 1 and not as_json
    for i, (_, piece) in enumerate(pieces):
        if live:  # the prompt comes with the first piece: a prompt that is refused is not printed
            print((prompt or "") + piece if i == 0 else piece, end="", flush=True)
    seconds = time.perf_counter() - started
    if as_json:
        print(_json(model, prompt, seed, continuations, seconds))
        return
    if live:
        print(flush=True)
    else:
        for i, continuation in enumerate(continuations, 1):
            print(f"--- {i} of {num_samples}\n{prompt or ''}{continuation.text}")
    _close(continuations, seconds, None if greedy else seed)


def _ids(text: str) -> list[int]:
    from gptlab.errors import GptlabError

    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        raise GptlabError(f'--prompt-ids wants token ids, as "15496 11 50256", got {text!r}')
    return [int(part) for part in parts]


def _hint(prompt: str, lm: LanguageModel) -> None:
    """Say when a prompt holds the text of a special token, which most people then mean."""
    found = [content for content in lm.needs_tokenizer().special_tokens if content in prompt]
    if found:
        print(f"note: {found[0]} in the prompt is read as text; --special reads it as the token", file=sys.stderr)


def _load(model: str, dtype: str, tokenizer: str | None) -> LanguageModel:
    import torch

    import gptlab
    from gptlab.errors import GptlabError, nearest

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise GptlabError(f"--dtype must be one of {', '.join(dtypes)}, got {dtype!r}{nearest(dtype, dtypes)}")
    return gptlab.load(model, dtype=dtypes[dtype], tokenizer=tokenizer)


def _json(model: str, prompt: str | None, seed: int, continuations: list[Continuation], seconds: float) -> str:
    rows = [{"text": c.text, "tokens": c.tokens, "finish": c.finish} for c in continuations]
    return json.dumps({"model": model, "prompt": prompt, "seed": seed, "seconds": seconds, "continuations": rows})


def _close(continuations: list[Continuation], seconds: float, seed: int | None) -> None:
    n = sum(len(continuation.tokens) for continuation in continuations)
    endings = {ENDINGS[continuation.finish] for continuation in continuations if continuation.finish}
    again = "" if seed is None else f"; --seed {seed}"
    print(f"[{n} tokens, {n / seconds:.1f} a second; {', '.join(sorted(endings))}{again}]", file=sys.stderr)
