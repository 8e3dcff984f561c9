"""Reading, taking out and putting in, against transformers and against models whose weights are zeroed."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from helpers.inspected import LENGTH, OTHERS, Theirs, every, inspected, text
from helpers.models import close, same_state
from torch import Tensor

from gptlab import GPT, GptlabError
from gptlab.inspecting import ablated, attention_maps, patched, sites, token_losses, trace
from gptlab.model.quantised import quantise_model


def hooks(model: GPT) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def logits(model: GPT, ids: Tensor) -> Tensor:
    return model(ids[None])[0]


def test_a_trace_is_what_transformers_computes(known: tuple[GPT, Tensor, Theirs]) -> None:
    model, ids, theirs = known
    seen = trace(model, ids, sites(model.config))
    assert seen.keys() == theirs.inside.keys()
    for site, x in seen.items():
        assert x.dtype == torch.float32
        close(x, theirs.inside[site], 2e-5)
    assert torch.equal(trace(model, ids, ["head.1.3"])["head.1.3"], seen["heads.1"][:, 3])
    assert hooks(model) == 0


@every
def test_the_parts_of_the_residual_stream_add_up(changes: dict[str, Any]) -> None:
    model, ids = inspected(**changes), text()
    seen = trace(model, ids, sites(model.config))
    for i in range(3):
        close(seen[f"residual.{i}"] + seen[f"attention.{i}"] + seen[f"mlp.{i}"], seen[f"residual.{i + 1}"], 1e-5)


@every
def test_a_head_that_is_out_is_one_whose_output_columns_are_zero(changes: dict[str, Any]) -> None:
    model, ids = inspected(**changes), text()
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for layer, head in ((0, 1), (2, 3), (2, 0)):
            zeroed.blocks[layer].attn.c_proj.weight[:, head * 8 : head * 8 + 8] = 0
        for part in (zeroed.blocks[1].attn, zeroed.blocks[0].mlp):
            part.c_proj.weight.zero_()
            if part.c_proj.bias is not None:
                part.c_proj.bias.zero_()
    before, state = logits(model, ids), copy.deepcopy(model)
    with ablated(model, heads=[(0, 1), (2, 3), (2, 0)], attention=[1], mlps=[0]):
        out = logits(model, ids)
        assert torch.equal(trace(model, ids, ["head.2.3"])["head.2.3"], torch.zeros(LENGTH, 8))
    close(out, logits(zeroed, ids), 2e-5)
    assert (out - before).abs().max() > 0.1
    assert torch.equal(logits(model, ids), before)
    assert same_state(model, state)
    assert hooks(model) == 0


@pytest.mark.parametrize("changes", list(OTHERS.values())[:2], ids=list(OTHERS)[:2])
def test_hidden_sinks_are_those_of_a_model_without(changes: dict[str, Any]) -> None:
    model, ids = inspected(**changes), text()
    without = GPT(dataclasses.replace(model.config, sinks=0)).eval()
    without.load_state_dict(model.state_dict())
    before = logits(model, ids)
    with ablated(model, sinks=True):
        close(logits(model, ids), logits(without, ids))
        close(attention_maps(model, ids), attention_maps(without, ids))
        cache = model.make_cache(1, LENGTH, chunk=4)
        with torch.no_grad():
            cached = torch.cat([model(part[None], cache=cache)[0] for part in ids.split(4)])
        close(cached, logits(without, ids), 2e-5)
    assert (logits(without, ids) - before).abs().max() > 0.1
    assert torch.equal(logits(model, ids), before)


def test_the_mean_of_a_text_in_place_of_what_is_taken_out() -> None:
    model, ids = inspected(n_kv_head=2, position="rope"), text()
    other = text(20, seed=5)
    means = {site: x.mean(0) for site, x in trace(model, other, ["heads.1", "mlp.0", "attention.2"]).items()}
    with ablated(model, heads=[(1, 2)], attention=[2], mlps=[0], by="mean", over=other):
        seen = trace(model, ids, ["head.1.2", "head.1.1", "mlp.0", "attention.2"])
    close(seen["head.1.2"], means["heads.1"][2].expand(LENGTH, -1))
    close(seen["mlp.0"], means["mlp.0"].expand(LENGTH, -1))
    close(seen["attention.2"], means["attention.2"].expand(LENGTH, -1))
    assert seen["head.1.1"].std(0).min() > 0


@every
def test_what_another_run_computed_carries_its_answer_over(changes: dict[str, Any]) -> None:
    model, one, other = inspected(**changes), text(seed=1), text(seed=2)
    wanted = logits(model, other)
    for layer in range(4):
        with patched(model, trace(model, other, [f"residual.{layer}"])):
            close(logits(model, one), wanted)
    parts = trace(model, other, ["residual.0", "heads.0", "mlp.0"])
    with patched(model, parts):
        close(logits(model, one), wanted)
    with patched(model, {"residual.3": trace(model, other, ["residual.3"])["residual.3"]}, tokens=[7, 30]):
        mixed = logits(model, one)
    own = logits(model, one)
    same = torch.ones(LENGTH, dtype=torch.bool)
    same[[7, 30]] = False
    close(mixed[~same], wanted[~same])
    assert torch.equal(mixed[same], own[same])
    assert hooks(model) == 0


def test_one_head_is_patched_and_its_neighbours_are_not() -> None:
    model, one, other = inspected(), text(seed=1), text(seed=2)
    put = trace(model, other, ["head.0.2"])
    own, theirs = (trace(model, ids, ["heads.0"])["heads.0"] for ids in (one, other))
    with patched(model, put):
        seen = trace(model, one, ["heads.0"])["heads.0"]
    assert torch.equal(seen[:, 2], theirs[:, 2])
    assert torch.equal(seen[:, [0, 1, 3]], own[:, [0, 1, 3]])


@pytest.mark.parametrize("how", ["ablated", "patched"])
def test_everything_is_restored_after_an_error(how: str) -> None:
    model, ids = inspected(window=6, sinks=2), text()
    before = logits(model, ids)
    if how == "ablated":
        changed = ablated(model, heads=[(0, 0)], attention=[1], mlps=[2], sinks=True)
    else:
        changed = patched(model, trace(model, text(seed=4), sites(model.config)))

    def fail() -> None:
        assert hooks(model)
        assert not torch.equal(logits(model, ids), before)
        raise GptlabError("in the block")

    with pytest.raises(GptlabError, match="in the block"), changed:
        fail()
    with pytest.raises(GptlabError, match="mean"), ablated(model, heads=[(0, 0)], by="mean"):
        pass
    assert hooks(model) == 0
    assert torch.equal(logits(model, ids), before)


def test_dropout_is_off_and_the_mode_stays() -> None:
    model, ids = inspected(dropout=0.5), text()
    expected = token_losses(model, ids)
    model.train()
    model.blocks[1].eval()
    assert torch.equal(token_losses(model, ids), expected)
    assert model.training
    assert model.blocks[0].mlp.training
    assert not model.blocks[1].mlp.training


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_looked_into_alike(bits: Any) -> None:
    model, ids = inspected(position="rope", n_kv_head=2), text()
    quantise_model(model, bits)
    before = logits(model, ids)
    seen = trace(model, ids, sites(model.config))
    close(seen["residual.0"] + seen["attention.0"] + seen["mlp.0"], seen["residual.1"], 1e-5)
    with ablated(model, heads=[(1, 2)]):
        assert (logits(model, ids) - before).abs().max() > 0.1
    assert torch.equal(logits(model, ids), before)


def test_half_precision_gives_float32() -> None:
    model, ids = inspected(position="rope", n_kv_head=2).bfloat16(), text()
    seen = trace(model, ids, sites(model.config))
    assert {x.dtype for x in seen.values()} == {torch.float32}
    with patched(model, seen):
        assert torch.equal(logits(model, ids), logits(model, ids))


REFUSED = {
    "residul.0": "'residul.0' is not a site \\(did you mean 'residual'",
    "mlp": "is not a site; sites are",
    "mlp.3": "no layer 3; here it must be 0 to 2",
    "head.0.4": "no head 4; here it must be 0 to 3",
    "head.0": "is not a site",
    "residual.4": "0 to 3",
}


@pytest.mark.parametrize("site", REFUSED)
def test_places_that_are_not_there(site: str) -> None:
    with pytest.raises(GptlabError, match=REFUSED[site]):
        trace(inspected(), text(), [site])


def test_what_cannot_be_done_is_said() -> None:
    model, ids = inspected(), text()
    wide = pytest.raises(GptlabError, match=r"must be given \(T, 32\), got shape \(40, 8\)")
    with wide, patched(model, {"mlp.0": torch.zeros(40, 8)}):
        pass
    with patched(model, {"mlp.0": torch.zeros(12, 32)}), pytest.raises(GptlabError, match="holds 12 tokens and the"):
        token_losses(model, ids)
    with (
        pytest.raises(GptlabError, match="0 to 11, got 12"),
        patched(model, {"mlp.0": torch.zeros(12, 32)}, tokens=[12]),
    ):
        pass
    for wrong, words in (
        ({"heads": [(3, 0)]}, "layer must be 0 to 2, got 3"),
        ({"heads": [(0, 4)]}, "head must be 0 to 3, got 4"),
        ({"mlps": [-1]}, "layer must be 0 to 2, got -1"),
        ({"sinks": True}, "no sinks"),
        ({"by": "median"}, "zero or mean"),
        ({"over": ids}, "go together"),
    ):
        with pytest.raises(GptlabError, match=words), ablated(model, **wrong):  # type: ignore[arg-type]
            pass
    with pytest.raises(GptlabError, match="no kind of site 'mlps'"):
        sites(model.config, "mlps")
    with pytest.raises(GptlabError, match="tokens of one text"):
        trace(model, ids[None], ["mlp.0"])
    assert hooks(model) == 0
