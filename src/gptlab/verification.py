"""The program proves itself: `gptlab verify`.

Each check computes something whose right answer is known from mathematics, from a publication, or from a
slower and more obvious way to compute it, and says what it found.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab import checkpoints, language_model
from gptlab.checkpoints import hub
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.evaluation.protocol import Protocol
from gptlab.evaluation.tasks import TASKS, evaluate
from gptlab.generation.padded import pad_left
from gptlab.generation.sampling import Sampling, draw, probabilities
from gptlab.language_model import LanguageModel
from gptlab.model import GPT, cost, kernels
from gptlab.text.tokenizers import GPT2Tokenizer, byte_tokenizer

PUBLISHED = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
"""Parameters of OpenAI's released models."""

THE_DOG = [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]
"""The original 124M, greedy from "The dog" (two tokens), as other implementations give it."""


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        name: what was checked.
        found: what came out, in words.
        expected: what had to come out, in words.
        passed: whether it did.
        seconds: how long the check took.
    """

    name: str
    found: str
    expected: str
    passed: bool
    seconds: float


Check = Callable[[], Result]


def checks(
    model: str | None = None, path: Path | None = None, scores: bool = False, data: Mapping[str, Path] | None = None
) -> Iterator[Check]:
    """Yield the checks that need nothing but the package, or those of original weights.

    Args:
        model: None, or one of the four original models.
        path: where its weights are; None looks for them as `load` does.
        scores: of the 124M also the scores that others published, each by its protocol: hours on a CPU.
        data: files for those by name of data set; others are looked for as `gptlab evaluate` does.

    Raises:
        GptlabError: not one of the four, its weights cannot be had, or what lies there is of another architecture.
    """
    if model is None:
        if path is not None or scores:
            raise GptlabError(
                "--path and --scores apply to original weights; name the model too: gptlab verify gpt2 --path DIR"
            )
        yield from map(_timed, OFFLINE)
        return
    if model not in hub.ORIGINALS:
        raise GptlabError(f"only the original models can be verified: {', '.join(hub.ORIGINALS)}; got {model!r}")
    directory = hub.locate(model if path is None else str(path.absolute()))
    _refuse_others(model, directory)
    lm = language_model.load(directory, dtype="float32")
    if lm.tokenizer is None or lm.tokenizer.vocab_size != lm.config.vocab_size:
        lm.tokenizer = GPT2Tokenizer()
    yield _timed(lambda: original_count(model, lm))
    if model == "gpt2":
        yield _timed(lambda: original_greedy(lm))
    yield _timed(lambda: original_prediction(lm))
    yield _timed(lambda: original_loss(lm))
    if scores:
        if model != "gpt2":
            raise GptlabError(f"the published scores are those of gpt2 (124M), not of {model}; leave --scores out")
        for protocol in TASKS.values():
            if protocol.original:
                yield _timed(functools.partial(published_scores, lm, protocol, data))


def _refuse_others(model: str, directory: Path) -> None:
    """Raise GptlabError where a model is not of the architecture of an original, before any weight is read."""
    config, wanted = checkpoints.read_config(directory).to_dict(), ModelConfig.preset(model).to_dict()
    differ = [name for name in wanted if config.get(name) != wanted[name] and name != "dropout"]
    if differ:
        some = "; ".join(f"{name} is {config.get(name)}, not {wanted[name]}" for name in differ[:4])
        more = f"; and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise GptlabError(f"{directory} holds a model other than {model}: {some}{more}; verify {model}'s own weights")


SCORE_BOUNDS = {"accuracy": 0.005, "perplexity": 0.01}
"""How far a score may be from the published one: accuracies absolutely, perplexities relatively."""


def published_scores(lm: LanguageModel, protocol: Protocol, data: Mapping[str, Path] | None) -> Outcome:
    """Measure the original 124M by a protocol and compare with what others obtained under the same."""
    expected = "; ".join(f"{name} {value:g}" for name, value in protocol.original.items())
    try:
        metrics = evaluate(lm.model, lm.needs_tokenizer(), protocol.name, data=data).metrics
    except GptlabError as error:
        return protocol.name, f"not measured: {error}", expected, False
    close = all(
        abs(metrics[name] - value) <= SCORE_BOUNDS["perplexity"] * value
        if "perplexity" in name
        else abs(metrics[name] - value) <= SCORE_BOUNDS["accuracy"]
        for name, value in protocol.original.items()
    )
    return protocol.name, "; ".join(f"{name} {metrics[name]:.4g}" for name in protocol.original), expected, close


def line(result: Result) -> str:
    """Return one line of the table as text."""
    verdict = "PASS" if result.passed else "FAIL"
    return f"{verdict}  {result.name:<47}  {result.found}  (expected: {result.expected})"


def setting() -> dict[str, Any]:
    """Return what the figures depend on: versions, processor architecture, threads."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


Outcome = tuple[str, str, str, bool]


def _timed(check: Callable[[], Outcome]) -> Check:
    def run() -> Result:
        started = time.perf_counter()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            outcome = check()
        return Result(*outcome, seconds=time.perf_counter() - started)

    return run


def _small(**overrides: Any) -> GPT:
    """A model small enough to check in a moment, with weights large enough for errors to show."""
    model = GPT(ModelConfig.preset("tiny", **overrides), seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"position": "rope"},
    {"n_kv_head": 2},
    {"window": 9},
    {"position": "rope", "n_kv_head": 2, "window": [9, 5], "sinks": 2, "dilation": [1, 2]},
    {"position": "rope", "n_kv_head": 2, "norm": "rms", "mlp": "swiglu", "bias": False},
)
"""Plain GPT-2, each change alone, everything at once, and Llama."""


def _ids(model: GPT, batch: int, length: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (batch, length))


def parameter_counts() -> Outcome:
    """Count the real modules of all presets."""
    counted: dict[str, int] = {}
    for name in PUBLISHED:
        config = ModelConfig.preset(name)
        with torch.device("meta"):
            counted[name] = sum(p.numel() for p in GPT(config).parameters())
        if counted[name] != sum(cost.parameters(config).values()):
            return f"{name}: cost model", "-", "the counts of the modules", False
    totals = ", ".join(f"{n:,}" for n in counted.values())
    return "parameters of GPT-2's four sizes", totals, "as published", counted == PUBLISHED


def initial_loss() -> Outcome:
    """An untrained model must be as unsure as a die with V sides."""
    model = GPT(ModelConfig.preset("gpt2")).eval()
    ids = _ids(model, 1, 129)
    with torch.inference_mode():
        loss = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:]).item()
    even = math.log(model.config.vocab_size)
    return (
        "loss of GPT-2 124M before training",
        f"{loss:.3f} nats",
        f"ln V = {even:.3f} within 0.2",
        abs(loss - even) < 0.2,
    )


@torch.inference_mode()
def causality() -> Outcome:
    """Change each token in turn; nothing before it may move."""
    leak, effect = 0.0, math.inf
    for variant in VARIANTS:
        model = _small(**variant)
        ids = _ids(model, 1, 32)
        before = model(ids)
        for t in range(ids.shape[1]):
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 1) % model.config.vocab_size
            moved = (model(changed) - before).abs().amax(-1)[0]  # (T,)
            leak = max(leak, moved[:t].max().item() if t else 0.0)
            effect = min(effect, moved[t].item())
    name = "changing token t moves no logit before t"
    return name, f"{leak:.1e} before, at least {effect:.1e} at t", "0 before, more at t", leak == 0.0 and effect > 1e-3


@torch.inference_mode()
def cached_prefill() -> Outcome:
    """Whole, in chunks of several sizes, and token by token; the rings of windows wrap several times."""
    worst = 0.0
    for variant in VARIANTS:
        model = _small(**variant)
        ids = _ids(model, 2, 48)
        whole = model(ids)
        for sizes in ([48], [16] * 3, [1, 30, 17], [1] * 48):
            cache = model.make_cache(2, 48, chunk=max(sizes))
            parts = [model(chunk, cache=cache) for chunk in ids.split(sizes, dim=1)]
            worst = max(worst, (torch.cat(parts, 1) - whole).abs().max().item())
    return "with a cache == without (whole, chunks, tokens)", f"{worst:.1e} apart", "below 1e-5", worst < 1e-5


def kernels_agree() -> Outcome:
    """Every kernel against the explicit softmax: logits and gradients, with and without several documents."""
    worst = 0.0
    for variant in VARIANTS:
        model = _small(**variant)
        ids = _ids(model, 2, 48)
        documents = torch.arange(48).expand(2, 48) // 20

        def run(kernel: str, model: GPT = model, ids: Tensor = ids, documents: Tensor = documents) -> list[Tensor]:
            out = []
            with kernels.use(kernel):
                for d in (None, documents):
                    model.zero_grad()
                    logits = model(ids, documents=d)
                    logits.logsumexp(-1).mean().backward()
                    out += [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            return out

        expected = run("reference")
        for name in ["sdpa", "banded"] if "window" in variant else ["sdpa"]:
            pairs = zip(run(name), expected, strict=True)
            worst = max(worst, *((a - b).abs().max().item() for a, b in pairs))
    return "fast attention == the explicit softmax", f"{worst:.1e} apart", "logits, gradients below 1e-5", worst < 1e-5


@torch.inference_mode()
def ragged_batch() -> Outcome:
    """Prompts of different lengths in one padded batch against each alone, with a cache, over several steps."""
    worst = 0.0
    for variant in VARIANTS:
        model = _small(**variant)
        prompts = [_ids(model, 1, n)[0].tolist() for n in (1, 7, 20)]
        more = _ids(model, 3, 5)
        ids, positions = pad_left(prompts, torch.device("cpu"))
        cache = model.make_cache(3, 25)
        model(ids, positions=positions, cache=cache)
        together = torch.cat([model(more[:, i : i + 1], cache=cache) for i in range(5)], 1)
        for row, prompt in enumerate(prompts):
            alone = model(torch.tensor([prompt + more[row].tolist()]))[0, -5:]
            worst = max(worst, (together[row] - alone).abs().max().item())
    return "a padded batch == each row alone", f"{worst:.1e} apart", "below 1e-5", worst < 1e-5


def overfit() -> Outcome:
    """Learning works when one batch can be learned by heart."""
    model = GPT(ModelConfig.preset("tiny"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = _ids(model, 4, 33)
    first = last = math.nan
    for step in range(150):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    return "one batch learned by heart, 150 steps", f"{first:.2f} -> {last:.3f} nats", "below 0.1", last < 0.1


def tokenizer_answers() -> Outcome:
    """Ids that OpenAI's encoder gives, and texts that must survive the way there and back."""
    tokenizer = GPT2Tokenizer()
    known = {"Hello, my name is": [15496, 11, 616, 1438, 318], "The dog": THE_DOG[:2]}
    right = all(tokenizer.encode(text) == ids for text, ids in known.items())
    hard = "naïve café\n\n\t 你好 🙂👩‍👩‍👧 I'll we'VE <|endoftext|> \x00 e\u0301  end  "
    for t in (tokenizer, byte_tokenizer()):
        right = right and t.decode(t.encode(hard)) == hard
    answers = (
        f"{known['Hello, my name is']} and {len(tokenizer.encode(hard))} tokens of Unicode" if right else "other ids"
    )
    return "GPT-2's tokenizer", answers, "known ids, same text back", right


@torch.inference_mode()
def saved_and_loaded() -> Outcome:
    """A saved model must come back bit for bit."""
    lm = LanguageModel(_small(vocab_size=257), byte_tokenizer())
    ids = _ids(lm.model, 1, 16)
    with tempfile.TemporaryDirectory() as directory:
        language_model.save(lm, directory)
        again = language_model.load(directory, dtype="float32")
    same = torch.equal(lm.model(ids), again.model(ids)) and again.config == lm.config
    return "saved and loaded again", "identical logits" if same else "different", "identical logits", same


def sampled_frequencies() -> Outcome:
    """Draws must follow the distribution that temperature, top-k and top-p leave."""
    n = 20_000
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0])
    weights = probabilities(logits[None], Sampling(temperature=0.8, top_k=5, top_p=0.9))
    counts = torch.bincount(draw(weights.expand(n, -1), torch.rand(n, dtype=torch.float64)), minlength=6)
    # By hand: softmax over the best five at 0.8, of which the best four are the first to reach 0.9.
    kept = torch.softmax(logits[:5].double() / 0.8, 0)[:4]
    wanted = torch.cat([kept / kept.sum(), torch.zeros(2)])
    worst = (counts / n - wanted).abs().max().item()
    return "sampled frequencies, 20,000 draws", f"off by {worst:.4f}", "at most 0.015", worst < 0.015


def pocket_bits_per_byte() -> Outcome:
    """The built-in model on a text that the package carries, against the figure noted when it was trained."""
    lm = language_model.load("pocket")
    noted = json.loads((hub.built_in()["pocket"] / "card.json").read_text())["known_text_bits_per_byte"]
    bits = bits_per_byte(lm, known_text())
    return (
        "built-in model on a known text",
        f"{bits:.4f} bits per byte",
        f"{noted:.4f} within 0.002",
        abs(bits - noted) < 0.002,
    )


def known_text() -> str:
    """A page of English written for this check; no model was trained on it."""
    return (importlib.resources.files("gptlab") / "assets" / "known_text.txt").read_text(encoding="utf-8")


@torch.inference_mode()
def bits_per_byte(lm: LanguageModel, text: str) -> float:
    """Return the bits that ``lm`` needs for each UTF-8 byte of ``text``, in windows that do not overlap.

    Each window starts from the end-of-text token, so that every token of the text is predicted.
    """
    tokenizer = lm.needs_tokenizer()
    ids = torch.tensor(tokenizer.encode(text))
    start = torch.tensor([tokenizer.end_of_text])
    nats = 0.0
    for window in ids.split(lm.config.context_length):
        logits = lm.model(torch.cat([start, window[:-1]])[None])[0]
        nats += F.cross_entropy(logits, window, reduction="sum").item()
    return nats / math.log(2) / len(text.encode())


def original_count(name: str, lm: LanguageModel) -> Outcome:
    """The weights that were loaded, counted."""
    n = sum(p.numel() for p in lm.model.parameters())
    return f"parameters of {name}", f"{n:,}", f"{PUBLISHED[name]:,}", n == PUBLISHED[name]


@torch.inference_mode()
def original_greedy(lm: LanguageModel) -> Outcome:
    """The known greedy continuation of "The dog", through the cache."""
    continuations = lm.new_continuations(1)
    for _ in lm.continue_all(["The dog"], continuations, Sampling(temperature=0), len(THE_DOG) - 2):
        pass
    text = repr("The dog" + continuations[0].text)
    return (
        "greedy continuation of 'The dog'",
        text,
        "the known 20 ids",
        THE_DOG[:2] + continuations[0].tokens == THE_DOG,
    )


@torch.inference_mode()
def original_prediction(lm: LanguageModel) -> Outcome:
    """What the model thinks comes next."""
    prompt, wanted = "The Eiffel Tower is located in the city of", " Paris"
    tokenizer = lm.needs_tokenizer()
    chances = lm.model(torch.tensor([tokenizer.encode(prompt)]))[0, -1].softmax(-1)
    best = chances.topk(5)
    words = [tokenizer.decode([i]) for i in best.indices.tolist()]
    guesses = ", ".join(f"{w!r} {p:.0%}" for w, p in zip(words, best.values.tolist(), strict=True))
    return f"next word of {prompt!r}", guesses, f"{wanted!r} among the five", wanted in words


def original_loss(lm: LanguageModel) -> Outcome:
    """Trained weights in the wrong place give nonsense; bits per byte on English say so at once."""
    bits, text = bits_per_byte(lm, known_text()), known_text()
    n_tokens = len(lm.needs_tokenizer().encode(text))
    chance = n_tokens * math.log2(lm.config.vocab_size) / len(text.encode())
    return "bits per byte on a known text", f"{bits:.3f}", f"below 1.3 (by chance: {chance:.2f})", bits < 1.3


OFFLINE: tuple[Callable[[], Outcome], ...] = (
    parameter_counts,
    initial_loss,
    causality,
    cached_prefill,
    kernels_agree,
    ragged_batch,
    overfit,
    sampled_frequencies,
    tokenizer_answers,
    saved_and_loaded,
    pocket_bits_per_byte,
)
