# The page in a browser: what it shows is what the functions say, for eyes, keys and screen readers.
from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from helpers.browser import chromium
from helpers.exploring import exploring
from helpers.models import tiny_lm
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

import gptlab
from gptlab import inspecting
from gptlab.exploring.export import write_page
from gptlab.exploring.packing import pack
from gptlab.exploring.texts import AT_FIRST, examples
from gptlab.language_model import LanguageModel

PLAIN, CHANGED = AT_FIRST
TEXT = next(iter(examples().values()))
SHORT = "The keepers of the tower lit it at night."
SECTIONS = ["begin", "losses", "maps", "sharing", "positions", "steps", "without", "costs"]
PATIENCE = 60_000  # milliseconds: other tests may have the processor
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with exploring() as address:
        yield address


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    return {name: gptlab.load(name) for name in AT_FIRST}


def open_page(browser: Browser, address: str, **settings: Any) -> Page:
    page = browser.new_page(**settings)
    page.set_default_timeout(PATIENCE)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.said = said  # type: ignore[attr-defined]
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    return page


@pytest.fixture(scope="module")
def page(browser: Browser, address: str) -> Iterator[Page]:
    page = open_page(browser, address, viewport={"width": 1280, "height": 900})
    yield page
    assert page.said == []  # type: ignore[attr-defined]
    page.close()


def see(page: Page, section: str) -> None:
    """Scroll to a section and wait until all that can be seen has been computed."""
    page.locator(f"#{section}").evaluate("section => section.scrollIntoView()")
    page.wait_for_selector(f"#{section} .content > *", state="attached")
    # Parts hear that they are in view after a frame has been drawn.
    page.evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
    )
    page.wait_for_function("() => !document.querySelector('[aria-busy=true]')")


def ids_of(lm: LanguageModel, text: str = TEXT) -> list[int]:
    tokenizer = lm.needs_tokenizer()
    assert tokenizer.start_of_text is not None
    return [tokenizer.start_of_text, *tokenizer.encode(text)]


def fixed(x: float, places: int) -> str:
    """As the page writes numbers."""
    written = f"{x:.{places}f}"
    return written.replace("-", "" if float(written) == 0 else "\u2212")


def signed(x: float, places: int) -> str:
    return ("+" if float(f"{x:.{places}f}") > 0 else "") + fixed(x, places)


def test_losses(page: Page, models: dict[str, LanguageModel]) -> None:
    see(page, "losses")
    nats = [inspecting.token_losses(models[name].model, ids_of(models[name])) for name in AT_FIRST]
    page.click("#losses summary")
    page.wait_for_selector("#losses tbody tr")  # the table is made when it is opened
    rows = page.locator("#losses tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(c => c.innerText))"
    )
    page.click("#losses summary")
    assert [row[1:] for row in rows] == [[fixed(x, 3) for x in pair] for pair in torch.stack(nats, 1).tolist()]
    for name, own in zip(AT_FIRST, nats, strict=True):
        summary = page.locator("#losses .card", has_text=name).first.locator(".summary").inner_text()
        assert summary.startswith(f"{fixed(float(own.double().mean()), 3)} nats per token; ")
    # The difference, by keyboard: focus a text, go to the fifth token.
    page.select_option("#losses select", PLAIN)
    text = page.locator("#losses .tokens").nth(1)
    text.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    change = signed(float(nats[1][4] - nats[0][4]), 2)
    readout = page.locator("#losses > .readout")
    expect(readout).to_contain_text("token 5")
    expect(readout).to_contain_text(f"{change} against {PLAIN}")
    page.select_option("#losses select", "")


def test_one_head_on_the_canvas_and_back(page: Page, models: dict[str, LanguageModel]) -> None:
    see(page, "maps")
    page.wait_for_selector("#maps button.head >> nth=47")
    page.focus(f"button[aria-label='{CHANGED}, layer 1, head 2']")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"#maps .frame[aria-label^='{CHANGED}, layer 2, head 3']")
    lm = models[CHANGED]
    ids = ids_of(lm)
    maps, visible = inspecting.attention_maps(lm.model, ids, [2])[0, 3], inspecting.visible(lm.config, 2, len(ids))
    packed = pack(maps[None], visible)[0]
    colours = page.evaluate("async () => [...(await import('/static/colours.js')).ramp()]")
    table = torch.tensor(colours, dtype=torch.uint8).view(256, 3)
    canvas = page.locator("#maps .single").nth(1).locator("canvas.map")
    drawn = canvas.evaluate("canvas => canvas.toDataURL()").partition(",")[2]  # PNG, which loses nothing
    with Image.open(io.BytesIO(base64.b64decode(drawn))) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
    seen = torch.ones_like(visible).tril()
    assert torch.equal(pixels[seen], table[packed.long()][seen])

    frame = page.locator("#maps .frame").nth(1)
    box = canvas.bounding_box()
    assert box is not None
    words = page.locator("#maps .single .readout").nth(1)
    for query, key in [(200, 150), (300, 20)]:  # seen, and hidden by the window
        place = [(i + 0.5) / len(ids) for i in (key, query)]
        frame.hover(position={"x": place[0] * box["width"], "y": place[1] * box["height"]})
        expect(words).to_contain_text(f"query {query} ")
        expect(words).to_contain_text(f"key {key} ")
        if visible[query, key]:
            shown = float(words.inner_text().partition("weight ")[2].partition(",")[0])
            assert shown == pytest.approx(float(maps[query, key]), abs=0.004)
        else:
            expect(words).to_contain_text("hidden, 280 tokens back and outside the window")
    frame.focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Shift+ArrowRight")
    expect(words).to_contain_text("query 299 ")
    expect(words).to_contain_text("key 30 ")
    page.keyboard.press("Escape")
    expect(page.locator(f"button[aria-label='{PLAIN}, layer 2, head 3']")).to_be_focused()


def test_sharing(page: Page, models: dict[str, LanguageModel]) -> None:
    see(page, "sharing")
    lm = models[PLAIN]
    for key_heads, moves in ((3, 0), (1, 2)):  # where the slider begins, and two to the left
        page.focus("#sharing input[type=range]")
        for _ in range(moves):
            page.keyboard.press("ArrowLeft")
        sharing = inspecting.share_keys(lm.model, key_heads, ids_of(lm))
        expect(page.locator("#sharing .summary")).to_contain_text(f"{fixed(sharing.loss_after, 3)} after")
        groups = page.locator("#sharing details .grouping").nth(1).locator(".group")
        assert groups.count() == key_heads
        heads = groups.evaluate_all("g => g.map(one => [...one.querySelectorAll('strong')].map(e => e.innerText))")
        assert heads == [[f"head {head}" for head in group] for group in sharing.groups[1]]


def test_positions(page: Page, models: dict[str, LanguageModel]) -> None:
    see(page, "positions")
    scores = inspecting.position_scores(models[CHANGED].model, ids_of(models[CHANGED]), 2, 3)  # of the head looked at
    cells = page.locator("#positions table").first.locator("tbody tr").first.locator("td")
    assert cells.all_inner_texts() == [fixed(float(scores.total[d]), 2) for d in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)]
    for name in AT_FIRST:
        shift = inspecting.shifted(models[name].model, ids_of(models[name]), 64)
        page.get_by_text("The same text, further on").scroll_into_view_if_needed()
        table = page.locator("#positions .card", has_text=name).first.locator("tbody tr")
        expect(table).to_have_count(4)
        rows = table.all_inner_texts()
        assert [row.split("\t")[1] for row in rows[1:3]] == [
            fixed(float(shift.losses_after.double().mean()), 3),
            fixed(shift.largest_loss_change, 3),
        ]
        assert rows[3].endswith("stays" if name == CHANGED else "moves")


def test_steps(page: Page, models: dict[str, LanguageModel]) -> None:
    see(page, "steps")
    lm = models[CHANGED]
    steps = list(inspecting.generation_steps(lm, ids_of(lm), 32, seed=0, temperature=0.8, top=8))
    page.focus("#steps input[name=step]")
    page.keyboard.press("End")
    last, before = steps[-1], steps[-2]
    expect(page.locator("#steps mark")).to_have_text(last.chosen.text.replace("\n", "↵\n"))
    slot = next(i for i, held in enumerate(before.slots[0]) if last.slots[0][i] != held)
    gone, come = before.slots[0][slot], last.slots[0][slot]
    words = f"slot {slot} is overwritten: position {gone} goes, {come} comes"
    expect(page.locator("#steps .cache").first).to_contain_text(words)
    assert page.locator("#steps .slots").first.locator(".slot").count() == len(last.slots[0])
    first = page.locator("#steps tbody tr").first.inner_text()
    assert first.startswith(f"“{last.candidates[0].text}”")
    assert f"{100 * last.candidates[0].probability:.3g}"[:2] in first


def test_what_is_taken_out(page: Page, models: dict[str, LanguageModel]) -> None:
    see(page, "without")
    lm = models[PLAIN]
    ids = ids_of(lm)
    effects = inspecting.head_effects(lm.model, ids)
    labels = page.locator("#without .toggle:not(.whole)").evaluate_all("all => all.map(one => one.ariaLabel)")
    assert labels == [
        f"layer {layer}, head {head}: {signed(float(effects[layer, head]), 3)} nats per token"
        for layer in range(4)
        for head in range(6)
    ]
    page.focus("#without .toggle >> nth=1")
    page.keyboard.press("Space")
    page.click("#without button[aria-label='layer 3: all attention']")
    with inspecting.ablated(lm.model, heads=[(0, 0)], attention=[3]):
        after = float(inspecting.token_losses(lm.model, ids).double().mean())
    expect(page.locator("#without .summary")).to_contain_text(f"{fixed(after, 3)} without what is pressed")
    page.click("#without >> text=put everything back")
    expect(page.locator("#without")).to_contain_text("Nothing is taken out.")


def test_the_calculator_agrees_with_python(page: Page) -> None:
    see(page, "costs")
    page.wait_for_selector("#costs .calculator[data-agrees=true]")
    assert page.locator("#costs [data-cell=gain]").inner_text().endswith("of the cache reads.")


def test_no_width_scrolls_sideways(page: Page) -> None:
    for width in (1920, 1024, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 1280, "height": 900})


def test_a_text_that_is_too_long_is_refused_in_words_and_the_last_one_typed_counts(
    browser: Browser, address: str, models: dict[str, LanguageModel]
) -> None:
    page = open_page(browser, address)
    see(page, "losses")
    page.fill("#text", "sea " * 600)
    warning = page.locator("#losses .warning").first
    expect(warning).to_contain_text(f"and {PLAIN} reads 512 at most; make it shorter by about")
    for text in ("The", "The sea", "The sea is blue."):
        page.fill("#text", text)
    loss = inspecting.token_losses(models[PLAIN].model, ids_of(models[PLAIN], "The sea is blue."))
    summary = page.locator("#losses .summary").first
    expect(summary).to_contain_text(f"{fixed(float(loss.double().mean()), 3)} nats per token")
    # Refused questions are an answer, which browsers report; nothing else was said.
    assert all("status of 400" in words for words in page.said)  # type: ignore[attr-defined]
    page.close()


def test_the_page_is_there_at_once(browser: Browser) -> None:
    with exploring() as address:  # no model is loaded
        page = browser.new_page()
        start = time.perf_counter()
        page.goto(address)
        page.wait_for_selector("html[data-ready]")
        page.wait_for_selector("#begin .choice")
        seconds = time.perf_counter() - start
        painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        page.close()
    assert seconds < 20  # a machine that does other things too
    assert painted < 5000


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, LanguageModel]:
    """A directory with a model that is quick to bake, with everything that can be switched."""
    lm = tiny_lm(position="rope", n_kv_head=2, window=16, sinks=2)
    directory = tmp_path_factory.mktemp("models") / "small"
    gptlab.save(lm, directory)
    return str(directory), gptlab.load(directory)


@pytest.fixture(scope="module")
def exported(
    browser: Browser, small: tuple[str, LanguageModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    """The whole page of one short text, from a file."""
    path = tmp_path_factory.mktemp("exported") / "page.html"
    assert write_page(path, [small[0]], text=SHORT) == path.stat().st_size
    page = open_page(browser, path.as_uri())
    for section in SECTIONS[1:]:
        see(page, section)
    yield page
    assert page.said == []  # type: ignore[attr-defined]
    page.close()


def test_the_exported_page_needs_no_server(exported: Page, small: tuple[str, LanguageModel]) -> None:
    page, (name, lm) = exported, small
    ids = ids_of(lm, SHORT)
    loss = inspecting.token_losses(lm.model, ids)
    assert page.locator("#losses .summary").inner_text().startswith(fixed(float(loss.double().mean()), 3))
    layer, head = lm.config.n_layer - 1, lm.config.n_head - 1
    page.click(f"button[aria-label='{name}, layer {layer}, head {head}']")
    page.wait_for_selector("#maps .single .token")
    words = page.locator("#maps .single .readout").inner_text()
    weight = float(inspecting.attention_maps(lm.model, ids, [layer])[0, head, -1, 0])
    assert words.startswith(f"query {len(loss)} “.”, key 0 “<|endoftext|>”: weight ")
    assert words.endswith(f"{len(loss)} tokens back, a sink")
    assert float(words.partition("weight ")[2].partition(",")[0]) == pytest.approx(weight, abs=0.004)
    page.click("#without >> text=the 2 sinks")
    with inspecting.ablated(lm.model, sinks=True):
        after = float(inspecting.token_losses(lm.model, ids).double().mean())
    expect(page.locator("#without .summary")).to_contain_text(f"{fixed(after, 3)} without what is pressed")
    page.wait_for_selector("#costs .calculator[data-agrees=true]")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_fault_for_people_who_see_or_move_otherwise(exported: Page, scheme: Any) -> None:
    exported.emulate_media(color_scheme=scheme)
    found = Axe().run(exported, options={"resultTypes": ["violations"]}).response["violations"]
    faults = [(one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")]
    assert faults == []
