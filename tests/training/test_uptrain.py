"""Budgets as a share, blended positions and narrowing windows: their values, and whole runs with them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trainings import RECIPE, Commands, assert_same_run, checkpoints, make_dataset, small
from test_distributed import assert_same_curve, two
from test_resume import Crash, crash_at

import gptlab
from gptlab.checkpoints.runs import best, model_of, run_checkpoints
from gptlab.conversion.convert import Changes, convert
from gptlab.conversion.rotary import to_blend
from gptlab.text.shards import Dataset
from gptlab.training.budget import tokens_trained, with_count
from gptlab.training.data import Windows
from gptlab.training.loop import train
from gptlab.training.recipe import Recipe, change_recipe, make_recipe, read_recipe
from gptlab.training.schedules import blend_scales, narrowed, set_stage, settled
from gptlab.training.settings import BlendSettings, NarrowSettings
from gptlab.training.step import stream_loss

UPTRAIN = RECIPE.replace('[model]\npreset = "tiny"\ncontext_length = 32\n', "").replace(
    "evaluate_every = 5", "evaluate_every = 4"
)


def uptrain(base: Path | str, *settings: str) -> Recipe:
    """The small recipe, from a base."""
    return make_recipe({**small(*settings, text=UPTRAIN).model_dump(mode="json"), "base": str(base)})


def save(data: Dataset, path: Path, **changes: Any) -> gptlab.LanguageModel:
    """A small model with the data's tokenizer, on disk."""
    config = gptlab.ModelConfig.preset("tiny", vocab_size=257, context_length=32, **changes)
    lm = gptlab.LanguageModel(gptlab.GPT(config, seed=7), data.tokenizer)
    gptlab.save(lm, path)
    return lm


def rows(run: Path, event: str) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in every if row["event"] == event]


# --- a longer context -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "items", "length"),
    [
        ({"rope_scaling": "yarn", "rope_factor": 4.0}, False, 8),  # which is worked out from what it was made for
        ({}, False, 32),  # from here on it is trained on texts as long as its context
        ({}, True, 8),  # and here it is not
    ],
    ids=["yarn", "plain", "items"],
)
def test_the_length_that_a_base_was_trained_on(
    data: Dataset, tmp_path: Path, changes: dict[str, Any], items: bool, length: int
) -> None:
    short = gptlab.GPT(gptlab.ModelConfig.preset("tiny", vocab_size=257, context_length=8, position="rope"), seed=7)
    base = convert(short, Changes(context_length=32, **changes)).model
    assert base.config.trained_length == 8
    gptlab.save(gptlab.LanguageModel(base, data.tokenizer), tmp_path / "base")
    if items:
        data = make_dataset(tmp_path / "items", ["abc", "de"] * 20, items=True)
    recipe = uptrain(tmp_path / "base", "budget.steps=2", "optimizer.learning_rate=1e-9", f"data.items={items}".lower())
    lm = train(recipe, data, tmp_path / "run", base=gptlab.load(tmp_path / "base")).language_model
    for loaded in (lm, gptlab.load(tmp_path / "run"), gptlab.load(f"{tmp_path / 'run'}@last")):
        assert loaded.config.trained_length == length
        assert (loaded.config.rope.scaling, loaded.config.rope.factor) == (
            base.config.rope.scaling,
            base.config.rope.factor,
        )
    ids = torch.arange(30)[None]
    torch.testing.assert_close(lm.model.eval()(ids), base.eval()(ids), rtol=0, atol=1e-4)  # the same angles
    further = convert(lm.model, Changes(context_length=64)).model
    assert further.config.trained_length == length


# --- a share of the pre-training ------------------------------------------------------------------------------


def test_a_share_of_what_pocket_was_trained_on() -> None:
    plan = with_count(read_recipe("uptrain"))
    assert plan.base == "pocket"
    assert (plan.budget.share, plan.budget.of) == (0.05, 8_192_000)
    assert plan.steps(512, 10**6) == 200  # 409,600 tokens of 4 x 512 a step
    assert plan.schedule.warmup_steps < 100
    assert with_count(plan) == plan


def test_a_count_that_is_stated_comes_before_the_bases(tmp_path: Path) -> None:
    for settings in (["budget.share=0.02", "budget.of=1_000_000"], ["budget.of=1_000_000", "budget.share=0.02"]):
        plan = with_count(read_recipe("uptrain", settings, base=str(tmp_path / "nowhere")))
        assert (plan.budget.share, plan.budget.of) == (0.02, 1_000_000)
    assert change_recipe(plan, ["budget.steps=7"]).budget.of is None
    assert make_recipe({"batch": {"size": 1}, "budget": {"share": 1.5, "of": 64}}).steps(32, 10) == 3


def test_a_run_counts_its_own_tokens_and_its_bases(data: Dataset, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(small("budget.steps=5"), data, first)
    assert tokens_trained(str(first)) == 5 * 4 * 32
    recipe = with_count(uptrain(first, "budget.share=0.4"))
    assert recipe.budget.of == 640
    result = train(uptrain(first, "budget.share=0.4"), data, second, base=gptlab.load(first))
    assert result.metrics["validation_loss"] > 0
    start = rows(second, "start")[0]
    assert (start["steps"], start["share"], start["share_of"]) == (2, 0.4, 640)
    assert json.loads((second / "run.json").read_text())["recipe"]["budget"]["of"] == 640
    assert tokens_trained(str(second)) == 7 * 4 * 32
    # A run goes on though its base is gone, by the number that it wrote down.
    first.rename(tmp_path / "gone")
    train(uptrain(first, "budget.share=0.4"), data, second, resume=True)


def test_a_share_of_nobody_knows_what(data: Dataset, tmp_path: Path, commands: Commands) -> None:
    save(data, tmp_path / "base")
    said = (
        f"budget.share=0.1 is a share of what {tmp_path / 'base'} was trained on, which is not known here; state the"
        " tokens of its pre-training with --set budget.of=..., or give budget.tokens instead"
    )
    command = commands.start(
        "train", "uptrain", "--from", tmp_path / "base", "--out", tmp_path / "run", "--set", "budget.share=0.1"
    )
    assert command.wait() == 2
    assert said in " ".join(command.err.read_text().split())
    assert not (tmp_path / "run").exists()
    (tmp_path / "base" / "card.json").write_text('{"tokens_trained": 1280}')
    assert with_count(uptrain(tmp_path / "base", "budget.share=0.1")).budget.of == 1280
    with pytest.raises(gptlab.GptlabError, match="a share of a model that starts from random weights"):
        with_count(small("budget.share=0.1"))
    with pytest.raises(gptlab.GptlabError, match="a share of an unknown number"):
        small("budget.share=0.1").steps(32, 100)


def test_the_plan_says_what_the_budget_is_a_share_of(data: Dataset, tmp_path: Path, commands: Commands) -> None:
    save(data, tmp_path / "base")
    path = tmp_path / "recipe.toml"
    path.write_text(UPTRAIN)
    options = ["--set", "budget.share=0.05", "--set", "budget.of=5120", "--set", f"distill.teacher={tmp_path / 'base'}"]
    command = commands.run(
        "train", path, "--from", tmp_path / "base", "--data", data.directory, "--out", tmp_path / "run", *options
    )
    said = command.out.read_text()
    assert "2 steps, 256 tokens (128 a step), 5% of 5,120 tokens, " in said
    assert f"learning from {tmp_path / 'base'}, cpu float32" in said


# --- positions ------------------------------------------------------------------------------------------------


def test_the_geometric_ramp_in_closed_form() -> None:
    settings = BlendSettings(ramp="geometric", rope_end=0.5, wpe_start=0.2, wpe_end=0.6)
    for step in range(101):
        share, wpe = blend_scales(settings, step / 100, 4)
        expected = 2.0 ** (-12 * (1 - min(step / 50, 1)))
        assert share.tolist() == pytest.approx([expected] * 4, rel=1e-6)
        assert wpe.item() == pytest.approx(min(max((60 - step) / 40, 0), 1), abs=1e-6)
    start, end = blend_scales(settings, 0.0, 4), blend_scales(settings, 1.0, 4)
    assert (start[0].tolist(), start[1].item()) == ([2.0**-12] * 4, 1.0)
    assert (end[0].tolist(), end[1].item()) == ([1.0] * 4, 0.0)


def test_pairs_rotate_from_the_slowest_to_the_fastest() -> None:
    settings = BlendSettings(ramp="pairs", rope_end=0.8, wpe_end=0.9)
    seen = [blend_scales(settings, step / 100, 4)[0] for step in range(101)]
    assert seen[0].tolist() == [0, 0, 0, 2.0**-12]
    assert seen[30].tolist() == pytest.approx([0, 0, 2.0**-6, 1])  # halfway through the second of four pairs
    assert seen[79].tolist() == pytest.approx([2.0 ** (-12 * 0.05), 1, 1, 1], rel=1e-5)
    assert seen[80].tolist() == seen[100].tolist() == [1, 1, 1, 1]
    for before, after in itertools.pairwise(seen):
        assert (after >= before).all()
        assert ((before > 0) & (before < 1)).sum() <= 1  # one at a time


def test_ends_of_schedules_are_met_whatever_the_number_of_steps() -> None:
    recipe = make_recipe({"blend": {"rope_end": 1.0, "wpe_start": 0.9, "wpe_end": 1.0}, "narrow": {"end": 1.0}})
    for steps in (1, 3, 7, 100, 977):
        share, wpe = blend_scales(recipe.blend or BlendSettings(), steps / steps, 2)
        assert (share.tolist(), wpe.item()) == ([1, 1], 0)
        assert settled(recipe, steps, steps)
        assert not settled(recipe, steps - 1, steps)
    assert settled(small(), 0, 10)


def blend(data: Dataset, path: Path) -> None:
    """A learned model made ready to blend, on disk."""
    lm = save(data, path)
    gptlab.save(gptlab.LanguageModel(to_blend(lm.model, method="abrupt"), data.tokenizer), path)


@pytest.mark.parametrize("ramp", ["geometric", "pairs"])
def test_a_blended_run_goes_on_exactly_and_ends_with_rotary_positions(data: Dataset, tmp_path: Path, ramp: str) -> None:
    blend(data, tmp_path / "base")
    settings = ["optimizer.learning_rate=1e-3", "train.keep_last=9", f"blend.ramp={ramp}"]
    recipe = uptrain(tmp_path / "base", *settings)  # rotation whole after 8 of 20 steps, the table gone after 12
    base = lambda: gptlab.load(tmp_path / "base")  # noqa: E731
    result = train(recipe, data, tmp_path / "whole", base=base())
    for crash in (4, 16):
        with pytest.raises(Crash):
            train(recipe, data, tmp_path / f"run{crash}", base=base(), report=crash_at(crash))
        train(recipe, data, tmp_path / f"run{crash}", resume=True)
        assert_same_run(tmp_path / f"run{crash}", tmp_path / "whole")
    for step, position in ((4, "blend"), (16, "blend"), (20, "rope")):
        model = gptlab.load(tmp_path / "whole" / "checkpoints" / f"step-{step:06d}").model
        assert model.config.position == position
        if position == "blend":
            share, wpe = blend_scales(recipe.blend or BlendSettings(), step / 20, model.config.head_dim // 2)
            assert torch.equal(model.rope_scale, share)
            assert torch.equal(model.wpe_scale, wpe)
    assert [c.step for c in run_checkpoints(tmp_path / "whole") if c.validation_loss is None] == [4, 8]
    # What is handed back is what is on disk, and what was evaluated last; a finished run can be asked again.
    last = gptlab.load(f"{tmp_path / 'whole'}@last").model
    assert result.language_model.config == last.config
    assert not hasattr(last, "wpe")
    assert all(
        torch.equal(p, q) for p, q in zip(result.language_model.model.parameters(), last.parameters(), strict=True)
    )
    loss = stream_loss(last, Windows(data.validation, 32))
    assert rows(tmp_path / "whole", "evaluate")[-1]["validation_loss"] == pytest.approx(loss, rel=1e-6)
    assert train(recipe, data, tmp_path / "whole", resume=True).metrics == result.metrics


def test_the_first_step_of_a_blend_sees_the_source(data: Dataset, tmp_path: Path) -> None:
    source = save(data, tmp_path / "source")
    train(uptrain(tmp_path / "source"), data, tmp_path / "plain", base=source)
    blend(data, tmp_path / "base")
    train(uptrain(tmp_path / "base", "blend.ramp=pairs"), data, tmp_path / "run", base=gptlab.load(tmp_path / "base"))
    first, plain = (rows(tmp_path / name, "step")[0]["loss"] for name in ("run", "plain"))
    assert first == pytest.approx(plain, abs=1e-4)  # one pair, rotated by 2^-12 of its angle
    said: list[str] = []
    report = lambda row: said.append(row["text"]) if row["event"] == "note" else None  # noqa: E731
    train(uptrain(tmp_path / "base"), data, tmp_path / "idle", base=gptlab.load(tmp_path / "base"), report=report)
    assert said == ["positions stay between learned and rotary as they are, since the recipe has no section [blend]"]
    assert gptlab.load(tmp_path / "idle").config.position == "blend"
    assert rows(tmp_path / "idle", "step")[-1]["loss"] == pytest.approx(
        rows(tmp_path / "plain", "step")[-1]["loss"], abs=1e-4
    )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_blend_and_narrow_as_one(
    commands: Commands, data: Dataset, tmp_path: Path, parallel: str
) -> None:
    lm = save(data, tmp_path / "base", window=8)
    gptlab.save(gptlab.LanguageModel(to_blend(lm.model, method="abrupt"), data.tokenizer), tmp_path / "base")
    text = UPTRAIN.replace("1e-2", "1e-3").replace("evaluate_every = 4", "evaluate_every = 1\nsave_every = 20")
    settings = ["blend.ramp=pairs", "narrow.stages=2", "train.evaluate_tokens=300"]
    recipe = make_recipe({**small(*settings, text=text).model_dump(mode="json"), "base": str(tmp_path / "base")})
    train(recipe, data, tmp_path / "alone", base=gptlab.load(tmp_path / "base"))
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    options = [x for s in (*settings, f"parallel={parallel}", "batch.micro=1") for x in ("--set", s)]
    two(
        commands,
        "train",
        path,
        "--from",
        tmp_path / "base",
        "--data",
        data.directory,
        "--out",
        tmp_path / "run",
        *options,
    )
    assert_same_curve(tmp_path / "run", tmp_path / "alone")
    assert gptlab.load(tmp_path / "run").config.position == "rope"


# --- windows --------------------------------------------------------------------------------------------------


def config(**changes: Any) -> gptlab.ModelConfig:
    return gptlab.ModelConfig.preset("tiny", context_length=64, **changes)


def test_windows_halve_in_equal_times() -> None:
    settings = NarrowSettings(end=0.6)  # 64, 32, 16, then 8
    seen = [narrowed(settings, config(window=8), step, 100) for step in range(100)]
    assert [w[0] for w in seen] == [64] * 20 + [32] * 20 + [16] * 20 + [8] * 40
    assert all(len(set(w)) == 1 for w in seen)


@pytest.mark.parametrize(
    ("settings", "changes", "stages"),
    [
        (NarrowSettings(stages=2, end=1), {"window": 4}, [(64, 64), (16, 16)]),
        (NarrowSettings(first=16, stages=1, end=1), {"window": 4}, [(16, 16)]),
        (NarrowSettings(stages=4, end=1), {"window": (None, 4)}, [(None, 64), (None, 32), (None, 16), (None, 8)]),
        (NarrowSettings(stages=2, end=1), {"window": (16, 4)}, [(64, 64), (32, 16)]),
        # A window of 8 at every second key reaches 16 back.
        (NarrowSettings(end=1), {"window": 8, "dilation": 2}, [(32, 32), (16, 16)]),
        (NarrowSettings(first=32, stages=3, end=1), {"window": 8}, [(32, 32), (20, 20), (13, 13)]),
    ],
)
def test_windows_of_every_layer(settings: NarrowSettings, changes: dict[str, Any], stages: list[Any]) -> None:
    steps = 10 * len(stages)
    seen = [narrowed(settings, config(**changes), step, steps) for step in range(steps + 1)]
    assert seen == [stage for stage in stages for _ in range(10)] + [config(**changes).windows]


def test_a_model_in_a_stage_is_the_model_with_that_window() -> None:
    own = config(window=4, sinks=2)
    model, wide = gptlab.GPT(own, seed=1), gptlab.GPT(dataclasses.replace(own, window=16), seed=1)
    ids = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    before = model(ids)
    recipe = make_recipe({"narrow": {"first": 16, "stages": 1, "end": 0.5}})
    set_stage(model, recipe, 4, 10, training=True)
    assert torch.equal(model(ids), wide(ids))
    assert not torch.equal(model(ids), before)
    for step, training in ((5, True), (4, False)):
        set_stage(model, recipe, step, 10, training=training)
        assert torch.equal(model(ids), before)


def test_a_narrowing_run_goes_on_exactly_and_is_judged_by_its_own_windows(data: Dataset, tmp_path: Path) -> None:
    save(data, tmp_path / "base", window=4)
    recipe = uptrain(tmp_path / "base", "narrow.end=0.5", "train.keep_last=9")
    base = lambda: gptlab.load(tmp_path / "base")  # noqa: E731
    train(recipe, data, tmp_path / "whole", base=base())
    with pytest.raises(Crash):
        train(recipe, data, tmp_path / "run", base=base(), report=crash_at(4))
    train(recipe, data, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    plain = uptrain(tmp_path / "base")
    train(plain, data, tmp_path / "plain", base=base())
    assert rows(tmp_path / "plain", "step")[0]["loss"] != rows(tmp_path / "run", "step")[0]["loss"]
    # Before the end no checkpoint counts as the best; the loss is told all the same.
    losses = {c.step: c.validation_loss for c in run_checkpoints(tmp_path / "run")}
    assert [step for step, loss in losses.items() if loss is None] == [4, 8]
    told = {row["step"]: row["validation_loss"] for row in rows(tmp_path / "run", "evaluate")}
    assert all(losses[step] in (None, told[step]) for step in losses)
    assert gptlab.load(f"{tmp_path / 'run'}@last").config.window == 4


def test_a_checkpoint_on_the_way_is_never_the_best(data: Dataset, tmp_path: Path) -> None:
    # A learning rate that spoils the model: its first checkpoint would be the best one.
    save(data, tmp_path / "base", window=4)
    settings = ["optimizer.learning_rate=1e-3", "narrow.end=0.9", "budget.steps=8", "train.evaluate_every=2"]
    train(uptrain(tmp_path / "base", *settings), data, tmp_path / "run", base=gptlab.load(tmp_path / "base"))
    assert checkpoints(tmp_path / "run") == ["step-000006", "step-000008"]
    chosen = best(run_checkpoints(tmp_path / "run"))
    assert chosen is not None
    assert chosen.path == model_of(tmp_path / "run")
    assert chosen.step == 8


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "settings", "complaint"),
    [
        ({}, ["blend.rope_end=0.5"], "has position 'learned'; convert it to 'blend' first"),
        ({"position": "rope"}, ["blend.rope_end=0.5"], "has position 'rope'; convert it"),
        ({}, ["narrow.end=0.5"], "narrows windows, and .* has none; leave the section"),
        ({"window": 8}, ["narrow.first=8"], "a first window of 8 tokens is no wider than the 8 that"),
        ({"window": 8, "dilation": 2}, ["narrow.first=16"], "a first window of 16 tokens is no wider than the 16"),
        ({"window": 8}, ["narrow.first=64"], r"narrow\.first=64 exceeds the context of 32 tokens; leave it out"),
    ],
)
def test_schedules_that_a_model_has_no_use_for(
    data: Dataset, tmp_path: Path, changes: dict[str, Any], settings: list[str], complaint: str
) -> None:
    lm = save(data, tmp_path / "base", **changes)
    with pytest.raises(gptlab.GptlabError, match=complaint) as caught:
        train(uptrain(tmp_path / "base", *settings), data, tmp_path / "run", base=lm)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    # A recipe that starts from random weights is asked the same.
    fields = {"preset": "tiny", "context_length": 32, **changes}
    scratch = make_recipe({**small(*settings).model_dump(mode="json"), "model": fields})
    with pytest.raises(gptlab.GptlabError, match=complaint):
        train(scratch, data, tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("budget.share=0", r"impossible value for budget\.share .* greater than 0"),
        ("budget.of=100", r"budget\.of is what budget\.share is a share of, and has no effect without it"),
        ("distill.weight=0.5", r"distill\.teacher is missing in the recipe; set it, or leave the section \[distill\]"),
        ("distill.teachers=pocket", r"unknown setting 'distill\.teachers' in the recipe \(did you mean 'teacher'"),
        ("blend.ramp=linear", r"impossible value for blend\.ramp .*'geometric' or 'pairs'"),
        ("blend.rope_end=1.5", r"impossible value for blend\.rope_end"),
        ("blend.wpe_start=0.7", r"blend\.wpe_start=0\.7 must lie before blend\.wpe_end=0\.6"),
        ("narrow.from=64", r"unknown setting 'narrow\.from' in the recipe"),
        ("narrow.stages=0", r"impossible value for narrow\.stages"),
        ("narow.stages=2", r"unknown setting 'narow' in the recipe \(did you mean 'narrow'"),
    ],
)
def test_wrong_settings(setting: str, complaint: str) -> None:
    with pytest.raises(gptlab.GptlabError, match=complaint):
        read_recipe("pocket", [setting])


@pytest.mark.parametrize("weight", ["0", "1.1", "-0.5", "nan", "half"])
@pytest.mark.parametrize("name", ["weight", "temperature"])
def test_wrong_weights_and_temperatures(name: str, weight: str) -> None:
    if (name, weight) == ("temperature", "1.1"):
        return
    with pytest.raises(gptlab.GptlabError, match=rf"impossible value for distill\.{name}"):
        read_recipe("pocket", ["distill.teacher=pocket", f"distill.{name}={weight}"])


def test_older_recipes_are_written_as_they_were() -> None:
    values = read_recipe("pocket").model_dump(mode="json")
    assert list(values) == [
        "base", "model", "tokenizer", "data", "batch", "optimizer", "schedule", "budget", "train", "parallel",
    ]  # fmt: skip
    assert values["budget"] == {"steps": 2000, "tokens": None, "epochs": None}
    taught = read_recipe("pocket", ["distill.teacher=pocket"])
    assert make_recipe(taught.model_dump(mode="json")) == taught
