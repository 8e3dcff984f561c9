"""Texts that come and go at any time: each has its own prompt, cache, sampling and random stream, and they share steps.

`gptlab.generation.batch` and the server bring the prompts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.generation.compiled.decoder import check_growth, products, read_prompt
from gptlab.generation.compiled.step import CompiledStep, Text
from gptlab.generation.continuation import Continuation
from gptlab.generation.engine import allowed, check_prompt, longest_text, random_stream, shortage_in_words, tokens_of
from gptlab.generation.padded import CHUNK, RESERVE, evaluating, last_logits
from gptlab.generation.sampling import Sampling, choose, penalised
from gptlab.generation.together import Together
from gptlab.model.gpt import GPT
from gptlab.model.linear import Linear
from gptlab.model.quantised import matrix

HEAD_ROWS = 256
"""Positions of a prompt whose logits are there at once, as in `gptlab.evaluation`: 50 MB with GPT-2's vocabulary."""


class TokenScore(NamedTuple):
    """What the model thought of one token, before temperature and all else that bends the odds.

    Attributes:
        logprob: natural log-probability of the token, given those before it.
        top: the likeliest tokens in its place, best first, with theirs.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class Prompt:
    """What one row or several begin with; it is read once for all of them.

    Args:
        ids: at least one token.
        rows: how many rows will begin with it.
        top: score every token but the first, with so many of the likeliest in its place; None: do not.

    Attributes:
        scores: of all tokens but the first, in their order, once the prompt has been read.
    """

    def __init__(self, ids: Sequence[int], rows: int = 1, top: int | None = None) -> None:
        self.ids = list(ids)
        self.top = top
        self.scores: list[TokenScore] = []
        self._expected = rows
        self._read: tuple[Text, Tensor] | None = None

    def begin(self, rows: Rows, length: int) -> tuple[Text, Tensor]:
        """Return a text of its own for one row, and the logits (1, V) that follow."""
        text, logits = self._read or rows.read(self, length)
        self._expected -= 1
        self._read = (text, logits) if self._expected > 0 else None
        return (Text(copy.deepcopy(text.cache)) if self._expected > 0 else text), logits


@dataclass(eq=False)
class Row:
    """One text that is being continued.

    Attributes:
        prompt: what it begins with.
        grown: its continuation, which tells when it is done.
        sampling: how to choose its tokens.
        number: with the seed, the number of its random stream.
        max_new_tokens: after which it ends; 0 only reads the prompt.
        top: score every new token, with so many of the likeliest in its place; None: do not.
        drawn: the new tokens, the one that ended the text among them.
        scores: of ``drawn``, where asked for.
    """

    prompt: Prompt
    grown: Continuation
    sampling: Sampling
    number: int
    max_new_tokens: int
    top: int | None = None
    drawn: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)


class _State(NamedTuple):
    row: Row
    text: Text
    random: np.random.Generator
    present: Tensor | None  # (1, V) bool: is the token in the text? None without a repetition penalty
    alike: Sampling  # without its seed: rows for which it is the same are sampled together


class Rows:
    """The rows that are being continued.

    By the compiled step a row's text is the same whatever rows are beside it. Without it rows share forward passes of
    PyTorch, so that its logits depend on the others by rounding.

    Args:
        model: what computes the logits, in eval mode.
        vocab_size: ids that the tokenizer can decode; logits beyond it are never sampled.
        never: ids below that which it cannot decode.
        compiled: whether to use the compiled step, where it serves.
    """

    def __init__(self, model: GPT, *, vocab_size: int, never: Sequence[int] = (), compiled: bool) -> None:
        self._model, self._vocab_size, self._never = model, vocab_size, list(never)
        self._device = model.wte.weight.device
        self._step = CompiledStep(model) if compiled else Together(model)
        self._limit = longest_text(model.config)
        self._states: list[_State] = []
        self._first: list[Tensor] = []  # (1, V): of the last rows of all, which have only been read

    def __len__(self) -> int:
        return len(self._states)

    @torch.inference_mode()
    def admit(self, row: Row) -> None:
        """Read a row's prompt and continue it from the next step on; with no tokens to add it is done at once.

        Raises:
            GptlabError: a prompt that the model cannot continue, or more memory needed than there is; the other rows
                go on as they were.
        """
        ids, config = row.prompt.ids, self._model.config
        check_prompt(ids, config)
        with shortage_in_words():
            shared = isinstance(self._step, Together)  # caches that are to be joined are made for one length
            length = self._limit if shared else min(len(ids) + row.max_new_tokens, self._limit)
            text, logits = row.prompt.begin(self, length)
            penalised_too = row.sampling.repetition_penalty != 1
            present = tokens_of([ids], config.vocab_size, self._device) if penalised_too else None
        if row.max_new_tokens == 0:
            row.grown.close("length")
            return
        alike = replace(row.sampling, seed=0)
        self._states.append(_State(row, text, random_stream(row.sampling, row.number), present, alike))
        self._first.append(logits)

    def drop(self, rows: Iterable[Row]) -> None:
        """Let go of rows before they are done."""
        gone = set(map(id, rows))
        n_read = len(self._states) - len(self._first)
        staying = [i for i, state in enumerate(self._states) if id(state.row) not in gone]
        self._first = [self._first[i - n_read] for i in staying if i >= n_read]
        self._keep(staying)

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, str]]:
        """Add a token to every row; return each with the text that has appeared. Those that are done are let go.

        Raises:
            GptlabError: more memory needed than there is; the rows cannot go on together, and must be dropped.
        """
        if not self._states:
            return []
        states = self._states
        with shortage_in_words():
            logits = self._logits()
            asked = [i for i, state in enumerate(states) if state.row.top is not None]
            raw = logits[asked]  # a copy
            chosen = self._choose(logits)
            most = max((state.row.top or 0 for state in states), default=0)
            scores = _scores(raw, chosen[asked], self._listed(raw.shape[1]), most)
        for i, score in zip(asked, scores, strict=True):
            row = states[i].row
            row.scores.append(TokenScore(score.logprob, score.top[: row.top]))
        pieces = []
        for state, token in zip(states, chosen.tolist(), strict=True):
            if state.present is not None:
                state.present[0, token] = True
            row = state.row
            row.drawn.append(token)
            piece = row.grown.add(token)
            # As in `decode`: the token just drawn must itself be read before another can follow it.
            if len(row.prompt.ids) + len(row.grown.tokens) > self._limit:
                piece += row.grown.close("context")
            elif len(row.drawn) == row.max_new_tokens:
                piece += row.grown.close("length")
            pieces.append((row, piece))
        self._first = []
        self._keep([i for i, state in enumerate(states) if state.row.grown.finish is None])
        return pieces

    @torch.inference_mode()
    def score(self, ids: Sequence[int], top: int) -> list[TokenScore]:
        """Score every token but the first, as those of a prompt are; the last may lie beyond the table of positions."""
        prompt = Prompt(ids[: self._limit], top=top)
        _, logits = self.read(prompt, len(prompt.ids))
        beyond = torch.tensor(ids[self._limit :], dtype=torch.int64, device=self._device)
        return prompt.scores + _scores(logits, beyond, self._listed(logits.shape[1]), top)

    def read(self, prompt: Prompt, length: int) -> tuple[Text, Tensor]:
        """Read a prompt, a chunk at a time, and score it where asked; return its text and the logits (1, V) after."""
        if prompt.top is None:
            return read_prompt(self._model, prompt.ids, length, compiled=self._step is not None)
        model, ids = self._model, torch.tensor([prompt.ids], device=self._device)
        cache = model.make_cache(1, length, chunk=CHUNK, reserve=len(prompt.ids) + RESERVE)
        weight = matrix(model.lm_head)
        with evaluating(list(model.modules())), products(self._step is not None):
            for start in range(0, len(prompt.ids), CHUNK):
                head = _Scoring(weight, ids[0, start + 1 : start + CHUNK + 1], self._listed(weight.shape[0]), prompt)
                logits = model(ids[:, start : start + CHUNK], cache=cache, head=head)
        return Text(cache), logits

    def _logits(self) -> Tensor:
        """Logits (B, V) of what follows every row."""
        n_read = len(self._states) - len(self._first)
        going_on = self._states[:n_read]
        ids = [state.row.drawn[-1] for state in going_on]
        texts = [state.text for state in going_on]
        if isinstance(self._step, CompiledStep):
            check_growth(texts)
        logits = [self._step(texts, ids)] if texts else []
        if len(logits) == 1 and not self._first:
            return logits[0]  # most steps need no copy; the first logits of a prompt belong to other rows too
        return torch.cat([*logits, *self._first])

    def _choose(self, logits: Tensor) -> Tensor:
        """(B, V) logits -> (B,) int64; rows that are sampled alike are sampled together."""
        uniforms = torch.tensor(
            [state.random.random() for state in self._states], dtype=torch.float64, device=self._device
        )
        groups: dict[Sampling, list[int]] = {}
        for i, state in enumerate(self._states):
            groups.setdefault(state.alike, []).append(i)
        chosen = torch.empty(len(self._states), dtype=torch.int64, device=self._device)
        for sampling, members in groups.items():
            part = logits if len(groups) == 1 else logits[members]
            marks = [present for i in members if (present := self._states[i].present) is not None]
            if marks:
                part = penalised(part, torch.cat(marks), sampling.repetition_penalty)
            chosen[members] = choose(allowed(part, self._vocab_size, self._never), sampling, uniforms[members])
        return chosen

    def _listed(self, n_vocab: int) -> Tensor:
        """(V,) bool: tokens that have a text, so that they can be listed among the likeliest."""
        listed = torch.arange(n_vocab, device=self._device) < self._vocab_size
        listed[self._never] = False
        return listed

    def _keep(self, staying: list[int]) -> None:
        if len(staying) < len(self._states):
            self._states = [self._states[i] for i in staying]
            if isinstance(self._step, Together):
                self._step.keep([state.text for state in self._states])
            else:
                self._step.release()


class _Scoring:
    """A head for `GPT.forward` that scores a part of a prompt, and returns the logits (1, V) after it.

    The output head is computed in float32 whatever the weights are, as in `gptlab.evaluation`.
    """

    def __init__(self, weight: Tensor, targets: Tensor, listed: Tensor, prompt: Prompt) -> None:
        self._weight, self._targets, self._listed, self._prompt = weight, targets, listed, prompt

    def __call__(self, hidden: Tensor, lm_head: Linear) -> Tensor:
        for start in range(0, len(self._targets), HEAD_ROWS):
            targets = self._targets[start : start + HEAD_ROWS]
            logits = F.linear(hidden[0, start : start + len(targets)].float(), self._weight)
            self._prompt.scores += _scores(logits, targets, self._listed, self._prompt.top or 0)
        return last_logits(hidden, lm_head)


def _scores(logits: Tensor, targets: Tensor, listed: Tensor, top: int) -> list[TokenScore]:
    """Score targets (N,) by logits (N, V) float32, which are written over."""
    if not len(targets):
        return []
    total = logits.logsumexp(1, keepdim=True)
    own = (logits.gather(1, targets[:, None]) - total)[:, 0].tolist()
    if not top:
        return [TokenScore(logprob, ()) for logprob in own]
    best, ids = logits.masked_fill_(~listed, -torch.inf).topk(min(top, int(listed.sum())), dim=1)
    pairs = zip((best - total).tolist(), ids.tolist(), strict=True)
    return [
        TokenScore(logprob, tuple(zip(tokens, values, strict=True)))
        for logprob, (values, tokens) in zip(own, pairs, strict=True)
    ]
