"""What is timed, and how: the work of a step, turns, time limits, memory. How fast a machine is, is not tested."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.generation.padded import CHUNK
from gptlab.model import cost
from gptlab.model.gpt import GPT
from gptlab.study import costs, timing
from gptlab.study import measure as measuring
from gptlab.study.measure import measure
from gptlab.study.memory import peak_memory
from gptlab.study.results import Timings
from gptlab.study.settings import MeasurementSettings
from gptlab.study.timing import ROUNDS, decoding_step, prefill_step, take_turns, training_step
from gptlab.training.recipe import Recipe, make_recipe

CPU = torch.device("cpu")
CONFIGS = {
    "base": ModelConfig.preset("tiny"),
    "rope": ModelConfig.preset("tiny", position="rope"),
    "all": ModelConfig.preset("tiny", position="rope", n_kv_head=1, window=8),
}
RECIPE = make_recipe({"train": {"dtype": "float32"}, "batch": {"size": 2}})


class Spy:
    """Notes what goes through a model."""

    def __init__(self, model: GPT) -> None:
        self.calls: list[dict[str, Any]] = []
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("cache")
        self.calls.append({"shape": tuple(args[0].shape), "seen": None if cache is None else cache.layers[0].seen})


@pytest.mark.parametrize("name", ["rope", "all"])
def test_a_decoding_step_adds_one_token_to_a_cache_that_holds_the_context(name: str) -> None:
    model = GPT(CONFIGS[name]).eval()
    spy, context = Spy(model), CHUNK + 70
    step = decoding_step(model, 3, context)
    assert not spy.calls  # filling the cache costs no forward pass
    for _ in range(ROUNDS + 1):
        step()
    assert spy.calls == [{"shape": (3, 1), "seen": context + i} for i in range(ROUNDS + 1)]


@pytest.mark.parametrize("name", ["rope", "all"])
def test_the_compiled_step_is_what_is_timed_where_it_serves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(CONFIGS[name]).eval()
    if timing.computed_by(model) != timing.COMPILED:
        pytest.skip("there is no compiled step here")
    lengths = []
    call = timing.CompiledStep.__call__

    def spy(self: Any, texts: list[Any], ids: list[int]) -> torch.Tensor:
        lengths.append([text.length for text in texts])
        return call(self, texts, ids)

    monkeypatch.setattr(timing.CompiledStep, "__call__", spy)
    step, context = decoding_step(model, 3, CHUNK + 70), CHUNK + 70
    for _ in range(ROUNDS + 1):
        step()
    assert lengths == [[context + i] * 3 for i in range(ROUNDS + 1)]


def test_the_filled_cache_is_one_that_a_prompt_leaves() -> None:
    model = GPT(CONFIGS["all"]).eval()
    caches = [model.make_cache(2, CHUNK + 100, chunk=CHUNK) for _ in range(2)]
    timing.fill(caches[0], 2, CHUNK + 90)
    for n in (CHUNK, 90):
        with torch.inference_mode():
            model(torch.zeros(2, n, dtype=torch.int64), cache=caches[1])
    for filled, read in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(filled.positions, read.positions)
        assert torch.equal(filled.counts, read.counts)
        assert (filled.seen, filled.plain) == (read.seen, read.plain)
        assert filled.k.any(dim=-1).sum() == read.k.any(dim=-1).sum()


def test_a_prompt_is_read_in_chunks() -> None:
    model = GPT(CONFIGS["all"]).eval()
    spy = Spy(model)
    prefill_step(model, 2, 2 * CHUNK + 5)()
    assert spy.calls == [{"shape": (2, n), "seen": s} for n, s in ((CHUNK, 0), (CHUNK, CHUNK), (5, 2 * CHUNK))]


def test_a_training_step_trains() -> None:
    model = GPT(CONFIGS["rope"])
    spy, before = Spy(model), [parameter.detach().clone() for parameter in model.parameters()]
    step = training_step(model, 3, RECIPE)
    step()
    assert [call["shape"] for call in spy.calls] == [(3, 64)]
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True) if a.ndim == 2)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_variants_take_turns_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []

    def step(name: str, seconds: list[float]) -> Any:
        def run() -> None:
            calls.append(name)
            now[0] += seconds[(calls.count(name) - 1) % len(seconds)]

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    steps = {"a": step("a", [9.0, 1.0, 2.0, 30.0]), "b": step("b", [5.0])}
    seconds = take_turns(steps, CPU, 1e9)
    assert calls == ["a", "b"] * (1 + ROUNDS)
    assert seconds == {"a": 2.0, "b": 5.0}  # of 1 2 30 9 1 2 30 9 1: the first call does not count
    calls.clear()
    take_turns(steps, CPU, 0.0)
    assert calls == ["a", "b"] * 2  # at least one round, whatever the time
    calls.clear()
    take_turns({"b": step("b", [5.0])}, CPU, 26.0)
    assert len(calls) == 5  # another would end after 30 seconds


Kept = tuple[Timings, list[str]]


def run(cache: Path, **changes: Any) -> Kept:
    values = {"seconds": 0, "contexts": [96, 16], "batches": [2, 1], "training_rows": 1}
    said: list[str] = []
    timings = measure(
        CONFIGS,
        MeasurementSettings(**{**values, **changes}),
        RECIPE,
        cache,
        device=CPU,
        report=lambda row: said.append(row.get("what") or row["text"]),
    )
    return timings, said


@pytest.mark.usefixtures("no_measuring")
def test_everything_is_timed_for_every_variant(tmp_path: Path) -> None:
    timings, said = run(tmp_path)
    assert list(timings.variants) == list(CONFIGS)
    for timed in timings.variants.values():
        points = [(row.context, row.batch) for row in timed.decode]
        assert points == [(16, 1), (16, 2), (96, 1), (96, 2)]  # 96 is beyond the learned positions
        for row in timed.decode:
            assert row.tokens_per_second == pytest.approx(1e3 * row.batch / row.milliseconds)
        assert [(row.context, row.batch) for row in timed.prefill] == [(16, 1), (96, 1)]
        assert all(row.tokens_per_second > 0 for row in timed.prefill)
        assert timed.training_tokens_per_second > 0
        assert (timed.training_memory_bytes, timed.decoding_memory_bytes) == (2000, 1000)
    assert "2 x 96 tokens in the cache" in timings.how
    assert "training on 1 windows" in timings.how
    assert timings.machine.threads == torch.get_num_threads()
    assert [what for what in said if what.startswith("memory")] == [f"memory of {name}" for name in CONFIGS]


@pytest.mark.usefixtures("no_measuring")
def test_the_clock_may_be_left_alone(tmp_path: Path) -> None:
    timings, said = run(tmp_path, timed=False)
    assert said == []
    assert timings.how == "no variant was timed"
    assert set(timings.variants) == set(CONFIGS)
    assert not any(filled for timed in timings.variants.values() for filled in timed.model_dump().values())


@pytest.mark.usefixtures("no_measuring")
def test_a_measurement_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = run(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(measuring, "take_turns", None)  # nothing is timed again
    again, _ = run(tmp_path)
    assert again == first
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    with pytest.raises(TypeError):
        run(tmp_path, contexts=[17])
    monkeypatch.setattr(measuring.platform, "node", lambda: "another")
    with pytest.raises(TypeError):
        run(tmp_path)


@pytest.mark.usefixtures("no_measuring")
def test_what_would_take_too_much_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {batch: sum(cost.cache_bytes(c, 96, 4, batch=batch) for c in CONFIGS.values()) for batch in (1, 2)}
    monkeypatch.setattr(measuring, "MOST_BYTES", (sizes[1] + sizes[2]) // 2)
    timings, _ = run(tmp_path)
    for timed in timings.variants.values():
        assert [(row.context, row.batch) for row in timed.decode] == [(16, 1), (16, 2), (96, 1)]
    assert "1 x 96 tokens in the cache" in timings.how

    def slow(steps: dict[str, Any], device: torch.device, seconds: float) -> dict[str, float]:
        return dict.fromkeys(steps, 60.0)

    monkeypatch.setattr(measuring, "take_turns", slow)
    timings, _ = run(tmp_path / "slow", seconds=100)
    for timed in timings.variants.values():
        assert [row.context for row in timed.prefill] == [16]  # the next would take minutes


@pytest.mark.usefixtures("no_measuring")
def test_memory_that_cannot_be_measured_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(asked: dict[str, Any]) -> dict[str, int]:
        raise GptlabError("memory could not be measured: killed")

    monkeypatch.setattr(measuring, "peak_memory", fail)
    timings, said = run(tmp_path)
    assert timings.variants["base"].training_memory_bytes is None
    assert "base: memory could not be measured: killed" in said


@pytest.mark.slow
def test_memory_of_a_process_of_its_own() -> None:
    big = ModelConfig.preset("tiny", n_embd=256, vocab_size=4096, position="rope", context_length=128)
    asked = {
        "config": big.to_dict(),
        "trained": big.to_dict(),
        "recipe": RECIPE.model_dump(mode="json"),
        "rows": 1,
        "batch": 4,
        "context": 4096,
        "device": "cpu",
    }
    ballast = torch.ones(2**28)  # 1 GiB that the child must not be blamed for
    memory = peak_memory(asked)
    assert ballast.any()
    weights = 4 * sum(cost.parameters(big).values())
    held = weights + cost.cache_bytes(big, 4096, 4, batch=4)
    assert held < memory["decoding"] < held + 2**28
    assert 4 * weights < memory["training"] < 4 * weights + 2**28  # weights, gradients, two moments
    narrow = dataclasses.replace(big, window=64).to_dict()
    assert peak_memory({**asked, "config": narrow})["decoding"] < memory["decoding"] - held // 4
    with pytest.raises(GptlabError, match="memory could not be measured"):
        peak_memory({**asked, "device": "nonsense"})


# --- from configurations alone ------------------------------------------------------------------------------------


def test_caches_are_allocated_as_generation_does() -> None:
    for config in CONFIGS.values():
        longer = dataclasses.replace(config, context_length=4096)
        for row in costs.cache_sizes(config, [64, 2048], [1, 4]):
            made = GPT(longer).make_cache(row.batch, row.context, chunk=CHUNK, dtype=torch.bfloat16)
            assert row.allocated == made.nbytes
            assert row.bytes == cost.cache_bytes(config, row.context, 2, batch=row.batch)
            assert row.bytes <= made.nbytes
    huge = costs.cache_sizes(ModelConfig.preset("gpt2"), [100_000], [32])
    assert huge[0].allocated is None


def test_the_changes_in_the_four_sizes() -> None:
    pocket = ModelConfig.preset("pocket")
    variants = {
        "base": pocket,
        "rope": dataclasses.replace(pocket, position="rope"),
        "gqa": dataclasses.replace(pocket, n_kv_head=2),
        "mqa": dataclasses.replace(pocket, n_kv_head=1),
        "swa": dataclasses.replace(pocket, window=128),
        "growing": dataclasses.replace(pocket, window=(32, 64, None, 128)),
        "wider": dataclasses.replace(pocket, n_embd=384),
    }
    sizes = costs.four_sizes(variants, "base")
    assert list(sizes) == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    small = sizes["gpt2"]
    assert "wider" not in small  # no counterpart
    # The figures of REFERENCES.md, section 1.
    assert small["base"].parameters == 124_439_808
    assert small["rope"].parameters == 124_439_808 - 786_432
    assert small["gqa"].changes == {"n_kv_head": 4}
    assert round(small["gqa"].parameters / 1e4) == 11499
    assert [row.bytes >> 20 for row in small["base"].cache] == [36, 144, 576]
    assert [row.bytes >> 20 for row in small["mqa"].cache] == [3, 12, 48]
    assert small["swa"].changes == {"window": 256}
    assert {row.bytes for row in small["swa"].cache} == {9 << 20}
    assert small["growing"].changes == {"window": [64] * 3 + [128] * 3 + [None] * 3 + [256] * 3}
    assert sizes["gpt2-xl"]["gqa"].changes == {"n_kv_head": 5}  # 25 heads cannot be divided by 3
    assert sizes["gpt2-xl"]["mqa"].changes == {"n_kv_head": 1}


def test_operations_of_a_token() -> None:
    flops = costs.flops_per_token(CONFIGS["base"], [16, 64])
    assert flops.forward == {str(n): cost.token_flops(CONFIGS["base"], n - 1).total for n in (16, 64)}
    assert flops.training == cost.training_flops(CONFIGS["base"], 64) / 64
    assert sum(cost.parameters(CONFIGS["base"]).values()) == costs.parameters(CONFIGS["base"])["total"]


@pytest.mark.usefixtures("no_measuring")
def test_the_recipe_decides_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    monkeypatch.setattr(measuring, "training_step", lambda model, n, recipe: rows.append(n) or (lambda: None))
    for recipe, expected in ((RECIPE, 2), (Recipe(batch={"size": 8, "micro": 4}), 4)):
        settings = MeasurementSettings(seconds=0, contexts=[16])
        measure(CONFIGS, settings, recipe, tmp_path / str(expected), device=CPU, report=lambda row: None)
        assert rows == [expected] * len(CONFIGS)
        rows.clear()
