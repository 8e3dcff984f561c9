"""`gptlab generate --batch`: a file of prompts, continued into a file of answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import secrets
import sys
import time
from array import array
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gptlab.checkpoints.files import tensor_sha256
from gptlab.cli.answers import Answers, Settings
from gptlab.cli.progress import EVERY, duration
from gptlab.cli.prompts import Line, read_prompts
from gptlab.errors import GptlabError
from gptlab.generation.batch import plan
from gptlab.generation.compiled.decoder import serves
from gptlab.generation.engine import check_prompt
from gptlab.generation.sampling import Sampling
from gptlab.language_model import LanguageModel

SINGLE = ("the prompt", "--prompt-file", "--prompt-ids", "--num-samples", "--json")
"""What applies to a single prompt only."""


@dataclass(frozen=True)
class Asked:
    """What the command line says.

    Attributes:
        prompts: the file of prompts.
        out: the file of answers.
        model: its name.
        batch_size: texts at a time, or None for as many as suit.
        sampling: how to choose tokens; its seed is not looked at.
        seed: or None for a new one, or that of the answers that are there already.
        max_new_tokens: for each text.
        stop: strings before which a text ends.
        special: read special tokens in prompts as what they are.
        chat: the prompts are messages.
    """

    prompts: Path | None
    out: Path | None
    model: str
    batch_size: int | None
    sampling: Sampling
    seed: int | None
    max_new_tokens: int
    stop: list[str]
    special: bool
    chat: bool


def _files(asked: Asked, single: Sequence[Any]) -> tuple[Path, Path]:
    """Return the files of prompts and of answers; refuse options that do not go together."""
    if asked.prompts is None:
        option = "--batch-size" if asked.out is None else "--out"
        raise GptlabError(f"{option} goes with --batch; give a file of prompts, or leave it out")
    if asked.out is None:
        raise GptlabError("--batch needs a file for the answers; name one with --out answers.jsonl")
    given = next((name for name, value in zip(SINGLE, single, strict=True) if value is not None), None)
    if given:
        raise GptlabError(f"--batch reads its prompts from a file and writes JSON lines to another; leave {given} out")
    if asked.out.exists() and asked.prompts.exists() and asked.out.samefile(asked.prompts):
        raise GptlabError(f"--out is the file of prompts, {asked.prompts}; give another name")
    return asked.prompts, asked.out


def run(asked: Asked, single: Sequence[Any], load: Callable[[], LanguageModel]) -> None:
    """Continue all prompts that have no answer yet.

    Args:
        asked: what to do.
        single: the values of `SINGLE`, all of which should be None.
        load: returns the model.

    Raises:
        GptlabError: options that do not go together, a file that cannot be read or written, answers that were begun
            otherwise, no prompt that can be continued, or too little memory.
    """
    source, out = _files(asked, single)
    lines, sha256 = read_prompts(source)
    with Answers(out) as answers:
        lm = load()
        lm.new_continuations(1, asked.stop)  # refuses what is no stop string
        prompts, errors = _encoded(lm, lines, asked)
        begun = answers.begun
        compiled, size = serves(lm.model, len(lines) * asked.max_new_tokens), asked.batch_size
        if begun is not None and not begun.compiled:
            compiled, size = False, size or begun.batch_size
        made = plan(lm.model, prompts, asked.max_new_tokens, size)
        seed = asked.seed if asked.seed is not None else begun.seed if begun else secrets.randbits(32)
        sampling = dataclasses.replace(asked.sampling, seed=seed)
        answers.begin(_settings(asked, lm, sampling, (source.name, sha256), compiled, made.slots))
        there = f", {len(answers.done):,} of them done already" if answers.done else ""
        print(f"{len(lines):,} prompts{there}; {made}", file=sys.stderr, flush=True)
        for index in sorted(errors.keys() - answers.done):
            answers.write(_row(lm, index, lines[index]) | {"error": errors[index]})
        progress = BatchProgress(len(lines), answers.done)
        texts = lm.complete(
            prompts,
            sampling,
            asked.max_new_tokens,
            stop=asked.stop,
            slots=made.slots,
            done=frozenset(answers.done),
            compiled=compiled,
            report=progress,
        )
        try:
            with progress:
                for index, grown in texts:
                    row = {"text": grown.text, "tokens": grown.tokens, "finish": grown.finish}
                    answers.write(_row(lm, index, lines[index]) | row)
        finally:
            failed = f'; {answers.failed:,} without an answer, their "error" says why' if answers.failed else ""
            again = "" if sampling.temperature == 0 else f"; --seed {seed}"
            rest = "" if len(answers.done) == len(lines) else "; the same command goes on"
            print(f"[{progress}{failed}{again}{rest}]", file=sys.stderr)


def _encoded(lm: LanguageModel, lines: list[Line], asked: Asked) -> tuple[dict[int, array[int]], dict[int, str]]:
    """Return ids by index, and what is wrong with the lines that have none."""
    tokenizer = lm.needs_tokenizer()
    if not asked.special and not asked.chat:
        texts = [line.prompt for line in lines if isinstance(line.prompt, str)]
        special = next((name for name in tokenizer.special_tokens if any(name in text for text in texts)), None)
        if special:
            print(f"note: {special} in prompts is read as text; --special reads it as the token", file=sys.stderr)
    prompts, errors = {}, {}
    for index, line in enumerate(lines):
        try:
            if line.prompt is None:
                raise GptlabError(line.error)
            if asked.chat and isinstance(line.prompt, str):
                ids = lm.chat_ids(line.prompt)
            else:
                ids = lm.prompt_ids(line.prompt, special=asked.special)
            check_prompt(ids, lm.config)
            prompts[index] = array("i", ids)
        except GptlabError as error:
            errors[index] = str(error)
    if not prompts:
        first = next(iter(errors))
        raise GptlabError(f"no line of {asked.prompts} can be continued; of prompt {first + 1}: {errors[first]}")
    return prompts, errors


def _settings(
    asked: Asked, lm: LanguageModel, sampling: Sampling, source: tuple[str, str], compiled: bool, batch_size: int
) -> Settings:
    weights = {name: tensor_sha256(tensor.cpu()) for name, tensor in lm.model.tensors().items()}
    files = {name: hashlib.sha256(content).hexdigest() for name, content in lm.needs_tokenizer().files().items()}
    return Settings(
        prompts=source[0],
        prompts_sha256=source[1],
        model=asked.model,
        weights_sha256=_sha256([lm.config.to_dict(), weights]),
        tokenizer_sha256=_sha256(files),
        device=str(lm.model.wte.weight.device),
        special=asked.special,
        chat=asked.chat,
        max_new_tokens=asked.max_new_tokens,
        **dataclasses.asdict(sampling),
        stop=asked.stop,
        compiled=compiled,
        batch_size=batch_size,
    )


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _row(lm: LanguageModel, index: int, line: Line) -> dict[str, Any]:
    """What a line of the answers says of its prompt."""
    prompt = line.prompt
    if isinstance(prompt, list):
        size = lm.needs_tokenizer().vocab_size
        prompt = lm.needs_tokenizer().decode([i for i in prompt if 0 <= i < size])
    return {"index": index} | ({} if line.id is None else {"id": line.id}) | {"prompt": prompt}


class BatchProgress:
    """Shows how far a batch is: a bar on a terminal, else a line now and then. Use it as a context manager.

    Args:
        n_texts: all of them.
        done: those that are there by now.
        console: where to show; else standard error.
        clock: seconds.
    """

    def __init__(
        self,
        n_texts: int,
        done: Sized,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True, force_terminal=sys.stderr.isatty())
        self._clock, self._begun = clock, clock()
        self._printed = self._begun
        self._n_texts, self._done, self._n_before, self._n_tokens = n_texts, done, len(done), 0
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn()
        self._bar = Progress(*columns, console=self._console, transient=True, refresh_per_second=2)
        self._task = self._bar.add_task("texts", total=n_texts, completed=len(done), said="")

    def __enter__(self) -> BatchProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, row: dict[str, Any]) -> None:
        """Take a report of `complete`."""
        self._n_tokens = row["tokens"]
        now = self._clock()
        if self._console.is_terminal:
            self._bar.update(self._task, completed=len(self._done), said=self._rate())
        elif now - self._printed >= EVERY:
            self._printed = now
            since = len(self._done) - self._n_before
            left = (self._n_texts - len(self._done)) * (now - self._begun) / since if since else math.nan
            remaining = "" if math.isnan(left) else f", {duration(left)} left"
            print(f"{self}{remaining}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        """How far it is, in words."""
        return f"{len(self._done):,} of {self._n_texts:,} prompts, {self._n_tokens:,} tokens, {self._rate()}"

    def close(self) -> None:
        """Take the bar away."""
        if self._console.is_terminal:
            self._bar.stop()

    def _rate(self) -> str:
        return f"{self._n_tokens / max(self._clock() - self._begun, 1e-9):,.1f} tokens a second"
