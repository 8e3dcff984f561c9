"""`LanguageModel`: the only place that joins weights, a tokenizer and generation."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from gptlab import checkpoints
from gptlab.checkpoints import hub, native
from gptlab.checkpoints.runs import is_run, model_of
from gptlab.errors import GptlabError
from gptlab.generation.continuation import Continuation
from gptlab.generation.engine import decode
from gptlab.generation.sampling import Sampling
from gptlab.model.gpt import GPT, SCALES
from gptlab.text.tokenizers import Tokenizer


class LanguageModel:
    """A model with its tokenizer.

    Attributes:
        model: the `GPT`; call it with (B, T) int64 ids for (B, T, V) float32 logits.
        tokenizer: text to ids and back, or None: then only `model` and `save` are of use.
        config: the model's `ModelConfig`.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = model.config

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> list[str]:
        """Continue each prompt; all go through the model as one batch.

        Args:
            prompts: one text or several, of any lengths up to the model's context.
            max_new_tokens: most tokens to add to each.
            temperature: 0 is greedy; see `Sampling` for this and the next two.
            top_k: draw from the k best tokens only.
            top_p: draw from the best tokens that make up p of the probability only.
            seed: the same seed gives the same texts; None takes a new one.
            stop: end a text before any of these strings.

        Returns:
            The continuations, without their prompts, in the order of the prompts.

        Raises:
            GptlabError: no tokenizer, an empty or too long prompt, impossible sampling values.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        sampling = Sampling(temperature, top_k, top_p, secrets.randbits(32) if seed is None else seed)
        continuations = self.new_continuations(len(texts), stop)
        for _ in self.continue_all(texts, continuations, sampling, max_new_tokens):
            pass
        return [continuation.text for continuation in continuations]

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Yield the continuation of one prompt piece by piece, in whole characters. Arguments as `generate`."""
        sampling = Sampling(temperature, top_k, top_p, secrets.randbits(32) if seed is None else seed)
        pieces = self.continue_all([prompt], self.new_continuations(1, stop), sampling, max_new_tokens)
        return (piece for _, piece in pieces if piece)

    def new_continuations(self, n: int, stop: str | Sequence[str] = ()) -> list[Continuation]:
        """Return ``n`` empty continuations for `continue_all`."""
        words = [stop] if isinstance(stop, str) else list(stop)
        if "" in words:
            raise GptlabError("a stop string is empty; leave it out")
        return [Continuation(self.needs_tokenizer(), words) for _ in range(n)]

    def continue_all(
        self,
        prompts: Sequence[str | None],
        continuations: Sequence[Continuation],
        sampling: Sampling,
        max_new_tokens: int,
    ) -> Iterator[tuple[int, str]]:
        """Continue prompts together; yield (row, new text) and fill ``continuations``.

        A prompt of None starts from the end-of-text token: the beginning of a new document.
        """
        tokenizer = self.needs_tokenizer()
        if max_new_tokens < 1:
            raise GptlabError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        rows = [self._prompt_ids(tokenizer, prompt) for prompt in prompts]
        self.model.eval()
        return decode(
            self.model,
            rows,
            continuations,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            vocab_size=min(tokenizer.vocab_size, self.config.vocab_size),
        )

    def needs_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            GptlabError: there is none.
        """
        if self.tokenizer is None:
            raise GptlabError(
                "this model came without a tokenizer, so it has no text: put its tokenizer.json (or vocab.json and"
                " merges.txt) beside the weights, or name one, as in gptlab.load(..., tokenizer='gpt2')"
            )
        return self.tokenizer

    def _prompt_ids(self, tokenizer: Tokenizer, prompt: str | None) -> list[int]:
        if prompt is None:
            if tokenizer.end_of_text is None:
                raise GptlabError("this model's tokenizer has no <|endoftext|> to start from; give a prompt")
            ids = [tokenizer.end_of_text]
        elif not prompt:
            raise GptlabError("the prompt is empty; give it some text")
        else:
            ids = tokenizer.encode(prompt)
        if max(ids) >= self.config.vocab_size:
            raise GptlabError(
                f"the tokenizer gives ids up to {max(ids)}, the model has {self.config.vocab_size}: they do not fit"
            )
        return ids


def load(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    tokenizer: str | Tokenizer | None = None,
) -> LanguageModel:
    """Load a model by name or path.

    Args:
        name: a built-in model (``pocket``), a directory or a file in any format that `gptlab.checkpoints` reads,
            ``gpt2``, ``gpt2-medium``, ``gpt2-large``, ``gpt2-xl``, or ``owner/name`` on the Hugging Face hub. A `Path`
            is always a place on disk. The directory of a training run stands for its best checkpoint,
            ``"runs/a@last"`` for the last.
        dtype: of the weights in memory; norms, softmax and logits are computed in float32 in any case.
        device: where to put the model.
        tokenizer: ``"gpt2"``, ``"bytes"`` or a `Tokenizer`, in place of the one beside the weights.

    Raises:
        GptlabError: nothing of that name, no network, or a checkpoint that is damaged or does not fit.
    """
    if isinstance(name, Path) and is_run(name):
        name = model_of(name)
    checkpoint = checkpoints.read(name if isinstance(name, Path) else hub.locate(name), dtype)
    with torch.device("meta"):
        model = GPT(checkpoint.config)
    model.load_state_dict(checkpoint.state, strict=not checkpoint.config.tie_embeddings, assign=True)
    model.tie()
    chosen = checkpoint.tokenizer
    if isinstance(tokenizer, str):
        from gptlab.text.tokenizers import make_tokenizer

        chosen = make_tokenizer(tokenizer)
    elif tokenizer is not None:
        chosen = tokenizer
    return LanguageModel(model.to(device).eval(), chosen)


def save(
    lm: LanguageModel,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Save a model and its tokenizer in gptlab's own format; `load` gives the same model back.

    An earlier checkpoint in the directory is replaced only once the new one is wholly on disk.

    Args:
        lm: the model.
        directory: made when it does not exist.
        dtype: to store the weights in; None keeps theirs.
        files: to be written beside them, by name.

    Raises:
        GptlabError: the directory cannot be written, or the disk is full.
    """
    state = {
        name: tensor if dtype is None or name in SCALES else tensor.to(dtype)
        for name, tensor in lm.model.tensors().items()
    }
    native.write(Path(directory), checkpoints.Checkpoint(lm.config, state, lm.tokenizer), files)
