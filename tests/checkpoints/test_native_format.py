"""gptlab's own format: the same model comes back, or the file is refused in one sentence."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gptlab
from gptlab.checkpoints.files import tensor_sha256
from gptlab.text.tokenizers import GPT2Tokenizer, Tokenizer, byte_tokenizer, char_tokenizer, train_bpe

FLIPS = 300


def make(seed: int = 0, tokenizer: Tokenizer | None = None, **overrides: object) -> gptlab.LanguageModel:
    config = gptlab.ModelConfig.preset("tiny", **{"vocab_size": 257, **overrides})
    return gptlab.LanguageModel(gptlab.GPT(config, seed=seed), tokenizer)


def weights(lm: gptlab.LanguageModel) -> dict[str, torch.Tensor]:
    return dict(lm.model.state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    gptlab.save(make(tokenizer=byte_tokenizer()), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_round_trip_is_bit_for_bit(tmp_path: Path, tie: bool, dtype: torch.dtype, with_tokenizer: bool) -> None:
    lm = make(tokenizer=byte_tokenizer() if with_tokenizer else None, tie_embeddings=tie, activation="gelu")
    lm.model.to(dtype)
    gptlab.save(lm, tmp_path / "model")
    again = gptlab.load(tmp_path / "model", dtype=dtype)
    assert same(weights(again), weights(lm))
    assert again.config == lm.config
    assert (again.model.lm_head.weight is again.model.wte.weight) == tie
    assert (again.tokenizer is not None) == with_tokenizer
    ids = torch.arange(10)[None]
    assert torch.equal(again.model(ids), lm.model.eval()(ids))


def test_saving_in_another_dtype_rounds_once_and_leaves_the_model_alone(tmp_path: Path) -> None:
    lm = make()
    before = {name: tensor.clone() for name, tensor in weights(lm).items()}
    gptlab.save(lm, tmp_path, dtype=torch.bfloat16)
    rounded = {name: tensor.bfloat16().float() for name, tensor in before.items()}
    assert same(weights(gptlab.load(tmp_path)), rounded)
    assert same(weights(lm), before)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_a_tied_head_is_stored_once(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in gptlab.load(saved).model.parameters())


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe", "gpt2"])
def test_every_tokenizer_comes_back(tmp_path: Path, kind: str) -> None:
    text = "the cat sat on the mat, the rat sat on the cat"
    made: dict[str, Tokenizer] = {
        "bytes": byte_tokenizer(),
        "chars": char_tokenizer([text]),
        "bpe": train_bpe([text], 270),
        "gpt2": GPT2Tokenizer(),
    }
    tokenizer = made[kind]
    gptlab.save(make(tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, n_embd=4), tmp_path)
    again = gptlab.load(tmp_path).needs_tokenizer()
    assert type(again) is type(tokenizer)
    assert again.encode(text) == tokenizer.encode(text)
    assert (again.vocab_size, again.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)


def test_any_flipped_bit_in_the_weights_is_noticed(saved: Path) -> None:
    path = saved / "model.safetensors"
    good = path.read_bytes()
    data_start = 8 + int.from_bytes(good[:8], "little")
    draw = random.Random(1)
    # The lowest bit of the very first and the very last number, then anywhere.
    places = [(data_start, 0), (len(good) - 1, 7)]
    places += [(draw.randrange(data_start, len(good)), draw.randrange(8)) for _ in range(FLIPS)]
    for byte, bit in places:
        bad = bytearray(good)
        bad[byte] ^= 1 << bit
        path.write_bytes(bad)
        with pytest.raises(gptlab.GptlabError, match=r"damaged: .* fails its checksum"):
            gptlab.load(saved)
    path.write_bytes(good)
    gptlab.load(saved)  # the file itself was never the reason


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_byte_anywhere_is_refused_in_words_or_changes_nothing(saved: Path, name: str) -> None:
    expected = gptlab.load(saved)
    path = saved / name
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little") if name == "model.safetensors" else len(good)
    draw = random.Random(2)
    refusals: list[str] = []
    for i in range(FLIPS):
        bad = bytearray(good)
        # Headers are where parsers stumble, so most changes go there; some into the length that comes first.
        place = draw.randrange(8) if i % 20 == 0 else draw.randrange(header if i % 4 else len(good))
        bad[place] ^= draw.randrange(1, 256)
        path.write_bytes(bad)
        try:
            loaded = gptlab.load(saved)
        except gptlab.GptlabError as error:
            refusals.append(str(error))
        else:
            assert same(weights(loaded), weights(expected)), f"byte {place} of {name}"
            assert loaded.config == expected.config
            assert loaded.needs_tokenizer().files() == expected.needs_tokenizer().files()
    assert len(refusals) > FLIPS * 0.9
    assert not any("\n" in sentence for sentence in refusals)


def test_a_number_type_changed_in_the_header_is_refused(saved: Path) -> None:
    # Same size, same bytes, same checksum: only the header says that the bits are whole numbers now.
    path = saved / "model.safetensors"
    good = path.read_bytes()
    for other in (b'"I32"', b'"U32"'):
        path.write_bytes(good.replace(b'"F32"', other, 1))
        with pytest.raises(gptlab.GptlabError, match="which weights never are"):
            gptlab.load(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_cut_short_anywhere_is_refused(saved: Path, name: str) -> None:
    path = saved / name
    good = path.read_bytes()
    draw = random.Random(3)
    # The last byte of config.json is a newline, which nobody misses.
    lengths = [0, 1, 7, 8, 9, len(good) // 2, len(good) - 2, *(draw.randrange(len(good) - 1) for _ in range(60))]
    for length in lengths:
        path.write_bytes(good[:length])
        with pytest.raises(gptlab.GptlabError) as caught:
            gptlab.load(saved)
        assert "\n" not in str(caught.value)


def test_bytes_after_the_end_are_refused(saved: Path) -> None:
    with (saved / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(gptlab.GptlabError, match="not an intact safetensors"):
        gptlab.load(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_files_of_two_saves_are_never_taken_for_one_model(saved: Path, tmp_path: Path, name: str) -> None:
    other = tmp_path / "other"
    # norm_eps and the alphabet differ, which no shape would show.
    gptlab.save(make(seed=1, tokenizer=char_tokenizer(["abc"]), norm_eps=1e-3), other)
    shutil.copy(other / name, saved / name)
    with pytest.raises(gptlab.GptlabError, match="belong to different saves"):
        gptlab.load(saved)


def test_a_lost_tokenizer_is_noticed(saved: Path) -> None:
    (saved / "tokenizer.json").unlink()
    with pytest.raises(gptlab.GptlabError, match="belong to different saves"):
        gptlab.load(saved)


def test_a_newer_version_is_refused_with_the_way_out(saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**values, "version": 3}))
    with pytest.raises(gptlab.GptlabError, match=r"version 3 .* install a newer gptlab"):
        gptlab.load(saved)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"sha256": "[1]", "config": "{}", "tokenizer": ""}])
def test_foreign_weights_under_our_config_are_refused(saved: Path, metadata: dict[str, str] | None) -> None:
    path = saved / "model.safetensors"
    save_file(load_file(path), path, metadata)
    with pytest.raises(gptlab.GptlabError, match="not written by gptlab"):
        gptlab.load(saved)


def test_other_files_of_the_directory_survive(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    gptlab.save(make(seed=1, tokenizer=byte_tokenizer()), saved)
    assert (saved / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in saved.iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("second", [None, "bytes"])
def test_no_tokenizer_of_an_earlier_save_stays_behind(tmp_path: Path, second: str | None) -> None:
    # GPT-2's tokenizer has three files; a later save with fewer must not leave a mixture.
    gptlab.save(make(tokenizer=GPT2Tokenizer(), vocab_size=50257, n_embd=4), tmp_path)
    gptlab.save(make(tokenizer=byte_tokenizer() if second else None), tmp_path)
    again = gptlab.load(tmp_path)
    assert again.tokenizer is None if second is None else again.needs_tokenizer().vocab_size == 257
    assert not (tmp_path / "merges.txt").exists()


def test_config_alone_can_be_read(saved: Path) -> None:
    from gptlab import checkpoints

    (saved / "model.safetensors").unlink()
    assert checkpoints.read_config(saved) == make().config
    with pytest.raises(gptlab.GptlabError):
        gptlab.load(saved)


WHOLE = "h.0.mlp.c_fc.weight"
FACTORS = "h.0.mlp.c_fc.factors"


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(FACTORS), "lacks"),
        (lambda t: t.pop(WHOLE), "lacks"),
        (lambda t: t.pop("ln_f.weight"), "lacks"),
        (lambda t: t.update(more=torch.zeros(1)), "holds more"),
        (lambda t: t.update({WHOLE: t[WHOLE].float()}), "torch.float32"),
        (lambda t: t.update({FACTORS: t[FACTORS].bfloat16()}), "torch.bfloat16"),
        (lambda t: t.update({WHOLE: t[WHOLE][:-1].clone()}), "make no matrix"),
        (lambda t: t.update({FACTORS: t[FACTORS][:-1].clone()}), "make no matrix"),
        (lambda t: t.update({FACTORS: t[FACTORS][:1].clone()}), "make no matrix"),
        (lambda t: t.update({WHOLE: t["h.0.mlp.c_proj.weight"]}), "make no matrix"),
        (lambda t: t[FACTORS].view(-1)[0].fill_(torch.nan), "not numbers"),
        (lambda t: t["ln_f.weight"][0].fill_(torch.inf), "not numbers"),
        (lambda t: t.update({"ln_f.weight": t["ln_f.weight"].to(torch.int8)}), "weights never are"),
        (lambda t: t.update({"ln_f.weight": t["ln_f.weight"][:-1].clone()}), "belong together"),
    ],
)
def test_damaged_whole_numbers_with_fitting_checksums_are_refused(tmp_path: Path, change, says: str, dtype) -> None:
    gptlab.save(make(), tmp_path / "float")
    gptlab.save(gptlab.load(tmp_path / "float", dtype="int8"), tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    metadata["sha256"] = json.dumps({name: tensor_sha256(tensor) for name, tensor in tensors.items()})
    save_file(tensors, path, metadata)
    with pytest.raises(gptlab.GptlabError, match=says):
        gptlab.load(tmp_path, dtype=dtype)


@pytest.mark.parametrize(
    "change", [{"precision": "int4"}, {"precision": None}, {"version": 1}, {"precision": ["int8"]}]
)
def test_a_precision_that_is_not_the_files_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    gptlab.save(make(), tmp_path / "float")
    gptlab.save(gptlab.load(tmp_path / "float", dtype="int8"), tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(header | change))
    with pytest.raises(gptlab.GptlabError, match="different saves"):
        gptlab.load(tmp_path)


def test_whole_numbers_replace_floats_and_floats_whole_numbers(tmp_path: Path) -> None:
    lm = make()
    gptlab.save(lm, tmp_path)
    gptlab.save(gptlab.load(tmp_path, dtype="int4"), tmp_path)
    whole = gptlab.load(tmp_path)
    assert whole.model.wte.weight.dtype == torch.int8
    gptlab.save(gptlab.load(tmp_path, dtype="float32"), tmp_path)
    assert gptlab.load(tmp_path).model.wte.weight.dtype == torch.float32
    gptlab.save(lm, tmp_path)
    assert same(weights(gptlab.load(tmp_path)), weights(lm))
