"""`gptlab report`: what it prints, what it opens, and how it refuses."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from pathlib import Path

import pytest

from gptlab.report import page as report

Run = Callable[..., tuple[int, str, str]]
COMMAND = ("report",)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that a browser was asked for."""
    asked: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: asked.append(address) or True)
    return asked


def test_it_says_where_the_page_is(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, opened: list[str]
) -> None:
    monkeypatch.setattr(report, "write_report", lambda directory: directory / "report.html")
    assert run(tmp_path) == (0, f"report: {tmp_path / 'report.html'}\n", "")
    assert opened == []


def test_it_opens_the_page(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, opened: list[str]) -> None:
    monkeypatch.setattr(report, "write_report", lambda directory: directory / "report.html")
    monkeypatch.chdir(tmp_path)
    assert run(".", "--open")[0] == 0
    assert opened == [(tmp_path / "report.html").as_uri()]
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    assert "there is no browser" in run(".", "--open")[1]


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"format": "gptlab study", "version": 99}'])
def test_bad_input_is_one_sentence(content: str | None, run: Run, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    code, out, err = run(tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("gptlab: ")
    assert err.count("\n") == 1
    assert "results.json" in err


def test_no_such_directory(run: Run, tmp_path: Path) -> None:
    code, _, err = run(tmp_path / "nowhere")
    assert code == 2
    assert err == (
        f"gptlab: there is no study in {tmp_path / 'nowhere'}: no such directory; name what gptlab study --out made\n"
    )
