# gptlab against GPT2LMHeadModel of `transformers`, which knows nothing of gptlab.
from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.judge import greedy_until_unclear, judge, positions_of
from helpers.models import close, random_ids
from torch import Tensor
from torch.nn import functional as F

import gptlab
from gptlab import GPT
from gptlab.checkpoints.huggingface.gpt2 import CONV1D
from gptlab.generation.continuation import Continuation
from gptlab.generation.engine import decode
from gptlab.generation.sampling import Sampling
from gptlab.text.tokenizers import byte_tokenizer

Pair = tuple[transformers.GPT2LMHeadModel, GPT]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "n_inner": {"n_inner": 37},
    "exact gelu": {"activation_function": "gelu"},
    "odd vocabulary": {"vocab_size": 101},
    "untied": {"tie_word_embeddings": False},
    "large epsilon": {"layer_norm_epsilon": 1e-2},
    "one head": {"n_head": 1},
    "one layer": {"n_layer": 1},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "unscaled scores": {"scale_attn_weights": False},
    "scores scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "as CodeParrot": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "all at once": {
        "n_inner": 51,
        "activation_function": "gelu_pytorch_tanh",
        "vocab_size": 3,
        "tie_word_embeddings": False,
        "layer_norm_epsilon": 1e-3,
    },
}


def both(directory: Path, seed: int = 0, **overrides: Any) -> Pair:
    theirs = judge(seed, **overrides)
    theirs.save_pretrained(directory)
    return theirs, gptlab.load(directory).model


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    return both(tmp_path, **VARIANTS[request.param])


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return both(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["exact gelu", "large epsilon", "one head", "relu", "unscaled scores", "scores scaled by layer"]
)
def test_a_variant_is_a_function_of_its_own(name: str) -> None:
    # These have the shapes of the plain one: were they the same function, agreement on them would show nothing.
    plain, changed = judge(), judge(**VARIANTS[name])
    plain.load_state_dict(changed.state_dict())
    ids = random_ids(257, 2, 30)
    assert (plain(ids).logits - changed(ids).logits).abs().max() > 1e-4  # ten times the tolerance


@torch.no_grad()
def test_logits(variant: Pair) -> None:
    theirs, ours = variant
    ids = random_ids(theirs.config.vocab_size, 3, 40)
    expected = theirs(ids).logits
    assert expected.std() > 0.5  # near zero, anything would agree
    close(ours(ids), expected)


@torch.no_grad()
def test_every_blocks_output_and_attention(variant: Pair) -> None:
    theirs, ours = variant
    ids = random_ids(theirs.config.vocab_size, 2, 20)
    outputs: dict[str, list[Tensor]] = {"theirs": [], "ours": []}
    for who, blocks in (("theirs", theirs.transformer.h), ("ours", ours.h)):
        for block in blocks:
            block.register_forward_hook(
                lambda _, __, out, who=who: outputs[who].append(out[0] if isinstance(out, tuple) else out)
            )
    seen = theirs(ids, output_hidden_states=True, output_attentions=True)
    final = ours(ids, head=lambda hidden, _: hidden)
    assert len(outputs["ours"]) == len(outputs["theirs"]) == theirs.config.n_layer
    for actual, expected in zip(outputs["ours"], outputs["theirs"], strict=True):
        close(actual, expected)
    close(ours.wte(ids) + ours.wpe(torch.arange(20)), seen.hidden_states[0])
    close(final, seen.hidden_states[-1])
    for layer, expected in enumerate(seen.attentions):
        close(ours.attention_maps(ids, layer), expected)


def test_gradients_of_the_loss(variant: Pair) -> None:
    theirs, ours = variant
    ids = random_ids(theirs.config.vocab_size, 3, 40)
    expected_loss = theirs(ids, labels=ids).loss
    loss = F.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(loss, expected_loss)
    expected_loss.backward()
    loss.backward()
    expected = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    actual = {name: p.grad for name, p in ours.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        assert gradient.abs().max() > 1e-6 or ".c_attn.bias" in name
        close(actual[name], gradient.t() if CONV1D.fullmatch(name) else gradient)


ROWS = [1, 9, 30, 17]


def padded_batch(left: bool) -> tuple[Tensor, Tensor]:
    """Ids of rows of different lengths, and which of them are real."""
    ids = random_ids(257, len(ROWS), max(ROWS))
    at = torch.arange(max(ROWS))
    real = torch.stack([(at >= max(ROWS) - n) if left else (at < n) for n in ROWS])
    return ids, real


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False])
def test_padded_batches_row_by_row(pair: Pair, left: bool) -> None:
    theirs, ours = pair
    ids, real = padded_batch(left)
    positions = positions_of(real)
    # Without position_ids their bare forward would count the padding: REFERENCES.md, section 1.
    expected = theirs(ids, attention_mask=real.long(), position_ids=positions.clamp(min=0)).logits
    plain = ours(ids, positions=positions)
    cached = ours(ids, positions=positions, cache=ours.make_cache(len(ROWS), max(ROWS)))
    for actual in (plain, cached):
        close(actual[real], expected[real])
    for row, n in enumerate(ROWS):
        close(plain[row, real[row]], theirs(ids[row, real[row]][None]).logits[0])
        assert int(real[row].sum()) == n


def generated(ours: GPT, prompts: list[list[int]], n: int) -> list[list[int]]:
    tokenizer = byte_tokenizer()
    continuations = [Continuation(tokenizer) for _ in prompts]
    for _ in decode(ours, prompts, continuations, sampling=Sampling(temperature=0), max_new_tokens=n, vocab_size=257):
        pass
    return [continuation.tokens for continuation in continuations]


@pytest.mark.parametrize("seed", range(3))
def test_greedy_text_is_theirs(tmp_path: Path, seed: int) -> None:
    theirs, ours = both(tmp_path, seed)
    prompts = [row[real].tolist() for row, real in zip(*padded_batch(left=True), strict=True)]
    compared = 0
    for prompt, actual in zip(prompts, generated(ours, prompts, 25), strict=True):
        expected, clear = greedy_until_unclear(theirs, prompt, 25)
        assert actual[:clear] == expected[:clear]
        compared += clear
    assert compared >= 80  # of 100: the ends of texts and near ties take some away


def test_greedy_text_of_a_padded_batch_is_theirs(pair: Pair) -> None:
    theirs, ours = pair
    ids, real = padded_batch(left=True)
    expected = theirs.generate(ids, attention_mask=real.long(), do_sample=False, max_new_tokens=10)[:, max(ROWS) :]
    continuations = generated(ours, [row[keep].tolist() for row, keep in zip(ids, real, strict=True)], 10)
    for row, tokens in enumerate(continuations):
        _, clear = greedy_until_unclear(theirs, ids[row, real[row]].tolist(), 10)
        assert tokens[:clear] == expected[row, :clear].tolist()
        assert clear >= 5


# The full 124M

FULL = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "pad_token_id": 50256,
}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("full")
    # Less noise than in the small ones, since the scores of wide heads grow with it and become one-hot.
    pair = both(directory, noise=0.03, **FULL)
    shutil.rmtree(directory)  # half a gigabyte
    return pair


@torch.no_grad()
def test_logits_at_124m_at_positions_from_first_to_last(full: Pair) -> None:
    theirs, ours = full
    assert sum(p.numel() for p in ours.parameters()) == 124_439_808
    ids = random_ids(50257, 1, 128)
    positions = torch.linspace(0, 1023, 128).long()[None]
    # Without a mask they would take every jump in the positions for the start of another document.
    mask = torch.ones_like(ids)
    expected = theirs(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert expected.std() > 0.5  # near zero, anything would agree
    close(ours(ids, positions=positions), expected, 1e-4)


@torch.no_grad()
@pytest.mark.slow
def test_logits_at_124m_over_the_full_context(full: Pair) -> None:
    theirs, ours = full
    ids = random_ids(50257, 1, 1024)
    close(ours(ids), theirs(ids, use_cache=False).logits, 1e-4)


@torch.no_grad()
def test_teacher_forced_over_their_own_greedy_text_at_124m(full: Pair) -> None:
    theirs, ours = full
    prompt = [464, 3290]  # "The dog"; any would do, the weights are random
    text, clear = greedy_until_unclear(theirs, prompt, 50)
    assert len(text) == 50
    assert clear == 50  # none of them was a near tie, so that all are compared
    ids = torch.tensor([prompt + text])
    expected = theirs(ids).logits
    cache = ours.make_cache(1, 52)
    in_chunks = torch.cat([ours(chunk, cache=cache) for chunk in ids.split([2, 20, 1, 1, 28], dim=1)], 1)
    for actual in (ours(ids), in_chunks):
        close(actual, expected, 1e-4)
        assert actual[0, 1:-1].argmax(-1).tolist() == text
