"""Study files: what they come to, and what is refused before anything is trained."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from helpers.studies import GRID, settings, small

from gptlab.checkpoints.hub import built_in
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.study.papers import CLAIMS
from gptlab.study.settings import make_study, read_study, study_names
from gptlab.study.variants import Converted, Loaded, Trained, changes_of, choose, kinds_of, read_variants

CORPUS = Path("sentences.txt")
FACTORIAL = ["base", "rope", "gqa", "swa", "rope-gqa", "rope-swa", "gqa-swa", "rope-gqa-swa"]


def test_a_grid_is_every_combination_under_names_that_stay() -> None:
    variants = read_variants(small(CORPUS, grid=GRID))
    assert [variant.name for variant in variants] == FACTORIAL
    labels = ["base", "RoPE", "GQA", "SWA", "RoPE + GQA", "RoPE + SWA", "GQA + SWA", "RoPE + GQA + SWA"]
    assert [variant.label for variant in variants] == labels
    for variant in variants:
        assert isinstance(variant, Trained)
        assert variant.factors is not None
        assert "-".join(variant.factors) == ("" if variant.name == "base" else variant.name)
        model = {name: value for factor in variant.factors for name, value in GRID[factor]["model"].items()}
        expected = ModelConfig.preset("tiny", context_length=32, **model, vocab_size=257)
        assert variant.recipe.model_for(257) == expected


def test_the_base_comes_first_then_the_grid_then_the_rest_as_in_the_file() -> None:
    for names in itertools.permutations(GRID):
        grid = {name: GRID[name] for name in names}
        assert [variant.name for variant in read_variants(small(CORPUS, grid=grid))] == FACTORIAL
    heads = [{"name": name, "model": {"n_kv_head": n}} for name, n in (("twin", 4), ("gqa", 2), ("mqa", 1))]
    for variants in itertools.permutations([{"name": "base"}, *heads]):
        names = [str(variant["name"]) for variant in variants]
        expected = sorted(names, key=lambda name: name != "base")
        assert [variant.name for variant in read_variants(small(CORPUS, variant=list(variants)))] == expected


def test_every_study_of_the_package_is_possible() -> None:
    names = [
        "ages",
        "convert",
        "convert-8m",
        "gpt2-small",
        "heads",
        "modern",
        "papers",
        "quick",
        "rates",
        "real",
        "standard",
    ]
    assert study_names() == names
    for name in study_names():
        study = read_study(name)
        variants = read_variants(study)
        assert study.name == name
        assert variants[0].name == study.base + ("-0.003" if study.rates else "")
    assert [variant.name for variant in read_variants(read_study("standard"))] == FACTORIAL
    assert [variant.name for variant in read_variants(read_study("gpt2-small"))] == FACTORIAL
    for study in map(read_study, ("papers", "convert", "convert-8m")):
        names = {variant.name for variant in read_variants(study)}
        assert {name for claim in study.claims for name in CLAIMS[claim].variants} <= names
    assert {*read_study("papers").claims, *read_study("convert").claims} == set(CLAIMS)
    assert {variant.model for variant in read_variants(read_study("quick")) if isinstance(variant, Loaded)} == set(
        built_in()
    ) - {"gpt2"}
    for name, left in (("convert", 7), ("convert-8m", 9)):
        converted = read_variants(read_study(name))
        assert (
            sum(isinstance(v, Converted) and v.uptraining is not None for v in converted) == len(converted) - 1 - left
        )


def test_windows_of_the_papers_study_do_the_same_work() -> None:
    windows = {}
    for variant in read_variants(read_study("papers")):
        assert isinstance(variant, Trained)
        if variant.name.startswith("swa"):
            windows[variant.name] = variant.recipe.model_for(4096).windows
    means = {sum(w for w in each if w is not None) / len(each) for each in windows.values()}
    assert means == {64.0}
    assert list(windows["swa-increasing"]) == sorted(windows["swa-increasing"])
    assert windows["swa-decreasing"] == windows["swa-increasing"][::-1]


def test_only_some_variants_and_the_base() -> None:
    variants = read_variants(small(CORPUS, grid=GRID))
    assert [variant.name for variant in choose(variants, ["swa", "rope"])] == ["base", "rope", "swa"]
    assert choose(variants, []) == variants
    with pytest.raises(GptlabError, match=r"no variant 'rope-gpa' \(did you mean 'rope-gqa'\?\)"):
        choose(variants, ["rope-gpa"])


def test_changes_and_factors() -> None:
    base = ModelConfig.preset("tiny")
    assert changes_of(base, base) == {}
    other = ModelConfig.preset("tiny", position="rope", n_kv_head=1, window=[8, None])
    assert changes_of(other, base) == {"position": "rope", "n_kv_head": 1, "window": [8, None]}
    assert kinds_of(changes_of(other, base)) == ["rope", "gqa", "swa"]
    assert kinds_of({"position": "none", "n_embd": 64}) == ["other"]
    assert kinds_of({"sinks": 4, "rope": {}, "dilation": 2}) == ["rope", "swa"]


BASE: dict[str, Any] = {"name": "base"}
REFUSALS = [
    ({"titel": "x"}, r"unknown setting 'titel' in the study \(did you mean 'title'\?\)"),
    ({"evaluate": {"piece": 3}}, r"unknown setting 'evaluate.piece' in the study \(did you mean 'pieces'\?\)"),
    ({"variant": [{"name": "base", "modell": {}}]}, r"unknown setting 'variant.0.modell'.*\(did you mean 'model'\?\)"),
    ({"grid": {"rope": {"lable": "x", "model": {}}}}, r"unknown setting 'grid.rope.lable'.*\(did you mean 'label'\?\)"),
    ({"seeds": []}, r"impossible value for seeds in the study"),
    ({"seeds": [1, 1]}, r"seeds of study small must be different numbers"),
    ({"seeds": ["a"]}, r"impossible value for seeds.0 in the study"),
    ({"claims": ["rope-fall-faster"]}, r"unknown claim .* \(did you mean 'rope-falls-faster'\?\)"),
    ({"name": "a/b"}, r"a study is named by small letters"),
    ({"measure": {"contexts": []}}, r"impossible value for measure.contexts"),
]


@pytest.mark.parametrize(("values", "said"), REFUSALS)
def test_a_file_that_is_wrong(values: dict[str, Any], said: str) -> None:
    with pytest.raises(GptlabError, match=said):
        make_study({**settings(CORPUS), **values})


IMPOSSIBLE = [
    (
        [BASE, {"name": "gqa", "model": {"n_kv_head": 3}}],
        r"variant 'gqa' is impossible: n_kv_head=3 does not divide n_h",
    ),
    ([BASE, {"name": "x", "model": {"windw": 3}}], r"variant 'x' is impossible: .*\(did you mean 'window'\?\)"),
    ([BASE, BASE], r"two variants are called 'base'"),
    ([{"name": "bse"}], r"no variant is the base 'base' \(did you mean 'bse'\?\)"),
    ([BASE, {"name": "A b"}], r"a variant is named by small letters.*'A b'"),
    ([BASE, {"name": "x", "load": "pocket", "model": {"window": 3}}], r"variant 'x' is loaded, so model has no effect"),
    ([], r"the study has no variants"),
]


@pytest.mark.parametrize(("variants", "said"), IMPOSSIBLE)
def test_a_variant_that_is_impossible_is_named(variants: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(GptlabError, match=said):
        read_variants(small(CORPUS, variant=variants))


def test_settings_without_effect() -> None:
    with pytest.raises(GptlabError, match=r"train\.seed has no effect in a study"):
        read_variants(small(CORPUS, "train.seed=3"))
    with pytest.raises(GptlabError, match="a study trains from scratch, but the recipe finetune continues gpt2"):
        read_variants(small(CORPUS, recipe="finetune", set=["base=gpt2"], variant=[BASE]))


def test_a_grid_goes_from_gpt2_to_llama() -> None:
    grid: dict[str, Any] = {"rms": {"model": {"norm": "rms"}}, "swiglu": {"model": {"mlp": "swiglu"}}}
    found = read_variants(small(CORPUS, grid={**grid, "bare": {"model": {"bias": False}}}))
    assert len(found) == 8
    by_name = {variant.name: variant for variant in found if isinstance(variant, Trained)}
    base, llama = (by_name[name].recipe.model_for(257) for name in ("base", "bare-rms-swiglu"))
    assert (llama.norm, llama.mlp, llama.bias, llama.inner) == ("rms", "swiglu", False, 88)
    assert changes_of(llama, base) == {"norm": "rms", "mlp": "swiglu", "bias": False, "n_inner": 88}
    assert kinds_of(changes_of(llama, base)) == ["other"]


def test_a_grid_whose_changes_collide() -> None:
    grid = {"gqa": {"model": {"n_kv_head": 2}}, "mqa": {"model": {"n_kv_head": 1}}}
    with pytest.raises(GptlabError, match="two changes of the grid set n_kv_head"):
        read_variants(small(CORPUS, grid=grid))


def test_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(GptlabError, match=r"no study 'standart' \(did you mean 'standard'\?\); give a .toml file or"):
        read_study("standart")
    path = tmp_path / "mine.toml"
    path.write_text("title = [")
    with pytest.raises(GptlabError, match=r"mine.toml is not valid TOML"):
        read_study(str(path))
    path.write_text("title = 'a'")
    with pytest.raises(GptlabError, match="the study lacks question"):
        read_study(str(path))
    path.write_text("title = 'a'\nquestion = 'b'\nset = ['budget.steps=3']\n[[variant]]\nname = 'base'")
    study = read_study(str(path))
    assert study.name == "mine"
    (variant,) = read_variants(study, ["budget.steps=7"])
    assert isinstance(variant, Trained)
    assert variant.recipe.budget.steps == 7
