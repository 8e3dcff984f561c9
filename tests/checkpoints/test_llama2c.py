"""llama2.c's files: a real one against the same model in Hugging Face's layout, and those that are not in order."""

from __future__ import annotations

import random
import shutil
import struct
from pathlib import Path

import hostile
import pytest
import torch

import gptlab
from gptlab import checkpoints
from gptlab.text.tokenizers import byte_tokenizer

SIZES = (8, 24, 2, 2, 1, 20, 16)


def floats(n: int, seed: int) -> bytes:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).numpy().tobytes()


@pytest.fixture
def real(shared: Path) -> Path:
    return shared / "models" / "stories260K"


def test_a_real_model_is_that_of_the_other_layout(real: Path) -> None:
    read, expected = checkpoints.read(real / "stories260K.bin"), checkpoints.read(real)
    assert read.config == checkpoints.read_config(real / "stories260K.bin")
    assert read.config == expected.config
    assert read.state.keys() == expected.state.keys()
    assert all(torch.equal(read.state[name], tensor) for name, tensor in expected.state.items())


@pytest.mark.parametrize("tied", [True, False])
def test_version_1(real: Path, tmp_path: Path, tied: bool) -> None:
    """The same arrays in the order of llama2.c's `version1_export`, with an output head of its own or without."""
    expected = checkpoints.read(real)
    config, data = expected.config, (real / "stories260K.bin").read_bytes()
    layers, width, inner, kv = config.n_layer, config.n_embd, config.inner, config.kv_heads * config.head_dim
    sizes = {"wte": config.vocab_size * width, "ln_1": layers * width}
    sizes |= {"q": layers * width * width, "k": layers * kv * width, "v": layers * kv * width}
    sizes |= {"o": layers * width * width, "ln_2": layers * width}
    sizes |= {"w1": layers * inner * width, "w2": layers * inner * width, "w3": layers * inner * width, "ln_f": width}
    at, part = 28, {}
    for name, size in sizes.items():
        part[name], at = data[at : at + 4 * size], at + 4 * size
    head = floats(sizes["wte"], 0)
    order = ["ln_1", "ln_2", "ln_f", "wte", "q", "k", "v", "o", "w1", "w2", "w3"]
    header = struct.pack("<Ii28sB", 0x616B3432, 1, data[:28], tied).ljust(256, b"\0")
    path = tmp_path / "model.bin"
    path.write_bytes(header + b"".join(part[name] for name in order) + (b"" if tied else head))
    read = checkpoints.read(path)
    state = dict(expected.state)
    if not tied:
        state["lm_head.weight"] = torch.frombuffer(bytearray(head), dtype=torch.float32).view(config.vocab_size, width)
    assert read.config.tie_embeddings == tied
    assert read.state.keys() == state.keys()
    assert all(torch.equal(read.state[name], tensor) for name, tensor in state.items())


def test_an_output_head_in_version_0(tmp_path: Path) -> None:
    width, inner, layers, heads, kv_heads, vocab, length = SIZES
    kv = width // heads * kv_heads
    n = vocab * width + layers * width * (2 + 2 * width + 2 * kv + 3 * inner) + width + length * width // heads
    header = struct.pack("<7i", width, inner, layers, heads, kv_heads, -vocab, length)
    head = floats(vocab * width, 1)
    (tmp_path / "model.bin").write_bytes(header + floats(n, 0) + head)
    read = checkpoints.read(tmp_path / "model.bin")
    assert not read.config.tie_embeddings
    assert read.state["lm_head.weight"].numpy().tobytes() == head


def test_a_tokenizer_beside_it_or_none(real: Path, tmp_path: Path) -> None:
    shutil.copy(real / "stories260K.bin", tmp_path)
    with pytest.raises(
        gptlab.GptlabError, match=r"of a kind that gptlab does not read.*put the model's tokenizer.json"
    ):
        gptlab.load(tmp_path / "stories260K.bin").generate("a")
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer().files()["tokenizer.json"])
    assert gptlab.load(tmp_path / "stories260K.bin").needs_tokenizer().vocab_size == 257


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (struct.pack("<7i", *SIZES), "has 28 bytes where its header asks for"),
        (struct.pack("<7i", *SIZES) + bytes(9999), "has 10,027 bytes where its header asks for"),
        (struct.pack("<7i", 2**20, 2**22, 1000, 2**16, 2**16, 2**31 - 1, 2**31 - 1), "bytes where its header asks for"),
        (struct.pack("<7i", 8, 24, 2, 3, 1, 20, 16), "is a file that gptlab cannot read"),
        (struct.pack("<7i", 8, 24, 0, 2, 1, 20, 16), "is a file that gptlab cannot read"),
        (b"", "is a file that gptlab cannot read"),
        (
            struct.pack("<Ii7iB", 0x616B3432, 2, *SIZES, 1),
            "version 2 of llama2.c's format, and gptlab reads versions 0",
        ),
        (struct.pack("<Ii", 0x616B3432, 1), "is a file that gptlab cannot read"),
        (struct.pack("<Ii7iB", 0x616B3432, 1, 8, 24, 2, 3, 1, 20, 16, 1), "valid n_head"),
        (struct.pack("<Ii7iB", 0x616B3432, 1, -8, 24, 2, 3, 1, 20, 16, 1), "n_embd must be"),
    ],
)
def test_a_file_that_lies(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(gptlab.GptlabError) as caught:
        gptlab.load(tmp_path / "model.bin")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_files(real: Path, tmp_path: Path) -> None:
    data, path = (real / "stories260K.bin").read_bytes(), tmp_path / "model.bin"
    for i in range(100):
        draw = random.Random(i)
        path.write_bytes(draw.choice([hostile.truncate, hostile.flip, hostile.number, hostile.splice])(data, draw))
        assert hostile.wrong_with(path) is None
