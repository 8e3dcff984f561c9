"""Study files: what they come to, and what is refused before anything is trained."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from studies import GRID, RECIPE, settings, small

from gptlab.checkpoints.hub import built_in
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.study.claims import CLAIMS
from gptlab.study.files import make_study, read_study, study_names
from gptlab.study.variants import cells, changes, chosen_cells, factors_of, race_cells

CORPUS = Path("sentences.txt")
FACTORIAL = ["base", "rope", "gqa", "swa", "rope-gqa", "rope-swa", "gqa-swa", "rope-gqa-swa"]


def test_a_grid_is_every_combination_under_names_that_stay() -> None:
    found = cells(small(CORPUS, grid=GRID))
    assert [cell.name for cell in found] == FACTORIAL
    labels = ["base", "RoPE", "GQA", "SWA", "RoPE + GQA", "RoPE + SWA", "GQA + SWA", "RoPE + GQA + SWA"]
    assert [cell.label for cell in found] == labels
    for cell in found:
        assert cell.recipe is not None
        assert "-".join(cell.factors) == ("" if cell.name == "base" else cell.name)
        model = {name: value for factor in cell.factors for name, value in GRID[factor]["model"].items()}
        expected = ModelConfig.preset("tiny", context_length=32, **model, vocab_size=257)
        assert cell.recipe.model_for(257) == expected


def test_the_order_of_a_file_decides_nothing() -> None:
    for names in itertools.permutations(GRID):
        assert [cell.name for cell in cells(small(CORPUS, grid={name: GRID[name] for name in names}))] == FACTORIAL
    heads = [{"name": name, "model": {"n_kv_head": n}} for name, n in (("twin", 4), ("gqa", 2), ("mqa", 1))]
    expected = cells(small(CORPUS, variant=[{"name": "base"}, *heads]))
    assert expected[0].name == "base"
    for variants in itertools.permutations([{"name": "base"}, *heads]):
        assert cells(small(CORPUS, variant=list(variants))) == expected


def test_every_study_of_the_package_is_possible() -> None:
    assert study_names() == ["convert", "convert-8m", "gpt2-small", "papers", "quick", "standard"]
    for name in study_names():
        study = read_study(name)
        found = cells(study)
        assert study.name == name
        assert found[0].name == study.base
        if study.race:
            assert len(race_cells(study.race)) == 2
    assert [cell.name for cell in cells(read_study("standard"))] == FACTORIAL
    assert [cell.name for cell in cells(read_study("gpt2-small"))] == FACTORIAL
    for study in map(read_study, ("papers", "convert", "convert-8m")):
        names = {cell.name for cell in cells(study)}
        assert {name for claim in study.claims for name in CLAIMS[claim].variants} <= names
    assert {*read_study("papers").claims, *read_study("convert").claims} == set(CLAIMS)
    assert {str(cell.load) for cell in cells(read_study("quick"))} <= set(built_in())
    for name, looked_at in (("convert", 7), ("convert-8m", 9)):
        converted = cells(read_study(name))
        assert sum(cell.uptrain is not None for cell in converted) == len(converted) - 1 - looked_at


def test_windows_of_the_papers_study_do_the_same_work() -> None:
    windows = {}
    for cell in cells(read_study("papers")):
        assert cell.recipe is not None
        if cell.name.startswith("swa"):
            windows[cell.name] = cell.recipe.model_for(4096).windows
    means = {sum(w for w in each if w is not None) / len(each) for each in windows.values()}
    assert means == {64.0}
    assert list(windows["swa-increasing"]) == sorted(windows["swa-increasing"])
    assert windows["swa-decreasing"] == windows["swa-increasing"][::-1]


def test_only_some_variants_and_the_base() -> None:
    found = cells(small(CORPUS, grid=GRID))
    assert [cell.name for cell in chosen_cells(found, ["swa", "rope"], "base")] == ["base", "rope", "swa"]
    assert chosen_cells(found, [], "base") == found
    with pytest.raises(GptlabError, match=r"no variant 'rope-gpa' \(did you mean 'rope-gqa'\?\)"):
        chosen_cells(found, ["rope-gpa"], "base")


def test_changes_and_factors() -> None:
    base = ModelConfig.preset("tiny")
    assert changes(base, base) == {}
    other = ModelConfig.preset("tiny", position="rope", n_kv_head=1, window=[8, None])
    assert changes(other, base) == {"position": "rope", "n_kv_head": 1, "window": [8, None]}
    assert factors_of(changes(other, base)) == ("rope", "gqa", "swa")
    assert factors_of({"position": "none", "n_embd": 64}) == ()


BASE: dict[str, Any] = {"name": "base"}
REFUSALS = [
    ({"titel": "x"}, r"unknown setting 'titel' in the study \(did you mean 'title'\?\)"),
    ({"evaluate": {"piece": 3}}, r"unknown setting 'evaluate.piece' in the study \(did you mean 'pieces'\?\)"),
    ({"variant": [{"name": "base", "modell": {}}]}, r"unknown setting 'variant.0.modell'.*\(did you mean 'model'\?\)"),
    ({"grid": {"rope": {"lable": "x", "model": {}}}}, r"unknown setting 'grid.rope.lable'.*\(did you mean 'label'\?\)"),
    ({"race": {"variants": []}}, r"race"),
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
        cells(small(CORPUS, variant=variants))


def test_settings_without_effect() -> None:
    with pytest.raises(GptlabError, match=r"train\.seed has no effect in a study"):
        cells(small(CORPUS, "train.seed=3"))
    with pytest.raises(GptlabError, match="a study trains from scratch, but the recipe finetune goes on from gpt2"):
        cells(small(CORPUS, recipe="finetune", set=["base=gpt2"], variant=[BASE]))


def test_a_grid_whose_changes_collide() -> None:
    grid = {"gqa": {"model": {"n_kv_head": 2}}, "mqa": {"model": {"n_kv_head": 1}}}
    with pytest.raises(GptlabError, match="two changes of the grid set n_kv_head"):
        cells(small(CORPUS, grid=grid))


def test_a_race_trains(tmp_path: Path) -> None:
    study = small(CORPUS, race={"set": RECIPE, "variant": [{"name": "base"}, {"name": "x", "load": "pocket"}]})
    assert study.race is not None
    with pytest.raises(GptlabError, match="'x' is to race, so it is trained"):
        race_cells(study.race)


def test_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(GptlabError, match=r"no study 'standart' \(did you mean 'standard'\?\); give a .toml file or"):
        read_study("standart")
    path = tmp_path / "mine.toml"
    path.write_text("title = [")
    with pytest.raises(GptlabError, match=r"mine.toml is no valid TOML"):
        read_study(str(path))
    path.write_text("title = 'a'")
    with pytest.raises(GptlabError, match="the study lacks question"):
        read_study(str(path))
    path.write_text("title = 'a'\nquestion = 'b'\nset = ['budget.steps=3']\n[[variant]]\nname = 'base'")
    study = read_study(str(path))
    assert study.name == "mine"
    (cell,) = cells(study, ["budget.steps=7"])
    assert cell.recipe is not None
    assert cell.recipe.budget.steps == 7
