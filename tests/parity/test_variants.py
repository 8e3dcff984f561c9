"""RoPE, grouped queries and sliding windows against models of `transformers` that have them."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from helpers.models import disturb
from torch import Tensor

import gptlab
from gptlab.config import RopeConfig

VOCAB, WIDTH, HEADS, LAYERS, CONTEXT = 97, 48, 6, 3, 128


def ours(**overrides: object) -> gptlab.GPT:
    config = gptlab.ModelConfig(
        vocab_size=VOCAB, context_length=CONTEXT, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, **overrides
    )
    return disturb(gptlab.GPT(config, seed=5).eval(), 0.15)


def ids(length: int, batch: int = 2) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def starcoder2(model: gptlab.GPT, **rope: object) -> transformers.Starcoder2ForCausalLM:
    """The same function as a Starcoder2: separate projections, names of its own."""
    config = model.config
    judge = transformers.Starcoder2ForCausalLM(
        transformers.Starcoder2Config(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=config.inner,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=config.kv_heads,
            hidden_act="gelu_pytorch_tanh",
            max_position_embeddings=4096,
            norm_epsilon=config.norm_eps,
            use_bias=True,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **rope},
            sliding_window=config.window,
            residual_dropout=0.0,
            embedding_dropout=0.0,
            attention_dropout=0.0,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=None,
        )
    ).eval()
    state = {"model.embed_tokens.weight": model.wte.weight, "lm_head.weight": model.wte.weight}
    names = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "mlp.c_fc": "mlp.c_fc"}
    names |= {"mlp.c_proj": "mlp.c_proj", "attn.c_proj": "self_attn.o_proj"}
    rows = [WIDTH, config.kv_heads * config.head_dim, config.kv_heads * config.head_dim]
    for kind in ("weight", "bias"):
        state[f"model.norm.{kind}"] = model.get_parameter(f"ln_f.{kind}")
        for i in range(LAYERS):
            for mine, theirs in names.items():
                state[f"model.layers.{i}.{theirs}.{kind}"] = model.get_parameter(f"h.{i}.{mine}.{kind}")
            parts = model.get_parameter(f"h.{i}.attn.c_attn.{kind}").split(rows)
            for letter, part in zip("qkv", parts, strict=True):
                state[f"model.layers.{i}.self_attn.{letter}_proj.{kind}"] = part
    judge.load_state_dict(state)
    return judge


@pytest.mark.parametrize(("n_kv_head", "window"), list(itertools.product([6, 3, 2, 1], [None, 2, 7, 64])))
@torch.inference_mode()
def test_rope_with_grouped_queries_and_windows_is_starcoder2(n_kv_head, window):
    model = ours(position="rope", n_kv_head=n_kv_head, window=window)
    tokens = ids(100)
    expected = starcoder2(model)(tokens, use_cache=False).logits
    torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({"theta": 500.0}, {"rope_theta": 500.0}),
        ({"scaling": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"scaling": "ntk", "factor": 4.0}, {"rope_theta": 10000.0 * 4.0 ** (8 / 6)}),
        ({"scaling": "yarn", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}),
        ({"scaling": "yarn", "factor": 8.0, "theta": 500.0}, {"rope_type": "yarn", "factor": 8.0, "rope_theta": 500.0}),
    ],
    ids=str,
)
@torch.inference_mode()
def test_scaled_rope_is_starcoder2s_past_the_trained_context(mine, theirs):
    model = ours(position="rope", n_kv_head=2, rope=RopeConfig(**mine))
    tokens = ids(160)  # not much longer: their angles are float32
    judge = starcoder2(model, **theirs, original_max_position_embeddings=CONTEXT)
    torch.testing.assert_close(model(tokens), judge(tokens, use_cache=False).logits, atol=1e-5, rtol=0)
    unscaled = starcoder2(model)(tokens, use_cache=False).logits
    assert (model(tokens) - unscaled).abs().max() > 1e-2  # the settings do something


@pytest.mark.parametrize(("n_kv_head", "window"), [(6, None), (2, 16), (1, 9)])
@torch.inference_mode()
def test_cached_generation_far_past_the_window_is_starcoder2s(n_kv_head, window):
    model = ours(position="rope", n_kv_head=n_kv_head, window=window)
    judge = starcoder2(model)
    prompt = ids(40, batch=1)
    out = judge.generate(prompt, max_new_tokens=60, do_sample=False, output_logits=True, return_dict_in_generate=True)
    tokens, expected = out.sequences, torch.stack(out.logits, dim=1)  # (1, 100), (1, 60, V)
    cache = model.make_cache(1, 100, chunk=40)
    actual = [model(prompt, cache=cache)[:, -1:]]
    actual += [model(tokens[:, t : t + 1], cache=cache) for t in range(40, 99)]
    torch.testing.assert_close(torch.cat(actual, dim=1), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_left_padded_rows_are_starcoder2s():
    model = ours(position="rope", n_kv_head=2, window=8)
    tokens, n_padding = ids(30), 7
    mask = torch.ones_like(tokens)
    mask[1, :n_padding] = 0
    expected = starcoder2(model)(tokens, attention_mask=mask, use_cache=False).logits
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, -1)
    actual = model(tokens, positions=positions)
    torch.testing.assert_close(actual[mask == 1], expected[mask == 1], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_learned_positions_with_one_key_head_are_gpt_bigcode():
    model = ours(n_kv_head=1)
    judge = transformers.GPTBigCodeForCausalLM(
        transformers.GPTBigCodeConfig(
            vocab_size=VOCAB,
            n_positions=CONTEXT,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            multi_query=True,
            activation_function="gelu_pytorch_tanh",
            layer_norm_epsilon=1e-5,
        )
    ).eval()
    state = {f"transformer.{name}": parameter for name, parameter in model.named_parameters()}
    judge.load_state_dict({**state, "lm_head.weight": model.wte.weight})
    tokens = ids(100)
    torch.testing.assert_close(model(tokens), judge(tokens, use_cache=False).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_kv_head", [1, 2, 3, 6])
@torch.inference_mode()
def test_learned_positions_with_grouped_queries_are_gpt2_with_repeated_heads(n_kv_head):
    model = ours(n_kv_head=n_kv_head)
    judge = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS)
    ).eval()
    state = {}
    for name, parameter in model.named_parameters():
        if ".c_attn." in name:
            q, k, v = parameter.split([WIDTH, n_kv_head * 8, n_kv_head * 8])
            k, v = (
                x.unflatten(0, (n_kv_head, 8)).repeat_interleave(HEADS // n_kv_head, 0).flatten(0, 1) for x in (k, v)
            )
            parameter = torch.cat([q, k, v])
        conv1d = name.endswith("weight") and (".c_" in name)
        state[f"transformer.{name}"] = parameter.t() if conv1d else parameter
    judge.load_state_dict({**state, "lm_head.weight": model.wte.weight})
    tokens = ids(100)
    torch.testing.assert_close(model(tokens), judge(tokens, use_cache=False).logits, atol=1e-5, rtol=0)
