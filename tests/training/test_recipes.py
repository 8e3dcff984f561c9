"""Recipes: those that the package carries, those that users write, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.trainings import small

import gptlab
from gptlab.training.budget import with_count
from gptlab.training.recipe import (
    Recipe,
    change_recipe,
    differences,
    make_recipe,
    read_recipe,
    recipe_names,
)
from gptlab.training.settings import BudgetSettings


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- the package's own ----------------------------------------------------------------------------------------


def test_the_recipes_that_are_promised_are_there() -> None:
    promised = {"pocket", "shakespeare-chars", "shakespeare-chars-cpu", "names", "gpt2-124m", "finetune"}
    assert promised <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_makes_a_model_that_learns_something(name: str) -> None:
    plan = with_count(read_recipe(name))
    assert make_recipe(plan.model_dump(mode="json")) == plan  # as a run saves it
    settings = plan.budget
    assert plan.steps(64, 1000) >= 1
    assert settings.steps is None or plan.schedule.warmup_steps < settings.steps
    if plan.base is None:
        config = plan.model_for(plan.tokenizer.vocab_size)
        assert config.context_length >= 16
    else:
        assert not plan.model


def test_the_recipes_are_what_they_are_named_after() -> None:
    pocket, gpt2 = read_recipe("pocket"), read_recipe("gpt2-124m")
    assert pocket.model_for(4096) == gptlab.ModelConfig.preset("pocket")
    assert (pocket.tokenizer.kind, pocket.tokenizer.vocab_size) == ("bpe", 4096)
    assert gpt2.model_for(50257) == gptlab.ModelConfig.preset("gpt2")
    assert gpt2.batch.size * 1024 == 2**19  # llm.c's half a million tokens a step, ten billion in all
    assert gpt2.steps(1024, 10**9) * 2**19 == pytest.approx(10e9, rel=0.02)
    small = read_recipe("shakespeare-chars-cpu").model_for(66)
    assert (small.n_layer, small.n_head, small.n_embd, small.context_length, small.dropout) == (4, 4, 128, 64, 0)
    assert not small.bias
    assert small.activation == "gelu"
    names = read_recipe("names")
    assert names.data.items
    assert names.model_for(27).n_embd == 64


LARGER = "pocket-8m"


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.startswith("pocket-") and n != LARGER])
def test_pocket_and_its_variants_differ_in_their_model_alone(name: str) -> None:
    changed = differences(read_recipe("pocket"), read_recipe(name))
    assert changed
    assert set(changed) <= {"model.position", "model.n_kv_head", "model.window"}


def test_the_larger_pocket_is_trained_in_the_same_way() -> None:
    changed = differences(read_recipe("pocket"), read_recipe(LARGER))
    assert set(changed) == {"model.n_layer", "model.n_head", "model.n_embd", "train.compile"}
    assert sum(p.numel() for p in gptlab.GPT(read_recipe(LARGER).model_for(4096)).parameters()) == 7_498_240


# --- budgets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 8 * 32 * 7}, 7),
        ({"tokens": 8 * 32 * 7 + 255}, 7),  # no part of a step
        ({"tokens": 5}, 1),
        ({"epochs": 1.0}, 12),  # 100 windows, 8 a step
        ({"epochs": 0.5}, 6),
        ({"epochs": 3}, 37),
        ({"epochs": 0.001}, 1),
    ],
)
def test_a_budget_in_steps_tokens_or_epochs(budget: dict[str, float], steps: int) -> None:
    assert make_recipe({"batch": {"size": 8}, "budget": budget}).steps(32, 100) == steps


@pytest.mark.parametrize(
    ("budget", "complaint"),
    [
        ({}, "give one of budget.steps, budget.tokens, budget.epochs and budget.share, got none"),
        ({"steps": 5, "tokens": 5}, "got steps and tokens"),
        ({"steps": 0}, "impossible value for budget.steps"),
        ({"tokens": 1.5}, "impossible value for budget.tokens"),
        ({"epochs": 0}, "impossible value for budget.epochs"),
        ({"epochs": float("inf")}, "impossible value for budget.epochs"),
    ],
)
def test_impossible_budgets(budget: dict[str, float], complaint: str) -> None:
    with pytest.raises(gptlab.GptlabError, match=complaint):
        make_recipe({"budget": budget})


def test_another_kind_of_budget_takes_the_place_of_the_recipes() -> None:
    assert read_recipe("pocket", ["budget.tokens=1_000_000"]).budget == BudgetSettings(tokens=1_000_000)
    assert read_recipe("pocket", ["budget.epochs=0.5"]).budget == BudgetSettings(epochs=0.5)
    assert change_recipe(small(), ["budget.steps=7"]).budget == BudgetSettings(steps=7)


# --- settings -------------------------------------------------------------------------------------------------


def test_settings_override_a_recipe_of_ones_own(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.toml", '[model]\nn_layer = 3\n[budget]\nsteps = 5\n[train]\nseed = 1\n[tokenizer]\nkind = "bytes"'
    )
    settings = ["budget.steps=7", "optimizer.learning_rate=5e-4", "model.n_head=2", "tokenizer.kind=chars"]
    plan = read_recipe(path, [*settings, "parallel=fsdp", "train.compile=true", "batch.micro = 2"])
    assert (plan.budget.steps, plan.train.seed, plan.optimizer.learning_rate) == (7, 1, 5e-4)
    assert (plan.tokenizer.kind, plan.parallel, plan.train.compile, plan.batch.micro) == ("chars", "fsdp", True, 2)
    config = plan.model_for(300)
    assert (config.n_layer, config.n_head, config.vocab_size) == (3, 2, 300)


def test_flags_come_on_top_of_settings() -> None:
    plan = read_recipe("pocket", ["model.window=64"], {"position": "rope", "n_kv_head": 2, "window": 32})
    assert plan.model_for(4096) == gptlab.ModelConfig.preset("pocket", position="rope", n_kv_head=2, window=32)


def test_another_network_takes_the_place_of_the_recipes_with_its_activation() -> None:
    assert read_recipe("shakespeare-chars-cpu").model_for(65).activation == "gelu"
    config = read_recipe("shakespeare-chars-cpu", model={"mlp": "swiglu", "norm": "rms"}).model_for(65)
    assert (config.mlp, config.norm, config.bias, config.inner) == ("swiglu", "rms", False, 344)  # 8/3 of 128


def test_a_base_takes_the_place_of_the_model() -> None:
    plan = read_recipe("finetune", base="runs/a")
    assert plan.base == "runs/a"
    words = (
        r"runs/a, so model\.preset cannot be set; take a recipe that sets nothing of the model, such as finetune, or"
    )
    with pytest.raises(gptlab.GptlabError, match=words):
        read_recipe("pocket", base="runs/a")
    with pytest.raises(gptlab.GptlabError, match=r"the model comes from gpt2, so model\.window cannot be set"):
        read_recipe("finetune", model={"window": 8})


def test_differences_are_named_in_full() -> None:
    old = small()
    new = change_recipe(old, ["train.seed=3", "model.window=8", "budget.tokens=9"])
    assert differences(old, old) == {}
    assert differences(old, new) == {
        "budget.steps": (20, None),
        "budget.tokens": (None, 9),
        "model.window": (None, 8),
        "train.seed": (0, 3),
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[train]\nsede = 1", r"unknown setting 'train.sede' in the recipe \(did you mean 'seed'"),
        ("[optimizer]\nlearning_rte = 1", r"'optimizer.learning_rte' in the recipe \(did you mean 'learning_rate'"),
        ("[tokeniser]\nkind = 'bpe'", r"unknown setting 'tokeniser' in the recipe \(did you mean 'tokenizer'"),
        ("paralel = 'ddp'", r"unknown setting 'paralel' in the recipe \(did you mean 'parallel'"),
        ("[model]\nn_heads = 4", r"unknown model setting 'n_heads' \(did you mean 'n_head'"),
        ("[model]\npreset = 'tinny'", r"unknown preset 'tinny' \(did you mean 'tiny'"),
        ("[model]\npreset = 5", "unknown preset '5'"),
        ("[model]\nvocab_size = 300", "the tokenizer decides it"),
        ("[model]\nn_embd = 33", "n_embd=33 cannot be split evenly"),
        ("[budget]\nsteps = 'many'", r"impossible value for budget\.steps in the recipe"),
        ("[budget]\nsteps = 1.5", r"impossible value for budget\.steps in the recipe"),
        ("[batch]\nsize = 0", r"impossible value for batch\.size"),
        ("[batch]\nmicro = 0", r"impossible value for batch\.micro"),
        ("[optimizer]\nbeta2 = 1.0", r"impossible value for optimizer\.beta2"),
        ("[optimizer]\nname = 'sgd'", r"impossible value for optimizer\.name .*'adamw' or 'muon'"),
        ("[optimizer]\nlearning_rate = 0", r"impossible value for optimizer\.learning_rate .* greater than 0, got 0"),
        ("[optimizer]\nlearning_rate = nan", r"impossible value for optimizer\.learning_rate"),
        ("[optimizer]\nclip_norm = 0", r"impossible value for optimizer\.clip_norm"),
        ("[schedule]\nkind = 'linear'", r"impossible value for schedule\.kind"),
        ("[schedule]\ndecay_share = 0", r"impossible value for schedule\.decay_share"),
        ("[train]\nevaluate_tokens = 1", r"impossible value for train\.evaluate_tokens"),
        ("[train]\ndtype = 'float16'", r"impossible value for train\.dtype"),
        ("[train]\ncompile = 'yes please'", r"impossible value for train\.compile in"),
        ("[train]\nkeep_last = 0", r"impossible value for train\.keep_last"),
        ("[data]\nheld_out = 1", r"impossible value for data\.held_out"),
        ("[data]\ncorpus = []", r"impossible value for data\.corpus"),
        ("[tokenizer]\nvocab_size = 256", r"impossible value for tokenizer\.vocab_size"),
        ("parallel = 'tensor'", "impossible value for parallel"),
        ("train = 5", "impossible value for train"),
        ("[train\nseed = 1", "is not valid TOML"),
        ("steps = ", "is not valid TOML"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_sentence(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(gptlab.GptlabError, match=complaint) as caught:
        read_recipe(write(tmp_path / "r.toml", text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(Recipe.model_fields) - {"model", "base", "parallel"}))
def test_every_section_knows_its_own_wrong_settings(name: str) -> None:
    with pytest.raises(gptlab.GptlabError, match=f"unknown setting '{name}.nonsense' in the recipe"):
        read_recipe("pocket", [f"{name}.nonsense=1"])


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"# caf\xe9")
    with pytest.raises(gptlab.GptlabError, match="cannot be read"):
        read_recipe(str(tmp_path / "r.toml"))


@pytest.mark.parametrize(
    ("recipe", "setting", "complaint"),
    [
        ("pocket", "trian.seed=1", r"unknown setting 'trian' in the recipe \(did you mean 'train'"),
        ("pocket", "train.seed", "--set takes section.key=value"),
        ("pocket", "steps=1", "--set takes section.key=value"),
        ("pocket", "train=1", "--set takes section.key=value"),
        ("pocket", "train.=1", "--set takes section.key=value"),
        ("pocket", "", "--set takes section.key=value"),
        ("poket", "train.seed=1", r"no recipe 'poket' \(did you mean 'pocket'\?\)"),
    ],
)
def test_wrong_settings(recipe: str, setting: str, complaint: str) -> None:
    with pytest.raises(gptlab.GptlabError, match=complaint):
        read_recipe(recipe, [setting])


def test_a_setting_below_what_is_no_section(tmp_path: Path) -> None:
    with pytest.raises(gptlab.GptlabError, match="'train' is not a section"):
        read_recipe(write(tmp_path / "r.toml", "train = 5"), ["train.seed=1"])
    with pytest.raises(gptlab.GptlabError):
        read_recipe("pocket", ["parallel.kind=ddp"])
