"""Hugging Face's GPT-2 layout: every field and every tensor is honoured or refused, and no pickle ever runs."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.refusals import Payload, refusal
from safetensors.torch import save_file
from torch import Tensor

import gptlab
from gptlab import checkpoints
from gptlab.checkpoints.huggingface.fields import ACTIVATIONS
from gptlab.text.tokenizers import GPT2Tokenizer

CONV1D = re.compile(r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
CONFIG: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 257,
    "n_positions": 64,
    "n_ctx": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.1,
}


def original(**overrides: Any) -> gptlab.GPT:
    model = gptlab.GPT(gptlab.ModelConfig.preset("tiny", vocab_size=257, **overrides), seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases of 0 and norms of 1 would hide what was lost
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) / 20
            )
    return model


def tensors_of(model: gptlab.GPT, prefix: str = "") -> dict[str, Tensor]:
    """The model's tensors as Hugging Face names and turns them."""
    return {
        (name if name.startswith("lm_head") else prefix + name): (p.detach().t() if CONV1D.search(name) else p.detach())
        .contiguous()
        .clone()
        for name, p in model.named_parameters()
    }


def write(directory: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors_of(original()) if tensors is None else tensors, directory / "model.safetensors")
    return directory


def assert_same(actual: gptlab.GPT, wanted: gptlab.GPT) -> None:
    pairs = list(zip(actual.state_dict().items(), wanted.state_dict().items(), strict=True))
    assert [a for (a, _), _ in pairs] == [b for _, (b, _) in pairs]
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "transformer.",
        "_orig_mod.transformer.",
        "module.transformer.",
        "model.transformer.",
        "module._orig_mod.",
        "_orig_mod.module.model.",
        "_fsdp_wrapped_module.transformer.",
        "gpt2.",
        "decoder.",
        "pretrained_model.transformer.",
    ],
)
@pytest.mark.parametrize("head", ["absent", "same as the embedding"])
@pytest.mark.parametrize("legacy", [False, True])
def test_prefixes_heads_and_legacy_buffers(tmp_path: Path, prefix: str, head: str, legacy: bool) -> None:
    tensors = tensors_of(original(), prefix)
    if head != "absent":
        tensors["lm_head.weight"] = tensors[prefix + "wte.weight"].clone()
    if legacy:
        tensors[prefix + "h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        tensors[prefix + "h.1.attn.masked_bias"] = torch.tensor(-1e4)
    lm = gptlab.load(write(tmp_path, tensors))
    assert_same(lm.model, original())
    assert lm.tokenizer is None


def test_a_prefix_on_everything_head_included_and_inside_names(tmp_path: Path) -> None:
    # As torch.compile leaves a model whose blocks were compiled one by one, inside DistributedDataParallel.
    tensors = {f"module.{k.replace('h.0.', 'h.0._orig_mod.')}": v for k, v in tensors_of(original()).items()}
    tensors["module.lm_head.weight"] = tensors["module.wte.weight"].clone()
    assert_same(gptlab.load(write(tmp_path, tensors)).model, original())


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_of_a_tied_pair_the_head_may_be_the_one_saved(tmp_path: Path, prefix: str) -> None:
    tensors = {prefix + name: tensor for name, tensor in tensors_of(original(), "transformer.").items()}
    tensors[prefix + "lm_head.weight"] = tensors.pop(prefix + "transformer.wte.weight")
    lm = gptlab.load(write(tmp_path, tensors))
    assert_same(lm.model, original())
    assert lm.model.lm_head.weight is lm.model.wte.weight


@pytest.mark.parametrize(
    ("names", "task"),
    [
        (["multiple_choice_head.summary.weight", "multiple_choice_head.summary.bias"], "multiple choice"),
        (["score.weight"], "sequence classification"),
        (["classifier.weight", "classifier.bias"], "classification"),
        (["v_head.summary.weight"], "a value of reinforcement learning"),
    ],
)
def test_a_head_of_another_task_is_left_aside_in_words(tmp_path: Path, names: list[str], task: str) -> None:
    tensors = tensors_of(original(), "transformer.") | {name: torch.ones(1, 32) for name in names}
    with pytest.warns(UserWarning, match=rf"has a head for {task} \({', '.join(sorted(names))}\), which is left aside"):
        assert_same(gptlab.load(write(tmp_path, tensors)).model, original())


def test_code_of_its_own_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"names code of its own \(auto_map\), which gptlab does not run"):
        gptlab.load(write(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_x.X"}))


def test_an_untied_head_is_read(tmp_path: Path) -> None:
    model = original(tie_embeddings=False)
    lm = gptlab.load(write(tmp_path, tensors_of(model), tie_word_embeddings=False))
    assert_same(lm.model, model)
    assert not torch.equal(lm.model.lm_head.weight, lm.model.wte.weight)


def test_an_untied_head_that_is_missing_is_refused(tmp_path: Path) -> None:
    assert "lacks lm_head.weight" in refusal(write(tmp_path, tie_word_embeddings=False))


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(original())
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    tensors["lm_head.weight"][5, 5] += 1e-6
    assert "differs from wte.weight, but its config.json ties them" in refusal(write(tmp_path, tensors))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_are_read(tmp_path: Path, stored: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in tensors_of(original()).items()}
    model = gptlab.load(write(tmp_path, tensors)).model
    assert model.wte.weight.dtype == torch.float32
    assert torch.equal(model.wte.weight, original().wte.weight.to(stored).float())


# Each with one field of config.json changed, and what the refusal must say (None: it is honoured or harmless).
@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("model_type", "gpt_neo", "model_type 'gpt_neo'"),
        ("model_type", None, None),  # before transformers 3 the architecture alone was named
        ("architectures", [], None),
        ("scale_attn_weights", 1, "scale_attn_weights must be true or false"),
        ("scale_attn_by_inverse_layer_idx", "yes", "scale_attn_by_inverse_layer_idx must be true or false"),
        ("add_cross_attention", True, "add_cross_attention=True"),
        ("is_encoder_decoder", True, "is_encoder_decoder=True"),
        ("pruned_heads", {"0": [1]}, "pruned_heads={'0': [1]}"),
        ("quantization_config", {"load_in_4bit": True}, "quantization_config={'load_in_4bit': True}"),
        ("layer_types", ["full_attention", "sliding_attention"], "layer_types="),
        ("activation_function", "quick_gelu", "activation_function='quick_gelu'; gptlab computes gelu_new"),
        ("activation_function", ["gelu"], "activation_function"),
        # Names of something that no GPT-2 has.
        ("sliding_window", 256, "sliding_window=256, which is not a field of GPT-2's configuration and may change"),
        ("num_key_value_heads", 2, "num_key_value_heads=2, which is not a field"),
        ("multi_query", True, "multi_query=True"),
        ("rope_theta", 10000.0, "rope_theta=10000.0"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping"),
        ("logit_scale", 0.5, "logit_scale=0.5"),
        ("position_embedding_type", "alibi", "position_embedding_type='alibi', a kind of position"),
        ("norm_type", "rms_norm", "norm_type='rms_norm', a kind of norm"),
        # Two names of one field.
        ("num_attention_heads", 2, "n_head=4 and num_attention_heads=2, which are two names of one field"),
        ("hidden_size", 64, "n_embd=32 and hidden_size=64"),
        ("num_attention_heads", 4, None),
        ("num_hidden_layers", None, None),
        ("max_position_embeddings", 64, None),
        ("n_ctx", 1024, None),  # transformers reads n_positions alone
        # What stands beside the field's own name, or belongs to training, to generation or to nobody.
        ("num_heads", 12, None),
        ("sliding_window", None, None),
        ("num_key_value_heads", 4, None),
        ("logit_scale", 1.0, None),
        ("position_embedding_type", "absolute", None),
        ("layer_types", ["full_attention", "full_attention"], None),
        ("attention_probs_dropout_prob", 0.5, None),
        ("max_length", 50, None),
        ("num_beam_groups", 2, None),
        ("note", "made on a Tuesday", None),
        ("scale_attn_weights", True, None),
        ("reorder_and_upcast_attn", True, None),
        ("attn_pdrop", 0.5, None),
        ("summary_type", "cls_index", None),
        ("n_inner", 128, None),
        ("n_inner", 64, "mlp.c_fc"),
        ("n_layer", 1, "which a model of its config.json does not have"),
        ("n_layer", 3, "lacks h.2."),
        ("vocab_size", 258, "wte.weight of shape (257, 32)"),
        ("n_positions", 63, "wpe.weight"),
        ("n_head", 5, "valid n_head: 1, 2, 4, 8, 16, 32"),
        ("n_head", 0, "n_head must be a whole number"),
        ("n_head", None, "n_head must be"),
        ("n_embd", -32, "n_embd must be"),
        ("n_embd", 32.5, "n_embd must be"),
        ("n_layer", "two", "n_layer must be"),
        ("n_layer", True, "n_layer must be"),
        ("n_layer", 2_000_000_000, "n_layer must be at most"),
        ("n_layer", 1000, "lacks h.2."),
        ("vocab_size", 2**63, "vocab_size must be"),
        ("n_inner", 2**31 - 1, "n_inner must be at most"),
        ("layer_norm_epsilon", 0, "norm_eps must be above 0"),
        ("layer_norm_epsilon", float("nan"), "norm_eps must be a finite number"),
        ("tie_word_embeddings", None, "tie_embeddings must be true or false"),
    ],
)
def test_every_field_is_honoured_or_refused(tmp_path: Path, field: str, value: Any, complaint: str | None) -> None:
    directory = write(tmp_path, **{field: value})
    if complaint is None:
        assert_same(gptlab.load(directory).model, original())
    else:
        assert complaint in refusal(directory)


def test_sizes_that_overflow_are_refused(tmp_path: Path) -> None:
    largest = 2**31 - 2
    assert refusal(write(tmp_path, n_embd=largest, n_head=1, n_inner=largest, vocab_size=largest))


@pytest.mark.parametrize(("name", "ours"), list(ACTIVATIONS.items()))
def test_the_activation_is_translated(tmp_path: Path, name: str, ours: str) -> None:
    config = checkpoints.read_config(write(tmp_path, activation_function=name, layer_norm_epsilon=1e-6))
    assert (config.activation, config.norm_eps) == (ours, 1e-6)


ALIASES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}


@pytest.mark.parametrize("names", [ALIASES, {**ALIASES, "n_positions": "n_ctx"}], ids=["aliases", "n_ctx"])
def test_a_field_may_have_its_other_name_alone(tmp_path: Path, names: dict[str, str]) -> None:
    write(tmp_path)
    values = {names.get(name, name): value for name, value in CONFIG.items() if name != "n_ctx"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert_same(gptlab.load(tmp_path).model, original())


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("n_head", "num_heads"),
        ("n_head", "n_heads"),
        ("n_head", "attentionHeads"),
        ("n_layer", "num_layers"),
        ("n_layer", "n_blocks"),
        ("n_embd", "d_model"),
        ("n_embd", "embedding_size"),
        ("n_inner", "intermediate_size"),
        ("n_inner", "ffn_dim"),
        ("n_positions", "block_size"),
        ("n_positions", "max_seq_len"),
        ("vocab_size", "n_vocab"),
        ("activation_function", "hidden_act"),
        ("layer_norm_epsilon", "layer_norm_eps"),
        ("tie_word_embeddings", "tie_weights"),
    ],
)
def test_an_unknown_name_never_leaves_a_field_at_its_default(tmp_path: Path, field: str, name: str) -> None:
    values = {key: value for key, value in {**CONFIG, "n_inner": 128, name: 4}.items() if key not in (field, "n_ctx")}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert re.search(
        rf"has {name}=4, which is not a field of GPT-2.* and not \w+, which it may mean", refusal(tmp_path)
    )


def test_defaults_are_gpt2s_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert checkpoints.read_config(tmp_path) == gptlab.ModelConfig.preset("gpt2")


def spoil(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    tensors = tensors_of(original(), "transformer.")
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("transformer.h.1.mlp.c_proj.bias"), "lacks h.1.mlp.c_proj.bias; it is incomplete"),
        (lambda t: [t.pop(k) for k in list(t) if ".h.1." in k], "lacks h.1."),
        (lambda t: [t.pop(k) for k in list(t) if ".h.0." in k], "and 9 more tensors"),
        (lambda t: t.update({"extra.weight": torch.ones(2, 2)}), "holds extra.weight, which"),
        (lambda t: t.update({"h.0.attn.c_attn.lora_A.default.weight": torch.ones(2, 2)}), "a LoRA adapter that is not"),
        (lambda t: t.update({"transformer.h.0.attn.bias2": torch.ones(2)}), "holds h.0.attn.bias2"),
        (lambda t: t.update({"wte.weight": torch.ones(257, 32)}), "holds wte.weight twice"),
        (lambda t: t.update({"transformer.wpe.weight": torch.ones(64, 31)}), "wpe.weight of shape (64, 31)"),
        # (out, in) where Hugging Face has (in, out): somebody stored Linear weights.
        (
            lambda t: t.update({k: v.t().contiguous() for k, v in t.items() if k.endswith("c_fc.weight")}),
            "h.0.mlp.c_fc.weight of shape (32, 128)",
        ),
        (lambda t: t["transformer.ln_f.bias"].fill_(float("nan")), "ln_f.bias holds values that are not numbers"),
        (lambda t: t["transformer.h.1.attn.c_attn.weight"][3, 3].fill_(float("inf")), "not numbers (nan or inf)"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.ones(32, dtype=torch.int64)}), "torch.int64"),
    ],
)
def test_every_tensor_is_accounted_for(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], complaint: str
) -> None:
    assert complaint in refusal(write(tmp_path, spoil(change)))


@pytest.mark.parametrize("config", [True, False], ids=["with config.json", "without"])
def test_an_adapter_alone_is_called_that(tmp_path: Path, config: bool) -> None:
    (write(tmp_path) / "model.safetensors").unlink()
    if not config:
        (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "openai-community/gpt2"}')
    save_file({"base_model.model.lora_A.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert "a LoRA adapter alone, not a model: what peft trained beside the weights of openai-community/gpt2;" in (
        refusal(tmp_path)
    )


def test_the_parent_of_a_trainers_checkpoints_names_them(tmp_path: Path) -> None:
    for step in (500, 1500, 1000):
        write(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    last = tmp_path / "checkpoint-1500"
    assert f"the last is {last}, the first {tmp_path / 'checkpoint-500'}" in refusal(tmp_path)
    assert_same(gptlab.load(last).model, original())
    (write(tmp_path) / "model.safetensors").unlink()  # some leave a config.json there
    assert f"the last is {last}" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["tf_model.h5", "flax_model.msgpack", "weights.safetensors"])
def test_weights_of_another_kind_are_named(tmp_path: Path, name: str) -> None:
    (write(tmp_path) / "model.safetensors").rename(tmp_path / name)
    assert f"has only {name}" in refusal(tmp_path)


def test_a_directory_without_weights_says_what_it_needs(tmp_path: Path) -> None:
    (write(tmp_path) / "model.safetensors").unlink()
    assert "holds no weights; it needs model.safetensors" in refusal(tmp_path)


PRETENDERS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5481\n": "run `git lfs pull` in its folder",
    b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html>": "is an HTML page, not the file itself; download it again",
    b"Entry not found": "holds the error message of a download ('Entry not found')",
}


@pytest.mark.parametrize("content", PRETENDERS, ids=PRETENDERS.get)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00002-of-00003.safetensors",
        "pytorch_model.bin",
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, name: str, content: bytes) -> None:
    if "0000" in name or "index" in name:
        write_shards(tmp_path)
    elif name == "pytorch_model.bin":
        write_bin(tmp_path)
    else:
        write(tmp_path)
    if name in ("vocab.json", "merges.txt"):
        for other in ("vocab.json", "merges.txt"):
            (tmp_path / other).write_bytes(GPT2Tokenizer().files()[other])
    (tmp_path / name).write_bytes(content)
    assert re.match(rf"{re.escape(str(tmp_path / name))} .*{re.escape(PRETENDERS[content])}", refusal(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 64, b"PK\x03\x04 not at all"])
def test_something_else_named_model_safetensors(tmp_path: Path, content: bytes) -> None:
    (write(tmp_path) / "model.safetensors").write_bytes(content)
    assert "not an intact safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": "gpt2"'])
def test_a_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (write(tmp_path) / "config.json").write_text(text)
    assert "config.json is damaged" in refusal(tmp_path)


def test_a_config_in_another_encoding(tmp_path: Path) -> None:
    (write(tmp_path) / "config.json").write_bytes(b'{"name": "caf\xe9"}')
    assert "config.json is damaged" in refusal(tmp_path)


# --- shards ---------------------------------------------------------------------------------------------------


def write_shards(directory: Path, suffix: str = "safetensors") -> dict[str, str]:
    tensors = tensors_of(original(), "transformer.")
    names = sorted(tensors)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map: dict[str, str] = {}
    for i in range(3):
        shard = f"{stem}-{i + 1:05}-of-00003.{suffix}"
        part = {name: tensors[name] for name in names[i::3]}
        save_file(part, directory / shard) if suffix == "safetensors" else torch.save(part, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return weight_map


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_put_together(tmp_path: Path, suffix: str) -> None:
    write_shards(tmp_path, suffix)
    assert_same(gptlab.load(tmp_path).model, original())


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "names the shard 'model-00002-of-00003.safetensors', which is not there" in refusal(tmp_path)


def test_a_shard_cut_short(tmp_path: Path) -> None:
    write_shards(tmp_path)
    path = tmp_path / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "model-00003-of-00003.safetensors is not an intact" in refusal(tmp_path)


@pytest.mark.parametrize("outside", ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "."])
def test_an_index_may_not_name_a_path_outside(tmp_path: Path, outside: str) -> None:
    (tmp_path / "m").mkdir()
    weight_map = write_shards(tmp_path / "m")
    # What it names exists and would complete the model: only the path is wrong.
    shard = weight_map["transformer.wte.weight"]
    (tmp_path / "m" / "sub").mkdir()
    for place in ("elsewhere.safetensors", "m/sub/x.safetensors"):
        (tmp_path / place).write_bytes((tmp_path / "m" / shard).read_bytes())
    moved = {name: outside if at == shard else at for name, at in weight_map.items()}
    (tmp_path / "m" / INDEX).write_text(json.dumps({"weight_map": moved}))
    assert f"names the shard {outside!r}, which is not a file's name" in refusal(tmp_path / "m")


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": 3}'])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    write_shards(tmp_path)
    (tmp_path / INDEX).write_text(text)
    assert "is damaged" in refusal(tmp_path)


@pytest.mark.parametrize("value", [5, None, ["x"], {"a": 1}])
def test_an_index_whose_shards_are_no_names(tmp_path: Path, value: Any) -> None:
    weight_map = write_shards(tmp_path)
    weight_map["transformer.wte.weight"] = value
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "which is not there" in refusal(tmp_path)


def test_an_index_that_points_to_the_wrong_shard(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    names = sorted(set(weight_map.values()))
    weight_map["transformer.wte.weight"] = next(s for s in names if s != weight_map["transformer.wte.weight"])
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "lack transformer.wte.weight, which" in refusal(tmp_path)


def test_an_index_that_promises_what_no_shard_holds(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    weight_map["transformer.h.2.ln_1.weight"] = weight_map["transformer.wte.weight"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "lack transformer.h.2.ln_1.weight" in refusal(tmp_path)


# --- pytorch_model.bin ----------------------------------------------------------------------------------------


def write_bin(directory: Path, *, legacy: bool = False) -> Path:
    (directory / "config.json").write_text(json.dumps(CONFIG))
    path = directory / "pytorch_model.bin"
    torch.save(tensors_of(original(), "transformer."), path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_of_tensors_is_read(tmp_path: Path, legacy: bool) -> None:
    write_bin(tmp_path, legacy=legacy)
    assert_same(gptlab.load(tmp_path).model, original())


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_a_pickle_in_which_a_training_loop_wrapped_the_tensors(tmp_path: Path, wrapper: str) -> None:
    path = write_bin(tmp_path)
    tensors = tensors_of(original(), "model.transformer.")
    torch.save({wrapper: tensors, "epoch": 3, "optimizer": {"state": {}}}, path)
    assert_same(gptlab.load(tmp_path).model, original())
    tensors.pop("model.transformer.h.0.ln_1.weight")
    torch.save({wrapper: tensors}, path)
    assert "lacks h.0.ln_1.weight" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"epoch": 3}, r"holds something other than tensors by name, alone or under 'state_dict'"),
        ({"state_dict": {"epoch": 3}}, r"save model\.state_dict\(\) alone as pytorch_model\.bin"),
        ({"model": {}, "model_args": {"n_layer": 2}}, r"is nanoGPT's ckpt\.pt under another name; rename it"),
    ],
)
def test_a_pickle_of_something_else_is_explained(tmp_path: Path, content: dict[str, Any], complaint: str) -> None:
    torch.save(content, write_bin(tmp_path))
    assert re.search(complaint, refusal(tmp_path))


def as_plain_pickle(payload: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps({"wte.weight": payload}))


def as_new_torch_file(payload: Any, path: Path) -> None:
    torch.save({**tensors_of(original()), "extra": payload}, path)


def as_old_torch_file(payload: Any, path: Path) -> None:
    torch.save({**tensors_of(original()), "extra": payload}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("form", [as_plain_pickle, as_new_torch_file, as_old_torch_file])
def test_a_pickle_that_would_run_code_does_not_run(tmp_path: Path, form: Callable[[Any, Path], None]) -> None:
    path = write_bin(tmp_path)
    mark = tmp_path / "code-has-run"
    form(Payload(mark), path)
    with contextlib.suppress(pickle.UnpicklingError, RuntimeError):
        torch.load(path, weights_only=False)
    assert mark.exists(), "the trap must be a real one: whoever unpickles without care falls into it"
    mark.rmdir()
    assert "loading it could run code, so it was not loaded" in refusal(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"wte.weight": [1.0]}, torch.ones(3)])
def test_a_pickle_of_something_else(tmp_path: Path, content: Any) -> None:
    torch.save(content, write_bin(tmp_path))
    assert "something other than tensors by name" in refusal(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_pickles_are_refused_or_read_but_never_a_traceback(tmp_path: Path, legacy: bool) -> None:
    path = write_bin(tmp_path, legacy=legacy)
    good = path.read_bytes()
    draw = random.Random(4)
    refused = 0
    for i in range(150):
        bad = bytearray(good)
        # The pickle itself stands first in both forms; that is where the trouble is.
        bad[draw.randrange(4000)] ^= draw.randrange(1, 256)
        path.write_bytes(bad if i % 3 else bad[: draw.randrange(len(bad))])
        try:
            gptlab.load(tmp_path)
        except gptlab.GptlabError:
            refused += 1
    assert refused > 75


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("n_head", ["nhead", "nheads", "n_heads", "numHeads", "headcount", "num_attn_heads"]),
        ("n_layer", ["nlayer", "nlayers", "num_layers", "layercount"]),
        ("n_embd", ["nembd", "hiddenSize", "d_model", "dmodel"]),
        ("n_positions", ["nctx", "maxpositions", "block_size", "seq_len"]),
        ("layer_norm_epsilon", ["lneps", "ln_eps", "layernormepsilon", "eps"]),
        ("activation_function", ["actfn", "act_fn", "activationfunction", "hidden_act"]),
        ("scale_attn_weights", ["scale_attention_weights", "scale_attn", "attn_scale", "scaled_attention"]),
    ],
)
def test_a_field_under_a_name_that_transformers_does_not_know_is_refused(
    tmp_path: Path, field: str, names: list[str]
) -> None:
    value = False if field == "scale_attn_weights" else CONFIG.get(field, 1)
    for name in names:
        config = {key: kept for key, kept in CONFIG.items() if key not in (field, "n_ctx")}
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(gptlab.GptlabError, match=f"has {name}=.*which it may mean"):
            checkpoints.read_config(tmp_path)
