"""Thousands of prompts: a few at a time, and each that is done makes room for the next."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gptlab.errors import GptlabError
from gptlab.formatting import NBSP, memory
from gptlab.generation.compiled.decoder import serves
from gptlab.generation.continuation import Continuation
from gptlab.generation.engine import (
    check_new_tokens,
    check_prompt,
    decode,
    longest_text,
    memory_of_text,
)
from gptlab.generation.memory import available_memory
from gptlab.generation.rows import Prompt, Row, Rows
from gptlab.generation.sampling import Sampling
from gptlab.model.gpt import GPT
from gptlab.progress import Report

MOST = 32
"""Texts at a time, unless another number is asked for: more gain little."""
SHARE = 0.5
"""Of the free memory that is used, unless a number of texts is asked for."""

Prompts = Mapping[int, Sequence[int]]
"""Token ids by the number of the text, which also chooses its random stream."""


@dataclass(frozen=True)
class Plan:
    """How many texts at a time, and the memory for them.

    Attributes:
        slots: texts at a time.
        length: tokens that the longest of all may have, its prompt among them.
        text_bytes: of keys and values of one so long.
        free: bytes of memory that are free, or None where nothing tells.
    """

    slots: int
    length: int
    text_bytes: int
    free: int | None

    def __str__(self) -> str:
        """The plan in words."""
        at_once = "1 text" if self.slots == 1 else f"{self.slots} texts"
        total = "" if self.slots == 1 else f" each, {_bytes(self.slots * self.text_bytes)} in all"
        free = "" if self.free is None else f"; {_bytes(self.free)} are free"
        return (
            f"{at_once} at a time, with caches of at most {_bytes(self.text_bytes)}{total} ({self.length:,} tokens)"
            f"{free}"
        )


def plan(model: GPT, prompts: Prompts, max_new_tokens: int, slots: int | None = None) -> Plan:
    """Say how many texts at a time `complete` should take: as many as fit into half of the free memory, at most `MOST`.

    Args:
        model: what is to generate.
        prompts: all of them, one at least.
        max_new_tokens: for each.
        slots: texts at a time; then they need only fit.

    Raises:
        GptlabError: they do not, or not even one; or numbers below 1.
    """
    check_new_tokens(max_new_tokens)
    if slots is not None and slots < 1:
        raise GptlabError(f"the batch size must be at least 1, got {slots}")
    n_prompt = max(map(len, prompts.values()))
    length = min(n_prompt + max_new_tokens, longest_text(model.config))
    held, passing = memory_of_text(model, length, n_prompt)
    free = available_memory(model.wte.weight.device)
    most = MOST if free is None else min(MOST, int(SHARE * free) // (held + passing))
    chosen = min(max(most, 1) if slots is None else slots, len(prompts))
    if free is not None and chosen * (held + passing) > free:
        texts = "1 text" if chosen == 1 else f"{chosen:,} texts"
        way_out = "ask for fewer new tokens, or leave the longest prompts out"
        if chosen > 1:
            way_out = f"take at most {free // (held + passing):,} at a time, or {way_out}"
        raise GptlabError(
            f"{texts} at a time take{'s' * (chosen == 1)} {_bytes(chosen * (held + passing))} when the longest has"
            f" {length:,} tokens, and {_bytes(free)} are free; {way_out}"
        )
    return Plan(chosen, length, held, free)


def complete(
    model: GPT,
    prompts: Prompts,
    begin: Callable[[], Continuation],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    vocab_size: int,
    never: Sequence[int] = (),
    slots: int = MOST,
    done: Collection[int] = (),
    compiled: bool | None = None,
    report: Report = lambda row: None,
) -> Iterator[tuple[int, Continuation]]:
    """Continue many prompts, a few at a time; yield (number, continuation) as texts are done.

    By the compiled step, a text that is done gives its place to the next prompt. The text of a prompt is then the
    same, whatever others are beside it and however many. Without the step, prompts of like length are continued in
    groups of ``slots`` by `decode`, each to the end of its longest text. What is drawn depends on the seed and the
    number of the text alone.

    Args:
        model: what computes the logits.
        prompts: at least one token each.
        begin: makes an empty continuation.
        sampling: how to choose tokens.
        max_new_tokens: for each text.
        vocab_size: as for `decode`.
        never: as for `decode`.
        slots: texts at a time; see `plan`.
        done: numbers of texts that are there already. A group of which some are missing is computed once more, so that
            these come out as they would have.
        compiled: whether to use the compiled step; None: where it serves.
        report: called with a row ``{"event": "step", "tokens": ...}`` now and then: new tokens of all texts so far.

    Raises:
        GptlabError: a prompt that the model cannot continue, before any is; or more memory needed than there is.
    """
    for prompt in prompts.values():
        check_prompt(prompt, model.config)
    if compiled is None:
        compiled = serves(model, len(prompts) * max_new_tokens)
    how = _continuous if compiled else _grouped
    return how(model, prompts, begin, _Settings(sampling, max_new_tokens, vocab_size, never, slots, done, report))


def _bytes(n: float) -> str:
    return memory(n).replace(NBSP, " ")


class _Settings(NamedTuple):
    """Those of `complete`."""

    sampling: Sampling
    max_new_tokens: int
    vocab_size: int
    never: Sequence[int]
    slots: int
    done: Collection[int]
    report: Report


def _continuous(
    model: GPT, prompts: Prompts, begin: Callable[[], Continuation], s: _Settings
) -> Iterator[tuple[int, Continuation]]:
    rows = Rows(model, vocab_size=s.vocab_size, never=s.never, compiled=True)
    waiting = [number for number in prompts if number not in s.done][::-1]
    n_tokens = 0
    while waiting or len(rows):
        while waiting and len(rows) < s.slots:
            number = waiting.pop()
            rows.admit(Row(Prompt(prompts[number]), begin(), s.sampling, number, s.max_new_tokens))
        stepped = rows.step()
        n_tokens += len(stepped)
        s.report({"event": "step", "tokens": n_tokens})
        for row, _ in stepped:
            if row.grown.finish is not None:
                yield row.number, row.grown


def _grouped(
    model: GPT, prompts: Prompts, begin: Callable[[], Continuation], s: _Settings
) -> Iterator[tuple[int, Continuation]]:
    by_length = sorted(prompts, key=lambda number: len(prompts[number]))
    n_tokens = 0
    for first in range(0, len(by_length), s.slots):
        group = by_length[first : first + s.slots]
        missing = {number for number in group if number not in s.done}
        if not missing:
            continue
        grown = [begin() for _ in group]
        pieces = decode(
            model,
            [list(prompts[number]) for number in group],
            grown,
            sampling=s.sampling,
            max_new_tokens=s.max_new_tokens,
            vocab_size=s.vocab_size,
            never=s.never,
            streams=group,
            compiled=False,
        )
        for row, _ in pieces:
            n_tokens += 1
            s.report({"event": "step", "tokens": n_tokens})
            if grown[row].finish is not None and group[row] in missing:
                missing.remove(group[row])
                yield group[row], grown[row]
