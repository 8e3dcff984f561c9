# What the page is told, against the functions that a notebook calls.
from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from starlette.requests import ClientDisconnect, Request
from starlette.testclient import TestClient

import gptlab
from gptlab import inspecting
from gptlab.exploring import shelf
from gptlab.exploring.app import make_app
from gptlab.exploring.computing import Check, Computer
from gptlab.exploring.packing import pack, shrink, unpack
from gptlab.exploring.page import HERE, MODULES, files, single_file
from gptlab.language_model import LanguageModel

TEXT = "A lighthouse is a tower in the sea. " * 16  # longer than a window of 128
WINDOWED = "pocket-rope-gqa-swa"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(make_app(), base_url="http://127.0.0.1:8080", raise_server_exceptions=False) as made:
        yield made


@pytest.fixture(scope="module", params=["pocket", WINDOWED])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    lm = gptlab.load(request.param)
    lm.name = request.param  # type: ignore[attr-defined]
    return lm


def ids_of(lm: LanguageModel, text: str = TEXT) -> list[int]:
    tokenizer = lm.needs_tokenizer()
    assert tokenizer.start_of_text is not None
    return [tokenizer.start_of_text, *tokenizer.encode(text)]


def ask(client: TestClient, question: str, **body: Any) -> Any:
    response = client.post(f"/api/{question}", json=body)
    assert response.status_code == 200, response.text
    if "X-Shape" not in response.headers:
        return response.json()
    shape = [int(n) for n in response.headers["X-Shape"].split(",")]
    return torch.from_numpy(np.frombuffer(response.content, dtype=np.uint8).reshape(shape).copy())


def about(lm: LanguageModel) -> dict[str, str]:
    return {"model": lm.name, "text": TEXT}  # type: ignore[attr-defined]


def test_losses(client: TestClient, lm: LanguageModel) -> None:
    found, nats = ask(client, "losses", **about(lm)), inspecting.token_losses(lm.model, ids_of(lm))
    assert found["losses"] == nats.tolist()
    assert found["total"] == pytest.approx(float(nats.double().sum()))
    assert found["bitsPerByte"] == pytest.approx(float(nats.double().sum()) / np.log(2) / len(TEXT.encode()))
    assert "".join(found["tokens"][1:]) == TEXT


@pytest.mark.parametrize("head", [None, 2])
def test_maps(client: TestClient, lm: LanguageModel, head: int | None) -> None:
    ids = ids_of(lm)
    maps = inspecting.attention_maps(lm.model, ids, [1])[0]
    visible = inspecting.visible(lm.config, 1, len(ids))
    found = ask(client, "maps", **about(lm), layer=1, head=head)
    expected = maps if head is None else maps[head : head + 1]
    assert torch.equal(found == 0, ~visible.expand_as(expected))
    torch.testing.assert_close(unpack(found), expected, atol=0.004, rtol=0)
    small = ask(client, "maps", **about(lm), layer=1, head=head, size=32)
    assert torch.equal(small, shrink(found, 32))


def test_maps_of_a_converted_and_of_a_moved_model(client: TestClient, lm: LanguageModel) -> None:
    ids = ids_of(lm)
    sharing = inspecting.share_keys(lm.model, 1, ids)
    maps = sharing.in_source_order(inspecting.attention_maps(sharing.model, ids, [2])[0], 2)
    found = ask(client, "maps", **about(lm), layer=2, n_kv_head=1)
    torch.testing.assert_close(unpack(found), maps, atol=0.004, rtol=0)
    moved = inspecting.shifted(lm.model, ids, 9, [2]).maps_after[0]
    torch.testing.assert_close(unpack(ask(client, "maps", **about(lm), layer=2, by=9)), moved, atol=0.004, rtol=0)


def test_sharing(client: TestClient, lm: LanguageModel) -> None:
    found, sharing = ask(client, "share", **about(lm), n_kv_head=1), inspecting.share_keys(lm.model, 1, ids_of(lm))
    assert found["groups"] == [[list(group) for group in layer] for layer in sharing.groups]
    assert found["keyErrors"] == sharing.errors.keys.tolist()
    assert found["layerValueErrors"] == sharing.layer_errors.values.tolist()
    assert (found["before"], found["after"]) == (sharing.loss_before, sharing.loss_after)
    assert found["cacheBytesPerToken"][0] == found["cacheBytesPerToken"][1] * lm.config.kv_heads


@pytest.mark.parametrize("most_bytes", [0, shelf.MOST_BYTES])
def test_another_text_converts_nothing_again(monkeypatch: pytest.MonkeyPatch, most_bytes: int) -> None:
    monkeypatch.setattr(shelf, "MOST_BYTES", most_bytes)  # with none to keep, the last one is kept
    models = shelf.Shelf(["pocket"])
    first, second = [models.shared("pocket", 2, [0, *range(9, 9 + n)]) for n in (20, 30)]
    assert first.model is second.model
    torch.testing.assert_close(
        second.losses_after, inspecting.share_keys(first.source, 2, [0, *range(9, 39)]).losses_after
    )
    models.shared("pocket", 3, [0, *range(9, 39)])
    again = models.shared("pocket", 2, [0, *range(9, 39)])
    assert (again.model is first.model) == (most_bytes > 0)
    inputs = models.inputs("pocket", [0, 9, 10])
    assert models.inputs("pocket", [0, 9, 10]) is inputs


def test_scores_and_shifts(client: TestClient, lm: LanguageModel) -> None:
    ids = ids_of(lm)
    found, scores = ask(client, "scores", **about(lm), layer=3, head=5), inspecting.position_scores(lm.model, ids, 3, 5)
    assert found["total"] == scores.total.tolist()
    assert found["pairs"] == (None if scores.pairs is None else scores.pairs.T.tolist())
    assert bool(found["note"]) == (scores.pairs is None)
    moved, shift = ask(client, "shift", **about(lm), by=7), inspecting.shifted(lm.model, ids, 7)
    assert moved["largestLossChange"] == shift.largest_loss_change
    assert moved["largestWeightChange"] == shift.largest_weight_change
    assert (moved["largestLossChange"] < 1e-3) == (lm.config.position == "rope")


def test_steps(client: TestClient, lm: LanguageModel) -> None:
    found = ask(client, "steps", **about(lm), n=5, seed=3, temperature=1)
    steps = list(inspecting.generation_steps(lm, ids_of(lm), 5, seed=3, top=8))
    assert [step["chosen"][0] for step in found["steps"]] == [step.chosen.text for step in steps]
    for step, own in zip(found["steps"], steps, strict=True):  # layers whose caches hold the same are sent once
        slots = {layer: held for layers, held in zip(found["layers"], step["slots"], strict=True) for layer in layers}
        assert [slots[layer] for layer in range(lm.config.n_layer)] == [list(held) for held in own.slots]
    assert [step["bytes"] for step in found["steps"]] == [step.cache_bytes for step in steps]


def test_what_is_taken_out(client: TestClient, lm: LanguageModel) -> None:
    ids = ids_of(lm)
    effects = torch.tensor([ask(client, "effects", **about(lm), layer=layer)["effects"] for layer in range(4)])
    torch.testing.assert_close(effects, inspecting.head_effects(lm.model, ids))
    found = ask(client, "without", **about(lm), heads=[[0, 1], [3, 2]], attention=[1])
    before = inspecting.token_losses(lm.model, ids)
    with inspecting.ablated(lm.model, heads=[(0, 1), (3, 2)], attention=[1]):
        after = inspecting.token_losses(lm.model, ids)
    assert found["changes"] == (after - before).tolist()
    # Nothing stays out, and one head alone is what its effect says.
    alone = ask(client, "without", **about(lm), heads=[[2, 4]])
    assert alone["before"] == pytest.approx(float(before.double().mean()))
    assert alone["after"] - alone["before"] == pytest.approx(float(effects[2, 4]), abs=1e-5)


def test_weights_survive_8_bits() -> None:
    weights = torch.linspace(0, 1, 2**18).view(1, 512, 512)
    packed = pack(weights, torch.ones(512, 512, dtype=torch.bool))
    assert int(packed.min()) == 1
    limit = torch.where(weights < 0.01, 0.0004, 0.004)
    assert bool(((unpack(packed) - weights).abs() <= limit).all())


REFUSED = [
    ("losses", {"model": "pocket", "text": ""}, 400, "the text is too short"),
    ("losses", {"model": "pocket", "text": "sea " * 600}, 400, "pocket reads 512 at most; make it shorter by about"),
    ("losses", {"model": "/etc/passwd", "text": "a b"}, 400, "there is no model '/etc/passwd' on this page"),
    ("losses", {"model": "pocket", "text": "a b", "path": "x"}, 400, "there is no parameter path"),
    ("losses", {"model": "pocket"}, 400, "text is missing"),
    ("losses", {"model": "pocket", "text": "x" * 200_001}, 400, "at most 200000 characters"),
    ("maps", {"model": "pocket", "text": "a b", "layer": 4}, 400, "layer must be 0 to 3, got 4"),
    ("effects", {"model": "pocket", "text": "a b", "layer": 4}, 400, "layer must be 0 to 3, got 4"),
    ("maps", {"model": "pocket", "text": "a b", "layer": -1}, 400, "layer must be greater than or equal to 0"),
    ("maps", {"model": "pocket", "text": "a b", "layer": 0, "head": 6}, 400, "head must be 0 to 5, got 6"),
    ("maps", {"model": "pocket", "text": "a b", "layer": 0, "size": 4096}, 400, "size must be less than or equal"),
    ("share", {"model": "pocket", "text": "a b", "n_kv_head": 4}, 400, "possible: 1, 2, 3, 6"),
    ("shift", {"model": "pocket", "text": "a b", "by": 600}, 400, "the learned positions end at 511"),
    ("steps", {"model": "pocket", "text": "a b", "n": 10**6, "seed": 0, "temperature": 1}, 400, "n must be less than"),
    ("steps", {"model": "pocket", "text": "a b", "n": 1, "seed": -1, "temperature": 1}, 400, "seed must be"),
    ("without", {"model": "pocket", "text": "a b", "heads": [[9, 9]]}, 400, "layer must be 0 to 3, got 9"),
    ("without", {"model": "pocket", "text": "a b", "sinks": True}, 400, "the model has no sinks"),
    ("files", {}, 404, "there is no question 'files'"),
]


@pytest.mark.parametrize(("question", "body", "status", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_refusals(client: TestClient, question: str, body: Any, status: int, words: str) -> None:
    response = client.post(f"/api/{question}", json=body)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


def test_bodies_have_a_limit(client: TestClient) -> None:
    assert client.post("/api/losses", content=b"x" * (5 * 2**20)).status_code == 413
    assert client.post("/api/losses", content=b"[").status_code == 400


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"host": "evil.example:8080"}, {"origin": "https://evil.example"}, {"origin": "null"}],
    ids=str,
)
@pytest.mark.parametrize("path", ["/", "/api/begin", "/static/main.js", "/api/losses"])
def test_pages_from_elsewhere_are_told_off(client: TestClient, headers: dict[str, str], path: str) -> None:
    method = "POST" if path == "/api/losses" else "GET"
    assert client.request(method, path, headers=headers).status_code == 403


@pytest.mark.parametrize(
    "path", ["/static/app.py", "/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd", "/pocket"]
)
def test_no_route_reads_other_files(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_page_may_load_nothing_from_elsewhere(client: TestClient) -> None:
    for name in ("", *(f"static/{name}" for name in files() if name != "index.html"), "api/begin", "nowhere"):
        response = client.get(f"/{name}")
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
        assert "unsafe" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    names = {path.name for path in HERE.iterdir()}
    assert names == {"index.html", "explore.css", *MODULES}
    assert not [
        name for name, content in files().items() if b"://" in content.replace(b"http://www.w3.org/2000/svg", b"")
    ]


def test_the_single_file_is_one_module() -> None:
    page = single_file("")
    assert "static/" not in page.partition("<body>")[0]
    assert not [line for line in page.splitlines() if line.startswith(("import ", "export "))]


def test_the_page_comes_before_torch() -> None:
    script = "import sys; from gptlab.exploring.app import make_app; make_app(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def waiting(leaves: asyncio.Event) -> Request:
    """A request whose client leaves when it is told to."""

    async def receive() -> dict[str, str]:
        await leaves.wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)  # type: ignore[arg-type]


def test_what_nobody_waits_for_is_not_computed() -> None:
    computer, began, computed = Computer(), threading.Event(), list[str]()

    def first(check: Check) -> str:
        computed.append("first")
        began.set()
        while True:  # until the check ends it
            check()

    def skipped(check: Check) -> str:
        computed.append("skipped")
        return "skipped"

    def last(check: Check) -> str:
        computed.append("last")
        return "last"

    async def scene() -> str:
        leaves = asyncio.Event()
        tasks = [asyncio.create_task(computer.run(waiting(leaves), one)) for one in (first, skipped)]
        await asyncio.to_thread(began.wait, 10)
        stays = asyncio.create_task(computer.run(waiting(asyncio.Event()), last))
        leaves.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [ClientDisconnect, ClientDisconnect]
        return await stays

    assert asyncio.run(asyncio.wait_for(scene(), 20)) == "last"
    assert computed == ["first", "last"]
    computer.close()
