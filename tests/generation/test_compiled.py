"""The compiled step against the plain model, which transformers judges elsewhere."""

import logging
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

from gptlab.config import ModelConfig, RopeConfig
from gptlab.errors import GptlabError
from gptlab.generation import padded
from gptlab.generation.compiled import decoder, library, step
from gptlab.generation.compiled.decoder import Compiled, read_prompt, serves
from gptlab.generation.compiled.step import CompiledStep, Text
from gptlab.model.gpt import GPT
from gptlab.model.quantised import dequantise, quantise, quantise_model

try:
    library.library()
except library.NoLibraryError as error:
    pytest.skip(str(error), allow_module_level=True)

LLAMA = {"norm": "rms", "mlp": "swiglu", "bias": False, "position": "rope", "n_kv_head": 2, "tie_embeddings": False}
VARIANTS = [
    {},
    {"position": "rope"},
    {"position": "rope", "n_kv_head": 1},
    {"position": "rope", "n_kv_head": 2, "window": 37, "sinks": 3},
    {"position": "rope", "window": (None, 90, 5), "dilation": (1, 2, 3), "sinks": 2},
    {"position": "none", "window": 64, "n_kv_head": 4},
    {"position": "blend", "window": (20, 30, None), "sinks": 1},
    {"position": "rope", "rope": RopeConfig(scaling="llama3", factor=8.0, trained_length=32)},
    {"position": "rope", "rope": RopeConfig(scaling="yarn", factor=4.0), "scale_attn_by_inverse_layer_idx": True},
    {"position": "rope", "rope": RopeConfig(scaling="linear", factor=2.0), "scale_attn_weights": False},
    {"activation": "relu", "n_embd": 40, "n_inner": 52, "bias": False},
    {"activation": "gelu", "n_embd": 136, "norm_eps": 0.1},
    {"activation": "silu", "tie_embeddings": False, "vocab_size": 101},
    LLAMA,
    {**LLAMA, "window": 50, "sinks": 4},
]


def make_model(**switches):
    """A random model whose every parameter matters."""
    config = {"vocab_size": 211, "context_length": 560, "n_layer": 3, "n_head": 4, "n_embd": 64} | switches
    model = GPT(ModelConfig(**config), seed=1).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
        for name, scale in model.named_buffers():
            scale.copy_(torch.rand(scale.shape, generator=draw) if name == "rope_scale" else torch.tensor(0.7))
    return model


def ids_for(model, n, seed=2):
    return torch.randint(model.config.vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def teacher_forced(model, ids, n_prompt):
    """(T - n_prompt + 1, V): the logits after the prompt and after each token that follows."""
    text, after = read_prompt(model, ids[:n_prompt], len(ids))
    step = CompiledStep(model)
    return torch.cat([after, *(step([text], [token]) for token in ids[n_prompt:])])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("switches", VARIANTS, ids=str)
def test_logits_equal_the_plain_models_for_500_tokens(switches, threads, monkeypatch):
    monkeypatch.setattr(padded, "CHUNK", 16)
    monkeypatch.setattr(step, "n_threads", lambda: threads)
    model = make_model(**switches)
    ids = ids_for(model, 520 if threads == 1 else 60)
    with torch.inference_mode():
        torch.testing.assert_close(
            teacher_forced(model, ids, 20), model(torch.tensor([ids]))[0, 19:], rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("switches", [VARIANTS[0], VARIANTS[3], LLAMA], ids=str)
def test_bfloat16_is_as_near_to_float32_as_the_plain_model_is(switches):
    model = make_model(**switches)
    ids = ids_for(model, 120)
    with torch.inference_mode():
        exact = model(torch.tensor([ids]))[0, 19:]
        model = model.bfloat16()
        plain = (model(torch.tensor([ids]))[0, 19:] - exact).square().mean()
        assert (teacher_forced(model, ids, 20) - exact).square().mean() < 1.2 * plain


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("switches", [VARIANTS[0], VARIANTS[9], VARIANTS[10], LLAMA], ids=str)
def test_whole_numbers_are_multiplied_as_the_floats_that_they_stand_for(switches, bits, monkeypatch):
    model = make_model(**switches)
    quantise_model(model, bits)
    monkeypatch.setattr(GPT, "cache_dtype", torch.float32)
    monkeypatch.setattr("gptlab.model.quantised.fast_bfloat16", lambda: False)
    ids = ids_for(model, 120)
    with torch.inference_mode():
        plain = model(torch.tensor([ids]))[0, 19:]
        # 16-bit activations: an error of 1e-5 of the largest, through three layers.
        torch.testing.assert_close(teacher_forced(model, ids, 20), plain, rtol=1e-3, atol=2e-3 * plain.std().item())


@pytest.mark.parametrize("bits", [8, 4, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_company(bits, dtype):
    model = make_model(n_kv_head=2).to(dtype)
    if bits:
        quantise_model(model, bits)
    prompts = [ids_for(model, n, seed=n) for n in (3, 400, 17, 300, 5, 64, 65, 66, 1, 2, 90)]
    fed = [ids_for(model, 4, seed=i) for i in range(len(prompts))]
    with torch.inference_mode():
        together = Compiled(model, prompts, 500)
        seen = [together.read(), *(together.step(torch.tensor(tokens)) for tokens in zip(*fed, strict=True))]
        for i, prompt in enumerate(prompts):
            alone = Compiled(model, [prompt], 500)
            mine = [alone.read(), *(alone.step(torch.tensor([token])) for token in fed[i])]
            assert all(torch.equal(a[0], b[i]) for a, b in zip(mine, seen, strict=True))


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(
    "switches",
    [
        {"n_embd": 1, "n_head": 1, "n_layer": 1, "vocab_size": 1, "n_inner": 1},
        {"n_embd": 9, "n_head": 3, "n_layer": 2, "vocab_size": 33, "n_inner": 5},
        {"n_embd": 36, "n_head": 2, "n_inner": 77, "n_kv_head": 1, "position": "rope", "window": 7, "sinks": 30},
        {"n_embd": 520, "n_head": 2, "n_inner": 531, "n_layer": 1, "vocab_size": 67, "window": 1},
        {**LLAMA, "n_embd": 92, "n_head": 2, "n_inner": 29, "n_kv_head": 1},
    ],
    ids=str,
)
def test_sizes_that_fill_no_vector(switches, bits):
    model = make_model(**switches)
    if bits:
        quantise_model(model, bits)
    prompts = [ids_for(model, n, seed=n) for n in (3, 257, 17, 5, 1, 100)]
    with torch.inference_mode():
        together = Compiled(model, prompts, 500)
        together.read()
        seen = together.step(torch.zeros(len(prompts), dtype=torch.int64))
        for i, prompt in enumerate(prompts):
            alone = Compiled(model, [prompt], 500)
            alone.read()
            mine = alone.step(torch.tensor([0]))[0]
            assert torch.equal(mine, seen[i])
            if not bits:
                plain = model(torch.tensor([[*prompt, 0]]))[0, -1]
                torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("name", ["wpe.weight", "h.0.mlp.c_fc.bias", "h.2.ln_2.weight"])
def test_what_is_not_a_number_stays_so(name, value, bits):
    model = make_model()
    if bits:
        quantise_model(model, bits)
    with torch.inference_mode():
        model.get_parameter(name).view(-1)[5] = value
        plain = model(torch.tensor([[1, 2, 3]]))[0, -1]
        text, _ = read_prompt(model, [1, 2], 10)
        assert torch.equal(CompiledStep(model)([text], [3])[0].isnan(), plain.isnan())


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", "gelu"])
def test_activations_far_below_zero_are_the_plain_ones(activation):
    model = make_model(activation=activation, n_layer=1)
    with torch.inference_mode():
        model.h[0].mlp.c_fc.bias[:42] = -torch.logspace(-3, 38, 42)
        plain = model(torch.tensor([[1, 2, 3]]))[0, -1]
        text, _ = read_prompt(model, [1, 2], 10)
        torch.testing.assert_close(CompiledStep(model)([text], [3])[0], plain, rtol=1e-4, atol=1e-4)


def test_a_cast_leaves_the_factors_of_whole_numbers():
    model = make_model()
    quantise_model(model, 8)
    before = model.h[0].mlp.c_fc.factors.clone()
    model.bfloat16()
    assert torch.equal(model.h[0].mlp.c_fc.factors, before)
    with torch.inference_mode():
        assert teacher_forced(model, ids_for(model, 30), 20).isfinite().all()


def test_a_model_that_is_cast_while_it_generates_is_refused():
    model = make_model()
    with torch.inference_mode():
        step = CompiledStep(model)
        text, _ = read_prompt(model.bfloat16(), [1, 2], 10)
        with pytest.raises(GptlabError, match="another dtype"):
            step([text], [3])


def test_more_rows_than_a_step_takes_and_rows_that_leave():
    model = make_model()
    prompts = [ids_for(model, 3, seed=i) for i in range(150)]
    with torch.inference_mode():
        batch = Compiled(model, prompts, 100)
        batch.read()
        batch.step(torch.tensor([7] * 150))
        batch.keep([149, 3, 77])
        got = batch.step(torch.tensor([1, 2, 3]))
        for row, (i, token) in enumerate(((149, 1), (3, 2), (77, 3))):
            want = model(torch.tensor([[*prompts[i], 7, token]]))[0, -1]
            torch.testing.assert_close(got[row], want, rtol=1e-5, atol=1e-4)


def test_equal_prompts_are_read_once_and_go_apart():
    model, reads = make_model(), []
    with torch.inference_mode():
        batch = Compiled(model, [[5, 6, 7]] * 3, 100)
        make_cache = model.make_cache
        model.make_cache = lambda *args, **rest: reads.append(1) or make_cache(*args, **rest)
        batch.read()
        assert len(reads) == 1
        got = batch.step(torch.tensor([1, 2, 3]))
        want = torch.cat([model(torch.tensor([[5, 6, 7, token]]))[:, -1] for token in (1, 2, 3)])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_a_text_that_outgrows_the_memory_ends_in_a_sentence(monkeypatch):
    monkeypatch.setattr(padded, "RESERVE", 4)
    model = make_model(position="rope")
    with torch.inference_mode():
        batch = Compiled(model, [[1, 2, 3], [4]], 500)
        batch.read()
        monkeypatch.setattr("gptlab.generation.memory.available_memory", lambda device: 1000)
        for _ in range(4):
            batch.step(torch.tensor([1, 2]))
        with pytest.raises(GptlabError, match=r"going on after 7 tokens takes"):
            batch.step(torch.tensor([1, 2]))


def test_a_cache_that_may_not_grow_says_so():
    model = make_model()
    with torch.inference_mode():
        text = Text(model.make_cache(1, 2))
        step = CompiledStep(model)
        step([text], [1])
        step([text], [2])
        with pytest.raises(GptlabError, match="no room for 1 more"):
            step([text], [3])


def test_quantising_in_8_bits_moves_no_weight_by_more_than_half_a_step():
    weight = torch.randn(50, 70, generator=torch.Generator().manual_seed(0))
    whole, factors = quantise(weight, 8)
    assert ((dequantise(whole, factors) - weight).abs() <= factors[:, None] * 0.5001).all()
    assert dequantise(*quantise(torch.zeros(2, 32), 8)).abs().max() == 0


def test_4_bits_are_no_worse_than_ggufs_own():
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    kind = gguf.GGMLQuantizationType.Q4_0
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
    ours = dequantise(*quantise(weight, 4))
    assert (ours - weight).square().mean() < (theirs - weight).square().mean()


def test_it_serves_only_what_it_computes(monkeypatch):
    monkeypatch.setattr(decoder, "is_built", lambda: True)
    assert serves(make_model(), 1)
    assert not serves(make_model().double(), 1)
    hooked = make_model()
    hooked.h[1].mlp.register_forward_hook(lambda *_: None)
    assert not serves(hooked, 1)
    patched = make_model()
    patched.h[1].mlp.forward = lambda x: x
    assert not serves(patched, 1)
    mixed = make_model()
    mixed.h[1].mlp.double()
    assert not serves(mixed, 1)
    changed = make_model()
    changed.h[0].attn.c_attn = torch.nn.Sequential(changed.h[0].attn.c_attn)
    assert not serves(changed, 1)


def test_it_is_built_for_long_runs_of_large_models_and_for_quantised_ones(monkeypatch):
    monkeypatch.setattr(decoder, "is_built", lambda: False)
    model = make_model()
    assert not serves(model, 10**9)
    quantise_model(model, 8)
    assert serves(model, 1)
    monkeypatch.setattr(decoder, "WORTH_BUILDING", 1e6)
    assert serves(make_model(), 100)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "", "CXX": ""}, "no C\\+\\+ compiler"),
        ({"CXX": "false"}, "does not compile"),
        ({"GPTLAB_COMPILED": "0"}, "switches the compiled step off"),
        ({"GPTLAB_CACHE": "/proc/nowhere"}, "set GPTLAB_CACHE"),
        ({"GPTLAB_CACHE": "", "HOME": "~"}, "set GPTLAB_CACHE"),
    ],
    ids=str,
)
def test_without_a_compiler_a_warning_says_why_and_text_comes_all_the_same(environment, reason, monkeypatch, tmp_path):
    for name, value in ({"GPTLAB_CACHE": str(tmp_path)} | environment).items():
        monkeypatch.setenv(name, value)
    library.library.cache_clear()
    library.library_path.cache_clear()
    try:
        with pytest.raises(library.NoLibraryError, match=reason):
            library.library()
        records = []
        monkeypatch.setattr(logging.getLogger(decoder.__name__), "warning", lambda text, why: records.append(str(why)))
        model = make_model()
        quantise_model(model, 8)
        assert not serves(model, 1)
        assert records
    finally:
        monkeypatch.undo()
        library.library.cache_clear()
        library.library_path.cache_clear()


def _one_step(connection):
    model = make_model()
    with torch.inference_mode():
        batch = Compiled(model, [[1, 2]], 10)
        batch.read()
        connection.send(batch.step(torch.tensor([3])).tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_computes_with_threads_of_its_own(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
    monkeypatch.setattr(step, "n_threads", lambda: 2)
    here, there = multiprocessing.Pipe()
    _one_step(there)
    mine = here.recv()
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_one_step, args=(there,))
    child.start()
    assert here.poll(60)
    child.join(60)
    assert here.recv() == mine
    assert child.exitcode == 0
    torch.set_num_threads(before)


@pytest.mark.slow
def test_a_library_that_was_cut_short_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTLAB_CACHE", str(tmp_path / "a 'cache' – \"here\""))
    library.library.cache_clear()
    library.library_path.cache_clear()
    try:
        path = library.library_path()
        path.parent.mkdir(parents=True)
        path.write_bytes(b"\x7fELF")
        assert library.library().gptlab_largest_batch() == 64
    finally:
        library.library.cache_clear()
        library.library_path.cache_clear()


@pytest.mark.slow
def test_builds_at_the_same_time_do_not_meet(tmp_path):
    code = "from gptlab.generation.compiled.library import library; library()"
    environment = os.environ | {"GPTLAB_CACHE": str(tmp_path)}
    several = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [one.wait() for one in several] == [0, 0, 0]
    assert len(list((tmp_path / "compiled").iterdir())) == 1
