# The same model in `transformers`, and the obvious way to score text with it: one forward pass for each token.
from __future__ import annotations

from collections.abc import Iterator

import torch
import transformers
from torch import Tensor

from gptlab import GPT, ModelConfig


def theirs(model: GPT) -> transformers.GPT2LMHeadModel:
    """Their model with our weights; theirs are transposed ("Conv1D")."""
    ours = model.config
    config = transformers.GPT2Config(
        vocab_size=ours.vocab_size,
        n_positions=ours.context_length,
        n_embd=ours.n_embd,
        n_layer=ours.n_layer,
        n_head=ours.n_head,
        n_inner=ours.n_inner,
        layer_norm_epsilon=ours.norm_eps,
        bos_token_id=None,
        eos_token_id=None,
    )
    judge = transformers.GPT2LMHeadModel(config).eval()
    state = {}
    for name, value in model.state_dict().items():
        turned = name.startswith("h.") and value.ndim == 2
        state[name if name == "lm_head.weight" else f"transformer.{name}"] = value.T if turned else value
    judge.load_state_dict(state)
    return judge


def small(**overrides: object) -> GPT:
    """Random weights, large enough that predictions differ from place to place."""
    model = GPT(ModelConfig.preset("tiny", **{"vocab_size": 257, **overrides}), seed=3).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.15)
    return model


def random_ids(n: int, seed: int = 0, vocab_size: int = 257) -> list[int]:
    return torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def begins(n: int, context: int, stride: int) -> Iterator[tuple[int, int]]:
    """For each token after the first, where the window begins that scores it: the first on the grid that reaches it."""
    for target in range(1, n):
        windows_later = max(0, -(-(target - context) // stride))
        yield target, windows_later * stride


@torch.no_grad()
def one_by_one(judge: transformers.GPT2LMHeadModel, ids: list[int], context: int, stride: int) -> Tensor:
    """(n - 1,) log-probabilities, from the last position of a forward pass of its own for each token."""
    out = []
    for target, begin in begins(len(ids), context, stride):
        logits = judge(torch.tensor([ids[begin:target]]), use_cache=False).logits[0, -1]
        out.append(torch.log_softmax(logits.double(), -1)[ids[target]])
    return torch.stack(out).float()


@torch.no_grad()
def at_once(judge: transformers.GPT2LMHeadModel, ids: list[int]) -> Tensor:
    """The same for a text that fits into one window, from one forward pass."""
    logits = judge(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
    return torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]]


@torch.no_grad()
def by_windows(judge: transformers.GPT2LMHeadModel, ids: list[int], context: int, stride: int) -> Tensor:
    """The same with one forward pass a window, for models where one a token takes too long."""
    scored = torch.full((len(ids),), torch.nan)
    for begin in sorted({begin for _, begin in begins(len(ids), context, stride)}):
        window = torch.tensor([ids[begin : begin + context]])
        logprobs = torch.log_softmax(judge(window, use_cache=False).logits[0], -1)
        for target, its_begin in begins(len(ids), context, stride):
            if its_begin == begin:
                scored[target] = logprobs[target - begin - 1, ids[target]]
    return scored[1:]
