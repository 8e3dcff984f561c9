# EleutherAI's harness gives our model the scores that it gives `transformers` with the same weights.
from __future__ import annotations

import importlib.resources
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gptlab
from gptlab import GptlabError
from gptlab.checkpoints.huggingface.gpt2 import CONV1D

TEXT = (importlib.resources.files("gptlab") / "assets" / "known_text.txt").read_text(encoding="utf-8")
WORDS = TEXT.split(" ")
TASKS = ["local_choice", "local_last_word", "local_text", "local_answer"]

needs_harness = pytest.mark.usefixtures("harness")


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        yield pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'gptlab[eval]'")


def passage(start: int, n: int) -> str:
    return " ".join((WORDS * 4)[start : start + n])


CHOICES: list[dict[str, Any]] = [
    # One token each, so that all answers share one input; then answers of several lengths.
    *(
        {"question": passage(7 * i, 20 + i), "choices": [" the", " a", " ship", " of"], "answer": i % 4}
        for i in range(8)
    ),
    *(
        {"question": passage(11 * i, 9), "choices": [passage(5 * i + j, 3 + j) for j in range(3)], "answer": 1}
        for i in range(6)
    ),
    {"question": "", "choices": ["A lighthouse", "Of the sea", "<|endoftext|>A tower"], "answer": 0},
    {"question": "A light in the night   ", "choices": ["of the sea", "and the coast"], "answer": 1},
    {"question": "Der Leuchtturm — ein Licht 🌊", "choices": [" über", " 海"], "answer": 0},
    {"question": "The end.<|endoftext|>The", "choices": [" sea", " beginning"], "answer": 1},
    # More than the window holds: 512 tokens.
    {"question": passage(0, 900), "choices": [" the", " of the ships"], "answer": 0},
]
LINES: dict[str, list[dict[str, Any]]] = {
    "local_choice": CHOICES,
    "local_last_word": [{"text": passage(13 * i, 15 + 5 * i)} for i in range(12)],
    # A single token, less than a window, two windows and three, an end of text within.
    "local_text": [
        {"text": text} for text in ("A", TEXT[:900], TEXT, f"{TEXT}\n{TEXT}", f"One.<|endoftext|>{TEXT[:200]}")
    ],
    "local_answer": [{"text": passage(17 * i, n), "answer": "the"} for i, n in enumerate((1, 5, 9, 14, 30, 60, 700))],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "local_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", ". "], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of four local tasks; YAML holds JSON too."""
    directory = tmp_path_factory.mktemp("tasks")
    for name, settings in SETTINGS.items():
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in LINES[name]), encoding="utf-8")
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (directory / f"{name}.yaml").write_text(json.dumps({**common, "test_split": "test", **settings}))
    return directory


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model as `transformers` reads it."""
    import transformers

    directory = tmp_path_factory.mktemp("pocket-hf")
    lm = gptlab.load("pocket")
    assert lm.tokenizer is not None
    c, end = lm.config, lm.tokenizer.end_of_text
    transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.context_length,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        bos_token_id=end,
        eos_token_id=end,
        architectures=["GPT2LMHeadModel"],
    ).save_pretrained(directory)
    state = {name: p.detach().T if CONV1D.fullmatch(name) else p.detach() for name, p in lm.model.named_parameters()}
    save_file(
        {f"transformer.{name}": p.contiguous() for name, p in state.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    for name, content in lm.tokenizer.files().items():
        (directory / name).write_bytes(content)
    return directory


def evaluate(
    tasks: Path, model: str, arguments: dict[str, Any], names: list[str] = TASKS, **more: Any
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from gptlab.harness import adapter

    adapter.register()
    evaluated = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        **{"bootstrap_iters": 0, **more},
    )
    assert evaluated is not None
    return evaluated


def answers(evaluated: dict[str, Any], task: str) -> list[Any]:
    """What the model answered to every request, in order."""
    samples = sorted(evaluated["samples"][task], key=lambda sample: sample["doc_id"])
    assert [sample["doc_id"] for sample in samples] == list(range(len(LINES[task])))
    return [answer for sample in samples for request in sample["resps"] for answer in request]


@pytest.fixture(scope="module")
def expected(harness: Any, tasks: Path, theirs: Path) -> dict[str, Any]:
    return evaluate(tasks, "hf", {"pretrained": str(theirs), "dtype": "float32"}, batch_size=3)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_scores_are_those_of_the_backend_for_hugging_face_models(
    expected: dict[str, Any], tasks: Path, batch_size: int | str
) -> None:
    actual = evaluate(tasks, "gptlab", {"path": "pocket"}, batch_size=batch_size)
    for task in TASKS:
        ours, other = answers(actual, task), answers(expected, task)
        assert len(ours) == len(other) >= len(LINES[task])
        for one, two in zip(ours, other, strict=True):
            if task == "local_answer":
                assert one == two
            elif task == "local_text":
                assert one == pytest.approx(two, rel=1e-6)
            else:
                assert one[0] == pytest.approx(two[0], abs=1e-4)
                assert one[1] == two[1]
        metrics = actual["results"][task], expected["results"][task]
        assert metrics[0].keys() == metrics[1].keys()
        for name, value in metrics[1].items():
            exact = isinstance(value, str) or name.startswith(("acc", "exact"))
            assert metrics[0][name] == (value if exact else pytest.approx(value, rel=1e-5)), name
    # The tasks were able to tell.
    assert 0 < actual["results"]["local_choice"]["acc,none"] < 1
    assert {greedy for _, greedy in answers(actual, "local_choice")} == {True, False}
    assert len(set(answers(actual, "local_answer"))) > 4
    assert actual["config"]["model_num_parameters"] == sum(p.numel() for p in gptlab.load("pocket").model.parameters())


@pytest.mark.slow
def test_window_and_prefix_can_be_chosen(harness: Any, tasks: Path, theirs: Path) -> None:
    chosen = {"max_length": 100, "prefix_token_id": 11}
    texts = ["local_text", "local_choice"]
    actual = evaluate(tasks, "gptlab", {"path": "pocket", **chosen}, texts, batch_size=2)
    other = evaluate(tasks, "hf", {"pretrained": str(theirs), "dtype": "float32", **chosen}, texts, batch_size=2)
    for task in texts:
        ours, expected = (torch.tensor(answers(one, task), dtype=torch.float64) for one in (actual, other))
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.slow
def test_the_command_line(harness: Any, expected: dict[str, Any], tasks: Path, tmp_path: Path) -> None:
    model = ["--model", "gptlab", "--model_args", "path=pocket,dtype=float32", "--device", "cpu"]
    what = ["--tasks", "local_last_word", "--include_path", str(tasks), "--output_path", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, "-m", "gptlab.harness", *model, *what], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "local_last_word" in run.stdout
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]["local_last_word"]
    theirs = expected["results"]["local_last_word"]
    assert results["acc,none"] == theirs["acc,none"]
    assert results["perplexity,none"] == pytest.approx(theirs["perplexity,none"], rel=1e-5)


@pytest.mark.slow
def test_scores_over_http_are_those_in_process(harness: Any, tasks: Path) -> None:
    pytest.importorskip("tenacity", reason="lm-eval's clients need it: pip install 'gptlab[eval]'")
    from helpers.serving import serving

    with serving(gptlab.load("pocket"), "pocket") as server:
        # It sends at most max_length - 1 tokens and asks for one more.
        arguments = {"model": "pocket", "base_url": f"{server.url}/v1/completions", "max_length": 513}
        remote = evaluate(tasks, "local-completions", {**arguments, "num_concurrent": 4})
    scored = evaluate(tasks, "gptlab", {"path": "pocket", "max_length": 511}, TASKS[:3])
    written = evaluate(tasks, "gptlab", {"path": "pocket", "max_length": 512}, TASKS[3:])
    for task in TASKS:
        local = written if task == "local_answer" else scored
        assert answers(remote, task) == answers(local, task)
        assert remote["results"][task] == local["results"][task]


@pytest.mark.slow
def test_a_user_error_on_the_command_line_is_one_sentence(
    harness: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gptlab.harness.__main__ import main

    arguments = ["--model", "gptlab", "--model_args", "pretrained=pocket", "--tasks", "local_text"]
    monkeypatch.setattr(sys, "argv", ["harness", *arguments, "--include_path", str(tasks)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("gptlab: --model gptlab takes no 'pretrained'")


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "needs the model's name or directory"),
        ({"path": "pocket", "max_lenght": 3}, r"takes no 'max_lenght' \(did you mean 'max_length'\?\)"),
        ({"path": "pocket", "dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
        ({"path": "pocket", "max_length": 513}, "512 learned positions"),
        ({"path": "pocket", "batch_size": 0}, "batch_size must be a whole number of at least 1, or auto, got 0"),
        ({"path": "no/such/directory"}, "no/such/directory"),
    ],
)
def test_wrong_arguments_are_refused_in_words(arguments: dict[str, Any], sentence: str) -> None:
    from gptlab.harness.adapter import GptlabLM

    with pytest.raises(GptlabError, match=sentence):
        GptlabLM(**arguments)


@pytest.fixture(scope="module")
def adapted(harness: Any) -> Any:
    from gptlab.harness.adapter import GptlabLM

    return GptlabLM("pocket", batch_size=2)


def request(*arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("generate_until", {}, arguments, 0)


def test_what_generation_refuses(adapted: Any) -> None:
    with pytest.raises(GptlabError, match="512 new tokens, which leaves no room for its text in a window of 512"):
        adapted.generate_until([request("A light", {"max_gen_toks": 512})], disable_tqdm=True)
    with pytest.raises(GptlabError, match="does not generate with 'num_beams'"):
        adapted.generate_until([request("A light", {"num_beams": 2})], disable_tqdm=True)
    with pytest.raises(GptlabError, match="no chat template"):
        adapted.chat_template(True)


def test_the_chat_template_of_a_model(adapted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    before = adapted.tokenizer_name
    monkeypatch.setattr(adapted._tokenizer, "chat_template", template)
    assert adapted.chat_template(True) == template
    assert adapted.chat_template(False) is None
    assert adapted.tokenizer_name != before  # it is part of the name of what the harness caches
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert adapted.apply_chat_template(messages[:1]) == "[user] Why?\n[assistant] "
    assert adapted.apply_chat_template(messages, add_generation_prompt=False) == "[user] Why?\n[assistant] So."
    with pytest.raises(GptlabError, match="none named 'tools'"):
        adapted.chat_template("tools")


def test_bfloat16_is_close_and_not_the_same(adapted: Any) -> None:
    from gptlab.harness.adapter import GptlabLM

    asked = [request("A lighthouse is", " a tower in the sea"), request("The", " ships")]
    exact = torch.tensor(adapted.loglikelihood(asked, disable_tqdm=True))[:, 0]
    rough = torch.tensor(GptlabLM("pocket", dtype="bfloat16").loglikelihood(asked, disable_tqdm=True))[:, 0]
    torch.testing.assert_close(rough, exact, rtol=0.01, atol=0.0)
    assert not torch.equal(rough, exact)


def test_samples_of_one_prompt_differ_and_repeat_with_the_seed(adapted: Any) -> None:
    asked = [request("A light", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12})] * 6  # three batches
    torch.manual_seed(0)
    first = adapted.generate_until(asked, disable_tqdm=True)
    assert len(set(first)) == 6
    torch.manual_seed(0)
    assert adapted.generate_until(asked, disable_tqdm=True) == first


def test_requests_with_different_arguments_keep_their_order(adapted: Any) -> None:
    stop, long = {"until": ["e"], "max_gen_toks": 20}, {"until": [], "max_gen_toks": 20}
    contexts = [("A lighthouse is a tower", stop), ("The sea", long), ("The", stop), ("", long), ("Of the ship", stop)]
    texts = adapted.generate_until([request(*one) for one in contexts], disable_tqdm=True)
    for (context, arguments), text in zip(contexts, texts, strict=True):
        assert [text] == adapted.generate_until([request(context, arguments)], disable_tqdm=True)
        assert text
        assert arguments is long or "e" not in text
    assert any("e" in text for (_, arguments), text in zip(contexts, texts, strict=True) if arguments is long)


def test_without_the_harness_there_is_one_sentence() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; from gptlab.harness.__main__ import main; main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("gptlab: the evaluation harness is not installed")
    assert run.stderr.endswith("pip install 'gptlab[eval]'\n")
    assert len(run.stderr.splitlines()) == 1
