"""What gptlab writes for transformers, loaded by transformers: the same logits, with and without its cache."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.judge import assert_computes_the_same, assert_generates_the_same
from helpers.models import disturb
from safetensors import safe_open
from torch import Tensor

import gptlab
from gptlab import checkpoints
from gptlab.checkpoints import huggingface
from gptlab.checkpoints.files import Checkpoint
from gptlab.text.tokenizers import byte_tokenizer

VOCAB, CONTEXT, LENGTH = 257, 256, 200
LLAMA: dict[str, Any] = {"position": "rope", "norm": "rms", "mlp": "swiglu", "bias": False}
EXACT: dict[str, tuple[dict[str, Any], str]] = {
    "as GPT-2": ({}, "GPT2LMHeadModel"),
    "untied, exact GELU": ({"tie_embeddings": False, "activation": "gelu", "norm_eps": 1e-3}, "GPT2LMHeadModel"),
    "ReLU, other width": ({"activation": "relu", "n_inner": 60}, "GPT2LMHeadModel"),
    "an idle window": ({"window": CONTEXT}, "GPT2LMHeadModel"),
    "one key head": ({"n_kv_head": 1}, "GPTBigCodeForCausalLM"),
    "one key head, SiLU, untied": (
        {"n_kv_head": 1, "activation": "silu", "tie_embeddings": False},
        "GPTBigCodeForCausalLM",
    ),
    "RoPE": ({"position": "rope"}, "Starcoder2ForCausalLM"),
    "RoPE, GQA": ({"position": "rope", "n_kv_head": 3, "n_inner": 50}, "Starcoder2ForCausalLM"),
    "RoPE, one key head, window": ({"position": "rope", "n_kv_head": 1, "window": 24}, "Starcoder2ForCausalLM"),
    "all three": (
        {"position": "rope", "n_kv_head": 2, "window": 16, "rope": {"theta": 500.0}},
        "Starcoder2ForCausalLM",
    ),
    "RoPE, window a layer, all alike": ({"position": "rope", "window": [9, 9, 9]}, "Starcoder2ForCausalLM"),
    "RoPE, linear": ({"position": "rope", "rope": {"scaling": "linear", "factor": 4.0}}, "Starcoder2ForCausalLM"),
    "RoPE, YaRN": ({"position": "rope", "rope": {"scaling": "yarn", "factor": 4.0}}, "Starcoder2ForCausalLM"),
    "Llama": (LLAMA, "LlamaForCausalLM"),
    "Llama, GQA, untied": (
        {**LLAMA, "n_kv_head": 2, "tie_embeddings": False, "norm_eps": 1e-3, "n_inner": 50, "rope": {"theta": 500.0}},
        "LlamaForCausalLM",
    ),
    "Llama with biases": ({**LLAMA, "bias": True, "n_kv_head": 3}, "LlamaForCausalLM"),
    "Llama, linear": ({**LLAMA, "rope": {"scaling": "linear", "factor": 4.0}}, "LlamaForCausalLM"),
    "Llama, YaRN": ({**LLAMA, "rope": {"scaling": "yarn", "factor": 4.0}}, "LlamaForCausalLM"),
    "Llama 3.1": (
        {**LLAMA, "n_kv_head": 2, "rope": {"theta": 500.0, "scaling": "llama3", "factor": 8.0, "trained_length": 32}},
        "LlamaForCausalLM",
    ),
    "Mistral": ({**LLAMA, "n_kv_head": 2, "window": 24}, "MistralForCausalLM"),
    "Mistral, YaRN, one key head": (
        {**LLAMA, "n_kv_head": 1, "window": [9, 9, 9], "rope": {"scaling": "yarn", "factor": 4.0}},
        "MistralForCausalLM",
    ),
    "RoPE, untied": ({"position": "rope", "tie_embeddings": False, "activation": "gelu"}, "Starcoder2ForCausalLM"),
}
REWRITTEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "no biases": ({"bias": False}, "GPT2LMHeadModel", "biases"),
    "RoPE, no biases": ({"position": "rope", "bias": False, "n_kv_head": 2}, "Starcoder2ForCausalLM", "biases"),
    "RoPE, NTK": ({"position": "rope", "rope": {"scaling": "ntk", "factor": 4.0}}, "Starcoder2ForCausalLM", "NTK"),
    "scores by layer": ({"scale_attn_by_inverse_layer_idx": True}, "GPT2LMHeadModel", "multiplied into the weights"),
    "Llama, NTK": ({**LLAMA, "rope": {"scaling": "ntk", "factor": 4.0}}, "LlamaForCausalLM", "NTK"),
    "Mistral, scores by layer": (
        {**LLAMA, "window": 24, "scale_attn_by_inverse_layer_idx": True},
        "MistralForCausalLM",
        "multiplied into the weights",
    ),
    "unscaled": ({"scale_attn_weights": False, "n_kv_head": 1}, "GPTBigCodeForCausalLM", "multiplied into the weights"),
    "RoPE, scores by layer": (
        {"position": "rope", "scale_attn_by_inverse_layer_idx": True},
        "Starcoder2ForCausalLM",
        "multiplied into the weights",
    ),
    "RoPE, unscaled": ({"position": "rope", "scale_attn_weights": False}, "Starcoder2ForCausalLM", "multiplied into"),
    "one key head, scores by layer": (
        {"n_kv_head": 1, "scale_attn_by_inverse_layer_idx": True},
        "GPTBigCodeForCausalLM",
        "multiplied into",
    ),
    "no positions": ({"position": "none"}, "GPT2LMHeadModel", "table of positions"),
    "GQA with learned positions": ({"n_kv_head": 2}, "GPT2LMHeadModel", "each is repeated 3 times"),
}
CUSTOM: dict[str, tuple[dict[str, Any], str]] = {
    "learned, window": ({"window": 16}, "window=16 with learned positions"),
    "sinks, GQA": ({"position": "rope", "n_kv_head": 2, "window": 16, "sinks": 3}, "sinks=3"),
    "dilation": ({"position": "rope", "window": 8, "dilation": 3, "sinks": 2}, "sinks=2"),
    "dilation alone": ({"position": "rope", "window": 8, "dilation": [3, 1, 2]}, "dilation="),
    "windows by layer": ({"position": "rope", "window": [8, None, 16]}, "windows that differ from layer to layer"),
    "window of 1": ({"position": "rope", "window": 1}, "window=1"),
    "Llama's norms, learned": ({"norm": "rms", "n_kv_head": 2, "bias": False}, "norm='rms'"),
    "Llama's gates": ({"mlp": "swiglu", "position": "rope", "tie_embeddings": False}, "norm='layer' with mlp='swiglu'"),
    "Llama without positions": ({**LLAMA, "position": "none"}, "norm='rms' with mlp='swiglu' and none positions"),
    "Llama with sinks": ({**LLAMA, "window": 16, "sinks": 3}, "sinks=3"),
    "Mistral with biases": ({**LLAMA, "window": 16, "bias": True}, "window=16 with biases"),
    "blend": ({"position": "blend", "n_kv_head": 2, "bias": False, "tie_embeddings": False}, "position='blend'"),
    "YaRN, sinks, unscaled": (
        {
            "position": "rope",
            "rope": {"scaling": "yarn", "factor": 4.0},
            "window": 16,
            "sinks": 1,
            "scale_attn_weights": False,
            "scale_attn_by_inverse_layer_idx": True,
        },
        "sinks=1",
    ),
}


def model(**overrides: Any) -> gptlab.LanguageModel:
    fields = {"vocab_size": VOCAB, "context_length": CONTEXT, "n_layer": 3, "n_head": 6, "n_embd": 48, **overrides}
    made = disturb(gptlab.GPT(gptlab.ModelConfig.from_dict(fields), seed=5).eval(), 0.12)
    with torch.no_grad():
        if made.config.position == "blend":
            made.rope_scale.copy_(torch.linspace(0.1, 1, len(made.rope_scale)))
            made.wpe_scale.fill_(0.3)
    return gptlab.LanguageModel(made, byte_tokenizer())


def checkpoint(lm: gptlab.LanguageModel) -> Checkpoint:
    return Checkpoint(lm.config, lm.model.tensors(), lm.tokenizer)


def load(directory: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


def ids(length: int = LENGTH, batch: int = 1) -> Tensor:
    return torch.randint(VOCAB - 1, (batch, length), generator=torch.Generator().manual_seed(1))


def same_state(actual: Checkpoint, expected: Checkpoint) -> None:
    assert actual.state.keys() == expected.state.keys()
    for name, tensor in expected.state.items():
        assert torch.equal(actual.state[name], tensor), name


@pytest.mark.parametrize("name", EXACT)
def test_what_has_an_exact_home_goes_there_and_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    overrides, architecture = EXACT[name]
    lm = model(**overrides)
    home = huggingface.write(tmp_path, checkpoint(lm))
    assert home.lost == ()
    theirs = load(tmp_path)
    assert type(theirs).__name__ == architecture
    assert_computes_the_same(lm.model, theirs)
    assert_generates_the_same(lm, theirs)
    again = checkpoints.read(tmp_path)
    same_state(again, checkpoint(lm))
    for field in ("activation", "norm", "norm_eps", "mlp", "n_inner", "bias", "n_kv_head", "rope", "windows"):
        if (field, name) != ("windows", "an idle window"):
            assert getattr(again.config, field) == getattr(lm.config, field), field
    # And what transformers itself writes of it.
    theirs.save_pretrained(tmp_path / "theirs")
    same_state(checkpoints.read(tmp_path / "theirs"), checkpoint(lm))


@pytest.mark.parametrize("name", REWRITTEN)
def test_what_must_be_rewritten_is_the_same_function_and_said(name: str, tmp_path: Path) -> None:
    overrides, architecture, said = REWRITTEN[name]
    lm = model(**overrides)
    home = huggingface.write(tmp_path, checkpoint(lm))
    assert said in " ".join([*home.rewritten, *home.lost])
    assert said in (tmp_path / "README.md").read_text()
    theirs = load(tmp_path)
    assert type(theirs).__name__ == architecture
    assert_computes_the_same(lm.model, theirs)
    torch.testing.assert_close(gptlab.load(tmp_path).model(ids()), lm.model(ids()), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("name", CUSTOM)
def test_what_has_no_home_is_refused_and_brings_its_own_code(name: str, tmp_path: Path) -> None:
    overrides, reason = CUSTOM[name]
    lm = model(**overrides)
    with pytest.raises(gptlab.GptlabError, match="no class of transformers computes this model exactly") as caught:
        huggingface.write(tmp_path / "m", checkpoint(lm))
    assert f"in the way is {reason}" in str(caught.value)
    assert not (tmp_path / "m").exists()
    huggingface.write(tmp_path / "m", checkpoint(lm), custom_code=True)
    theirs = load(tmp_path / "m", trust_remote_code=True)
    assert_computes_the_same(lm.model, theirs)
    assert_generates_the_same(lm, theirs)
    again = checkpoints.read(tmp_path / "m")
    assert again.config == lm.config
    same_state(again, checkpoint(lm))


@pytest.mark.parametrize("custom_code", [False, True])
def test_a_position_that_no_code_computes_is_refused(custom_code: bool, tmp_path: Path) -> None:
    lm = model(position="none")
    object.__setattr__(lm.config, "position", "new")  # as if `Position` had one more
    with pytest.raises(gptlab.GptlabError, match="position='new' cannot be written for transformers"):
        huggingface.write(tmp_path / "m", checkpoint(lm), custom_code=custom_code)
    assert not (tmp_path / "m").exists()


@torch.no_grad()
def test_code_of_its_own_trains(tmp_path: Path) -> None:
    lm = model(window=8)
    huggingface.write(tmp_path, checkpoint(lm), custom_code=True)
    theirs = load(tmp_path, trust_remote_code=True)
    with torch.enable_grad():
        loss = theirs(ids(), labels=ids()).loss
        loss.backward()
    expected = torch.nn.functional.cross_entropy(lm.model(ids())[0, :-1], ids()[0, 1:])
    torch.testing.assert_close(loss.detach(), expected)
    assert all(parameter.grad is not None for parameter in theirs.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_written_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    lm = model(position="rope", n_kv_head=2)
    source = checkpoint(lm)
    huggingface.write(tmp_path, source._replace(state={n: t.to(dtype) for n, t in source.state.items()}))
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["dtype"] == values["torch_dtype"] == str(dtype).removeprefix("torch.")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == dtype


def test_large_weights_are_shards_that_both_read(tmp_path: Path) -> None:
    lm = model()
    huggingface.write(tmp_path, checkpoint(lm), max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 4
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in lm.model.tensors().values())
    for path in shards:
        with safe_open(path, "pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
            assert sum(sizes) <= 60_000 or len(sizes) == 1
    assert_computes_the_same(lm.model, load(tmp_path))
    same_state(checkpoints.read(tmp_path), checkpoint(lm))
    # A later export with fewer files leaves no mixture.
    huggingface.write(tmp_path, checkpoint(lm))
    assert [path.name for path in sorted(tmp_path.glob("model*"))] == ["model.safetensors"]
    same_state(checkpoints.read(tmp_path), checkpoint(lm))


@pytest.mark.parametrize("name", ["pocket", "pocket-rope-gqa-swa", "gpt2's"])
def test_the_tokenizer_comes_along(name: str, tmp_path: Path) -> None:
    if name == "gpt2's":
        config = gptlab.ModelConfig(n_layer=1, n_head=1, n_embd=4, context_length=64)
        from gptlab.text.tokenizers import GPT2Tokenizer

        lm = gptlab.LanguageModel(gptlab.GPT(config), GPT2Tokenizer())
    else:
        lm = gptlab.load(name)
    huggingface.write(tmp_path, checkpoint(lm))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Hello, world! It's 42 degrees in Zürich.\n\n  東京"
    assert theirs(text)["input_ids"] == lm.needs_tokenizer().encode(text)
    assert theirs.decode(lm.needs_tokenizer().encode(text)) == text
    end = lm.needs_tokenizer().end_of_text
    assert (theirs.eos_token_id, theirs.bos_token_id) == (end, end)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (generation.eos_token_id, generation.bos_token_id) == (end, end)
    again = gptlab.load(tmp_path).needs_tokenizer()
    assert again.sha256 == lm.needs_tokenizer().sha256
    assert (again.end_of_text, again.ends, again.start_of_text) == (end, lm.tokenizer.ends, lm.tokenizer.start_of_text)


@torch.no_grad()
def test_pocket_with_all_three_changes_goes_the_whole_way(tmp_path: Path) -> None:
    from gptlab.conversion.calibration import calibration_rows
    from gptlab.conversion.convert import Changes, convert

    lm = gptlab.load("pocket")
    rows = calibration_rows(lm.needs_tokenizer(), 256, 1024)
    changes = Changes.from_dict(
        {"position": "rope", "n_kv_head": 2, "window": 64, "rotary": "abrupt", "method": "mean"}
    )
    converted = gptlab.LanguageModel(convert(lm.model, changes, None).model, lm.tokenizer)
    gptlab.save(converted, tmp_path / "native")
    from gptlab.exporting import export

    exported = export(tmp_path / "native", tmp_path / "hf")
    assert (exported.family, exported.difference) == ("starcoder2", 0.0)
    theirs = load(tmp_path / "hf")
    text = torch.stack(list(rows)).long()
    loss = theirs(text, attention_mask=torch.ones_like(text), labels=text).loss.item()
    ours = torch.nn.functional.cross_entropy(converted.model(text)[:, :-1].flatten(0, 1), text[:, 1:].flatten()).item()
    assert math.isclose(loss, ours, abs_tol=1e-5)


# --- the way in -----------------------------------------------------------------------------------------------


def theirs_random(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.12 * torch.randn_like(parameter))
    return made


SMALL = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "use_cache": True}
BIG = {**SMALL, "n_positions": CONTEXT, "n_embd": 48, "n_layer": 2, "n_head": 6}
STAR = {
    **SMALL,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
}
THEIRS: dict[str, Any] = {
    "one key head": lambda: transformers.GPTBigCodeConfig(**BIG),
    "many key heads, interleaved": lambda: transformers.GPTBigCodeConfig(**BIG, multi_query=False, n_inner=70),
    "unscaled": lambda: transformers.GPTBigCodeConfig(**BIG, scale_attn_weights=False, activation_function="relu"),
    "StarCoder2": lambda: transformers.Starcoder2Config(**STAR, sliding_window=20),
    "without biases": lambda: transformers.Starcoder2Config(**STAR, use_bias=False, tie_word_embeddings=False),
    "linear": lambda: transformers.Starcoder2Config(
        **STAR, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}
    ),
    "YaRN with a context of its own": lambda: transformers.Starcoder2Config(
        **{**STAR, "max_position_embeddings": 3 * CONTEXT},
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1000.0,
            "original_max_position_embeddings": CONTEXT // 2,
        },
    ),
    "YaRN": lambda: transformers.Starcoder2Config(
        **{**STAR, "max_position_embeddings": 4 * CONTEXT},
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1000.0,
            "original_max_position_embeddings": CONTEXT,
        },
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", THEIRS)
def test_what_transformers_writes_is_read(name: str, tmp_path: Path) -> None:
    theirs = theirs_random(THEIRS[name]())
    theirs.save_pretrained(tmp_path)
    text = ids()
    expected = theirs(text, attention_mask=torch.ones_like(text)).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(gptlab.load(tmp_path).model(text), expected, rtol=0.0, atol=1e-5)


def test_a_starcoder2_of_transformers_4_is_read(tmp_path: Path) -> None:
    theirs = theirs_random(transformers.Starcoder2Config(**STAR, sliding_window=20))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    values |= {"norm_type": "layer_norm", "mlp_type": "default", "activation_function": "gelu", "rope_scaling": None}
    path.write_text(json.dumps(values))
    torch.testing.assert_close(gptlab.load(tmp_path).model(ids()), theirs(ids()).logits, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "field", "value", "complaint"),
    [
        ("starcoder2", "rope_parameters", {"rope_type": "dynamic", "factor": 2.0}, "rotary positions with"),
        ("starcoder2", "rope_scaling", {"type": "longrope", "factor": 2.0}, "rotary positions with"),
        ("starcoder2", "rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("starcoder2", "rope_scaling", [1], "rope_scaling must be an object"),
        ("starcoder2", "head_dim", 16, "head_dim=16"),
        ("starcoder2", "num_key_value_heads", 4, "valid n_kv_head: 1, 2, 3, 6"),
        ("starcoder2", "sliding_window", 0, "window must be"),
        ("starcoder2", "use_bias", "no", "use_bias must be true or false"),
        ("starcoder2", "norm_type", "rms_norm", "norm_type='rms_norm'"),
        ("starcoder2", "n_head", 6, "num_attention_heads"),
        ("starcoder2", "layer_types", ["full_attention", "sliding_attention"], "layer_types"),
        ("gpt_bigcode", "multi_query", "yes", "multi_query must be true or false"),
        ("gpt_bigcode", "num_key_value_heads", 3, "num_key_value_heads=3 beside multi_query=True"),
        ("gpt_bigcode", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt_bigcode", "position_embedding_type", "rope", "a kind of position"),
    ],
)
def test_what_changes_the_function_is_refused(
    family: str, field: str, value: Any, complaint: str, tmp_path: Path
) -> None:
    values = {"model_type": family, **(STAR if family == "starcoder2" else BIG), field: value}
    if field == "n_head":
        del values["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(gptlab.GptlabError) as caught:
        checkpoints.read_config(tmp_path)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
