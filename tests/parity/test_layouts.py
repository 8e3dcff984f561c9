# Every way in which a GPT-2 of `transformers` may lie on disk gives the same model.
from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.judge import judge
from helpers.models import close, random_ids
from safetensors.torch import load_file, save_file
from torch import Tensor

import gptlab
from gptlab import GptlabError

Model = transformers.GPT2LMHeadModel
State = dict[str, Tensor]


def state_of(model: Model) -> State:
    """All of their tensors, the tied head too, as independent copies."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write(model: Model, directory: Path, state: State) -> None:
    model.config.save_pretrained(directory)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")


def single(model: Model, directory: Path) -> None:
    model.save_pretrained(directory)
    assert [path.name for path in directory.glob("*.safetensors")] == ["model.safetensors"]


def sharded(model: Model, directory: Path) -> None:
    model.save_pretrained(directory, max_shard_size="30KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    assert (directory / "model.safetensors.index.json").exists()


def pickled(model: Model, directory: Path) -> None:
    model.config.save_pretrained(directory)
    torch.save(model.state_dict(), directory / "pytorch_model.bin")


def pickled_long_ago(model: Model, directory: Path) -> None:
    model.config.save_pretrained(directory)
    torch.save(model.state_dict(), directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def pickled_and_sharded(model: Model, directory: Path) -> None:
    model.config.save_pretrained(directory)
    weight_map = {}
    for i, (name, tensor) in enumerate(state_of(model).items()):
        weight_map[name] = shard = f"pytorch_model-0000{i % 3 + 1}-of-00003.bin"
        path = directory / shard
        torch.save({**(torch.load(path, weights_only=True) if path.exists() else {}), name: tensor}, path)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def without_prefix(model: Model, directory: Path) -> None:
    write(model, directory, {name.removeprefix("transformer."): t for name, t in state_of(model).items()})


def without_head(model: Model, directory: Path) -> None:
    write(model, directory, {name: t for name, t in state_of(model).items() if name != "lm_head.weight"})


def with_head(model: Model, directory: Path) -> None:
    assert "lm_head.weight" in state_of(model)
    write(model, directory, state_of(model))


def with_legacy_buffers(model: Model, directory: Path) -> None:
    state = state_of(model)
    for i in range(model.config.n_layer):
        # As transformers before 4.29 saved them, and as the hub's gpt2 still has the first.
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(64, 64, dtype=torch.bool).tril()[None, None]
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    write(model, directory, state)


def as_the_hub_has_gpt2(model: Model, directory: Path) -> None:
    # No prefix, no head, causal masks in float32.
    state = {name.removeprefix("transformer."): t for name, t in state_of(model).items() if name != "lm_head.weight"}
    for i in range(model.config.n_layer):
        state[f"h.{i}.attn.bias"] = torch.ones(64, 64).tril()[None, None]
    write(model, directory, state)


LAYOUTS: list[Callable[[Model, Path], None]] = [
    single,
    sharded,
    pickled,
    pickled_long_ago,
    pickled_and_sharded,
    without_prefix,
    without_head,
    with_head,
    with_legacy_buffers,
    as_the_hub_has_gpt2,
]
NEEDS_TYING = [without_head, as_the_hub_has_gpt2]


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_the_same_model(layout: Callable[[Model, Path], None], tied: bool, tmp_path: Path) -> None:
    theirs = judge(tie_word_embeddings=tied)
    layout(theirs, tmp_path)
    if not tied and layout in NEEDS_TYING:
        with pytest.raises(GptlabError, match=r"lacks lm_head\.weight"):
            gptlab.load(tmp_path)
        return
    ours = gptlab.load(tmp_path).model
    # The same numbers to the last bit, the projections transposed.
    expected = state_of(theirs)
    for name, parameter in ours.named_parameters():
        there = expected[name if name.startswith("lm_head") else f"transformer.{name}"]
        conv1d = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        assert torch.equal(parameter, there.t() if conv1d else there), name
    assert (ours.lm_head.weight is ours.wte.weight) == tied
    ids = random_ids(257, 2, 30)
    close(ours(ids), theirs(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_low_precision_are_computed_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = judge().to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = gptlab.load(tmp_path).model
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    ids = random_ids(257, 2, 30)
    close(ours(ids), theirs.float()(ids).logits)


@pytest.mark.parametrize("layout", [single, sharded, pickled], ids=lambda layout: layout.__name__)
def test_a_loaded_model_does_not_hang_on_its_file(layout: Callable[[Model, Path], None], tmp_path: Path) -> None:
    theirs = judge()
    layout(theirs, tmp_path)
    ours = gptlab.load(tmp_path).model
    for path in [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")]:
        path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(ours.wte.weight, theirs.transformer.wte.weight)
    assert torch.equal(ours.blocks[2].attn.c_proj.weight, theirs.transformer.h[2].attn.c_proj.weight.t())


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path: Path) -> None:
    theirs = judge()
    state = state_of(theirs)
    state["lm_head.weight"][0, 0] += 1
    write(theirs, tmp_path, state)
    with pytest.raises(GptlabError, match=r"lm_head\.weight that differs from wte\.weight"):
        gptlab.load(tmp_path)


@pytest.mark.parametrize("shape", [(), (5,), (32, 32, 1), (96, 32), (1, 32, 96)], ids=str)
def test_a_projection_of_a_wrong_shape_or_rank_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    theirs = judge()
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["transformer.h.1.attn.c_attn.weight"] = torch.zeros(shape)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(GptlabError, match=r"h\.1\.attn\.c_attn\.weight of shape .* asks for \(96, 32\)"):
        gptlab.load(tmp_path)


ALIASES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        ALIASES,
        {"n_head": "num_attention_heads"},
        {"activation_function": {"value": "gelu_fast"}},
        {"activation_function": {"value": "gelu_accurate"}},
        {"activation_function": {"value": "gelu_python"}},
        {"activation_function": {"value": "swish"}},
        {"scale_attn_by_inverse_layer_idx": {"value": True}, "scale_attn_weights": {"value": False}},
    ],
    ids=str,
)
def test_a_configuration_means_what_transformers_takes_it_for(changes: dict[str, Any], tmp_path: Path) -> None:
    judge().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for name, change in changes.items():
        if isinstance(change, str):
            values[change] = values.pop(name)
        else:
            values[name] = change["value"]
    path.write_text(json.dumps(values))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()  # from the very same directory
    ids = random_ids(257, 2, 30)
    close(gptlab.load(tmp_path).model(ids), theirs(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["GPT2DoubleHeadsModel", "GPT2ForSequenceClassification", "GPT2Model"])
def test_what_models_of_other_tasks_save_is_their_language_model(kind: str, tmp_path: Path) -> None:
    theirs = judge()
    other = getattr(transformers, kind)(theirs.config).eval()
    (other if kind == "GPT2Model" else other.transformer).load_state_dict(theirs.transformer.state_dict())
    other.save_pretrained(tmp_path)
    ids = random_ids(257, 2, 30)
    with contextlib.nullcontext() if kind == "GPT2Model" else pytest.warns(UserWarning, match="is left aside"):
        ours = gptlab.load(tmp_path).model
    close(ours(ids), theirs(ids).logits)


@torch.no_grad()
def test_a_setting_that_changes_rounding_only_is_honoured(tmp_path: Path) -> None:
    theirs = judge(reorder_and_upcast_attn=True)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["reorder_and_upcast_attn"]
    ids = random_ids(257, 2, 30)
    close(gptlab.load(tmp_path).model(ids), theirs(ids).logits)
