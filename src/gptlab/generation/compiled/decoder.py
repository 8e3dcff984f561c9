"""A batch by the compiled step: every prompt is read alone, then all take their steps together."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from gptlab.generation import padded
from gptlab.generation.compiled import linear
from gptlab.generation.compiled.library import NoLibraryError, is_built, library
from gptlab.generation.compiled.step import CompiledStep, Text
from gptlab.generation.memory import check_memory
from gptlab.generation.padded import FEWER, evaluating, last_logits, nothing
from gptlab.model.attention import CausalSelfAttention
from gptlab.model.gpt import GPT, MLP, Block, LayerNorm, RMSNorm, SwiGLU
from gptlab.model.linear import Linear
from gptlab.model.quantised import QuantisedEmbedding, QuantisedLinear, multiplied_by

_MODEL = {GPT, Block, CausalSelfAttention, LayerNorm, RMSNorm, MLP, SwiGLU, Linear}
KNOWN = _MODEL | {QuantisedLinear, QuantisedEmbedding}
"""The modules that the step computes, besides PyTorch's embeddings, dropout and containers."""
WORTH_BUILDING = 3e10
"""Weights times tokens from which on the step saves more time than it takes to build: 250 tokens of GPT-2's 124M."""

_log = logging.getLogger(__name__)


def serves(model: GPT, n_tokens: int) -> bool:
    """Say whether the compiled step is to compute ``n_tokens`` for this model.

    It is where all is on the CPU in float32, bfloat16 or quantised, nothing of the model has been replaced or hooked,
    and the step is built already, or worth it. Where it would be and cannot, a line in the log says why.
    """
    held = {torch.float32, torch.bfloat16, torch.int8}
    if any(tensor.device.type != "cpu" or tensor.dtype not in held for tensor in model.tensors().values()):
        return False
    for module in model.modules():
        plain = (nn.Embedding, nn.Dropout, nn.ModuleList)
        if (type(module) not in KNOWN and not isinstance(module, plain)) or _hooked(module):
            return False
    if not is_built():
        n_weights = sum(tensor.numel() for tensor in model.tensors().values())
        # Not every text becomes as long as it may. Quantised weights in plain PyTorch are slower than any others.
        if n_weights * min(n_tokens, 4096) < WORTH_BUILDING and model.wte.weight.is_floating_point():
            return False
        _log.info("compiling the decoding step for this processor, once; it takes about ten seconds")
    return can_serve()


def can_serve() -> bool:
    """Say whether there is a compiled step, building it where there is none; the log tells why not."""
    try:
        library()
    except NoLibraryError as error:
        _log.warning("decoding in plain PyTorch, which is slower: %s", error)
        return False
    return True


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class Compiled:
    """Decodes on the CPU.

    A row's logits are the same to the last bit whatever the other rows are.

    Args:
        model: what `serves` approves of.
        prompts: token ids of each row.
        length: most tokens that a row will have.
    """

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], length: int) -> None:
        self._model, self._prompts, self._length = model, prompts, length
        self._step = CompiledStep(model)
        self._texts: list[Text] = []

    def read(self) -> Tensor:
        """Read the prompts; return (B, V) float32 logits of what follows."""
        seen: dict[tuple[int, ...], tuple[Text, Tensor]] = {}
        logits = []
        for prompt in map(tuple, self._prompts):
            if prompt not in seen:
                text, after = read_prompt(self._model, prompt, self._length)
                seen[prompt] = text, after
            else:
                text, after = Text(copy.deepcopy(seen[prompt][0].cache)), seen[prompt][1]
            self._texts.append(text)
            logits.append(after)
        return torch.cat(logits)

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token (B,) of every row; return as `read`."""
        check_growth(self._texts)
        return self._step(self._texts, tokens.tolist())

    def keep(self, rows: list[int]) -> None:
        """Go on with some rows only."""
        self._texts = [self._texts[row] for row in rows]


def check_growth(texts: Sequence[Text]) -> None:
    """Raise a `GptlabError` where the memory does not suffice for one more token of each."""
    if more := sum(text.growth() for text in texts):
        said = f"going on after {max(text.length for text in texts):,} tokens takes"
        check_memory(more, torch.device("cpu"), said, FEWER)


def products(compiled: bool) -> AbstractContextManager[None]:
    """Inside the ``with`` block, weights in whole numbers are multiplied by the compiled product if there is one."""
    return multiplied_by(linear.multiply) if compiled else contextlib.nullcontext()


def read_prompt(model: GPT, prompt: Sequence[int], length: int, *, compiled: bool = True) -> tuple[Text, Tensor]:
    """Read a prompt, a chunk at a time; return it with a cache of its own and the logits (1, V) float32 that follow.

    Args:
        model: what computes the logits.
        prompt: token ids, at least one.
        length: most tokens that the text will have.
        compiled: whether there is a compiled step; its product of whole numbers then serves the prompt as well.
    """
    cache = model.make_cache(1, length, chunk=padded.CHUNK, reserve=len(prompt) + padded.RESERVE)
    ids = torch.tensor([prompt], device=model.wte.weight.device)
    rest = (len(prompt) - 1) // padded.CHUNK * padded.CHUNK
    with evaluating(list(model.modules())), products(compiled):
        for start in range(0, rest, padded.CHUNK):
            model(ids[:, start : start + padded.CHUNK], cache=cache, head=nothing)
        logits = model(ids[:, rest:], cache=cache, head=last_logits)
    return Text(cache), logits
