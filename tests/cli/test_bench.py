"""What `gptlab bench generate` times and writes. How fast a machine is, is not tested."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.models import noisy

from gptlab import benchmark
from gptlab.benchmark import GenerationSpeed, Settings, in_precisions, measure_generation, one_token_step, weight_bytes
from gptlab.cli.bench import _show
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.generation import padded
from gptlab.generation.compiled import library
from gptlab.generation.compiled.decoder import serves
from gptlab.model import cost
from gptlab.model.gpt import GPT
from gptlab.study import timing

SWITCHES = [{}, {"position": "rope", "n_kv_head": 2, "window": 8, "sinks": 2}, {"tie_embeddings": False}]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(benchmark, "PROBE_BYTES", 2**16)
    monkeypatch.setattr(benchmark, "TURN", 0.0)


@pytest.fixture(params=["compiled step", "plain PyTorch"])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "plain PyTorch":
        monkeypatch.setattr(benchmark, "serves", lambda *_: False)
    elif not library.find_compiler():
        pytest.skip("no compiler")
    else:
        library.library()
        assert serves(noisy(), 1)
    return request.param


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_step_attends_to_the_same_context(switches: dict, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (benchmark, timing):
        monkeypatch.setattr(module, "CHUNK", 16)
    model, chosen = noisy(**switches), []
    real = torch.Tensor.argmax

    def spy(logits: torch.Tensor, dim: int) -> torch.Tensor:
        chosen.append(logits.clone())
        return real(logits, dim)

    monkeypatch.setattr(torch.Tensor, "argmax", spy)
    step, compiled = one_token_step(model, 3, 40)
    assert compiled == (program == "compiled step")
    for _ in range(30):
        step()
    assert chosen[0].shape == (3, 256)
    assert all(torch.equal(logits, chosen[0]) for logits in chosen)


def test_both_programs_do_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    if not library.find_compiler():
        pytest.skip("no compiler")
    library.library()
    model, logits = noisy(position="rope", n_kv_head=2, window=8), []
    monkeypatch.setattr(torch.Tensor, "argmax", lambda self, dim: logits.append(self.clone()) or torch.zeros(len(self)))
    for serving in (True, False):
        monkeypatch.setattr(benchmark, "serves", lambda *_, serving=serving: serving)
        one_token_step(model, 1, 50)[0]()
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_bytes_of_weights_are_those_of_the_cost_model(switches: dict) -> None:
    config = ModelConfig.preset("tiny", **switches)
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        model = in_precisions(GPT(config), (dtype,))[dtype]
        for batch in (1, 7):
            rows = batch * config.n_embd * size  # of the head, which the cost model counts beside the rows looked up
            expected = cost.decode_bytes(config, 9, size, batch=batch)[0] - config.tie_embeddings * rows
            assert weight_bytes(model, batch) == expected


def test_quantised_weights_are_read_once_with_their_factors() -> None:
    config = ModelConfig.preset("tiny")
    inner = 2 * 12 * config.n_embd**2  # two layers of 12 C^2 weights
    outputs = 2 * (3 + 1 + 4 + 1) * config.n_embd + config.vocab_size
    beside = 2 * ((3 + 1 + 4 + 1) + 4) * config.n_embd + 2 * config.n_embd + config.n_embd  # biases, norms, a position
    weights = inner + config.vocab_size * config.n_embd
    models = in_precisions(GPT(config), ("int8", "int4"))
    assert weight_bytes(models["int8"], 1) == weights + 4 * (outputs + beside)
    assert weight_bytes(models["int4"], 1) == weights / 2 + 4 * (weights / 32 + beside)


def test_the_result_is_complete_and_is_read_back(
    program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[dict] = []
    settings = Settings(batches=(1, 3), contexts=(9, 16), prompt=20, rounds=3)
    result = measure_generation("tiny", "random", noisy(), settings, said.append)
    assert GenerationSpeed.model_validate_json(result.model_dump_json()) == result
    assert {row["number"] for row in said} == set(range(1, 6))
    assert [row["of"] for row in said] == [5] * 5
    assert len(result.decode) == 4 * 2 * 2
    for point in result.decode:
        low, high = point.step.quartiles
        assert len(point.step.seconds) == 3
        assert min(point.step.seconds) <= low <= point.step.median <= high <= max(point.step.seconds)
        assert point.tokens_per_second == point.batch / point.step.median
        assert point.program == program
    assert len(result.prefill) == 4
    assert all(len(row.read.seconds) == 3 for row in result.prefill)
    assert len(result.bandwidth.read.seconds) == 3 * 4
    _show(result)
    out = capsys.readouterr().out
    assert f"{result.decode[0].tokens_per_second:,.1f}" in out
    assert out.count(program) == 16


def test_points_whose_caches_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "serves", lambda *_: False)
    model = noisy()
    settings = Settings(dtypes=("float32",), batches=(1, 64), contexts=(64,), prompt=0, rounds=1)
    room = cost.cache_bytes(model.config, 64, 4, batch=32, chunk=padded.CHUNK)
    monkeypatch.setattr(benchmark, "available_memory", lambda *_: room)
    result = measure_generation("tiny", "random", model, settings, lambda _: None)
    assert [point.batch for point in result.decode] == [1]
    assert [words.partition(":")[0] for words in result.left_out] == ["batch 64, context 64"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtypes": ("int9",)}, "one of float32, bfloat16, int8, int4, got 'int9'"),
        ({"batches": (1, 0)}, "a batch must be at least 1, got 1, 0"),
        ({"contexts": ()}, "a context must be at least 1, got none"),
        ({"rounds": 0}, "rounds must be at least 1"),
    ],
)
def test_settings_that_cannot_be_timed(changes: dict, words: str) -> None:
    with pytest.raises(GptlabError, match=words):
        Settings(**changes)


def test_the_command_writes_what_it_shows(run, tmp_path: Path) -> None:
    out = tmp_path / "new" / "speed.json"
    arguments = "--model tiny --contexts 8,70 --batches 1 --prompt 0 --rounds 1 --dtypes int8 --threads 1"
    code, shown, said = run("bench", "generate", *arguments.split(), "--out", out)
    assert code == 0, said
    values = json.loads(out.read_text(encoding="utf-8"))
    assert (values["format"], values["model"], values["weights"]) == ("gptlab bench generate", "tiny", "random")
    assert values["config"]["context_length"] == 70  # a random model has the positions that it needs
    assert f"{values['decode'][1]['tokens_per_second']:,.1f}" in shown
    assert said.splitlines() == ["timing batch 1, context 8 (1 of 2)", "timing batch 1, context 70 (2 of 2)"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "generate", "--batches", "1;8"], "--batches takes whole numbers with commas between"),
        (["bench", "generate", "--dtypes", "float16"], "a precision must be one of"),
        (
            ["bench", "generate", "--model", "pocket-rope", "--contexts", "9", "--prompt", "0", "--threads", "0"],
            "--threads",
        ),
        (["bench", "generate", "--model", "pocket-gqa", "--contexts", "513"], "learned positions end at 512 tokens"),
        (["bench", "generate", "--out", "."], "is a directory"),
        (["bench", "generate", "--model", "nowhere"], "no model 'nowhere'"),
        (["compile", "--dtype", "int8"], "--dtype is of a model to check"),
        (["compile", "pocket", "--dtype", "int9"], "dtype must be one of"),
        (["compile", "nowhere"], "no model 'nowhere'"),
    ],
)
def test_refusals(run, arguments: list[str], words: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_compile_says_where_the_step_lies_and_checks_a_model(run, dtype: str) -> None:
    if not library.find_compiler():
        pytest.skip("no compiler")
    code, out, err = run("compile", "pocket", "--dtype", dtype)
    assert code == 0, err
    place, check = out.splitlines()
    assert Path(place.split(": ", 1)[1]).exists()
    words = check.split()
    assert float(words[words.index("most") + 1]) < (1e-3 if dtype == "float32" else 0.3)


def test_compile_without_a_compiler_says_what_to_install(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTLAB_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    for cached in (library.library, library.library_path):
        cached.cache_clear()
    try:
        code, out, err = run("compile")
    finally:
        for cached in (library.library, library.library_path):
            cached.cache_clear()
    assert (code, out) == (2, "")
    assert "install g++ or clang++" in err
