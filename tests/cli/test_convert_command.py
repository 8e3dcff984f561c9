"""`gptlab convert` from the command line: what it leaves and says, and how it refuses."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gptlab
from gptlab import GPT, ModelConfig
from gptlab.config import RopeConfig
from gptlab.conversion.rotary import to_rope
from gptlab.evaluation.tasks import identity
from gptlab.text.tokenizers import byte_tokenizer, char_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny model of bytes, noisy enough that a conversion moves its outputs."""
    model = GPT(ModelConfig.preset("tiny", vocab_size=257))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    gptlab.save(gptlab.LanguageModel(model, byte_tokenizer()), tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    draw = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text("".join(draw.choice("abcdefgh ") for _ in range(2000)))
    return path


def test_convert_then_generate_evaluate_and_convert_again(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "model"
    flags = ["--n-kv-head", 2, "--window", 16, "--sinks", 2, "--context", 100, "--calibration", text]
    code, said, err = run("convert", source, *flags, "--out", out)
    assert (code, err) == (0, "")
    lines = said.splitlines()
    assert lines[:2] == [
        f"{source}:",
        "1. heads: 4 key/value heads -> 2, method svd, those that fit share, by the calibration text",
    ]
    assert [line for line in lines if line[:2] in ("2.", "3.")] == [
        "2. windows: window 16, sinks 2",
        "3. context: 64 -> 100 tokens, copies of the table side by side",
    ]
    assert "in this order: heads come first: once positions rotate keys" in said
    lm = gptlab.load(out)
    new = lm.config
    assert (new.n_kv_head, new.window, new.sinks, new.context_length) == (2, 16, 2, 100)
    size = sum(p.numel() for p in lm.model.parameters())
    assert any(line.startswith("parameters: ") and line.endswith(f"-> {size:,}") for line in lines)
    facts = json.loads((out / "conversion.json").read_text())
    outputs = facts["outputs"]
    assert outputs["kl"] > 0
    moved = outputs["after"] - outputs["before"]
    assert f"{outputs['before']:.4f} -> {outputs['after']:.4f} nats per token ({moved:+.4f}), KL" in said
    assert lines[-1] == (
        f"continue its training: gptlab train uptrain --from {out} --data DATA --set budget.share=0.05"
        " --set budget.of=TOKENS"  # beyond its context the source is no teacher
    )
    # What the record says.
    model = gptlab.load(source).model
    assert facts["source"] == {**identity(model, str(source)), "tokens_trained": None}
    assert facts["changes"] == {"n_kv_head": 2, "window": 16, "sinks": 2, "context_length": 100}
    assert facts["model"] == json.loads(json.dumps(new.to_dict()))
    assert [step["name"] for step in facts["steps"]] == ["heads", "windows", "context"]
    assert facts["calibration"]["text"] == str(text)
    tokens = facts["calibration"]["fitted_on"]["tokens"], facts["calibration"]["measured_on"]["tokens"]
    assert sum(tokens) == 1984
    assert outputs["tokens"] == tokens[1] // 64 * 63
    assert facts["cache"]["after"] == {"tokens": 100, "bytes": 2 * 2 * 18 * 2 * 8 * 2}
    # Like any other model.
    assert run("generate", "abc", "--model", out, "--max-new-tokens", 5, "--greedy")[0] == 0
    assert run("evaluate", out, "--task", f"text:{text}")[0] == 0
    code, said, err = run("convert", out, "--n-kv-head", 4, "--calibration", text, "--out", tmp_path / "again")
    assert (code, err) == (0, "")
    assert "2 key/value heads -> 4, each repeated 2 times" in said
    again = json.loads((tmp_path / "again" / "conversion.json").read_text())
    assert again["source"]["conversion"] == facts
    assert again["outputs"]["kl"] < 1e-9


def test_the_same_command_gives_the_same_weights(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    for name in "ab":
        assert run("convert", source, "--n-kv-head", 1, "--calibration", text, "--out", tmp_path / name)[0] == 0
    states = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@torch.inference_mode()
def own_text(model: GPT) -> str:
    """Letters that a model draws itself: on them, whatever comes nearer to its outputs has fewer nats a token."""
    generator, rows = torch.Generator().manual_seed(0), torch.full((32, 1), ord("a"))
    letters = torch.tensor([ord(letter) for letter in "abcdefghijklmnopqrstuvwxyz "])
    for _ in range(63):
        chosen = torch.multinomial(model(rows)[:, -1, letters].softmax(-1), 1, generator=generator)
        rows = torch.cat([rows, letters[chosen]], dim=1)
    return bytes(rows.flatten().tolist()).decode()


def test_positions(run: Run, source: Path, tmp_path: Path) -> None:
    states, text = {}, tmp_path / "own.txt"
    text.write_text(own_text(gptlab.load(source).model))  # on another text the fit may not pay, and is not taken
    for name, flags in (("fit", []), ("abrupt", ["--rotary", "abrupt"])):  # fit where nobody says
        out = tmp_path / name
        flags = ["--position", "rope", *flags, "--calibration", text, "--calibration-tokens", 256]
        code, said, err = run("convert", source, *flags, "--out", out)
        assert (code, err) == (0, "")
        assert f"1. positions: learned -> rope, {name}" in said.splitlines()
        assert json.loads((out / "conversion.json").read_text())["outputs"]["kl"] > 1e-4
        states[name] = gptlab.load(out).model.tensors()
    expected = to_rope(gptlab.load(source).model, method="abrupt").tensors()
    assert states["abrupt"].keys() == expected.keys()
    assert all(torch.equal(states["abrupt"][key], expected[key]) for key in expected)
    # Queries and keys are all that is fitted.
    moved = {key for key in expected if not torch.equal(states["fit"][key], expected[key])}
    assert moved == {key for key in expected if ".attn.c_attn." in key}


def test_a_blend_gives_the_outputs_of_its_source_and_says_how_to_go_on(
    run: Run, source: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "blend"
    code, said, err = run("convert", source, "--position", "blend", "--calibration", text, "--out", out)
    assert (code, err) == (0, "")
    assert "1. positions: learned -> blend, gauge: becomes rope during uptraining" in said.splitlines()
    assert said.splitlines()[-1].endswith(f"--set distill.teacher={source} --set blend.ramp=geometric")
    outputs = json.loads((out / "conversion.json").read_text())["outputs"]
    assert outputs["kl"] < 1e-7
    assert outputs["after"] == pytest.approx(outputs["before"], abs=1e-5)
    ids = torch.arange(64)[None]
    before, after = (gptlab.load(path).model(ids).log_softmax(-1) for path in (source, out))
    assert (before - after).abs().max() < 1e-4
    code, _, err = run("convert", out, "--position", "rope", "--calibration", text, "--out", tmp_path / "rope")
    assert code == 2
    assert "the blend is not at its end" in err
    assert not (tmp_path / "rope").exists()


def test_json(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    code, said, _ = run(
        "convert", source, "--n-kv-head", 1, "--refit", "--calibration", text, "--calibration-tokens", 256,
        "--out", out, "--json",
    )  # fmt: skip
    assert code == 0
    values = json.loads(said)
    assert values.pop("out") == str(out)
    assert values == json.loads((out / "conversion.json").read_text())
    assert [step["name"] for step in values["steps"]] == ["heads", "output projections"]
    assert values["calibration"]["fitted_on"]["tokens"] == 256
    assert values["parameters"]["before"] - values["parameters"]["after"] == 2 * 2 * 3 * 8 * 33
    assert not (out / "card.json").exists()


def test_weights_alone(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    code, said, _ = run("convert", source, "--n-kv-head", 2, "--no-calibration", "--json", "--out", tmp_path / "new")
    assert code == 0
    values = json.loads(said)
    assert values["steps"][0]["change"].endswith("by the weights alone")
    assert values["calibration"].keys() == {"text", "measured_on"}


def test_characters_that_cannot_write_the_text(run: Run, tmp_path: Path) -> None:
    config = gptlab.ModelConfig.preset("tiny", vocab_size=3)
    gptlab.save(gptlab.LanguageModel(gptlab.GPT(config), char_tokenizer(["abc"], end_of_text=False)), tmp_path / "m")
    change = (tmp_path / "m", "--n-kv-head", 2, "--out", tmp_path / "new")
    code, _, err = run("convert", *change)
    assert code == 2
    assert err.startswith("gptlab: of the calibration text pydoc the character")
    assert "or name another text (--calibration)" in err
    assert not (tmp_path / "new").exists()
    code, out, _ = run("convert", *change, "--no-calibration")
    assert code == 0
    assert "outputs: not measured, because there is no text" in out


def test_what_was_trained_is_passed_on(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    (source / "card.json").write_text('{"tokens_trained": 12345}')
    code, said, _ = run("convert", source, "--window", 8, "--calibration", text, "--out", tmp_path / "new")
    assert code == 0
    assert json.loads((tmp_path / "new" / "card.json").read_text()) == {
        "converted_from": str(source),
        "tokens_trained": 12345,
    }
    assert "--set budget.share=0.05 --set distill.teacher=" in said


def test_a_window_as_long_as_the_context_is_written_with_a_warning(
    run: Run, source: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="hides nothing") as warned:
        code, said, err = run("convert", source, "--window", 64, "--calibration", text, "--out", tmp_path / "new")
    assert (code, err) == (0, "")
    assert [str(warning.message) for warning in warned] == ["window=64 hides nothing within the context_length of 64"]
    assert "KL(source || converted) 0.0000" in said
    assert gptlab.load(tmp_path / "new").config.window == 64


def test_nothing_to_do_writes_nothing(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    assert run("convert", source, "--n-kv-head", 4, "--out", out) == (
        0,
        f"{source} already has these settings; nothing is written\n",
        "",
    )
    assert not out.exists()


def test_without_a_tokenizer_only_what_needs_no_text(run: Run, source: Path, tmp_path: Path) -> None:
    gptlab.save(gptlab.LanguageModel(gptlab.load(source).model), tmp_path / "bare")
    code, _, err = run("convert", tmp_path / "bare", "--n-kv-head", 2, "--out", tmp_path / "new")
    assert code == 2
    assert "this model came without a tokenizer" in err
    code, said, _ = run("convert", tmp_path / "bare", "--window", 8, "--out", tmp_path / "new")
    assert code == 0
    assert "outputs: not measured, because there is no text" in said


REFUSED = [
    ([], "no change is asked for; give --n-kv-head, --position, --window, --context, --rope-scaling, or"),
    (["--no-refit"], "no change is asked for"),
    (["--n-kv-head", 3], "cannot be given 3 key/value heads; possible: 1, 2, 4"),
    (["--window", 0], "window must be a whole number of at least 1"),
    (["--window", "8,x"], "--window takes a number, or one per layer"),
    (["--context", 32], "a context of 32 is shorter than the model's 64"),
    (["--position", "learned", "--window", 8, "--sinks", -1], "sinks must be a whole number of at least 0"),
    (["--method", "mean"], "method and grouping have no effect unless heads are to share"),
    (["--n-kv-head", 2, "--no-calibration", "--calibration", "pydoc"], "--no-calibration leaves --calibration"),
    (["--n-kv-head", 2, "--calibration-tokens", 0], "--calibration-tokens must be at least 1, got 0"),
    (["--n-kv-head", 2, "--calibration", "nothing.txt"], "no corpus at nothing.txt"),
    (["--n-kv-head", 2, "--refit", "--no-calibration"], "--refit fits on a calibration text"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_refusals(run: Run, source: Path, tmp_path: Path, arguments: list[object], words: str) -> None:
    out = tmp_path / "new"
    code, _, err = run("convert", source, *arguments, "--out", out)
    assert code == 2
    assert err.startswith("gptlab: ")
    assert err.count("\n") == 1
    assert words in err
    assert not out.exists()


def test_refusals_of_places_texts_and_models(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        code, _, err = run("convert", *arguments)
        assert (code, err.count("\n")) == (2, 1)
        return err

    assert f"{source} already exists; choose another --out" in refused(source, "--window", 8, "--out", source)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    words = "has 10 tokens, fewer than the 64 of the model's context; give a longer one"
    assert words in refused(source, "--n-kv-head", 2, "--calibration", short, "--out", tmp_path / "new")
    gptlab.save(gptlab.LanguageModel(GPT(ModelConfig.preset("tiny", position="rope"))), tmp_path / "rope")
    for arguments, words in (
        (["--position", "learned"], "a model of rope positions cannot be given a learned table"),
        (["--n-kv-head", 2, "--method", "svd"], "rotary positions do not allow; use 'procrustes'"),
    ):
        assert words in refused(tmp_path / "rope", *arguments, "--out", tmp_path / "new")
    assert "no model 'pockt' (did you mean 'pocket'?)" in refused("pockt", "--window", 8, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
def test_rope_scaling_of_a_trained_model(run: Run, source: Path, text: Path, tmp_path: Path, kind: str) -> None:
    lm = gptlab.load(source)
    rope, out = tmp_path / "rope", tmp_path / "out"
    gptlab.save(gptlab.LanguageModel(to_rope(lm.model, method="abrupt"), lm.tokenizer), rope)
    flags = ["--rope-scaling", kind, "--rope-factor", 4, "--calibration", text]
    code, said, err = run("convert", rope, *flags, "--out", out)
    assert (code, err) == (0, "")
    assert f"1. rope scaling: {kind}, factor 4: for texts of up to 256 tokens, 4 times the 64 trained on" in said
    old, new = gptlab.load(rope), gptlab.load(out)
    assert new.config.rope == RopeConfig(scaling=kind, factor=4.0)  # kept by the files
    # A model that is made with the setting computes the same; transformers judges that one.
    made = GPT(dataclasses.replace(old.config, rope=new.config.rope))
    made.load_state_dict(old.model.state_dict(), strict=False)
    made.tie()
    ids = torch.arange(200)[None]
    with torch.inference_mode():
        assert torch.equal(new.model(ids), made.eval()(ids))
        assert not torch.equal(new.model(ids), old.model(ids))
    assert run("convert", out, "--rope-scaling", "none", "--calibration", text, "--out", tmp_path / "back")[0] == 0
    assert torch.equal(gptlab.load(tmp_path / "back").model(ids), old.model(ids))


def test_a_longer_context_of_rotary_positions_says_what_it_is(run: Run, source: Path, text: Path) -> None:
    lm = gptlab.load(source)
    rope = text.parent / "rope"
    gptlab.save(gptlab.LanguageModel(to_rope(lm.model, method="abrupt"), lm.tokenizer), rope)
    _, said, _ = run("convert", rope, "--context", 256, "--calibration", text, "--out", text.parent / "long")
    advice = "nothing is done for texts longer than the 64 tokens trained on, which --rope-scaling yarn --rope-factor 4"
    assert advice in said
    flags = ["--rope-scaling", "yarn", "--rope-factor", 4]
    states = []
    for start, more in ((rope, []), (rope, ["--context", 256]), (text.parent / "long", [])):
        out = text.parent / f"yarn{len(states)}"
        code, said, _ = run("convert", start, *flags, *more, "--calibration", text, "--out", out)
        assert (code, "for texts of up to 256 tokens, 4 times the 64 trained on" in said) == (0, True)
        new = gptlab.load(out)
        assert new.config.trained_length == 64
        states.append(new.model(torch.arange(200)[None]))
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--rope-scaling", "yarn"], "go together"),
        (["--rope-factor", 4], "go together"),
        (["--rope-scaling", "dynamic", "--rope-factor", 4], "depends on the length of the text"),
        (["--rope-scaling", "yarm", "--rope-factor", 4], "did you mean 'yarn'?"),
        (["--rope-scaling", "yarn", "--rope-factor", 0.5], "factor must be a finite number at least 1"),
        (["--rope-scaling", "none", "--rope-factor", 4], "has no effect with --rope-scaling 'none'"),
    ],
)
def test_rope_scalings_that_are_none(run: Run, tmp_path: Path, flags: list[object], complaint: str) -> None:
    code, said, err = run("convert", "pocket-rope", *flags, "--out", tmp_path / "out")
    assert (code, said) == (2, "")
    assert complaint in err
    assert not (tmp_path / "out").exists()
    code, _, err = run("convert", "pocket", "--rope-scaling", "yarn", "--rope-factor", 4, "--out", tmp_path / "out")
    assert (code, "no effect on a model with position='learned'" in err) == (2, True)
