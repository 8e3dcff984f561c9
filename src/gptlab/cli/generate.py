"""`gptlab generate`."""

from __future__ import annotations

import json
import secrets
import sys
import time
from dataclasses import replace
from pathlib import Path
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
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="The text to continue; - reads standard input, as does none where text is piped. Else none starts a"
            " new document."
        ),
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="Read the prompt from this file, less a newline at its end.", metavar="FILE")
    ] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(help='Token ids in place of a prompt, as "15496 11 50256".', metavar="IDS")
    ] = None,
    special: Annotated[
        bool,
        typer.Option("--special", help="Read special tokens such as <|endoftext|> in the prompt as what they are."),
    ] = False,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="The prompt is a message; print the answer of a model that was taught to chat."),
    ] = False,
    model: Annotated[
        str, typer.Option(help="A built-in model, a directory, smollm2, gpt2 ... gpt2-xl, or owner/name.")
    ] = "pocket",
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of tokens to add.")] = 100,
    num_samples: Annotated[int, typer.Option(help="How many continuations.")] = 1,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(help="Below 1 is safer, above 1 wilder.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k best tokens only; 0 from all.")] = 40,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the best tokens with probability p in all (default: from all).")
    ] = None,
    min_p: Annotated[
        float, typer.Option(help="Draw from tokens with p times the probability of the best, or more; 0 from all.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that stand in the text already are less likely.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text (default: a new one).")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help=r"End before this text, in which \n is a newline; may be given several times (default: none)."
        ),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="gpt2 or bytes, for weights without a tokenizer.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, int8 or int4; auto for the fastest that keeps the quality (default: float32, or"
            " what the model was saved in)."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    batch: Annotated[
        Path | None,
        typer.Option(
            help='Continue every prompt of this file, one a line, or JSON lines with "prompt" or "ids", into --out.',
            metavar="FILE",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="With --batch: the answers, as JSON lines. The same command again goes on with them.", metavar="FILE"
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="With --batch: texts at a time (default: as many as half of the free memory holds, at most 32)."
        ),
    ] = None,
) -> None:
    """Continue a text."""
    from gptlab.cli.prompts import read_prompt, repair, unescape
    from gptlab.errors import GptlabError
    from gptlab.generation.engine import check_batch
    from gptlab.generation.sampling import Sampling

    sampling = Sampling(0.0 if greedy else temperature, top_k, top_p, seed or 0, min_p, repetition_penalty)
    if chat and (prompt_ids is not None or special):
        other = "--special, as the chat template's tokens are read as such" if special else "--prompt-ids"
        raise GptlabError(f"--chat takes a message; leave out either it or {other}")
    words = [unescape(repair(word)) for word in stop or []]
    if batch is not None or out is not None or batch_size is not None:
        from gptlab.cli.batch import Asked, run

        single = (prompt, prompt_file, prompt_ids, num_samples if num_samples != 1 else None, as_json or None)
        asked = Asked(batch, out, model, batch_size, sampling, seed, max_new_tokens, words, special, chat)
        run(asked, single, lambda: _load(model, dtype, tokenizer, device))
        return
    seed = secrets.randbits(32) if seed is None else seed
    sampling = replace(sampling, seed=seed)
    if num_samples < 1:
        raise GptlabError(f"--num-samples must be at least 1, got {num_samples}")
    ids = None if prompt_ids is None else _ids(prompt_ids, prompt is not None or prompt_file is not None, special)
    prompt = read_prompt(prompt, prompt_file) if ids is None else None
    if chat and prompt is None:
        raise GptlabError("--chat needs a message to answer; give it as the prompt")
    lm = _load(model, dtype, tokenizer, device)
    if chat:
        assert prompt is not None
        ids = lm.chat_ids(prompt)
    check_batch(lm.model, num_samples, 1)  # before a list of as many rows is made
    if prompt is not None and not special and not chat:
        _hint(prompt, lm)
    continuations = lm.new_continuations(num_samples, words)
    started = time.perf_counter()
    rows = [prompt if ids is None else ids] * num_samples
    pieces = lm.continue_all(rows, continuations, sampling, max_new_tokens, special=special)
    if ids is not None and not chat:
        prompt = lm.needs_tokenizer().decode(ids)
    before = "" if chat else prompt or ""  # what is shown before a continuation
    live = num_samples == 1 and not as_json
    interruption: BaseException | None = None
    begun = False
    try:
        for _, piece in pieces:
            # The prompt comes with the first piece: a prompt that is refused is not printed.
            shown = piece if begun else before + piece
            begun = True  # before it is printed: an interruption may come as soon as a reader has seen it
            if live:
                print(shown, end="", flush=True)
    except (KeyboardInterrupt, GptlabError) as error:
        if not begun:
            raise
        interruption = error  # what there is by now is shown
    seconds = time.perf_counter() - started
    if as_json:
        print(_json(model, prompt, seed, continuations, seconds))
    else:
        texts = [before + continuation.text for continuation in continuations]
        print(*([""] if live else (f"--- {i} of {num_samples}\n{text}" for i, text in enumerate(texts, 1))), sep="\n")
        _close(continuations, seconds, None if greedy else seed)
    if interruption is not None:
        raise interruption


def _ids(text: str, has_prompt: bool, special: bool) -> list[int]:
    """Read the ids of --prompt-ids, which leaves no room for a prompt or what is said of its text."""
    from gptlab.errors import GptlabError

    if has_prompt or special:
        other = "a prompt" if has_prompt else "--special, which applies to the text of a prompt"
        raise GptlabError(f"--prompt-ids replaces a prompt; leave out either it or {other}")
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() and len(part) < 20 for part in parts):
        raise GptlabError(f'--prompt-ids takes token ids, such as "15496 11 50256", got {text!r:.60}')
    return [int(part) for part in parts]


def _hint(prompt: str, lm: LanguageModel) -> None:
    """Say when a prompt holds the text of a special token, which most people then mean."""
    specials = [content for content in lm.needs_tokenizer().special_tokens if content in prompt]
    if specials:
        print(f"note: {specials[0]} in the prompt is read as text; --special reads it as the token", file=sys.stderr)


def _load(model: str, dtype: str | None, tokenizer: str | None, device: str) -> LanguageModel:
    import gptlab

    return gptlab.load(model, dtype=dtype, tokenizer=tokenizer, device=device)


def _json(model: str, prompt: str | None, seed: int, continuations: list[Continuation], seconds: float) -> str:
    rows = [{"text": c.text, "tokens": c.tokens, "finish": c.finish} for c in continuations]
    return json.dumps({"model": model, "prompt": prompt, "seed": seed, "seconds": seconds, "continuations": rows})


def _close(continuations: list[Continuation], seconds: float, seed: int | None) -> None:
    n = sum(len(continuation.tokens) for continuation in continuations)
    endings = {ENDINGS[c.finish] if c.finish else "interrupted" for c in continuations}
    again = "" if seed is None else f"; --seed {seed}"
    print(f"[{n} tokens, {n / seconds:.1f} a second; {', '.join(sorted(endings))}{again}]", file=sys.stderr)
