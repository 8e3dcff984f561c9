"""OpenAI's release, read without TensorFlow: checkpoints that TensorFlow wrote, and damaged ones."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import write_tensorflow as writer
from helpers.refusals import refusal

import gptlab
from gptlab import checkpoints
from gptlab.checkpoints.bundle import open_bundle
from gptlab.checkpoints.crc32c import crc32c, masked_crc32c
from gptlab.text.tokenizers import GPT2Tokenizer

OPENAI = Path(__file__).parent / "openai"
FOLDERS = ("plain", "sharded")


def theirs(hparams: dict[str, int]) -> Any:
    """transformers' GPT-2 with the same weights: its projections are (in, out), as OpenAI's are."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=hparams["n_vocab"],
        n_positions=hparams["n_ctx"],
        **{name: hparams[name] for name in ("n_embd", "n_head", "n_layer")},
    )
    model = GPT2LMHeadModel(config).eval()
    state = model.state_dict()
    for name, shape in writer.shapes(hparams).items():
        parts = name.replace("/h", "/h/").split("/")[1:]
        leaf = {"w": "weight", "g": "weight", "b": "bias"}.get(parts[-1])
        key = ".".join(["transformer", *parts[:-1], leaf] if leaf else ["transformer", *parts, "weight"])
        state[key].copy_(torch.from_numpy(writer.values(name, shape)).reshape(state[key].shape))
    return model


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(OPENAI / "plain", tmp_path / "124M")


@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001", "hparams.json"])
def test_a_pointer_in_a_files_place_is_called_that(copy: Path, name: str) -> None:
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5481\n")
    assert refusal(copy) == f"{copy / name} is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder"


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("form", [Path, str])
def test_what_tensorflow_wrote_computes_the_logits_of_transformers(folder: str, form: Callable[[Path], Any]) -> None:
    lm = gptlab.load(form(OPENAI / folder))
    assert lm.tokenizer is None
    ids = torch.arange(2 * 16).reshape(2, 16) * 7 % 257
    with torch.inference_mode():
        torch.testing.assert_close(lm.model(ids), theirs(writer.SMALL)(ids).logits, atol=1e-5, rtol=0)


def test_every_number_is_the_one_that_was_written() -> None:
    for folder in FOLDERS:
        tensors = open_bundle(OPENAI / folder / "model.ckpt")
        for name, shape in writer.shapes(writer.SMALL).items():
            assert torch.equal(tensors[name](), torch.from_numpy(writer.values(name, shape)))
    assert {*tensors} - {*writer.shapes(writer.SMALL)} == {"model/ln_f/g/Adam", "beta1_power"}


def test_bfloat16_and_the_configuration_alone() -> None:
    plain, rounded = (checkpoints.read(OPENAI / "plain", dtype) for dtype in (torch.float32, torch.bfloat16))
    assert all(torch.equal(plain.state[name].bfloat16(), tensor) for name, tensor in rounded.state.items())
    assert checkpoints.read_config(OPENAI / "plain") == plain.config
    assert (plain.config.vocab_size, plain.config.context_length, plain.config.n_layer) == (257, 16, 2)


def test_which_checkpoint_of_several(copy: Path) -> None:
    for suffix in (".index", ".data-00000-of-00001"):
        shutil.copy(copy / f"model.ckpt{suffix}", copy / f"model-500{suffix}")
    (copy / "model.ckpt.data-00000-of-00001").unlink()
    assert "model.ckpt.data-00000-of-00001 is missing" in refusal(copy)
    # The path that training had on another machine, or one that leads elsewhere: the files are in this directory.
    for latest in ("/content/checkpoint/run1/model-500", r"C:\run1\model-500", "../../model-500", "model-500"):
        (copy / "checkpoint").write_text(f'model_checkpoint_path: "{latest}"\nall_model_checkpoint_paths: "x"\n')
        gptlab.load(copy)
    (copy / "checkpoint").unlink()
    assert "several checkpoints (model-500.index, model.ckpt.index); name one" in refusal(copy)
    gptlab.load(copy / "model-500.index")
    gptlab.load(str(copy / "model-500.index"))
    (copy / "checkpoint").write_text('model_checkpoint_path: ".."')
    assert "cannot be read" in refusal(copy)


def test_openais_tokenizer(copy: Path) -> None:
    (copy / "encoder.json").write_bytes(GPT2Tokenizer().files()["vocab.json"])
    assert gptlab.load(copy).tokenizer is None  # the merges are missing
    (copy / "vocab.bpe").write_bytes(GPT2Tokenizer().files()["merges.txt"])
    assert isinstance(gptlab.load(copy).tokenizer, GPT2Tokenizer)


@pytest.mark.parametrize(
    ("hparams", "complaint"),
    [
        ({"n_head": 3}, "valid n_head: 1, 2, 4, 8"),
        ({"n_layer": 3}, "lacks h.2."),
        ({"n_layer": 1}, "which a model of its hparams.json does not have"),
        ({"n_vocab": 258}, "where its hparams.json asks for (258, 8)"),
        ({"n_embd": 16}, "of shape"),
        ({"n_ctx": -1}, "context_length must be"),
        ({"n_layer": 2**70}, "n_layer must be at most"),
    ],
)
def test_hparams_that_do_not_belong(copy: Path, hparams: dict[str, int], complaint: str) -> None:
    (copy / "hparams.json").write_text(json.dumps({**writer.SMALL, **hparams}))
    assert complaint in refusal(copy)


def test_what_is_missing_is_named(copy: Path) -> None:
    for name, complaint in (
        ("model.ckpt.data-00000-of-00001", "model.ckpt.data-00000-of-00001 is missing; copy it"),
        ("model.ckpt.index", "model.ckpt.index cannot be read: No such file"),
        ("checkpoint", "holds no TensorFlow checkpoint"),
        ("hparams.json", "is not a model directory"),
    ):
        (copy / name).unlink()
        assert complaint in refusal(copy)


def test_a_changed_byte_anywhere_is_noticed(copy: Path) -> None:
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        good = (copy / name).read_bytes()
        # Before the magic number zeros fill the place of handles that are shorter.
        places = range(len(good)) if name.endswith("index") else range(0, len(good), 997)
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 0x41
            (copy / name).write_bytes(bad)
            try:
                loaded = gptlab.load(copy)
            except gptlab.GptlabError:
                continue
            assert len(good) - 48 <= place < len(good) - 8, place
            assert torch.equal(loaded.model.wte.weight, gptlab.load(OPENAI / "plain").model.wte.weight)
        (copy / name).write_bytes(good)


def test_a_file_cut_short_is_refused(copy: Path) -> None:
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        good = (copy / name).read_bytes()
        for n in (0, 1, 8, 47, 48, len(good) // 2, len(good) - 1):
            (copy / name).write_bytes(good[:n])
            refusal(copy)
        (copy / name).write_bytes(good)


# --- an index with other contents, its checksums right -----------------------------------------------------------


def varint(n: int) -> bytes:
    out = bytearray()
    while n >= 0x80:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def record(key: bytes, value: bytes, n_shared: int = 0) -> bytes:
    return varint(n_shared) + varint(len(key)) + varint(len(value)) + key + value


def field(number: int, content: int | bytes) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def entry(*, dtype: int = 1, shape: tuple[int, ...] = (2,), shard: int = 0, offset: int = 0, size: int = 8) -> bytes:
    dimensions = b"".join(field(2, field(1, n)) for n in shape)
    return field(1, dtype) + field(2, dimensions) + field(3, shard) + field(4, offset) + field(5, size)


def index_of(*records: bytes, kind: int = 0, header: bytes = field(1, 1)) -> bytes:
    """An index with one block of these records after the header's."""

    def sealed(content: bytes) -> bytes:
        return content + bytes([kind]) + struct.pack("<I", masked_crc32c(content + bytes([kind])))

    block = record(b"", header) + b"".join(records) + struct.pack("<II", 0, 1)
    blocks = record(b"z", varint(0) + varint(len(block))) + struct.pack("<II", 0, 1)
    first, second = sealed(block), sealed(blocks)
    nothing = sealed(struct.pack("<II", 0, 1))
    place = len(first) + len(second)
    footer = varint(place) + varint(8) + varint(len(first)) + varint(len(blocks))
    return first + second + nothing + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        (index_of(kind=1), "a block is compressed"),
        (index_of(record(b"a", entry(offset=2**64 - 8))), "a has a negative size or place"),
        (index_of(record(b"a", entry(size=2**64 - 8))), "a has a negative size or place"),
        (index_of(record(b"a", entry(shape=(2**40, 2**40)))), "a has 8 bytes, which its shape"),
        (index_of(record(b"a", entry(shape=(2**62,), size=2**63 - 8))), "a has 9223372036854775800 bytes"),
        (index_of(record(b"a", entry(shard=1))), "data files beyond those that it counts"),
        (index_of(record(b"a", entry(shard=2**63))), "negative"),
        (index_of(record(b"a", entry(offset=2**40))), "is cut short: a lies behind its end"),
        (index_of(record(b"a", entry() + field(7, b""))), "a is cut into parts"),
        (index_of(*(record(b"a%03d" % i, entry(shape=(3000,), size=12000)) for i in range(9))), "its tensors overlap"),
        (index_of(record(b"\0\1a\0\1\xff", entry())), "a name is not text"),
        (index_of(record(b"b", entry()), record(b"a", entry())), "its keys are out of order"),
        (index_of(record(b"a", entry()), record(b"", entry(), n_shared=1)), "its keys are out of order"),
        (index_of(record(b"a" * 999, entry()), record(b"aa", entry(), n_shared=999)), "longer than any name"),
        (index_of(record(b"a", entry()), record(b"a", entry(), n_shared=2)), "longer than any name"),
        (index_of(varint(0) + varint(2**60) + varint(0)), "longer than any name"),
        (index_of(varint(0) + varint(1) + varint(2**60) + b"a"), "a record is cut short"),
        (index_of(b"\xff" * 20), "a number does not end"),
        (index_of(record(b"a", field(1, 1)[:1])), "a record is cut short"),
        (index_of(record(b"a", b"\x0b")), "a field of kind 3"),
        (index_of(header=field(1, 1) + field(2, 1)), "big-endian"),
    ],
)
def test_an_index_that_lies(copy: Path, index: bytes, complaint: str) -> None:
    (copy / "model.ckpt.index").write_bytes(index)
    assert complaint in refusal(copy)


def test_an_enormous_index_is_not_read(copy: Path) -> None:
    with (copy / "model.ckpt.index").open("r+b") as file:
        file.truncate(2**40)
    assert "more than 1,048,576 bytes" in refusal(copy)


# --- checksums ---------------------------------------------------------------------------------------------------


def bit_by_bit(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def test_the_published_checksums() -> None:
    # RFC 3720, appendix B.4.
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize("n", [0, 1, 2047, 2048, 2049, 4100, 65_536, 131_071, 131_072, 200_003])
def test_long_messages_in_lanes(n: int) -> None:
    data = np.random.default_rng(n).bytes(n)
    assert crc32c(data) == bit_by_bit(data)
    assert crc32c(np.frombuffer(b"x" + data, dtype=np.uint8)[1:]) == bit_by_bit(data)


# --- the size of the original --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_124m_shape(tmp_path: Path) -> None:
    """All of GPT-2 small in the release's layout (the writer of the index is this file's own)."""
    records = []
    with (tmp_path / "model.ckpt.data-00000-of-00001").open("wb") as file:
        for name, shape in sorted(writer.shapes(writer.FULL).items()):
            content = writer.values(name, shape).tobytes()
            crc = b"\x35" + struct.pack("<I", masked_crc32c(content))
            records.append(record(name.encode(), entry(shape=shape, offset=file.tell(), size=len(content)) + crc))
            file.write(content)
    (tmp_path / "model.ckpt.index").write_bytes(index_of(*records))
    (tmp_path / "hparams.json").write_text(json.dumps(writer.FULL))
    (tmp_path / "encoder.json").write_bytes(GPT2Tokenizer().files()["vocab.json"])
    (tmp_path / "vocab.bpe").write_bytes(GPT2Tokenizer().files()["merges.txt"])
    lm = gptlab.load(tmp_path)
    assert sum(p.numel() for p in lm.model.parameters()) == 124_439_808
    assert isinstance(lm.tokenizer, GPT2Tokenizer)
    ids = torch.tensor([[464, 3290, 373, 1043]])
    with torch.inference_mode():
        torch.testing.assert_close(lm.model(ids), theirs(writer.FULL)(ids).logits, atol=2e-3, rtol=1e-5)
