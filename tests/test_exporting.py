"""Exports end by reading the result back; what cannot be written is refused before anything is read or written."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_lm

import gptlab
from gptlab import checkpoints, exporting
from gptlab.exporting import export
from gptlab.formatting import readable
from gptlab.text.tokenizers import char_tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    gptlab.save(tiny_lm(1, n_kv_head=2), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_is_compared_with_what_was_asked_for(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    exported = export(saved, tmp_path / "out", dtype=dtype)
    # The same numbers in the same order of operations: repeated heads change nothing but rounding.
    assert exported.difference is not None
    assert exported.difference < 1e-5
    assert exported.tokens == 512 // 4  # two rows of the context
    assert exported.family == "gpt2"
    assert "the saving of 2 key/value heads" in exported.lost[0]


def test_a_model_without_a_tokenizer_is_compared_on_random_tokens(tmp_path: Path) -> None:
    gptlab.save(gptlab.LanguageModel(gptlab.GPT(gptlab.ModelConfig.preset("tiny"))), tmp_path / "model")
    exported = export(tmp_path / "model", tmp_path / "out")
    assert (exported.difference, exported.tokens) == (0.0, 128)


def test_characters_that_cannot_write_the_text_are_compared_on_random_tokens(tmp_path: Path) -> None:
    config = gptlab.ModelConfig.preset("tiny", vocab_size=3)
    lm = gptlab.LanguageModel(gptlab.GPT(config, seed=1), char_tokenizer(["abc"], end_of_text=False))
    gptlab.save(lm, tmp_path / "model")
    exported = export(tmp_path / "model", tmp_path / "out")
    assert (exported.difference, exported.tokens) == (0.0, 128)
    assert gptlab.load(tmp_path / "out").needs_tokenizer().encode("cab") == [2, 0, 1]


def test_without_a_comparison(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "compare", lambda *_: pytest.fail("compared"))
    exported = export(saved, tmp_path / "out", verify=False)
    assert (exported.difference, exported.tokens) == (None, 0)


def spoil_a_weight(checkpoint: checkpoints.Checkpoint) -> None:
    checkpoint.state["h.1.attn.c_proj.weight"][0, 0] += 1.0


def transpose_a_square(checkpoint: checkpoints.Checkpoint) -> None:
    checkpoint.state["h.0.attn.c_proj.weight"] = checkpoint.state["h.0.attn.c_proj.weight"].t().contiguous()


def nan(checkpoint: checkpoints.Checkpoint) -> None:
    checkpoint.state["ln_f.bias"].fill_(float("nan"))


@pytest.mark.parametrize("mistake", [spoil_a_weight, transpose_a_square, nan])
def test_a_result_that_computes_something_else_is_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Any
) -> None:
    read = checkpoints.read

    def spoiled(path: Path) -> checkpoints.Checkpoint:
        checkpoint = read(path)
        if path.name == "out":
            mistake(checkpoint)
        return checkpoint

    monkeypatch.setattr(checkpoints, "read", spoiled)
    with pytest.raises(gptlab.GptlabError, match=r"does not compute what .* does: logits differ by up to"):
        export(saved, tmp_path / "out")


def test_a_format_that_is_not_there(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(gptlab.GptlabError, match=r"unknown format 'hff' \(did you mean 'hf'\?\)"):
        export(saved, tmp_path / "out", format="hff")


def test_a_place_that_is_taken_stays_as_it_is(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(gptlab.GptlabError, match="already exists; choose another --out"):
        export(saved, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
def test_paths_that_are_not_utf8(saved: Path, tmp_path: Path) -> None:
    """safetensors writes to such a path and then cannot open it; a run must not find that out at its first save."""
    from gptlab.training.lock import locked

    path = tmp_path / os.fsdecode(b"mod\xe8le")
    writers = (
        lambda: export(saved, path),
        lambda: gptlab.save(gptlab.load(saved), path),
        lambda: locked(path).__enter__(),
    )
    for write in writers:
        with pytest.raises(gptlab.GptlabError, match="is not a UTF-8 path, and safetensors opens no other; give"):
            write()
        assert not path.exists()
    shutil.copytree(saved, path)
    with pytest.raises(gptlab.GptlabError, match="is not a UTF-8 path"):
        gptlab.load(path)


def test_a_name_in_an_ascii_locale_is_written_as_text(saved: Path, tmp_path: Path) -> None:
    escaped = os.fsencode("mod\u00e8le").decode("ascii", "surrogateescape")  # what Python makes of it there
    assert [readable(name) for name in (escaped, "mod\u00e8le", "m\udce8")] == ["mod\u00e8le", "mod\u00e8le", r"m\xe8"]
    saved.rename(saved.parent / escaped)
    export(saved.parent / escaped, tmp_path / "out", verify=False)
    assert "mod\u00e8le" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_what_has_no_home_is_refused_before_its_weights_are_read(saved: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(checkpoints.read_config(saved), window=8)
    gptlab.save(gptlab.LanguageModel(gptlab.GPT(config)), saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(
        gptlab.GptlabError, match=r"in the way is window=8 with learned positions: no class has both; with"
    ):
        export(saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["", "0MB", "5", "5 TB", "-1GB", "many"])
def test_a_size_that_is_none(saved: Path, tmp_path: Path, size: str) -> None:
    with pytest.raises(gptlab.GptlabError, match="is not a size of a file; write it as 500MB or 5GB"):
        export(saved, tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


def test_the_card_tells_the_whole_history(tmp_path: Path) -> None:
    imported = {"source": "ckpt.pt", "format": "nanogpt"}
    first = {
        "source": {"name": "m0", "import": imported},
        "steps": [{"name": "heads", "change": "6 to 2"}],
        "outputs": None,
    }
    outputs = {"before": 4.5, "after": 4.75}
    second = {"source": {"name": "m1", "conversion": first}, "steps": [{"name": "windows", "change": "64"}]}
    import json

    config = gptlab.ModelConfig.preset("tiny", position="rope", n_kv_head=2, window=16)
    files = {"conversion.json": json.dumps({**second, "outputs": outputs}).encode(), "card.json": b"{damaged"}
    gptlab.save(gptlab.LanguageModel(gptlab.GPT(config)), tmp_path / "model", files=files)
    export(tmp_path / "model", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- converted from m1: windows: 64 (4.5000 to 4.7500 nats per token on a text not fitted on)" in card
    assert "- converted from m0: heads: 6 to 2\n- imported from ckpt.pt (format: nanogpt)\n" in card
    assert card.index("from m1") < card.index("from m0")
    assert "4 query heads on 2 key/value heads, 8 wide" in card
    assert "rope positions, context 64, attention windows of 16 tokens" in card


def test_the_card_of_a_trained_model(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")

    export("pocket", tmp_path / "hf", verify=False)
    export("pocket", tmp_path / "m.gguf", format="gguf", planning={"type": "q8_0"}, verify=False)
    cards = {
        "hf": (tmp_path / "hf" / "README.md").read_text(encoding="utf-8"),
        "gguf": gguf.GGUFReader(tmp_path / "m.gguf").fields["general.description"].contents(),
    }
    assert cards["hf"].startswith("---\nlibrary_name: transformers\n")
    assert cards["gguf"].startswith("# pocket\n\nA causal language model exported by gptlab for llama.cpp, as `gpt2` w")
    for card in cards.values():
        for part in ("- corpus: enwiki", "- 8,192,000 tokens", "- 4.3800 nats per token", '"name": "muon"'):
            assert part in card


def test_the_card_inside_a_gguf_file_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from gptlab.cli.import_model import import_model

    export("pocket", tmp_path / "m.gguf", format="gguf", verify=False)
    export(tmp_path / "m.gguf", tmp_path / "direct", verify=False)
    import_model(str(tmp_path / "m.gguf"), tmp_path / "imported")
    export(tmp_path / "imported", tmp_path / "by-import", verify=False)
    for name in ("direct", "by-import"):
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert "(format: gguf)" in card
        assert "> # pocket\n>\n> A causal language model exported by gptlab for llama.cpp" in card
        assert "\n> - 4.3800 nats per token\n" in card
