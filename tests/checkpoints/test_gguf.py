"""GGUF: what is written comes back, the gguf package reads it, and llama.cpp writes the same text."""

from __future__ import annotations

import json
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.llama_cpp import in_llama_cpp

import gptlab
from gptlab import checkpoints
from gptlab.checkpoints import Checkpoint
from gptlab.checkpoints import gguf as ours
from gptlab.checkpoints.gguf.container import open_gguf
from gptlab.text.tokenizers import GPT2Tokenizer, Tokenizer, byte_tokenizer, char_tokenizer, train_bpe

gguf = pytest.importorskip("gguf")
from gguf import quants  # noqa: E402

GATED = {"position": "rope", "norm": "rms", "mlp": "swiglu"}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gqa": {"n_kv_head": 2},
    "rope": {"position": "rope"},
    "rope, mqa, theta": {"position": "rope", "n_kv_head": 1, "rope": {"theta": 5000.0}},
    "rope, gqa, linear": {"position": "rope", "n_kv_head": 2, "rope": {"scaling": "linear", "factor": 4.0}},
    "llama": {**GATED, "bias": False, "n_kv_head": 2, "rope": {"theta": 1e5}},
    "llama, biases, linear": {**GATED, "tie_embeddings": False, "rope": {"scaling": "linear", "factor": 4.0}},
    "llama 3.1": {
        **GATED,
        "bias": False,
        "n_kv_head": 2,
        "rope": {"theta": 500.0, "scaling": "llama3", "factor": 8.0, "trained_length": 40},
    },
    "untied, inner, eps": {"tie_embeddings": False, "n_inner": 96, "norm_eps": 1e-3},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat and the dog sat on the log " * 20], 300)


def make(tokenizer: Tokenizer | None = None, **overrides: Any) -> Checkpoint:
    vocab_size = 300 if tokenizer is None else tokenizer.vocab_size
    config = gptlab.ModelConfig.from_dict(
        {"vocab_size": vocab_size, "context_length": 64, "n_layer": 2, "n_head": 4, "n_embd": 64, **overrides}
    )
    model = gptlab.GPT(config, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
    return Checkpoint(config, model.tensors(), tokenizer)


def logits(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    model = gptlab.GPT(checkpoint.config).eval()
    model.load_state_dict(checkpoint.state, strict=False)
    model.tie()
    with torch.inference_mode():
        return model(ids)


IDS = torch.arange(64)[None] * 7 % 300


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_comes_back_bit_for_bit(tmp_path: Path, variant: str) -> None:
    source = make(**VARIANTS[variant])
    path = tmp_path / "model.gguf"
    ours.write(path, source)
    for place in (path, tmp_path):  # a directory with one file stands for it
        loaded = checkpoints.read(place)
        assert checkpoints.read_config(place) == loaded.config
        assert loaded.state.keys() == source.state.keys()
        assert all(torch.equal(loaded.state[name], tensor) for name, tensor in source.state.items())
    assert torch.equal(logits(loaded, IDS), logits(source, IDS))
    assert gptlab.load(str(path)).config == source.config
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_what_is_rewritten_computes_the_same(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        for changes, words in (
            ({"bias": False}, "biases of zero"),
            ({"position": "rope", "rope": {"scaling": "ntk", "factor": 4.0}}, "NTK scaling as a base"),
            ({"window": 64}, "within 64 tokens the window hides nothing"),
        ):
            source = make(**changes)
            home = ours.write(tmp_path / "m.gguf", source)
            assert any(words in line for line in home.rewritten)
            torch.testing.assert_close(logits(checkpoints.read(tmp_path), IDS), logits(source, IDS))


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_transformers_reads_a_llama_alike(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    source = make(**VARIANTS["llama"])
    ours.write(tmp_path / "m.gguf", source, type=kind)
    judge = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    with torch.inference_mode():
        expected = judge(IDS).logits
    torch.testing.assert_close(logits(checkpoints.read(tmp_path), IDS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, "rope.scaling.type='yarn', which gptl"),
        ({"llama.expert_count": 8}, "a mixture of 8 experts, which gptlab does not compute"),
        ({"llama.attention.key_length": 32}, "heads of 32 channels, which gptlab computes with 16 only"),
        ({"llama.rope.dimension_count": 8}, "rotates 8 channels of a head of 16; gptlab rotates all of them"),
    ],
)
def test_llamas_that_gptlab_does_not_compute(tmp_path: Path, metadata: dict[str, Any], complaint: str) -> None:
    ours.write(tmp_path / "m.gguf", make(**VARIANTS["llama"]))
    rewrite(tmp_path / "m.gguf", **metadata)
    with pytest.raises(gptlab.GptlabError, match=re.escape(complaint)):
        gptlab.load(tmp_path / "m.gguf")


@pytest.mark.parametrize(("kind", "bound"), [("f16", 5e-3), ("bf16", 4e-2), ("q8_0", 0.1)])
def test_smaller_types(tmp_path: Path, kind: str, bound: float) -> None:
    source = make(n_kv_head=2)
    sizes = {}
    for one in ("f32", kind):
        ours.write(tmp_path / one, source, type=one)
        sizes[one] = (tmp_path / one).stat().st_size
    error = logits(checkpoints.read(tmp_path / kind), IDS) - logits(source, IDS)
    assert 0 < error.abs().max() < bound * logits(source, IDS).std()
    assert sizes[kind] < sizes["f32"] * 0.65


def test_numbers_too_large_for_f16_and_rows_of_no_whole_blocks(tmp_path: Path) -> None:
    source = make(n_inner=80)
    source.state["h.0.mlp.c_fc.weight"][0, 0] = 7e4
    with pytest.raises(gptlab.GptlabError, match=r"blk.0.ffn_up.weight holds numbers too large for f16; use --type"):
        ours.write(tmp_path / "m.gguf", source, type="f16")
    assert not list(tmp_path.iterdir())
    ours.write(tmp_path / "m.gguf", source, type="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # rows of 80
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["position_embd.weight"] == kinds["blk.0.ffn_up.bias"] == "F32"


@pytest.mark.parametrize(
    ("changes", "options", "complaint"),
    [
        ({"window": 16}, {}, "cap the context at the window with --context 16"),
        ({"position": "rope", "window": [None, 32]}, {"context": 33}, "--context 32"),
        ({"window": 16, "dilation": 2}, {"context": 8}, "dilation"),
        ({"position": "none"}, {}, "position='none'"),
        ({"position": "blend"}, {}, "position='blend'"),
        ({"activation": "gelu"}, {}, "activation='gelu' (it computes gelu_tanh)"),
        ({"scale_attn_weights": False}, {}, "scale attention scores"),
        ({"norm": "rms"}, {}, "norm='rms' and mlp='gelu' with learned positions"),
        ({"position": "rope", "mlp": "swiglu"}, {}, "norm='layer' and mlp='swiglu' with rope positions"),
        ({"position": "rope", "rope": {"scaling": "yarn", "factor": 2.0}}, {}, "YaRN"),
        ({"position": "rope", "rope": {"scaling": "llama3", "factor": 2.0}}, {}, "its Llama alone has it"),
        ({}, {"type": "q4_0"}, "--type must be one of f32, f16, bf16, q8_0"),
        ({}, {"context": 65}, "--context must be 1 to 64"),
    ],
)
def test_what_llama_cpp_would_compute_wrongly(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(gptlab.GptlabError) as caught:
        ours.write(tmp_path / "m.gguf", make(**changes), **options)
    assert complaint in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_context_capped_at_the_window(tmp_path: Path, position: str) -> None:
    source = make(position=position, window=[16, 24], sinks=2)
    home = ours.write(tmp_path / "m.gguf", source, context=16)
    loaded = checkpoints.read(tmp_path)
    assert (loaded.config.context_length, loaded.config.window) == (16, None)
    assert home.lost == ("texts of more than 16 tokens",)
    torch.testing.assert_close(logits(loaded, IDS[:, :16]), logits(source, IDS[:, :16]), atol=1e-5, rtol=0)


# --- tokenizers ------------------------------------------------------------------------------------------------------

TEXTS = ["the cat sat", "  42 dogs\n\n naïve 你好 🙂\t!", "<|endoftext|> is text"]


def test_tokenizers_come_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for one, width in ((tokenizer, 64), (GPT2Tokenizer(), 8)):
        ours.write(tmp_path / "m.gguf", make(one, n_embd=width, n_layer=1))
        loaded = checkpoints.read(tmp_path).tokenizer
        assert loaded is not None
        assert type(loaded) is type(one)
        assert loaded.encode_batch(TEXTS) == one.encode_batch(TEXTS)
        assert (loaded.vocab_size, loaded.end_of_text, loaded.ends) == (one.vocab_size, one.end_of_text, one.ends)
        assert loaded.encode(TEXTS[2], special=True) == one.encode(TEXTS[2], special=True)


def test_a_chat_template_comes_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ours.write(tmp_path / "m.gguf", make(tokenizer))
    assert checkpoints.read(tmp_path).tokenizer.chat_template is None  # type: ignore[union-attr]
    rewrite(tmp_path / "m.gguf", **{"tokenizer.chat_template": "{{ messages[0].content }}!"})
    lm = gptlab.load(tmp_path)
    assert lm.chat_ids("the cat") == lm.needs_tokenizer().encode("the cat!")
    ours.write(tmp_path / "m.gguf", Checkpoint(lm.config, lm.model.tensors(), lm.tokenizer))
    assert gptlab.load(tmp_path).chat_ids("the cat") == lm.chat_ids("the cat")


@pytest.mark.parametrize("kind", ["smollm", "llama-bpe", "qwen2"])
def test_ways_to_cut_words_come_back(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    with_words(tmp_path / "m.gguf", tokenizer, kind)
    lm = gptlab.load(tmp_path)
    ours.write(tmp_path / "again.gguf", Checkpoint(lm.config, lm.model.tensors(), lm.tokenizer))
    assert open_gguf(tmp_path / "again.gguf")[0]["tokenizer.ggml.pre"] == kind
    again = gptlab.load(tmp_path / "again.gguf").needs_tokenizer()
    assert again.files() == lm.needs_tokenizer().files()
    digits = {"smollm": 4, "llama-bpe": 2, "qwen2": 4}[kind]
    assert len(again.encode("1212")) == digits  # three digits are a word of the vocabulary


def with_words(path: Path, tokenizer: Tokenizer, kind: str) -> None:
    """A model whose vocabulary holds a word of three digits, with a way to cut texts into words."""
    values = json.loads(tokenizer.files()["tokenizer.json"])["model"]
    merges = ["1 2", "12 1", *(" ".join(pair) for pair in values["merges"])]
    tokens = sorted(values["vocab"], key=values["vocab"].get)
    tokens += [token for token in ("<|endoftext|>",) if token not in tokens] + ["12", "121"]
    ours.write(path, make(tokenizer, vocab_size=len(tokens)))
    types = [3 if token == "<|endoftext|>" else 1 for token in tokens]
    rewrite(
        path,
        **{
            "tokenizer.ggml.pre": kind,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": merges,
        },
    )


def test_a_tokenizer_beside_a_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ours.write(tmp_path / "m.gguf", make(tokenizer))
    rewrite(tmp_path / "m.gguf", **{"tokenizer.ggml.pre": "of-its-own"})
    with pytest.raises(gptlab.GptlabError, match=r"of the kinds gpt-2, .*: put the model's tokenizer.json beside the"):
        gptlab.load(tmp_path)
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    assert gptlab.load(tmp_path / "m.gguf").needs_tokenizer().encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_a_padded_vocabulary_and_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ours.write(tmp_path / "m.gguf", make(tokenizer, vocab_size=320))
    loaded = gptlab.load(tmp_path)
    assert loaded.config.vocab_size == 320
    assert loaded.needs_tokenizer().vocab_size == tokenizer.vocab_size
    ours.write(tmp_path / "m.gguf", make())
    assert gptlab.load(tmp_path).tokenizer is None


def test_a_directory_with_several_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        ours.write(tmp_path / f"{name}.gguf", make())
    with pytest.raises(gptlab.GptlabError, match=r"holds 2 GGUF files; name one of them, as .*a\.gguf$"):
        gptlab.load(tmp_path)


def test_tokenizers_that_llama_cpp_lacks(tmp_path: Path) -> None:
    for one, complaint in (
        (byte_tokenizer(), "needs at least one merge"),
        (char_tokenizer(["abc"]), "does not cut texts as this model's tokenizer does (WordLevel"),
    ):
        with pytest.raises(gptlab.GptlabError) as caught:
            ours.write(tmp_path / "m.gguf", make(one))
        assert complaint in str(caught.value)
        assert not list(tmp_path.iterdir())


# --- files that the gguf package wrote -------------------------------------------------------------------------------


def rewrite(path: Path, kind: Any = None, **metadata: Any) -> None:
    """The file again, its matrices in another type and some of its metadata replaced."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "general.architecture")):
            continue
        writer.add_key_value(
            name, metadata.pop(name, field.contents()), field.types[0], field.types[-1] if field.types[1:] else None
        )
    for name, value in metadata.items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        numbers = quants.dequantize(tensor.data, tensor.tensor_type)
        stored = kind if kind is not None and numbers.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quants.quantize(numbers, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").rename(path)


@pytest.mark.parametrize(
    "kind", [k for k in gguf.GGMLQuantizationType if k in quants._type_traits], ids=lambda k: k.name
)
def test_every_type_that_the_package_dequantises(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "m.gguf"
    source = make(n_embd=256, n_head=2, n_layer=1)
    ours.write(path, source)
    try:
        rewrite(path, kind)
    except NotImplementedError:
        # The package reads this type and does not write it: any bytes are numbers to it.
        block, size = gguf.GGML_QUANT_SIZES[kind]
        part = np.random.default_rng(0).integers(0, 64, (4, 512 // block * size), dtype=np.uint8)
        writer = gguf.GGUFWriter(path, "gpt2")
        writer.add_tensor("x", part, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        actual = open_gguf(path)[1]["x"]()
        np.testing.assert_array_equal(actual.numpy(), quants.dequantize(part, kind))
        return
    expected = {t.name: quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    for name, get in open_gguf(path)[1].items():
        np.testing.assert_array_equal(get().float().numpy(), expected[name])
    assert checkpoints.read(path).config == source.config


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"gpt2.block_count": 3}, "lacks h.2."),
        ({"gpt2.block_count": 1}, "which a model of its metadata does not have"),
        ({"gpt2.attention.head_count": 5}, "valid n_head"),
        ({"gpt2.context_length": 63}, "where its metadata asks for (63, 64)"),
        ({"gpt2.embedding_length": 0}, "n_embd must be"),
        ({"tokenizer.ggml.model": "llama"}, "a tokenizer of kind 'llama'"),
        ({"gpt2.vocab_size": 301}, "of shape (300, 64)"),
    ],
)
def test_metadata_that_does_not_belong(tmp_path: Path, metadata: dict[str, Any], complaint: str) -> None:
    path = tmp_path / "m.gguf"
    ours.write(path, make())
    rewrite(path, **metadata)
    with pytest.raises(gptlab.GptlabError) as caught:
        gptlab.load(path)
    assert complaint in str(caught.value)


def string(text: bytes, n: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if n is None else n) + text


def header(n_tensors: int = 0, n_keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "cannot be read as a GGUF file"),
        (b"GGUF", "it is cut short"),
        (b"GGML" + bytes(40), "does not begin as one does"),
        (header(version=1), "version 1"),
        (header(version=3 << 24), "the other byte order"),
        (header(n_keys=2**63), "it is cut short"),
        (header(n_tensors=2**63), "it is cut short"),
        (header(n_keys=1) + string(b"", 2**62), "a text of 4,611,686,018,427,387,904 bytes"),
        (header(n_keys=1) + string(b"a") + struct.pack("<I", 99), "unknown type 99"),
        (header(n_keys=1) + string(b"a") + struct.pack("<IIQ", 9, 4, 2**61), "an array of"),
        (header(n_keys=1) + string(b"a") + struct.pack("<IIQ", 9, 9, 4), "an array of arrays"),
        (header(n_keys=1) + string(b"\xff") + bytes(9), "cannot be read as a GGUF file"),
        (header(n_tensors=1) + string(b"a") + struct.pack("<I", 2**31), "more than four dimensions"),
        (header(n_tensors=1) + string(b"a") + struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0), "behind its end"),
        (header(n_tensors=1) + string(b"a") + struct.pack("<IQIQ", 1, 1, 0, 2**63), "behind its end"),
        (header(n_tensors=1) + string(b"a") + struct.pack("<IQIQ", 1, 33, 8, 0), "not whole blocks of 32"),
        (header(n_tensors=1) + string(b"a") + struct.pack("<IQIQ", 1, 32, 77, 0), "the unknown type 77"),
        (header(), "has the architecture None; gptlab reads gpt2, starcoder2, llama"),
    ],
)
def test_a_file_that_lies(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(gptlab.GptlabError) as caught:
        gptlab.load(tmp_path / "m.gguf")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


# --- llama.cpp -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("llama")])
def test_llama_cpp_computes_the_same_llama(tmp_path: Path, variant: str) -> None:
    ours.write(tmp_path / "m.gguf", make(**VARIANTS[variant]))
    ids = [5, 9, 100, 33, 7, 250]
    _, chosen, scores = in_llama_cpp(tmp_path / "m.gguf", 64, 20, ids, [])
    expected = logits(checkpoints.read(tmp_path), torch.tensor([ids + chosen]))[0].numpy()
    assert np.abs(scores - expected).max() / expected.std() < 1e-4


@pytest.mark.slow
def test_llama_cpp_runs_a_llama(tmp_path: Path, shared: Path) -> None:
    """The tokenizer of this model is SentencePiece's, so ids are all that is compared."""
    source = checkpoints.read(shared / "models" / "stories260K")
    ours.write(tmp_path / "m.gguf", source._replace(tokenizer=None))
    read = gptlab.load(tmp_path / "m.gguf", tokenizer="bytes")
    ids = [1]  # from which its stories begin
    _, found, scores = in_llama_cpp(tmp_path / "m.gguf", read.config.context_length, 60, ids, [])
    with torch.inference_mode():
        reference = read.model(torch.tensor([ids + found]))[0].numpy()
    assert np.abs(scores - reference).max() / reference.std() < 1e-2
    assert reference[len(ids) - 1 : -1].argmax(-1).tolist() == found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smollm", "llama-bpe", "qwen2"])
def test_llama_cpp_cuts_the_same_words(tmp_path: Path, tokenizer: Tokenizer, kind: str, shared: Path) -> None:
    path = tmp_path / "m.gguf"
    with_words(path, tokenizer, kind)
    text = (shared / "data" / "enwiki.txt").read_text(encoding="utf-8")[:20_000]
    texts = [*TEXTS[:2], "HE'S 1212\r\n\r\n  x=12121;\n\t\u2028 I'Ll", text]
    words, _, _ = in_llama_cpp(path, 64, 1, [1], texts)
    assert words == gptlab.load(path).needs_tokenizer().encode_batch(texts)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bound"), [("f32", 1e-2), ("f16", 1e-2), ("q8_0", 0.1)])
@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_head": 2}, {"position": "rope", "n_kv_head": 3}, {"window": 128}], ids=str
)
def test_llama_cpp_writes_the_same_text(tmp_path: Path, changes: dict[str, Any], kind: str, bound: float) -> None:
    from gptlab.conversion.convert import Changes, convert

    lm = gptlab.load("pocket")
    model = convert(lm.model, Changes.from_dict(changes)).model.eval() if changes else lm.model
    context = 128 if "window" in changes else None
    path = tmp_path / "m.gguf"
    ours.write(path, Checkpoint(model.config, model.tensors(), lm.tokenizer), type=kind, context=context)
    read = gptlab.load(path)
    tokenizer = read.needs_tokenizer()
    ids, texts = tokenizer.encode("The city of London is the capital of"), [" 1234 it's\n\n  naïve 你好!", *TEXTS]
    words, continuation, scores = in_llama_cpp(path, read.config.context_length, 60, ids, texts)
    assert words == tokenizer.encode_batch(texts)
    # Of each token that llama.cpp chose: was it the best one here, given the same tokens before it?
    with torch.inference_mode():
        reference = read.model(torch.tensor([ids + continuation]))[0].numpy()
    assert np.abs(scores - reference).max() / reference.std() < bound  # its GELU is a table in half precision
    chosen = reference[len(ids) - 1 : -1]
    lead = chosen.max(-1) - np.take_along_axis(chosen, np.array(continuation)[:, None], -1)[:, 0]
    assert lead.max() <= (0.0 if kind == "f32" else 2 * np.abs(scores - reference).max())
