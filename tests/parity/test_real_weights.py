# Trained weights that others made: a whole small model, and the attention of OpenAI's 124M.
from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import transformers
from helpers.models import close
from safetensors.torch import load_file
from torch import Tensor

import gptlab
from gptlab import GPT, ModelConfig
from gptlab.checkpoints.huggingface.gpt2 import CONV1D
from gptlab.model import Tokens


def folder(shared: Path, name: str) -> Path:
    path = shared / "models" / name
    if not path.is_dir():
        pytest.skip(f"../shared/models/{name} is absent")
    return path


# A model that sorts six digits of 0..2, with its activations as its makers published them.


@pytest.fixture(scope="module")
def sorter(shared: Path) -> GPT:
    return gptlab.load(folder(shared, "gpt-nano-sort")).model


@pytest.fixture(scope="module")
def published(shared: Path) -> dict[str, Tensor]:
    return load_file(folder(shared, "gpt-nano-sort") / "partials.safetensors")


@torch.no_grad()
def activations(model: GPT, ids: Tensor) -> dict[str, Tensor]:
    """Every step of the model under the names of the published file, which are minGPT's."""
    seen: dict[str, Tensor] = {}
    block = model.blocks[0]
    watched = {
        "x": model.drop,
        "ln1": block.ln_1,
        "qkv": block.attn.c_attn,
        "yProj": block.attn.c_proj,
        "ln2": block.ln_2,
        "fc": block.mlp.c_fc,
        "mlp": block.mlp.c_proj,
        **{f"block{i}": b for i, b in enumerate(model.blocks)},
        "ln_f": model.ln_f,
        "lm_head": model.lm_head,
    }
    inputs = {"y": block.attn.c_proj, "attnResid": block.ln_2, "gelu": block.mlp.c_proj}
    handles = [
        *(m.register_forward_hook(lambda _, __, out, n=n: seen.__setitem__(n, out)) for n, m in watched.items()),
        *(m.register_forward_pre_hook(lambda _, args, n=n: seen.__setitem__(n, args[0])) for n, m in inputs.items()),
    ]
    logits = model(ids)
    for handle in handles:
        handle.remove()
    seen["q"], seen["k"], seen["v"], _ = block.attn.project(seen["ln1"], None)
    seen["tok_emb"] = model.wte(ids)
    seen["pos_emb"] = model.wpe(torch.arange(ids.shape[1]))[None]
    seen["attSm"] = model.attention_maps(ids, 0)
    hidden = torch.ones_like(seen["attSm"], dtype=torch.bool).triu(1)
    scores = seen["q"] @ seen["k"].transpose(-2, -1) / model.config.head_dim**0.5
    seen["att"] = scores.masked_fill(hidden, -torch.inf)
    seen["mlpResid"] = seen["attnResid"] + seen["mlp"]
    seen["probs"] = logits.softmax(-1)
    return seen


def test_every_published_activation(sorter: GPT, published: dict[str, Tensor]) -> None:
    ids = published["idx"].long()
    actual = activations(sorter, ids)
    assert actual.keys() == published.keys() - {"idx"}
    for name, expected in published.items():
        if name != "idx":
            close(actual[name], expected)


@torch.no_grad()
def test_all_729_inputs_are_sorted(sorter: GPT) -> None:
    inputs = torch.tensor(list(itertools.product(range(3), repeat=6)))
    assert len(inputs) == 729
    cache = sorter.make_cache(729, 11)
    ids, chosen = inputs, []
    for _ in range(6):
        ids = sorter(ids, cache=cache)[:, -1:].argmax(-1)
        chosen.append(ids)
    assert torch.equal(torch.cat(chosen, 1), inputs.sort(1).values)


# The real attention and norms of GPT-2 124M, with feed-forward networks and embeddings drawn at random.


@pytest.fixture(scope="module")
def original(shared: Path) -> tuple[transformers.GPT2Model, GPT, Tensor]:
    real = load_file(folder(shared, "gpt2-attention") / "model.safetensors")
    torch.manual_seed(0)
    theirs = transformers.GPT2Model(transformers.GPT2Config(vocab_size=1000, attn_implementation="eager")).eval()
    state = theirs.state_dict()
    drawn = {"wte.weight", *(f"h.{i}.mlp.{name}.weight" for i in range(12) for name in ("c_fc", "c_proj"))}
    assert state.keys() - real.keys() == drawn
    assert real.keys() <= state.keys()
    for name in sorted(drawn):
        # The spread of the trained matrices, about 0.13; the feed-forward network must be large enough to matter.
        state[name] = torch.randn_like(state[name]) * 0.13
    state.update(real)
    theirs.load_state_dict(state)
    ours = GPT(ModelConfig.preset("gpt2", vocab_size=1000)).eval()
    ours.load_state_dict(
        {**{n: t.t() if CONV1D.fullmatch(n) else t for n, t in state.items()}, "lm_head.weight": state["wte.weight"]}
    )
    return theirs, ours, torch.randint(1000, (1, 128))


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def test_each_real_block_gives_the_same_output(original: tuple[transformers.GPT2Model, GPT, Tensor]) -> None:
    theirs, ours, ids = original
    states: list[tuple[Tensor, Tensor]] = []
    for block in theirs.h:
        block.register_forward_hook(
            lambda _, args, out: states.append((args[0], out[0] if isinstance(out, tuple) else out))
        )
    theirs(ids)
    assert len(states) == 12
    tokens = Tokens(torch.arange(128)[None], plain=True)
    for i, (x, expected) in enumerate(states):
        actual = ours.blocks[i](x, tokens)
        assert relative(actual, expected) < 1e-5, i
        # What the block adds, too: a large stream would hide it.
        assert relative(actual - x, expected - x) < 1e-5, i


@torch.no_grad()
def test_the_stack_of_real_blocks_gives_the_same_output(original: tuple[transformers.GPT2Model, GPT, Tensor]) -> None:
    theirs, ours, ids = original
    expected = theirs(ids, output_hidden_states=True, output_attentions=True)
    assert relative(ours(ids, head=lambda hidden, _: hidden), expected.last_hidden_state) < 1e-5
    for layer in (0, 5, 11):
        close(ours.attention_maps(ids, layer), expected.attentions[layer])
