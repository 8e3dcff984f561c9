"""Whole runs, small ones: they learn, they can be repeated, and the command line leaves a usable model."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gptlab
from gptlab.cli import main
from gptlab.text.corpora import Corpus, read_corpus
from gptlab.training.loop import Result, train
from gptlab.training.recipe import Recipe, TokenizerSettings, TrainSettings, read_recipe


def corpus() -> Corpus:
    """Sentences from a grammar so plain that a tiny model learns it in seconds."""
    draw = random.Random(0)
    pets, verbs, things = ["cat", "dog", "rat"], ["sees", "eats"], ["fish", "bread", "cheese"]
    lines = [f"the {draw.choice(pets)} {draw.choice(verbs)} the {draw.choice(things)}." for _ in range(1500)]
    return Corpus("grammar", ("\n".join(lines) + "\n",))


def recipe(model: dict[str, Any] | None = None, kind: str = "bytes", **settings: Any) -> Recipe:
    defaults: dict[str, Any] = {
        "steps": 20,
        "batch_size": 4,
        "warmup_steps": 5,
        "learning_rate": 1e-2,
        "held_out": 0.1,
        "evaluate_every": 10,
        "dtype": "float32",
    }
    shape = {"preset": "tiny", "context_length": 32, **(model or {})}
    tokenizer = TokenizerSettings(kind=kind, vocab_size=280)
    return Recipe(model=shape, tokenizer=tokenizer, train=TrainSettings(**{**defaults, **settings}))


def same_weights(a: Result, b: Result) -> bool:
    pairs = zip(a.language_model.model.parameters(), b.language_model.model.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_learns(dtype: str) -> None:
    rows: list[dict[str, Any]] = []
    result = train(recipe(steps=200, batch_size=8, dtype=dtype, evaluate_every=80), corpus(), rows.append)
    assert rows[0] == {"event": "start", "steps": 200, "tokens": 200 * 8 * 32}
    losses = [row["loss"] for row in rows[1:]]
    assert losses[0] > 2.0
    assert losses[-1] < 0.5  # the grammar itself leaves 0.16 nats a byte, the frequencies of letters 2.3
    assert result.metrics["held_out_nats_per_token"] < 0.5
    assert [row["step"] for row in result.history] == [80, 160, 200]
    assert not result.language_model.model.training
    assert all(p.dtype == torch.float32 for p in result.language_model.model.parameters())
    text = result.language_model.generate("the d", max_new_tokens=2, temperature=0)[0]
    assert text == "og"


def test_the_figures_fit_together() -> None:
    texts = corpus()
    metrics = train(recipe(), texts).metrics
    held_bytes, held_tokens = metrics["held_out_bytes"], metrics["held_out_tokens"]
    assert held_tokens == held_bytes + 1  # bytes, and one end of text
    assert metrics["training_tokens_available"] == texts.n_bytes - held_bytes + 1
    assert 0.09 < held_bytes / texts.n_bytes < 0.11
    assert metrics["corpus_sha256"] == texts.sha256
    assert metrics["tokens_trained"] == 20 * 4 * 32
    bits = metrics["held_out_nats_per_token"] * (held_tokens - 1) / math.log(2) / held_bytes
    assert metrics["held_out_bits_per_byte"] == pytest.approx(bits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_weights(dtype: str) -> None:
    plan = recipe({"dropout": 0.1}, dtype=dtype)
    first, second = train(plan, corpus()), train(plan, corpus())
    assert same_weights(first, second)
    assert first.metrics["held_out_nats_per_token"] == second.metrics["held_out_nats_per_token"]
    assert not same_weights(first, train(recipe({"dropout": 0.1}, dtype=dtype, seed=1), corpus()))


def test_looking_more_often_changes_nothing() -> None:
    rare, often = (train(recipe({"dropout": 0.1}, evaluate_every=n), corpus()) for n in (20, 3))
    assert same_weights(rare, often)
    assert [row["step"] for row in often.history] == [3, 6, 9, 12, 15, 18, 20]


def test_the_model_is_kept_at_every_evaluation() -> None:
    kept: list[torch.Tensor] = []
    result = train(recipe(), corpus(), keep=lambda lm: kept.append(lm.model.wte.weight.detach().clone()))
    assert len(kept) == 2
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(kept[1], result.language_model.model.wte.weight)


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_the_tokenizer_decides_the_vocabulary(kind: str) -> None:
    lm = train(recipe(kind=kind, steps=2), corpus()).language_model
    assert lm.config.vocab_size == lm.needs_tokenizer().vocab_size


def test_a_character_of_the_held_out_part_alone_is_in_the_alphabet() -> None:
    text = corpus().documents[0] + "zebra §\n"  # the end of a single document is what is held out
    lm = train(recipe(kind="chars", steps=2), Corpus("x", (text,))).language_model
    assert lm.needs_tokenizer().encode("§")


def test_a_corpus_too_small_says_so() -> None:
    with pytest.raises(gptlab.GptlabError, match="too few for one batch"):
        train(recipe(), Corpus("x", ("a line\n" * 15,)))
    with pytest.raises(gptlab.GptlabError, match="too short to hold a part of it out"):
        train(recipe(), Corpus("x", ("one line",)))


def test_a_loss_that_is_no_number_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptlab.training import loop

    monkeypatch.setattr(loop, "mean_loss", lambda model, ids, targets: model(ids).sum() * math.inf)
    with pytest.raises(gptlab.GptlabError, match=r"at step 10; lower train\.learning_rate"):
        train(recipe(), corpus())


# --- through the command line ---------------------------------------------------------------------------------


def test_train_then_generate_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "runs" / "model"
    text.write_text(corpus().documents[0])
    settings = {
        "model.preset": '"tiny"',
        "tokenizer.kind": "bpe",
        "tokenizer.vocab_size": 280,
        "train.steps": 20,
        "train.warmup_steps": 5,
        "train.evaluate_every": 10,
        "train.held_out": 0.1,
        "train.compile": "false",
        "train.dtype": "float32",
    }
    arguments = ["train", "--corpus", str(text), "--out", str(out)]
    for key, value in settings.items():
        arguments += ["--set", f"{key}={value}"]
    assert run(monkeypatch, *arguments) == 0
    said = capfd.readouterr()
    assert said.err == ""
    assert "20 steps, 10,240 tokens" in said.out
    assert f"try it: gptlab generate --model {out}" in said.out
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "recipe.json",
        "result.json",
    }
    # What lies beside the model is enough to train it again, to the same weights.
    resolved = Recipe(**json.loads((out / "recipe.json").read_text()))
    again = train(resolved, read_corpus(str(text)))
    saved = gptlab.load(out)
    assert all(
        torch.equal(a, b)
        for a, b in zip(saved.model.parameters(), again.language_model.model.parameters(), strict=True)
    )
    result = json.loads((out / "result.json").read_text())
    assert result["metrics"]["held_out_bits_per_byte"] == again.metrics["held_out_bits_per_byte"]
    assert [row["step"] for row in result["history"]] == [10, 20]

    assert run(monkeypatch, "generate", "the ", "--model", str(out), "--max-new-tokens", "5", "--greedy") == 0
    said = capfd.readouterr()
    assert said.out == f"the {saved.generate('the ', max_new_tokens=5, temperature=0)[0]}\n"
    assert said.err.startswith("[5 tokens")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gptlab", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


# --- recipes --------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_pocket_recipe_is_what_it_should_be() -> None:
    plan = read_recipe("pocket")
    config = plan.model_for(4096)
    assert config == gptlab.ModelConfig.preset("pocket")
    assert (plan.tokenizer.kind, plan.tokenizer.vocab_size) == ("bpe", 4096)


def test_settings_override_a_recipe_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path / "r.toml", '[model]\nn_layer = 3\n[train]\nsteps = 5\nseed = 1\n[tokenizer]\nkind = "bytes"')
    plan = read_recipe(path, ["train.steps=7", "train.learning_rate=5e-4", "model.n_head=2", "tokenizer.kind=chars"])
    assert (plan.train.steps, plan.train.seed, plan.train.learning_rate) == (7, 1, 5e-4)
    assert plan.tokenizer.kind == "chars"
    assert (plan.model_for(300).n_layer, plan.model_for(300).n_head, plan.model_for(300).vocab_size) == (3, 2, 300)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "[train]\nlearning_rte = 1",
            r"unknown setting 'train.learning_rte' in the recipe \(did you mean 'learning_rate'",
        ),
        ("[tokeniser]\nkind = 'bpe'", r"unknown setting 'tokeniser' in the recipe \(did you mean 'tokenizer'"),
        ("[model]\nn_heads = 4", r"unknown model setting 'n_heads' \(did you mean 'n_head'"),
        ("[model]\npreset = 'tinny'", r"unknown preset 'tinny' \(did you mean 'tiny'"),
        ("[model]\npreset = 5", "unknown preset '5'"),
        ("[model]\nvocab_size = 300", "the tokenizer decides it"),
        ("[model]\nn_embd = 33", "n_embd=33 cannot be split evenly"),
        ("[train]\nsteps = 'many'", "impossible value for train.steps in the recipe"),
        ("[train]\nsteps = 1.5", "impossible value for train.steps in the recipe"),
        ("[train]\nbeta2 = 1.0", "impossible value for train.beta2"),
        ("[train]\nlearning_rate = nan", "impossible value for train.learning_rate"),
        ("[train]\nevaluate_tokens = 1", "impossible value for train.evaluate_tokens"),
        ("[train]\ndtype = 'float16'", "impossible value for train.dtype"),
        ("[tokenizer]\nvocab_size = 256", "impossible value for tokenizer.vocab_size"),
        ("train = 5", "impossible value for train"),
        ("[train\nsteps = 1", "is no valid TOML"),
        ("steps = ", "is no valid TOML"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_sentence(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(gptlab.GptlabError, match=complaint) as caught:
        read_recipe(write(tmp_path / "r.toml", text))
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"# caf\xe9")
    with pytest.raises(gptlab.GptlabError, match="cannot be read"):
        read_recipe(str(tmp_path / "r.toml"))


@pytest.mark.parametrize(
    ("recipe", "setting", "complaint"),
    [
        ("pocket", "trian.steps=1", r"unknown setting 'trian' in the recipe \(did you mean 'train'"),
        ("pocket", "train.steps", "--set takes section.key=value"),
        ("pocket", "steps=1", "--set takes section.key=value"),
        ("pocket", "train.=1", "--set takes section.key=value"),
        ("pocket", "", "--set takes section.key=value"),
        ("poket", "train.steps=1", r"no recipe 'poket' \(did you mean 'pocket'\?\)"),
    ],
)
def test_wrong_settings(recipe: str, setting: str, complaint: str) -> None:
    with pytest.raises(gptlab.GptlabError, match=complaint):
        read_recipe(recipe, [setting])


def test_a_setting_below_what_is_no_section(tmp_path: Path) -> None:
    with pytest.raises(gptlab.GptlabError, match="'train' is no section"):
        read_recipe(write(tmp_path / "r.toml", "train = 5"), ["train.steps=1"])
