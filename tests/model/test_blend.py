"""Between learned and rotary positions: exact at both ends, one function in between, and saved whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import close, noisy, random_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import gptlab
from gptlab import GPT, GptlabError, ModelConfig
from gptlab.config import RopeConfig
from gptlab.model import PADDING, cost
from gptlab.model.gpt import SCALES
from gptlab.model.kernels import use
from gptlab.text.tokenizers import byte_tokenizer

LENGTH = 60
VARIANTS: list[dict[str, Any]] = [
    {},
    {"n_kv_head": 2},
    {"window": 5},
    {"window": (4, None), "sinks": 3, "n_kv_head": 1},
    {"window": 6, "sinks": 2, "dilation": 2},
    {"rope": RopeConfig(theta=500.0)},
    {"rope": RopeConfig(scaling="yarn", factor=4.0)},
    {"tie_embeddings": False, "bias": False},
]
variants = pytest.mark.parametrize("values", VARIANTS, ids=str)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def at(model: GPT, rope: float | Tensor, wpe: float) -> GPT:
    """The model at these scales."""
    model.rope_scale.copy_(torch.as_tensor(rope))
    model.wpe_scale.fill_(wpe)
    return model


def half_way(**values: Any) -> GPT:
    """Each pair at a scale of its own, and a good part of the table."""
    model = noisy(position="blend", **values)
    return at(model, torch.linspace(0.03, 0.9, model.config.head_dim // 2), 0.37)


def sibling(model: GPT, position: str) -> GPT:
    """The same weights, with positions of another kind."""
    values: dict[str, Any] = {**model.config.to_dict(), "position": position}
    if position == "learned":
        values["rope"] = None
    other = GPT(ModelConfig.from_dict(values)).eval()
    ours = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        parameter.copy_(ours[name])
    return other


@variants
def test_at_its_ends_it_is_a_learned_and_a_rotary_model(values: dict[str, Any]) -> None:
    model = noisy(position="blend", **values)
    ids = random_ids(model, 2, LENGTH)
    learned, rope = sibling(model, "learned")(ids), sibling(model, "rope")(ids)
    close(model(ids), learned)  # as it starts
    close(at(model, 1.0, 0.0)(ids), rope)
    assert (learned - rope).abs().max() > 0.1
    between = at(model, 0.1, 0.5)(ids)
    assert min((between - learned).abs().max(), (between - rope).abs().max()) > 0.01


def test_a_fresh_model_is_at_the_start_and_draws_what_its_sibling_draws() -> None:
    model, learned = GPT(ModelConfig.preset("tiny", position="blend")), GPT(ModelConfig.preset("tiny"))
    assert model.rope_scale.tolist() == [0.0] * 4
    assert model.wpe_scale.item() == 1.0
    theirs = dict(learned.named_parameters())
    assert all(torch.equal(parameter, theirs.pop(name)) for name, parameter in model.named_parameters())
    assert not theirs


def test_each_scale_is_a_factor_on_what_it_scales() -> None:
    model = half_way(rope=RopeConfig(theta=300.0))
    ids = random_ids(model, 2, LENGTH)
    expected = sibling(model, "rope")
    table = model.wpe.weight * 0.37
    expected.frequencies = (expected.frequencies[0] * model.rope_scale.double(), 1.0)
    expected.wte.register_forward_hook(lambda _module, _args, out: out + table[:LENGTH])
    close(model(ids), expected(ids))


@variants
@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
def test_whole_chunked_token_by_token_and_padded_are_one_function(values: dict[str, Any], kernel: str) -> None:
    model = half_way(**values)
    ids = random_ids(model, 2, LENGTH)
    with use("reference"):
        expected = model(ids)
    with use(kernel):
        close(model(ids), expected)
        close(model(ids, cache=model.make_cache(2, LENGTH, chunk=LENGTH)), expected)
        for size in (7, 1):
            cache = model.make_cache(2, LENGTH, chunk=size)
            close(torch.cat([model(part, cache=cache) for part in ids.split(size, 1)], 1), expected)
        positions = torch.arange(LENGTH).expand(2, -1) - torch.tensor([[0], [9]])
        padded = torch.stack([ids[0], torch.cat([ids[1, :9], ids[1, :-9]])])
        close(model(padded, positions=positions.clamp(min=PADDING))[1, 9:], expected[1, :-9])


def test_banded_attention_computes_the_same() -> None:
    model = half_way(window=5, sinks=2)
    ids = random_ids(model, 2, LENGTH)
    with use("reference"):
        expected = model(ids)
    with use("banded"):
        close(model(ids), expected)


def test_a_cache_of_other_scales_is_refused() -> None:
    model = half_way()
    ids = random_ids(model, 1, 10)
    changes: list[Callable[[], Tensor]] = [
        lambda: model.wpe_scale.fill_(0.36),
        lambda: model.rope_scale[2:3].mul_(1.0001),
    ]
    for change in changes:
        cache = model.make_cache(1, 20)
        model(ids, cache=cache)
        change()
        with pytest.raises(GptlabError, match=r"rope_scale and wpe_scale had other values.*make a new one"):
            model(ids, cache=cache)
    for position in ("learned", "rope"):
        other = sibling(model, position)
        with pytest.raises(GptlabError, match="other values"):
            other(ids, cache=model.make_cache(1, 20))
        with pytest.raises(GptlabError, match="other values"):
            model(ids, cache=other.make_cache(1, 20))


def test_its_length_ends_with_its_table() -> None:
    model = half_way()
    with pytest.raises(GptlabError, match="context of 64"):
        model(random_ids(model, 1, 65))
    with pytest.raises(GptlabError, match="context of 64"):
        model.make_cache(1, 65)


def test_casting_leaves_the_scales_alone() -> None:
    model = half_way()
    before = {name: getattr(model, name).clone() for name in SCALES}
    for cast in (model.bfloat16(), model.to(torch.float16), copy.deepcopy(model).bfloat16(), model.float()):
        for name, scale in before.items():
            assert getattr(cast, name).dtype == torch.float32
            assert torch.equal(getattr(cast, name), scale)
    assert dict(model.named_buffers()).keys() == set(SCALES)
    assert copy.deepcopy(model).bfloat16().wte.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("stored", [None, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
def test_saved_and_loaded_it_is_the_same(
    tmp_path: Path, stored: torch.dtype | None, loaded: torch.dtype, tie: bool
) -> None:
    model = half_way(tie_embeddings=tie)
    gptlab.save(gptlab.LanguageModel(model), tmp_path, dtype=stored)
    assert load_file(tmp_path / "model.safetensors")["rope_scale"].dtype == torch.float32
    again = gptlab.load(tmp_path, dtype=loaded).model
    assert again.config == model.config
    for name in SCALES:
        assert getattr(again, name).dtype == torch.float32
        assert torch.equal(getattr(again, name), getattr(model, name))
    if stored is None and loaded == torch.float32:
        ids = random_ids(model, 2, LENGTH)
        assert torch.equal(again(ids), model(ids))


def test_a_checkpoint_without_its_scales_is_refused(tmp_path: Path) -> None:
    gptlab.save(gptlab.LanguageModel(half_way()), tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["rope_scale"]
    save_file(tensors, path, metadata)
    with pytest.raises(GptlabError, match="lacks rope_scale"):
        gptlab.load(tmp_path)


def test_an_odd_head_is_refused_and_settings_of_rotation_are_not() -> None:
    with pytest.raises(GptlabError, match=r"position='blend' rotates pairs of channels, but head_dim is 3"):
        ModelConfig.preset("tiny", n_embd=12, position="blend")
    config = ModelConfig.preset("tiny", position="blend", rope={"theta": 7.0})
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_it_is_counted_like_a_model_with_learned_positions() -> None:
    blend, learned = (ModelConfig.preset("tiny", position=position) for position in ("blend", "learned"))
    assert sum(cost.parameters(blend).values()) == sum(p.numel() for p in GPT(blend).parameters())
    assert cost.parameters(blend) == cost.parameters(learned)
    assert cost.decode_bytes(blend, 9, 4) == cost.decode_bytes(learned, 9, 4)


def test_generation_ends_with_the_table() -> None:
    model = half_way(vocab_size=257)
    lm = gptlab.LanguageModel(model, byte_tokenizer())
    assert lm.generate("ab", max_new_tokens=10, temperature=0) == lm.generate("ab", max_new_tokens=10, temperature=0)
    with pytest.raises(GptlabError, match="context holds 64"):
        lm.generate("a" * 65)


def test_compiled_blocks_serve_every_scale() -> None:
    counter = CompileCounter()
    model = half_way()
    ids = random_ids(model, 2, LENGTH)
    torch._dynamo.reset()
    blocks = [torch.compile(block, backend=counter, fullgraph=True) for block in model.blocks]
    seen = []
    for rope, wpe in ((0.0, 1.0), (0.25, 1.0), (1.0, 0.5), (1.0, 0.0)):
        at(model, rope, wpe)
        expected = model(ids)
        x, tokens, rotary = model.embed(ids, None, None, None)
        for block in blocks:
            x = block(x, tokens, rotary)
        close(model.lm_head(model.ln_f(x)), expected)
        seen.append(counter.frame_count)
    assert seen[0] > 0
    assert len(set(seen)) == 1
