# OpenAI's own client against our server.
from __future__ import annotations

import http.client
import itertools
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from helpers.models import tiny_lm
from helpers.serving import Running, serving

import gptlab
from gptlab.evaluation.scoring import token_logprobs
from gptlab.language_model import LanguageModel

CYCLE = [*"é€🌊".encode(), 256]
PROMPT = "A lighthouse is a tower in the sea"


@pytest.fixture(scope="module")
def pocket() -> LanguageModel:
    return gptlab.load("pocket")


@pytest.fixture(scope="module")
def server(pocket: LanguageModel) -> Iterator[Running]:
    with serving(pocket, "pocket") as running:
        yield running


def parrot() -> LanguageModel:
    """A model of bytes that knows one text and how to end it: the next token follows from the last."""
    lm = tiny_lm(tie_embeddings=False, position="none")
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if name.startswith("h."):
                parameter.zero_()
        hidden = torch.nn.functional.layer_norm(lm.model.wte.weight, lm.model.wte.weight.shape[1:])
        lm.model.lm_head.weight.zero_()
        for token, following in itertools.pairwise(CYCLE):
            lm.model.lm_head.weight[following] = hidden[token]
    return lm


def endless() -> LanguageModel:
    """A model that never ends a text of its own."""
    lm = tiny_lm(position="rope")
    lm.needs_tokenizer().set_borders(end_of_text=256, start=None, ends=[])
    return lm


@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"seed": 5}, {"seed": 6, "top_p": 0.8, "temperature": 1.3}], ids=str
)
def test_texts_are_those_of_the_library(
    server: Running, pocket: LanguageModel, sampling: dict[str, Any], as_ids: bool
) -> None:
    texts = [PROMPT, "The", "In the"]
    prompts: Any = [pocket.prompt_ids(text) for text in texts] if as_ids else texts
    found = server.client.completions.create(model="pocket", prompt=prompts, n=2, max_tokens=9, **sampling)
    expected = pocket.generate([text for text in texts for _ in range(2)], max_new_tokens=9, **sampling)
    assert [choice.text for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == list(range(6))
    assert {choice.finish_reason for choice in found.choices} == {"length"}
    n_prompt = sum(len(pocket.prompt_ids(text)) for text in texts)
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (n_prompt, 54)
    assert found.usage.total_tokens == n_prompt + 54


@pytest.mark.parametrize(
    "text", [PROMPT, "Der Leuchtturm — ein Licht 🌊 über 海", "<|endoftext|>The sea " * 80], ids=len
)
def test_log_probabilities_of_the_prompt_are_those_of_the_evaluation(
    server: Running, pocket: LanguageModel, text: str
) -> None:
    found = server.client.completions.create(model="pocket", prompt=text, max_tokens=0, echo=True, logprobs=2).choices[
        0
    ]
    ids = pocket.prompt_ids(text, special=True)
    assert found.text == text
    lists: Any = found.logprobs
    assert lists.token_logprobs[0] is None
    assert lists.top_logprobs[0] is None
    actual, expected = torch.tensor(lists.token_logprobs[1:]), token_logprobs(pocket.model, [ids])[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    columns = lists.tokens, lists.text_offset, lists.token_logprobs, lists.top_logprobs
    for token, offset, own, top in itertools.islice(zip(*columns, strict=True), 1, None):
        assert text.startswith(token, offset) or token.startswith("bytes:")
        assert 2 <= len(top) <= 3
        assert top[token] == own
        assert max(top.values()) >= own


def test_a_stream_tells_what_the_whole_answer_does(server: Running) -> None:
    sampled: dict[str, Any] = {"n": 2, "seed": 3, "max_tokens": 12, "stop": ["tow", "."]}
    asked = {"model": "pocket", "prompt": [PROMPT, "The 🌊"], "echo": True, "logprobs": 1, **sampled}
    whole = server.client.completions.create(**asked)
    parts = list(server.client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert parts[-1].choices == []
    assert parts[-1].usage == whole.usage
    assert all(part.usage is None for part in parts[:-1])
    for choice in whole.choices:
        mine = [part.choices[0] for part in parts[:-1] if part.choices[0].index == choice.index]
        assert "".join(part.text for part in mine) == choice.text
        assert [part.finish_reason for part in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert choice.logprobs is not None
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [value for part in mine for value in getattr(part.logprobs, name)]
            assert joined == getattr(choice.logprobs, name)


def test_a_character_split_over_tokens_is_streamed_whole_and_the_end_is_scored() -> None:
    with serving(parrot()) as running:
        asked: dict[str, Any] = {"model": "m", "prompt": "é", "temperature": 0, "max_tokens": 20}
        assert [part.choices[0].text for part in running.client.completions.create(**asked, stream=True)] == [
            "€",
            "🌊",
            "",
        ]
        found = running.client.completions.create(**asked, logprobs=0, echo=True)
        [choice] = found.choices
        assert (choice.text, choice.finish_reason) == ("é€🌊", "stop")
        assert found.usage is not None
        assert found.usage.completion_tokens == 8  # the end of text too
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert choice.logprobs.tokens[:3] == ["bytes:\\xc3", "bytes:\\xa9", "bytes:\\xe2"]
        assert choice.logprobs.text_offset == [0, 0, 1, 1, 1, 2, 2, 2, 2, 3]
        stopped = running.client.completions.create(**asked, stop="🌊").choices[0]
        assert (stopped.text, stopped.finish_reason) == ("€", "stop")


def test_a_new_document_begins_without_a_prompt(server: Running, pocket: LanguageModel) -> None:
    found = server.request("POST", "/v1/completions", {"max_tokens": 5, "seed": 1, "echo": True})[1]
    assert found["choices"][0]["text"] == "<|endoftext|>" + pocket.generate([[4095]], max_new_tokens=5, seed=1)[0]


def test_a_full_context_ends_a_text(server: Running) -> None:
    found = server.client.completions.create(model="pocket", prompt=[5] * 510, max_tokens=50)
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert found.usage.completion_tokens == 3  # the last is drawn after 512 tokens, and need not be read


@pytest.mark.parametrize("compiled", [True, False])
def test_a_client_that_leaves_frees_its_place(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setenv("GPTLAB_COMPILED", "0")
        monkeypatch.setattr("gptlab.serving.worker.serves", lambda model, n: False)
    lm = endless()
    with serving(lm, slots=1, queue=0, max_length=10**6) as running:
        ask = running.client.completions.create
        stream = ask(model="m", prompt="a", max_tokens=10**6, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="as many as it takes"):
            ask(model="m", prompt="b")
        stream.close()
        assert running.idle()
        assert ask(model="m", prompt="b", max_tokens=2).choices[0].finish_reason == "length"
        impatient = running.client.with_options(timeout=0.3)
        with pytest.raises(openai.APITimeoutError):
            impatient.completions.create(model="m", prompt="a", max_tokens=10**6)
        assert running.idle()


def test_texts_of_several_clients_share_steps() -> None:
    with serving(endless(), slots=3, max_length=10**5) as running:
        ask = running.client.completions.create
        streams = [iter(ask(model="m", prompt="a", max_tokens=10**5, seed=i, stream=True)) for i in range(3)]
        for _ in range(3):
            for stream in streams:
                next(stream)
        assert running.worker.load == (3, 0)


def test_the_model_is_listed(server: Running) -> None:
    [model] = server.client.models.list().data
    assert model == server.client.models.retrieve("pocket")
    assert (model.id, model.owned_by) == ("pocket", "gptlab")


def test_text_to_ids_and_back(server: Running, pocket: LanguageModel) -> None:
    text = "<|endoftext|>Ein Licht 🌊"
    status, found = server.request("POST", "/tokenize", {"prompt": text, "add_special_tokens": False})
    assert status == 200
    assert found["tokens"] == pocket.prompt_ids(text, special=True)
    assert server.request("POST", "/detokenize", {"tokens": found["tokens"]}) == (200, {"prompt": text})
    assert server.request("GET", "/tokenizer_info")[1]["eos_token"] == "<|endoftext|>"
    assert server.request("GET", "/health")[1]["status"] == "ok"


# --- chat -----------------------------------------------------------------------------------------------------


def test_a_conversation_is_answered_by_the_template() -> None:
    lm = tiny_lm()
    lm.needs_tokenizer().chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    messages: Any = [{"role": "user", "content": "Hello"}]
    expected = lm.generate([lm.chat_ids(messages)] * 2, max_new_tokens=9, seed=2)
    with serving(lm) as running:
        asked: dict[str, Any] = {"model": "m", "messages": messages, "seed": 2, "n": 2, "max_tokens": 9}
        found = running.client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        assert [choice.message.content for choice in found.choices] == expected
        logprobs: Any = found.choices[0].logprobs
        assert len(logprobs.content) == 9
        assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)
        texts = ["", ""]
        for part in running.client.chat.completions.create(**asked, stream=True):
            [choice] = part.choices
            texts[choice.index] += choice.delta.content or ""
        assert texts == expected


def test_a_model_without_a_template_does_not_chat(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="no chat template: it continues texts"):
        server.client.chat.completions.create(model="pocket", messages=[{"role": "user", "content": "Hello"}])


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b"[]", 400, "must be a JSON object, got list"),
        ({"promt": "a"}, 400, "no parameter promt (did you mean 'prompt'?)"),
        ({"prompt": 3}, 400, "prompt must be a text"),
        ({"prompt": []}, 400, "prompt must be a text"),
        ({"prompt": ["a", 1]}, 400, "prompt must be a text"),
        ({"prompt": [True]}, 400, "prompt must be a text"),
        ({"prompt": [4096]}, 400, "the prompt has the token id 4096"),
        ({"prompt": [10**30]}, 400, "the prompt has the token id"),
        ({"prompt": "\ud800"}, 400, "a lone surrogate"),
        ({"prompt": [1] * 513}, 400, "the prompt has 513 tokens, a text here at most 512"),
        ({"prompt": "a", "max_tokens": "3"}, 400, "max_tokens must be"),
        ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens must be"),
        ({"prompt": "a", "max_tokens": True}, 400, "max_tokens must be"),
        ({"prompt": "a", "n": 0}, 400, "n must be"),
        ({"prompt": "a", "n": 10**9}, 400, "the request asks for 1000000000 texts"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature must be 0"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature must be"),
        ({"prompt": "a", "top_p": 2}, 400, "top_p must be above 0"),
        ({"prompt": "a", "seed": -1}, 400, "seed must be a whole number"),
        ({"prompt": "a", "logprobs": 21}, 400, "logprobs must be"),
        ({"prompt": "a", "stop": [""]}, 400, "a stop string is empty"),
        ({"prompt": "a", "stop": [1]}, 400, "stop"),
        ({"prompt": "a", "best_of": 3}, 400, "best_of is not supported"),
        ({"prompt": "a", "presence_penalty": 1}, 400, "presence_penalty is not supported"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options are for streams"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "no model 'gpt-4' here, only 'pocket'"),
        (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413, "more than 4 MiB"),
    ],
    ids=lambda value: value[:40].decode("latin1") if isinstance(value, bytes) else str(value)[:60],
)  # fmt: skip
def test_a_bad_request_is_one_sentence_in_openais_form(server: Running, body: Any, status: int, said: str) -> None:
    got, answer = server.request("POST", "/v1/completions", body)
    assert got == status
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert said in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert server.request("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/models/x/../y", 404),
    ],
)
def test_other_routes_are_refused_in_the_same_form(server: Running, method: str, path: str, status: int) -> None:
    got, answer = server.request(method, path)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_a_slow_sender_is_told_so(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptlab.serving.http.BODY_SECONDS", 0.2)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", "100")
    connection.endheaders()
    connection.send(b'{"prom')
    response = connection.getresponse()
    assert response.status == 408
    assert "did not come within" in json.loads(response.read())["error"]["message"]
    connection.close()
    assert server.request("GET", "/health")[0] == 200


def test_strangers_are_not_let_in(server: Running) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        status, answer = server.request("GET", "/v1/models", headers=headers)
        assert (status, answer["error"]["param"]) == (403, None)
    with serving(tiny_lm(), api_key="secret") as running:
        assert running.client.completions.create(model="m", prompt="a", max_tokens=1).choices
        with pytest.raises(openai.AuthenticationError, match="wants its API key"):
            running.client.with_options(api_key="guess").models.list()
        assert running.request("GET", "/health")[0] == 200
