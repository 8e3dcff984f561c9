"""`gptlab verify` passes, and each of its checks fails when what it checks is broken."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.models import tiny_lm

import gptlab
from gptlab import language_model, verification
from gptlab.checkpoints import hub
from gptlab.config import PRESETS
from gptlab.model import cache, cost, gpt, kernels, masks
from gptlab.text.tokenizers import FileTokenizer, GPT2Tokenizer, byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

POCKET = "pocket_bits_per_byte"
Outcome = tuple[str, str, str, bool]


def result_of(check: Callable[[], Outcome]) -> verification.Result:
    return verification._timed(check)()


@pytest.mark.parametrize("check", verification.OFFLINE, ids=lambda check: check.__name__)
def test_every_offline_check_passes(check: Callable[[], Outcome]) -> None:
    if check.__name__ == POCKET and "pocket" not in hub.built_in():
        pytest.skip("the built-in model is not in this checkout")
    result = result_of(check)
    assert result.passed, verification.line(result)
    assert verification.line(result).startswith("PASS  ")


def test_the_checks_are_those_of_the_list_and_leave_the_random_state_alone() -> None:
    assert len(list(verification.checks())) == len(verification.OFFLINE)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = result_of(verification.causality), result_of(verification.causality)
    assert first.found == second.found  # the same figures every time
    assert torch.equal(torch.random.get_rng_state(), before)


# --- sabotage: one thing is broken, its row must fail ---------------------------------------------------------


def wrong_preset(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(PRESETS["gpt2-medium"], "n_layer", 23)


def wrong_cost_model(patch: pytest.MonkeyPatch) -> None:
    right = cost.parameters
    patch.setattr(cost, "parameters", lambda config: {**right(config), "layer norms": 0})


def initialisation_ten_times_too_wide(patch: pytest.MonkeyPatch) -> None:
    small_gpt2(patch)
    right = gpt.GPT.init_weights

    @torch.no_grad()
    def wide(self: gpt.GPT, seed: int) -> None:
        right(self, seed)
        self.wte.weight.mul_(20)

    patch.setattr(gpt.GPT, "init_weights", wide)


def small_gpt2(patch: pytest.MonkeyPatch) -> None:
    """The vocabulary alone decides the loss before training; so a check need not take the time of 124M."""
    patch.setitem(PRESETS, "gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 64})


def mask_that_shows_the_next_token(patch: pytest.MonkeyPatch) -> None:
    right = masks.Visibility.visible

    def leaky(self: masks.Visibility, queries: masks.Tokens, keys: masks.Tokens) -> torch.Tensor:
        return right(self, dataclasses.replace(queries, positions=queries.positions + 1), keys)

    patch.setattr(masks.Visibility, "visible", leaky)
    patch.setattr(masks.Visibility, "shape", lambda *args: None)


def shortcut_that_shows_everything(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(masks.Visibility, "shape", lambda *args: "everything")


def model_that_does_not_read(patch: pytest.MonkeyPatch) -> None:
    right = gpt.GPT.embed
    patch.setattr(gpt.GPT, "embed", lambda self, ids, *rest: right(self, torch.zeros_like(ids), *rest))


def cache_that_shifts_positions(patch: pytest.MonkeyPatch) -> None:
    right = cache.Cache.describe

    def shifted(self: cache.Cache, *args: Any) -> masks.Tokens:
        tokens = right(self, *args)
        return dataclasses.replace(tokens, positions=tokens.positions + int(self.layers[0].used > 0))

    patch.setattr(cache.Cache, "describe", shifted)


def cache_that_forgets_the_first_value(patch: pytest.MonkeyPatch) -> None:
    right = cache.Full.append

    def forgetful(self: cache.Full, *args: Any) -> Any:
        k, v, keys = right(self, *args)
        if self.used > args[0].shape[2]:
            v[:, :, 0] = 0
        return k, v, keys

    patch.setattr(cache.Full, "append", forgetful)


def kernel_with_a_wrong_scale(patch: pytest.MonkeyPatch) -> None:
    right = kernels.KERNELS["sdpa"]
    patch.setitem(kernels.KERNELS, "sdpa", lambda inputs: right(inputs._replace(q=inputs.q * 1.01)))


def kernel_with_a_wrong_gradient(patch: pytest.MonkeyPatch) -> None:
    right = kernels.KERNELS["sdpa"]
    patch.setitem(kernels.KERNELS, "sdpa", lambda inputs: right(inputs._replace(k=inputs.k.detach())))


def kernel_that_ignores_documents(patch: pytest.MonkeyPatch) -> None:
    right = kernels.KERNELS["sdpa"]

    def blind(inputs: kernels.Inputs) -> Any:
        return right(inputs._replace(queries=dataclasses.replace(inputs.queries, documents=None)))

    patch.setitem(kernels.KERNELS, "sdpa", blind)


def padding_that_counts_as_text(patch: pytest.MonkeyPatch) -> None:
    right = verification.pad_left
    patch.setattr(verification, "pad_left", lambda *args: (right(*args)[0], None))


def logits_that_saturate(patch: pytest.MonkeyPatch) -> None:
    right = gpt.all_logits
    patch.setattr(gpt, "all_logits", lambda hidden, lm_head: right(hidden, lm_head).clamp(-2, 2))


def temperature_without_effect(patch: pytest.MonkeyPatch) -> None:
    right = verification.probabilities
    patch.setattr(
        verification, "probabilities", lambda logits, s: right(logits, dataclasses.replace(s, temperature=1.0))
    )


def top_p_without_effect(patch: pytest.MonkeyPatch) -> None:
    right = verification.probabilities
    patch.setattr(verification, "probabilities", lambda logits, s: right(logits, dataclasses.replace(s, top_p=None)))


def draws_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = verification.draw
    patch.setattr(verification, "draw", lambda *args: (right(*args) + 1).clamp(max=5))


class Swapped(GPT2Tokenizer):
    """Two ids exchanged, both ways: texts survive, but a trained model would read nonsense."""

    swap: dict[int, int] = {15496: 11, 11: 15496}  # noqa: RUF012

    def _encode_ordinary(self, texts: Any) -> list[list[int]]:
        return [[self.swap.get(i, i) for i in ids] for ids in super()._encode_ordinary(texts)]

    def _decode(self, ids: list[int]) -> bytes:
        return super()._decode([self.swap.get(i, i) for i in ids])


def tokenizer_with_two_ids_swapped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verification, "GPT2Tokenizer", Swapped)


def tokenizer_that_drops_spaces_at_the_end(patch: pytest.MonkeyPatch) -> None:
    right = FileTokenizer._decode
    patch.setattr(FileTokenizer, "_decode", lambda self, ids: right(self, ids).rstrip(b" "))


def saving_that_drops_precision(patch: pytest.MonkeyPatch) -> None:
    right = language_model.save
    patch.setattr(language_model, "save", lambda lm, directory: right(lm, directory, dtype=torch.bfloat16))


def saving_that_loses_the_configuration(patch: pytest.MonkeyPatch) -> None:
    # The logits of this check's short text would not tell.
    right = language_model.load

    def forgetful(directory: str, **options: Any) -> gptlab.LanguageModel:
        lm = right(directory, **options)
        lm.config = dataclasses.replace(lm.config, dropout=0.1)
        return lm

    patch.setattr(language_model, "load", forgetful)


SABOTAGE: list[tuple[Callable[[], Outcome], Callable[[pytest.MonkeyPatch], None]]] = [
    (verification.parameter_counts, wrong_preset),
    (verification.parameter_counts, wrong_cost_model),
    (verification.initial_loss, initialisation_ten_times_too_wide),
    (verification.causality, mask_that_shows_the_next_token),
    (verification.causality, shortcut_that_shows_everything),
    (verification.causality, model_that_does_not_read),
    (verification.cached_prefill, cache_that_shifts_positions),
    (verification.cached_prefill, cache_that_forgets_the_first_value),
    (verification.kernels_agree, kernel_with_a_wrong_scale),
    (verification.kernels_agree, kernel_with_a_wrong_gradient),
    (verification.kernels_agree, kernel_that_ignores_documents),
    (verification.ragged_batch, padding_that_counts_as_text),
    (verification.ragged_batch, cache_that_shifts_positions),
    (verification.overfit, logits_that_saturate),
    (verification.sampled_frequencies, temperature_without_effect),
    (verification.sampled_frequencies, top_p_without_effect),
    (verification.sampled_frequencies, draws_off_by_one),
    (verification.tokenizer_answers, tokenizer_with_two_ids_swapped),
    (verification.tokenizer_answers, tokenizer_that_drops_spaces_at_the_end),
    (verification.saved_and_loaded, saving_that_drops_precision),
    (verification.saved_and_loaded, saving_that_loses_the_configuration),
]


@pytest.mark.parametrize(("check", "sabotage"), SABOTAGE, ids=[f"{c.__name__}-{s.__name__}" for c, s in SABOTAGE])
def test_a_broken_part_fails_its_row(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[], Outcome], sabotage: Callable[[pytest.MonkeyPatch], None]
) -> None:
    sabotage(monkeypatch)
    result = result_of(check)
    assert not result.passed, f"{sabotage.__name__} went unnoticed: {verification.line(result)}"
    assert verification.line(result).startswith("FAIL  ")


def test_every_check_has_its_sabotage() -> None:
    assert {check.__name__ for check in verification.OFFLINE} - {POCKET} == {check.__name__ for check, _ in SABOTAGE}


def test_the_small_stand_in_for_the_initial_loss_is_not_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    small_gpt2(monkeypatch)
    assert result_of(verification.initial_loss).passed


# --- bits per byte, and the rows for original weights ---------------------------------------------------------


def uniform_model() -> gptlab.LanguageModel:
    model = gptlab.GPT(gptlab.ModelConfig.preset("tiny", vocab_size=257)).eval()
    with torch.no_grad():
        model.wte.weight.zero_()  # the tied head with it: every token is equally likely
    return gptlab.LanguageModel(model, byte_tokenizer())


@pytest.mark.parametrize("text", ["a", "x" * 64, "x" * 65, "é" * 100])
def test_a_model_that_knows_nothing_needs_the_bits_of_a_die(text: str) -> None:
    assert verification.bits_per_byte(uniform_model(), text) == pytest.approx(math.log2(257), rel=1e-6)


def test_every_token_of_the_text_counts_once() -> None:
    lm = tiny_lm()
    lm.model.eval()
    text = "The quick brown fox jumps over the lazy dog, and again, and again, and once more after that."
    ids = lm.needs_tokenizer().encode(text)
    nats = 0.0
    for t in range(len(ids)):
        context = [256, *ids[t // 64 * 64 : t]]  # windows of the context's 64, each after an end of text
        nats -= lm.model(torch.tensor([context]))[0, -1].detach().double().log_softmax(-1)[ids[t]].item()
    assert verification.bits_per_byte(lm, text) == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)


def test_the_known_text_is_a_page_of_english() -> None:
    text = verification.known_text()
    assert len(text.split()) > 200
    assert GPT2Tokenizer().decode(GPT2Tokenizer().encode(text)) == text


def test_the_count_of_original_weights() -> None:
    with torch.device("meta"):
        right = gptlab.LanguageModel(gptlab.GPT(gptlab.ModelConfig.preset("gpt2")))
        wrong = gptlab.LanguageModel(gptlab.GPT(gptlab.ModelConfig.preset("gpt2", vocab_size=50256)))
    assert result_of(lambda: verification.original_count("gpt2", right)).passed
    assert not result_of(lambda: verification.original_count("gpt2", wrong)).passed
    assert not result_of(lambda: verification.original_count("gpt2-xl", right)).passed


def test_nonsense_fails_the_rows_of_original_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "known_text", lambda: "A short text will do for a model that knows nothing.")
    for check in (verification.original_greedy, verification.original_prediction, verification.original_loss):
        assert not result_of(lambda check=check: check(uniform_model())).passed


@pytest.mark.parametrize(("last", "passes"), [(verification.THE_DOG[-1], True), (verification.THE_DOG[-1] + 1, False)])
def test_the_known_greedy_ids_are_what_the_row_asks_for(
    monkeypatch: pytest.MonkeyPatch, last: int, passes: bool
) -> None:
    lm = gptlab.LanguageModel(gptlab.GPT(gptlab.ModelConfig.preset("tiny", vocab_size=50257)), GPT2Tokenizer())

    def rigged(prompts: Any, continuations: Any, sampling: Any, max_new_tokens: int) -> Iterator[tuple[int, str]]:
        assert (prompts, sampling.temperature, max_new_tokens) == (["The dog"], 0, 18)
        for token in [*verification.THE_DOG[2:-1], last]:
            yield 0, continuations[0].add(token)

    monkeypatch.setattr(lm, "continue_all", rigged)
    assert result_of(lambda: verification.original_greedy(lm)).passed == passes
