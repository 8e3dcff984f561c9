"""`gptlab train` from the command line: what it leaves and says, and how it refuses."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import tiny_lm
from safetensors.torch import load_file

import gptlab
from gptlab.text.datasets import open_dataset
from gptlab.text.tokenizers import byte_tokenizer

RECIPE = """
[model]
preset = "tiny"
context_length = 32

[tokenizer]
kind = "bytes"

[data]
held_out = 0.1

[batch]
size = 4

[schedule]
warmup_steps = 5

[budget]
steps = 20

[train]
dtype = "float32"
compile = false
evaluate_every = 5
"""

Run = Callable[..., tuple[int, str, str]]
DISK_MEGABYTES = 4
pytestmark = pytest.mark.usefixtures("one_thread", "no_measuring")
Refused = Callable[..., str]


@pytest.fixture
def refused(run: Run) -> Refused:
    """Demand a proper refusal of `gptlab train`, and return its sentence."""

    def command(*arguments: object) -> str:
        code, _, err = run("train", *arguments)
        assert code == 2
        *progress, said, rest = err.split("\n")
        assert set(progress) <= {f"making the {kind} tokenizer" for kind in ("bytes", "chars", "bpe")}, err
        assert said.startswith("gptlab: "), err
        assert rest == ""
        return said.removeprefix("gptlab: ")

    return command


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """One document."""
    draw = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text("".join(f"the {draw.choice(['cat', 'dog'])} sees the {draw.choice('abc')}.\n" for _ in range(500)))
    return path


# --- what goes well -------------------------------------------------------------------------------------------


def test_train_then_generate(run: Run, recipe: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a"
    code, said, err = run("train", recipe, "--corpus", text, "--out", out, "--set", "train.evaluate_every=20")
    assert (code, err) == (0, "making the bytes tokenizer\n")
    assert "20 steps, 2,560 tokens (128 a step)" in said
    assert "tokens/s" in said  # the rate and the end of the run are told before the first evaluation
    assert said.index("left") < said.index("validation loss")
    assert f"saved: {out}\ntry it: gptlab generate --model {out}" in said
    figures = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    bits = f"{figures['validation_bits_per_byte']:.4f} bits per byte"
    assert f"validation: {figures['validation_loss']:.4f} nats per token, {bits} (non-overlapping windows of 32" in said
    assert {p.name for p in out.iterdir()} == {"run.json", "metrics.jsonl", "checkpoints", "data"}
    lm = gptlab.load(out)
    code, said, _ = run("generate", "the ", "--model", out, "--max-new-tokens", 5, "--greedy")
    assert (code, said) == (0, f"the {lm.generate('the ', max_new_tokens=5, temperature=0)[0]}\n")
    assert run("inspect", f"{out}@last")[0] == 0


def test_the_same_command_gives_the_same_weights(run: Run, recipe: Path, text: Path, tmp_path: Path) -> None:
    assert run("prepare", text, "--tokenizer", "bytes", "--held-out", 0.1, "--out", tmp_path / "data")[0] == 0
    assert run("train", recipe, "--corpus", text, "--out", tmp_path / "a")[0] == 0
    assert run("train", recipe, "--data", tmp_path / "data", "--out", tmp_path / "b")[0] == 0
    states = [load_file(tmp_path / name / "checkpoints" / "step-000020" / "model.safetensors") for name in "ab"]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_flags_and_settings_reach_the_run(run: Run, recipe: Path, text: Path, tmp_path: Path) -> None:
    flags = ["--position", "rope", "--n-kv-head", 2, "--window", 8, "--sinks", 1]
    settings = ["--set", "optimizer.name=muon", "--set", "budget.tokens=640", "--set", "data.documents=true"]
    assert run("train", recipe, "--corpus", text, "--out", tmp_path / "a", *flags, *settings)[0] == 0
    config = gptlab.load(tmp_path / "a").config
    assert (config.position, config.n_kv_head, config.window, config.sinks) == ("rope", 2, 8, 1)
    resolved = json.loads((tmp_path / "a" / "run.json").read_text())["recipe"]
    assert resolved["optimizer"]["name"] == "muon"
    assert resolved["budget"] == {"steps": None, "tokens": 640, "epochs": None}
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 5


def test_without_out_the_run_is_named_after_its_recipe(
    run: Run, recipe: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, _ = run("train", recipe, "--corpus", text, "--set", "budget.steps=2")
    assert code == 0
    assert "saved: runs/small\n" in said
    assert (tmp_path / "runs" / "small" / "run.json").exists()


def test_a_list_of_names(run: Run, tmp_path: Path) -> None:
    names = ["".join(random.Random(i).choices("aeiou", k=1 + i % 5)) for i in range(300)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    settings = ["budget.steps=30", "train.evaluate_every=30", "model.n_layer=1", "model.n_embd=16"]
    flags = [x for setting in settings for x in ("--set", setting)]
    code, said, _ = run("train", "names", "--corpus", tmp_path / "names.txt", "--out", tmp_path / "run", *flags)
    assert code == 0
    assert "300" not in said.split("training")[0]
    figures = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    line = f"{figures['new_share']:.0%} of 200 sampled items are new: not in the training data\n"
    assert line in said
    assert "(non-overlapping items, float32)" in said


def test_going_on_from_a_run(run: Run, recipe: Path, text: Path, tmp_path: Path) -> None:
    assert run("train", recipe, "--corpus", text, "--out", tmp_path / "a")[0] == 0
    tuned = ["--set", "budget.steps=2", "--set", "optimizer.learning_rate=1e-9", "--set", "batch.size=4"]
    (tmp_path / "more.txt").write_text("the dog sees the b.\n" * 50)
    code, said, _ = run(
        "train",
        "finetune",
        "--from",
        tmp_path / "a",
        "--corpus",
        tmp_path / "more.txt",
        "--out",
        tmp_path / "b",
        *tuned,
    )
    assert code == 0
    assert "257 ids in the vocabulary" in said  # the corpus is encoded with the base's tokenizer
    before, after = (gptlab.load(tmp_path / name) for name in "ab")
    assert after.config == before.config
    torch.testing.assert_close(after.model.wte.weight, before.model.wte.weight, rtol=0, atol=1e-6)


def test_records_and_a_validation_text_are_prepared_as_by_prepare(run: Run, recipe: Path, tmp_path: Path) -> None:
    for name, n in (("a", 400), ("held", 40)):
        (tmp_path / f"{name}.csv").write_text("body,n\n" + "".join(f"the cat sees {i % 9},{i}\n" for i in range(n)))
    options = ("--validation", tmp_path / "held.csv", "--text-field", "body")
    code, said, _ = run("train", recipe, "--corpus", tmp_path / "a.csv", *options, "--out", tmp_path / "run")
    assert code == 0
    assert "the validation text given\n" in said
    assert "note: 400 of the documents to train on are in the validation text too\n" in said
    run("prepare", tmp_path / "a.csv", *options, "--tokenizer", "bytes", "--out", tmp_path / "data")
    assert open_dataset(tmp_path / "run" / "data").sha256 == open_dataset(tmp_path / "data").sha256


def test_without_a_window(run: Run, recipe: Path, text: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace("context_length", "window = 8\ncontext_length"))
    for name, flags in (("a", []), ("b", ["--window", "none"])):
        out = tmp_path / name
        assert run("train", recipe, "--corpus", text, "--out", out, "--set", "budget.steps=1", *flags)[0] == 0
        assert gptlab.load(out).config.window == (None if flags else 8)
        assert run("train", "--resume", out)[0] == 0


# --- data and corpora -----------------------------------------------------------------------------------------


def test_a_context_longer_than_the_data(refused: Refused, recipe: Path, text: Path, tmp_path: Path) -> None:
    said = refused(recipe, "--corpus", text, "--out", tmp_path / "a", "--set", "model.context_length=20000")
    assert "which give 0 windows of 20000 tokens, too few for one batch of 4; add text, or lower batch.size or" in said
    # What was prepared is not lost: the next attempt says how to use it.
    data = tmp_path / "a" / "data"
    again = refused(recipe, "--corpus", text, "--out", tmp_path / "a")
    assert again == f"{data} is left from a run that did not begin; train on it with --data {data}, or remove it"


def test_data_that_are_left_can_be_used(run: Run, refused: Refused, recipe: Path, text: Path, tmp_path: Path) -> None:
    refused(recipe, "--corpus", text, "--out", tmp_path / "a", "--set", "model.context_length=20000")
    assert run("train", recipe, "--data", tmp_path / "a" / "data", "--out", tmp_path / "a")[0] == 0


def test_prepared_data_shorter_than_the_context(run: Run, refused: Refused, recipe: Path, text: Path) -> None:
    data, out = text.parent / "data", text.parent / "a"
    assert run("prepare", text, "--tokenizer", "bytes", "--held-out", 0.1, "--out", data)[0] == 0
    said = refused(recipe, "--data", data, "--out", out, "--set", "model.context_length=20000")
    assert "which give 0 windows of 20000 tokens, too few for one batch of 4" in said
    assert not out.exists()


def test_too_few_items(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("emma\nolivia\nava\n")
    said = refused("names", "--corpus", tmp_path / "names.txt", "--out", tmp_path / "a")
    assert said == "the training data has 2 items, too few for one batch of 64; add some, or lower batch.size"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no corpus at"),
        (b"", "there is no text in"),
        (b"\n \n", "there is no text in"),
        (b"caf\xe9 " * 100, "is not UTF-8 text"),
        (b"one line", "too short to hold a part of it out; add text"),
    ],
)
def test_a_corpus_that_cannot_be_used(
    refused: Refused, recipe: Path, tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    assert complaint in refused(recipe, "--corpus", path, "--out", tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_a_directory_without_text(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"")
    assert "holds no .txt" in refused("--corpus", tmp_path, "--out", tmp_path / "out")


def test_data_that_are_none(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    said = refused(recipe, "--data", tmp_path, "--out", tmp_path / "out")
    assert f"{tmp_path} is not a dataset: it has no index.json; make one with gptlab prepare" in said


@pytest.mark.parametrize("name", ["training-00000.bin", "training-ends-00000.bin", "validation-00000.bin"])
def test_a_truncated_shard(run: Run, refused: Refused, recipe: Path, text: Path, tmp_path: Path, name: str) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    assert run("prepare", text, "--tokenizer", "bytes", "--held-out", 0.1, "--out", data)[0] == 0
    assert run("train", recipe, "--data", data, "--out", out, "--set", "budget.steps=2")[0] == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    size = (data / name).stat().st_size
    os.truncate(data / name, size - 2)
    for arguments in ([recipe, "--data", data, "--out", tmp_path / "other"], ["--resume", out]):
        said = refused(*arguments)
        assert said == (
            f"{data / name} has {size - 2:,} bytes instead of {size:,}; restore it, or prepare the data again"
        )
    assert not (tmp_path / "other").exists()
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_ids_that_the_tokenizer_does_not_know(refused: Refused, tmp_path: Path) -> None:
    for name, last in (("train.bin", 50256), ("val.bin", 50257)):  # nanoGPT's format, without checksums
        np.arange(last - 500, last + 1, dtype="<u2").tofile(tmp_path / name)
    settings = ["--set", "model.preset=tiny", "--set", "model.context_length=32"]
    said = refused("gpt2-124m", "--data", tmp_path, "--out", tmp_path / "out", *settings, "--set", "batch.size=4")
    assert said == f"{tmp_path / 'val.bin'} holds the id 50257, but its tokenizer has 50,257; prepare it again"
    assert not (tmp_path / "out").exists()


def test_two_answers_to_one_question(refused: Refused, text: Path, tmp_path: Path) -> None:
    said = refused("--data", tmp_path, "--corpus", text, "--out", tmp_path / "out")
    assert said == "--data and --corpus both say what to train on; give one of them"


# --- recipes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--set", "optimizer.learning_rate=0"], "impossible value for optimizer.learning_rate in the recipe"),
        (["--set", "optimizer.learning_rat=1"], "unknown setting 'optimizer.learning_rat' in the recipe (did you mean"),
        (["--set", "trian.seed=1"], "unknown setting 'trian' in the recipe (did you mean 'train'?)"),
        (["--set", "model.n_laier=2"], "unknown model setting 'n_laier' (did you mean 'n_layer'?)"),
        (["--set", "model.n_head=5"], "n_embd=192 cannot be split evenly over n_head=5"),
        (["--set", "model.vocab_size=300"], "the tokenizer decides it"),
        (["--set", "budget.steps=0"], "impossible value for budget.steps"),
        (["--set", "budget.steps=many"], "impossible value for budget.steps"),
        (["--set", "steps=5"], "--set takes section.key=value"),
        (["--set", "train.seed"], "--set takes section.key=value"),
        (["--n-kv-head", "5"], "valid n_kv_head: 1, 2, 3, 6"),
        (["--position", "rotary"], "position"),
        (["pokcet"], "no recipe 'pokcet' (did you mean 'pocket'?)"),
        (
            ["pocket", "--from", "pocket"],
            "the model comes from pocket, so model.preset cannot be set; take a recipe that",
        ),
        (["finetune", "--from", "pocket", "--window", "8"], "the model comes from pocket, so model.window cannot be"),
        (["finetune", "--from", "pockt"], "no model 'pockt' (did you mean 'pocket'?)"),
        (["--device", "gpu"], "no device 'gpu' here"),
        (["--device", "cpu:five"], "no device 'cpu:five' here"),
        (["--device", "meta"], "no device 'meta' here"),
        (
            ["finetune", "--from", "pocket", "--set", "tokenizer.kind=bytes"],
            "the tokenizer comes from pocket, so tokenizer.kind has no effect; leave it out",
        ),
    ],
)
def test_recipes_and_settings(
    refused: Refused, text: Path, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    assert complaint in refused(*arguments, "--corpus", text, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()  # nothing was prepared in vain


@pytest.mark.parametrize(
    "flags",
    [
        ["--set", "tokenizer.kind=bytes"],
        ["--set", "data.corpus=['stdlib']"],
        ["--set", "data.held_out=0.2"],
        ["--validation", "a.txt"],
        ["--text-field", "body"],
    ],
)
def test_what_prepared_data_have_answered(refused: Refused, tmp_path: Path, flags: list[str]) -> None:
    name = flags[1].partition("=")[0] if flags[0] == "--set" else flags[0]
    assert refused("--data", tmp_path, "--out", tmp_path / "out", *flags) == (
        f"{name} has no effect on data that are prepared already; leave it out, or give --corpus in place of --data"
    )


def test_a_share_and_a_text_to_hold_out(refused: Refused, text: Path, tmp_path: Path) -> None:
    flags = ("--validation", text, "--set", "data.held_out=0.2")
    said = refused("--corpus", text, "--out", tmp_path / "out", *flags)
    assert said == "data.held_out has no effect with --validation; leave one of them out"


def test_a_base_with_another_tokenizer(refused: Refused, run: Run, text: Path, tmp_path: Path) -> None:
    gptlab.save(tiny_lm(), tmp_path / "base")
    assert run("prepare", text, "--tokenizer", "chars", "--held-out", 0.1, "--out", tmp_path / "data")[0] == 0
    base = tmp_path / "base"
    said = refused("finetune", "--from", base, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert said == (
        f"the data text was prepared with a tokenizer other than that of {base}; prepare it again"
        f" with --tokenizer {base}"
    )
    assert not (tmp_path / "out").exists()


# --- runs -----------------------------------------------------------------------------------------------------


def test_a_directory_that_holds_a_run(run: Run, refused: Refused, recipe: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    assert run("train", recipe, "--corpus", text, "--out", out)[0] == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for source in (["--corpus", text], ["--data", out / "data"]):
        said = refused(recipe, *source, "--out", out)
        assert said == f"{out} holds a run already; go on with it by --resume {out}, or choose another --out"
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["names"],
        ["--corpus", "c"],
        ["--from", "m"],
        ["--out", "o"],
        ["--window", "8"],
        ["--sinks", "1"],
        ["--window", "none"],
        ["--validation", "v"],
        ["--text-field", "t"],
    ],
)
def test_resume_takes_no_other_options(refused: Refused, tmp_path: Path, arguments: list[str]) -> None:
    said = refused("--resume", tmp_path, *arguments)
    assert said == (
        "--resume takes the recipe from the run; of the other options only --data, for data that have moved, --set and"
        " --device go with it"
    )


def test_resuming_what_is_no_run(refused: Refused, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        said = refused("--resume", path)
        assert said == f"{path} holds no run (no run.json); name the directory that --out was given"
    (tmp_path / "run.json").write_text("{")
    assert f"{tmp_path / 'run.json'} cannot be read (" in refused("--resume", tmp_path)


def test_resuming_without_the_data(run: Run, refused: Refused, recipe: Path, text: Path, tmp_path: Path) -> None:
    assert run("train", recipe, "--corpus", text, "--out", tmp_path / "a")[0] == 0
    os.rename(tmp_path / "a" / "data", tmp_path / "moved")
    assert refused("--resume", tmp_path / "a") == (
        f"the data of the run {tmp_path / 'a'} are no longer at {tmp_path / 'a' / 'data'}; say where they are:"
        f" gptlab train --resume {tmp_path / 'a'} --data WHERE"
    )


def test_data_that_moved(run: Run, refused: Refused, recipe: Path, text: Path, tmp_path: Path) -> None:
    out, moved = tmp_path / "a", tmp_path / "moved"
    for folder in (out, tmp_path / "whole"):
        assert run("train", recipe, "--corpus", text, "--out", folder)[0] == 0
    shutil.rmtree(out / "checkpoints" / "step-000020")
    os.rename(out / "data", moved)
    other = tmp_path / "other"
    assert run("prepare", text, "--tokenizer", "bytes", "--held-out", 0.4, "--out", other)[0] == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert refused("--resume", out, "--data", other) == (
        f"{other} holds other data than the run {out} began with: their checksums differ; restore them, name the right"
        f" ones with --data, or start a new run: gptlab train --from {out} --data {other} --out NEW"
    )
    assert "is not a dataset" in refused("--resume", out, "--data", tmp_path / "nowhere")
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert run("train", "--resume", out, "--data", moved)[0] == 0
    for name in ("model.safetensors", "training.safetensors"):
        actual, expected = (load_file(r / "checkpoints" / "step-000020" / name) for r in (out, tmp_path / "whole"))
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
    shutil.rmtree(out / "checkpoints" / "step-000020")
    assert run("train", "--resume", out)[0] == 0  # and from then on it is known


def test_a_new_run_from_a_run_as_the_refusal_says(
    run: Run, refused: Refused, recipe: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    assert run("train", recipe, "--corpus", text, "--out", out)[0] == 0
    said = refused("--resume", out, "--set", "optimizer.learning_rate=1e-4")
    advice = said.partition("start a new run: gptlab ")[2].replace("NEW", str(tmp_path / "new"))
    assert run(*advice.split(), "--set", "batch.size=4")[0] == 0
    assert gptlab.load(tmp_path / "new").config == gptlab.load(out).config


@pytest.mark.parametrize(("steps", "warmup", "reached"), [(8, 8, "its full height"), (6, 8, "75.0% of its full")])
def test_a_run_that_is_over_before_its_warmup(
    run: Run, recipe: Path, text: Path, tmp_path: Path, steps: int, warmup: int, reached: str
) -> None:
    settings = ["--set", f"budget.steps={steps}", "--set", f"schedule.warmup_steps={warmup}"]
    code, said, _ = run("train", recipe, "--corpus", text, "--out", tmp_path / "a", *settings)
    assert code == 0
    assert said.count(f"the run's {steps} steps are all warm-up (schedule.warmup_steps={warmup}): ") == 1
    assert f"the learning rate reaches {reached}" in said
    code, said, _ = run("train", recipe, "--corpus", text, "--out", tmp_path / "b", "--set", f"budget.steps={warmup}")
    assert "warm-up" not in said


def test_an_output_directory_that_cannot_be_written(
    run: Run, refused: Refused, recipe: Path, text: Path, tmp_path: Path
) -> None:
    # Below a file: nobody may write there, not even root.
    assert "cannot write to" in refused(recipe, "--corpus", text, "--out", text / "model")
    assert run("prepare", text, "--tokenizer", "bytes", "--held-out", 0.1, "--out", tmp_path / "data")[0] == 0
    assert "cannot write to" in refused(recipe, "--data", tmp_path / "data", "--out", text / "model")


def test_a_loss_that_is_no_number(refused: Refused, recipe: Path, text: Path, tmp_path: Path) -> None:
    # A model whose logits are beyond float32.
    model = gptlab.GPT(gptlab.ModelConfig.preset("tiny", vocab_size=257))
    with torch.no_grad():
        model.wte.weight.fill_(3e38)
    gptlab.save(gptlab.LanguageModel(model, byte_tokenizer()), tmp_path / "base")
    settings = ["--set", "batch.size=3", "--set", "train.dtype=float32", "--set", "data.held_out=0.1"]
    said = refused("finetune", "--from", tmp_path / "base", "--corpus", text, "--out", tmp_path / "a", *settings)
    assert said.startswith("the loss is ")
    assert " in step 1, on the windows that begin at tokens " in said
    assert " of text; there is no checkpoint yet; lower optimizer.learning_rate, or look at that text" in said
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"run.json", "metrics.jsonl", "data"}


# --- a full disk ----------------------------------------------------------------------------------------------


def fill(disk: Path, room: int) -> None:
    free = os.statvfs(disk)
    (disk / "filler").write_bytes(b"x" * (free.f_bavail * free.f_bsize - room))


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_a_full_disk_while_preparing(run: Run, recipe: Path, tmp_path: Path, small_disk: Path, command: str) -> None:
    path, out = tmp_path / "text.txt", small_disk / "out"
    path.write_text("the dog sees the b.\n" * 120_000)  # 2.4 MB, which are 4.8 MB of ids
    options = [path, "--tokenizer", "bytes"] if command == "prepare" else [recipe, "--corpus", path]
    code, said, err = run(command, *options, "--out", out)
    place = out if command == "prepare" else out / "data"
    assert (code, said) == (2, "")
    line = err.removeprefix("making the bytes tokenizer\n")
    assert line.startswith(f"gptlab: cannot write to {place}: the disk is full; nothing was left there")
    assert line.count("\n") == 1
    assert not [p for p in small_disk.rglob("*") if p.is_file()]


def test_no_room_for_a_run(
    run: Run, refused: Refused, recipe: Path, text: Path, tmp_path: Path, small_disk: Path
) -> None:
    assert run("prepare", text, "--tokenizer", "bytes", "--held-out", 0.1, "--out", tmp_path / "data")[0] == 0
    fill(small_disk, 0)
    said = refused(recipe, "--data", tmp_path / "data", "--out", small_disk / "run")
    assert said.startswith(f"cannot write to {small_disk / 'run'}: the disk is full; ")
    assert not [p for p in (small_disk / "run").rglob("*") if p.is_file()]


@pytest.mark.parametrize("room", [1.5, 2.3])  # checkpoints that fit; what fails is the weights or the optimizer's state
def test_a_full_disk_during_a_checkpoint(
    run: Run, refused: Refused, recipe: Path, text: Path, tmp_path: Path, small_disk: Path, room: float
) -> None:
    assert run("train", recipe, "--corpus", text, "--out", tmp_path / "whole")[0] == 0
    data, whole = tmp_path / "whole" / "data", tmp_path / "whole" / "checkpoints"
    size = sum(p.stat().st_size for p in (whole / "step-000020").iterdir())
    fill(small_disk, int(room * size) + 30_000)
    out = small_disk / "run"
    said = refused(recipe, "--data", data, "--out", out, "--set", "train.keep_last=9")
    step = 5 * math.ceil(room)
    assert said == (
        f"cannot write to {out / 'checkpoints' / f'.step-{step:06d}.partial'}: the disk is full; earlier checkpoints"
        f" are unchanged: make room, then go on with gptlab train --resume {out}"
    )
    there = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert there == [f"step-{n:06d}" for n in range(5, step, 5)]  # and nothing half written
    assert gptlab.load(out).generate("the ", max_new_tokens=3, seed=0)
    (small_disk / "filler").unlink()
    assert run("train", "--resume", out)[0] == 0
    for name in ("model.safetensors", "training.safetensors"):
        actual, expected = (load_file(folder / "step-000020" / name) for folder in (out / "checkpoints", whole))
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_no_room_for_a_row_of_metrics(
    run: Run, refused: Refused, recipe: Path, text: Path, tmp_path: Path, small_disk: Path
) -> None:
    assert run("train", recipe, "--corpus", text, "--out", tmp_path / "whole")[0] == 0
    out = small_disk / "run"
    shutil.copytree(tmp_path / "whole", out)
    shutil.rmtree(out / "checkpoints" / "step-000020")
    (out / "metrics.jsonl").unlink()
    fill(small_disk, 4096)
    (out / "metrics.jsonl").write_bytes(b"")
    fill_up = (out / "filler").open("wb")
    with fill_up, pytest.raises(OSError, match="No space"):
        fill_up.write(b"x" * 10**6)
    said = refused("--resume", out)
    assert "metrics.jsonl: No space left on device; make room, then go on with gptlab train --resume" in said
    assert said.count("--resume") == 1
    for path in (small_disk / "filler", out / "filler"):
        path.unlink()
    assert run("train", "--resume", out)[0] == 0
