"""`LanguageModel`: the only place that joins weights, a tokenizer and generation."""

from __future__ import annotations

import operator
import os
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gptlab import checkpoints
from gptlab.checkpoints import hub, native
from gptlab.checkpoints.runs import is_run, model_of
from gptlab.devices import find_device, find_dtype, find_precision
from gptlab.errors import GptlabError
from gptlab.generation import batch
from gptlab.generation.compiled.decoder import can_serve
from gptlab.generation.continuation import Continuation
from gptlab.generation.engine import check_new_tokens, decode
from gptlab.generation.sampling import Sampling
from gptlab.model.gpt import GPT, SCALES
from gptlab.model.linear import fast_bfloat16
from gptlab.model.quantised import bits_of, quantise_model, restore
from gptlab.progress import Report
from gptlab.text.chat import render_chat
from gptlab.text.tokenizers import Tokenizer

Prompt = str | Sequence[int]
"""A text, or the ids of its tokens."""
_NAMING = "gptlab.load(..., tokenizer='gpt2'), or --tokenizer gpt2 of gptlab generate and gptlab evaluate"


class LanguageModel:
    """A model with its tokenizer.

    Attributes:
        model: the `GPT`; call it with (B, T) int64 ids for (B, T, V) float32 logits.
        tokenizer: text to ids and back, or None: then only `model` and `save` are of use.
        config: the model's `ModelConfig`.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer | None = None, *, no_tokenizer: str = "") -> None:
        """Join a model and its tokenizer; ``no_tokenizer`` says why there is none, where there is a reason."""
        self.model = model
        self.tokenizer = tokenizer
        self.config = model.config
        self._no_tokenizer = no_tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        special: bool = False,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
    ) -> list[str]:
        """Continue each prompt; all go through the model as one batch.

        Args:
            prompts: one text or several, of any lengths up to the model's context; in place of a text the ids of its
                tokens, which are taken as they are. What the tokenizer's template puts around a text is put there.
            max_new_tokens: most tokens to add to each.
            temperature: 0 is greedy; see `Sampling` for this and all that says how to draw.
            top_k: draw from the k best tokens only; 0 or None: from all.
            top_p: draw from the best tokens that make up p of the probability only.
            seed: the same seed gives the same texts; None takes a new one.
            stop: end a text before any of these strings.
            special: read special tokens such as ``<|endoftext|>`` in prompts as what they are, not as text.
            min_p: draw only from tokens with at least p times the probability of the best.
            repetition_penalty: above 1, tokens that stand in the text already are less likely.

        Returns:
            The continuations, without their prompts, in the order of the prompts.

        Raises:
            GptlabError: no tokenizer, an empty or too long prompt, ids that the model does not have, a character that
                the tokenizer cannot write, impossible sampling values, more memory needed than there is.
        """
        rows = _as_prompts(prompts)
        sampling = Sampling(temperature, top_k, top_p, _seed(seed), min_p, repetition_penalty)
        continuations = self.new_continuations(len(rows), stop)
        for _ in self.continue_all(rows, continuations, sampling, max_new_tokens, special=special):
            pass
        return [continuation.text for continuation in continuations]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        special: bool = False,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
    ) -> Iterator[str]:
        """Yield the continuation of one prompt piece by piece, in whole characters. Arguments as `generate`."""
        sampling = Sampling(temperature, top_k, top_p, _seed(seed), min_p, repetition_penalty)
        continuations = self.new_continuations(1, stop)
        pieces = self.continue_all([prompt], continuations, sampling, max_new_tokens, special=special)
        return (piece for _, piece in pieces if piece)

    def new_continuations(self, n: int, stop: str | Sequence[str] = ()) -> list[Continuation]:
        """Return ``n`` empty continuations for `continue_all`."""
        words = _stop_strings(stop)
        if "" in words:
            raise GptlabError("a stop string is empty; leave it out")
        return [Continuation(self.needs_tokenizer(), words) for _ in range(n)]

    def continue_all(
        self,
        prompts: Sequence[Prompt | None],
        continuations: Sequence[Continuation],
        sampling: Sampling,
        max_new_tokens: int,
        *,
        special: bool = False,
    ) -> Iterator[tuple[int, str]]:
        """Continue prompts together; yield (row, new text) and fill ``continuations``.

        A prompt of None starts from the tokenizer's `start_of_text`: the beginning of a new document. ``special`` as in
        `generate`.
        """
        self.needs_tokenizer()
        check_new_tokens(max_new_tokens)
        rows = [self.prompt_ids(prompt, special=special) for prompt in prompts]
        return decode(
            self.model, rows, continuations, sampling=sampling, max_new_tokens=max_new_tokens, **self.vocabulary()
        )

    def complete(
        self,
        prompts: Mapping[int, Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        *,
        stop: str | Sequence[str] = (),
        slots: int | None = None,
        done: Collection[int] = (),
        compiled: bool | None = None,
        report: Report = lambda row: None,
    ) -> Iterator[tuple[int, Continuation]]:
        """Continue thousands of prompts, a few at a time; yield (number, continuation) as texts are done.

        Args:
            prompts: ids, as `prompt_ids` and `chat_ids` return them, by a number that also chooses what is drawn.
            sampling: how to choose tokens.
            max_new_tokens: most tokens to add to each.
            stop: end a text before any of these strings.
            slots: texts at a time; None takes as many as `gptlab.generation.batch.plan` says.
            done: numbers of texts that are there already.
            compiled: as for `gptlab.generation.batch.complete`, which has more to say.
            report: likewise.

        Raises:
            GptlabError: no tokenizer, a prompt that the model cannot continue, more memory needed than there is.
        """
        self.new_continuations(1, stop)
        if not prompts:
            return iter(())
        return batch.complete(
            self.model,
            prompts,
            lambda: self.new_continuations(1, stop)[0],
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            slots=batch.plan(self.model, prompts, max_new_tokens, slots).slots,
            done=done,
            compiled=compiled,
            report=report,
            **self.vocabulary(),
        )

    def vocabulary(self) -> dict[str, Any]:
        """Return what `decode` and `Rows` are told about the ids that have a text."""
        tokenizer = self.needs_tokenizer()
        return {
            "vocab_size": min(tokenizer.vocab_size, self.config.vocab_size),
            "never": [token for token in tokenizer.holes if token < self.config.vocab_size],
        }

    def needs_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            GptlabError: there is none.
        """
        if self.tokenizer is None:
            if self._no_tokenizer:
                raise GptlabError(f"{self._no_tokenizer}; or name another one: {_NAMING}")
            raise GptlabError(
                "this model came without a tokenizer, so it has no text: put its tokenizer.json (or vocab.json and"
                f" merges.txt) beside the weights, or name one: {_NAMING}"
            )
        return self.tokenizer

    def chat_ids(self, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Return the prompt for an answer to a message, or to the last of a conversation, as ids for `generate`.

        Args:
            messages: one text of the user, or messages as `render_chat` takes them. As in transformers, special tokens
                are read as what they are, in messages too.

        Raises:
            GptlabError: no tokenizer, or no chat template.
        """
        tokenizer = self.needs_tokenizer()
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = render_chat(tokenizer, messages)
        return tokenizer.encode(text, special=bool(tokenizer.special_tokens))

    def prompt_ids(self, prompt: Prompt | None, *, special: bool = False) -> list[int]:
        """Return the ids that `generate` begins with.

        Args:
            prompt: a text, ids, which are checked, or None for the beginning of a new document.
            special: as in `generate`.

        Raises:
            GptlabError: no tokenizer, an empty prompt, ids that the model does not have, or a character that the
                tokenizer cannot write.
        """
        tokenizer = self.needs_tokenizer()
        if prompt is None:
            if tokenizer.start_of_text is None:
                raise GptlabError("this model's tokenizer has no <|endoftext|> to start from; give a prompt")
            ids = [tokenizer.start_of_text]
        elif hasattr(prompt, "__len__") and not len(prompt):
            raise GptlabError("the prompt is empty; give it some text")
        elif isinstance(prompt, str):
            ids = tokenizer.encode_prompt(prompt, special=special)
        else:
            ids = self._checked_ids(prompt)
        if max(ids, default=0) >= self.config.vocab_size:
            raise GptlabError(
                f"the tokenizer gives ids up to {max(ids)}, the model has {self.config.vocab_size}: they do not fit"
            )
        return ids

    def _checked_ids(self, prompt: Sequence[int]) -> list[int]:
        try:
            ids = [operator.index(token) for token in prompt]
        except TypeError:
            raise GptlabError(f"a prompt is a text or a list of token ids, got {prompt!s:.40}") from None
        for token in ids:
            if not 0 <= token < self.config.vocab_size:
                raise GptlabError(
                    f"the prompt has the token id {token}, the model's are 0 to {self.config.vocab_size - 1}"
                )
        return ids


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return several prompts: ids are one prompt, as a text is."""
    if isinstance(prompts, str):
        return [prompts]
    values: Any = prompts.tolist() if hasattr(prompts, "tolist") else prompts  # arrays and tensors too
    if not isinstance(values, Iterable) or isinstance(values, (bytes, bytearray, Mapping)):
        raise GptlabError(f"a prompt is a text or a list of token ids, got {type(values).__name__} {values!s:.40}")
    rows: list[Any] = list(values)
    several = all(hasattr(row, "__len__") and not isinstance(row, bytes) for row in rows)
    return rows if several else [rows]


def _stop_strings(stop: Any) -> list[str]:
    words = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, Iterable) else [stop]
    for word in words:
        if not isinstance(word, str):
            raise GptlabError(f"stop must be a text or a list of texts, got {type(word).__name__} {word!s:.40}")
    return words


def _seed(seed: int | None) -> int:
    return secrets.randbits(32) if seed is None else seed


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    tokenizer: str | Tokenizer | None = None,
) -> LanguageModel:
    """Load a model by name or path.

    Args:
        name: a built-in model (``pocket``), a directory or a file in any format that `gptlab.checkpoints` reads,
            ``smollm2`` (of an installed package), ``gpt2``, ``gpt2-medium``, ``gpt2-large``, ``gpt2-xl``, or
            ``owner/name`` on the Hugging Face hub. A `Path` is always a place on disk. The directory of a training run
            stands for its best checkpoint, ``"runs/a@last"`` for the last.
        dtype: of the weights in memory: ``torch.bfloat16`` or ``"bfloat16"``, ``"int8"`` or ``"int4"`` for weights
            rounded to whole numbers (`gptlab.model.quantised`), ``"auto"`` for the fastest here that keeps the quality.
            None is float32, or what the model was saved in where that is whole numbers. Norms, softmax and logits are
            computed in float32 in any case.
        device: where to put the model: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
        tokenizer: ``"gpt2"``, ``"bytes"`` or a `Tokenizer`, in place of the one beside the weights.

    Raises:
        GptlabError: nothing of that name, no network, a checkpoint that is damaged or does not fit, a dtype or a device
            that is not there.
    """
    name = Path(name) if isinstance(name, os.PathLike) else name
    if not isinstance(name, (str, Path)):
        raise GptlabError(f"the model must be a name or a directory, got {type(name).__name__} {name!s:.40}")
    device = find_device(device)
    read_as, bits = (None, None) if dtype is None else find_precision(_fastest(device) if dtype == "auto" else dtype)
    if isinstance(name, Path) and is_run(name):
        name = model_of(name)
    place = name if isinstance(name, Path) else hub.locate(name)
    checkpoint = checkpoints.read(place, read_as if bits is None else None)
    if bits is not None and checkpoint.bits not in (None, bits):  # saved in other whole numbers than are asked for
        checkpoint = checkpoints.read(place, read_as)
    with torch.device("meta"):
        model = GPT(checkpoint.config)
    if checkpoint.bits is None:
        model.load_state_dict(checkpoint.state, strict=not checkpoint.config.tie_embeddings, assign=True)
        model.tie()
    else:
        restore(model, checkpoint.state)
    if bits is not None and checkpoint.bits is None:
        quantise_model(model, bits)
    chosen = checkpoint.tokenizer
    if isinstance(tokenizer, str):
        from gptlab.text.tokenizers import make_tokenizer

        chosen = make_tokenizer(tokenizer)
    elif isinstance(tokenizer, Tokenizer):
        chosen = tokenizer
    elif tokenizer is not None:
        raise GptlabError(f"the tokenizer must be 'gpt2', 'bytes' or a Tokenizer, got {type(tokenizer).__name__}")
    return LanguageModel(model.to(device).eval(), chosen, no_tokenizer=checkpoint.no_tokenizer)


def _fastest(device: torch.device) -> str:
    """What ``auto`` stands for: int8 where the compiled step multiplies it, else bfloat16 where that is fast."""
    if device.type == "cpu":
        return "int8" if can_serve() else "bfloat16" if fast_bfloat16() else "float32"
    return "bfloat16" if device.type == "cuda" else "float32"


def save(
    lm: LanguageModel,
    directory: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Save a model and its tokenizer in gptlab's own format; `load` gives the same model back.

    An earlier checkpoint in the directory is replaced only once the new one is wholly on disk.

    Args:
        lm: the model.
        directory: made when it does not exist.
        dtype: to store the weights in; None keeps theirs, which may be whole numbers.
        files: to be written beside them, by name.

    Raises:
        GptlabError: the directory cannot be written, the disk is full, or something is not what it should be.
    """
    if not isinstance(lm, LanguageModel):
        raise GptlabError(f"save takes a LanguageModel, got {type(lm).__name__}; wrap a GPT in LanguageModel(model)")
    if not isinstance(directory, (str, os.PathLike)) or not str(directory):
        raise GptlabError(f"the place to save to must be the path of a directory, got {directory!r}")
    stored, bits = None if dtype is None else find_dtype(dtype), bits_of(lm.model)
    if stored is not None and bits is not None:
        raise GptlabError(f"the model's weights are in {bits} bits already; leave out dtype")
    state = {
        name: tensor if stored is None or name in SCALES else tensor.to(stored)
        for name, tensor in lm.model.tensors().items()
    }
    native.write(Path(directory), checkpoints.Checkpoint(lm.config, state, lm.tokenizer, bits=bits), files)
