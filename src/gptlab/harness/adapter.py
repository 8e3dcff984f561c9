"""A gptlab model as EleutherAI's lm-evaluation-harness 0.4.13 wants it (Gao et al. 2021).

The harness asks three things of a model: how likely a continuation is after a context, how likely a whole text is, and
how it continues. What is encoded, cut off and put in front is what the harness's own class for Hugging Face models does
with GPT-2, so that scores are the same; computing is gptlab's own.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gptlab.errors import GptlabError, nearest
from gptlab.evaluation.batches import DTYPES
from gptlab.evaluation.scoring import completion_logprobs, completion_window, window_length
from gptlab.evaluation.tasks import identity
from gptlab.generation.continuation import Continuation
from gptlab.generation.engine import decode
from gptlab.generation.rows import Rows
from gptlab.generation.sampling import Sampling
from gptlab.language_model import load
from gptlab.text.chat import render_chat
from gptlab.text.tokenizers import END_OF_TEXT

AUTO_ROWS = 8
"""Texts that are continued together with ``--batch_size auto``."""
KEPT = 1024
"""Requests after which answers go into the harness's cache (``--use_cache``)."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""What the harness calls the request, context ids, continuation ids."""


def register() -> None:
    """Make the model type ``gptlab`` known to the harness."""
    if "gptlab" not in model_registry:
        model_registry.register("gptlab")(GptlabLM)


class GptlabLM(TemplateLM):  # type: ignore[misc]
    """What ``--model gptlab --model_args path=NAME,...`` makes.

    Args:
        path: anything that `gptlab.load` takes: a directory, ``gpt2``, ``pocket``, ``owner/name``.
        dtype: ``float32`` or ``bfloat16``.
        tokenizer: ``gpt2`` or ``bytes``, for weights without one.
        max_length: tokens of a window; by default the model's context.
        prefix_token_id: stands before a text that has no context; by default the end of text.
        batch_size: windows of ``max_length`` tokens to compute at once (shorter requests share them), and texts to
            continue at once; or ``auto``. With 1 every request is read alone, as `gptlab serve` reads it, so that the
            scores are the server's to the last digit.
        device: the harness gives ``cuda:0`` by default; where there is no such device, the CPU is taken.

    Raises:
        GptlabError: an unknown argument, or what `gptlab.load` raises.
    """

    max_gen_toks = 256

    def __init__(
        self,
        path: str = "",
        *,
        dtype: str = "float32",
        tokenizer: str | None = None,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        known = ("path", "dtype", "tokenizer", "max_length", "prefix_token_id", "batch_size", "device")
        if unknown:
            name = next(iter(unknown))
            raise GptlabError(f"--model gptlab takes no {name!r}{nearest(name, known)}; it takes {', '.join(known)}")
        if not path:
            raise GptlabError("--model gptlab needs the model's name or directory: --model_args path=gpt2")
        if dtype not in DTYPES:
            raise GptlabError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}{nearest(dtype, DTYPES)}")
        self._device = torch.device(device if device and (torch.cuda.is_available() or "cuda" not in device) else "cpu")
        lm = load(str(path), dtype=DTYPES[dtype], device=self._device, tokenizer=tokenizer)
        self._model, self._tokenizer = lm.model, lm.needs_tokenizer()
        self._path, self._dtype = str(path), dtype
        self.max_length = window_length(self._model, max_length)
        self._prefix = prefix_token_id
        auto = str(batch_size) == "auto"
        if not auto and not (str(batch_size).isdecimal() and int(batch_size) >= 1):
            raise GptlabError(f"batch_size must be a whole number of at least 1, or auto, got {batch_size!r}")
        self.batch_size = batch_size
        self._rows = AUTO_ROWS if auto else int(batch_size)
        self._alone = Rows(self._model, vocab_size=self._model.config.vocab_size, compiled=False)
        self._batch_tokens = None if auto else int(batch_size) * self.max_length

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        if self._tokenizer.end_of_text is None:
            raise GptlabError(
                f"the tokenizer of {self._path} has no {END_OF_TEXT}, which stands before a text that has no context;"
                " name another token: --model_args prefix_token_id=ID"
            )
        return self._tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text that has no context."""
        if self._prefix is None and self._tokenizer.start_of_text is not None:
            return self._tokenizer.start_of_text
        return self.eot_token_id if self._prefix is None else self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text; special tokens in it are tokens.

        What the tokenizer's template puts around a text is put there (GPT-2's puts nothing), unless the text brings
        the first token itself.
        """
        tokenizer = self._tokenizer
        ids = tokenizer.encode(string, special=bool(tokenizer.special_tokens))
        if add_special_tokens is None:
            start = self._prefix if self._prefix is not None else tokenizer.start_of_text
            add_special_tokens = start is None or not string.startswith(tokenizer.decode([start]))
        return [*tokenizer.before, *ids, *tokenizer.after] if add_special_tokens else ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the model's template; called with ``--apply_chat_template`` only."""
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise GptlabError(f"gptlab's models have one chat template at most, and none named {chat_template!r}")
        if self._tokenizer.chat_template is None:
            raise GptlabError(f"{self._path} has no chat template; leave --apply_chat_template out")
        return self._tokenizer.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the template writes it."""
        return render_chat(self._tokenizer, chat_history, answer=add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer and template from others in the harness's cache of requests."""
        template = hashlib.sha256((self._tokenizer.chat_template or "").encode()).hexdigest()
        return f"gptlab-{self._tokenizer.sha256[:16]}-{template[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes beside its results."""
        info = identity(self._model, self._path)
        return {
            "model_num_parameters": info["parameters"],
            "model_sha": info["sha256"],
            "model_dtype": self._dtype,
            "model_max_length": self.max_length,
            "model_config": self._model.config.to_dict(),
        }

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return for each request the log-probability of its continuation, and whether greedy decoding gives it."""
        too_long = sum(len(before) + len(after) > self.max_length + 1 for _, before, after in requests)
        if too_long:
            logging.getLogger(__name__).warning(
                "%d of %d requests exceed %d tokens; their contexts are cut off on the left",
                too_long,
                len(requests),
                self.max_length,
            )
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][1]) + len(requests[i][2]), reverse=True)
        answers: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for start in range(0, len(order), KEPT):
                part = order[start : start + KEPT]
                score = self._score_together if self._batch_tokens != self.max_length else self._score_alone
                for i, answer in zip(part, score([requests[i][1:] for i in part]), strict=True):
                    answers[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                bar.update(len(part))
        return answers

    def _score_together(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        completions = completion_logprobs(
            self._model, pairs, context=self.max_length, batch_tokens=self._batch_tokens, dtype=self._dtype
        )
        return [(sum(completion.logprobs.tolist()), completion.greedy) for completion in completions]

    def _score_alone(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        for before, after in pairs:
            window = completion_window(self._model, before, after, self.max_length)
            scores = self._alone.score(window.tolist(), top=1)[-len(after) :]
            greedy = all(score.top[0][0] == token for score, token in zip(scores, after, strict=True))
            yield sum(score.logprob for score in scores), greedy

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text: windows that do not overlap, but for the last, which is full."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for before, after in map(make_disjoint_window, rolling):
                windows.append((None, before, after))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return how the model continues each context, up to the first stop string."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for members in groups.values():
                arguments = requests[members[0]].args[1]
                for i, text in self._continue(arguments, {i: requests[i].args[0] for i in members}):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update()
        return texts

    def _continue(self, arguments: dict[str, Any], contexts: dict[int, str]) -> Iterator[tuple[int, str]]:
        """Yield the continuation of every context, longest context first."""
        chosen: dict[str, Any] = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        end = self._tokenizer.end_of_text
        eos = END_OF_TEXT if end is None else self._tokenizer.decode([end])
        stops = [stop for stop in handle_stop_sequences(chosen.pop("until"), eos=eos) if stop]
        most = chosen.pop("max_gen_toks")
        room = self.max_length - most
        if room < 1:
            raise GptlabError(
                f"the task asks for {most} new tokens, which leaves no room for its text in a window of"
                f" {self.max_length}; ask for fewer: --gen_kwargs max_gen_toks=N"
            )
        prompts = {i: self.tok_encode(text)[-room:] or [self.prefix_token_id] for i, text in contexts.items()}
        order = sorted(prompts, key=lambda i: len(prompts[i]), reverse=True)
        for start in range(0, len(order), self._rows):
            part = order[start : start + self._rows]
            continuations = [Continuation(self._tokenizer, stops) for _ in part]
            for _ in decode(
                self._model,
                [prompts[i] for i in part],
                continuations,
                sampling=_sampling(chosen),
                max_new_tokens=most,
                vocab_size=min(self._tokenizer.vocab_size, self._model.config.vocab_size),
                never=[token for token in self._tokenizer.holes if token < self._model.config.vocab_size],
            ):
                pass
            for i, continuation in zip(part, continuations, strict=True):
                # As the harness decodes: without special tokens.
                special = set(self._tokenizer.special_tokens.values())
                text = self._tokenizer.decode(token for token in continuation.tokens if token not in special)
                yield i, postprocess_generated_text(text, stops, think_end_token=None)


def _sampling(arguments: dict[str, Any]) -> Sampling:
    """Return how to choose tokens, with a new seed from the generator that the harness seeds.

    With one seed for all batches, a prompt that comes in two of them would be continued alike.
    """
    known = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    if unknown := [name for name in arguments if name not in known]:
        raise GptlabError(f"gptlab does not generate with {unknown[0]!r}; it knows {', '.join(known)}")
    return Sampling(
        temperature=float(arguments.get("temperature", 1.0)) if arguments["do_sample"] else 0.0,
        top_k=int(arguments.get("top_k") or 0),
        top_p=arguments.get("top_p"),
        min_p=arguments.get("min_p"),
        repetition_penalty=float(arguments.get("repetition_penalty", 1.0)),
        seed=int(torch.randint(2**31, ())),
    )
