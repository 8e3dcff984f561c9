# De-tokenizers rule by rule, on the real files, and against the harness where it is installed.
from __future__ import annotations

import re
from pathlib import Path

import pytest

from gptlab.evaluation import detokenizers
from gptlab.evaluation.data import read


@pytest.fixture(scope="module")
def valid(shared: Path) -> str:
    """WikiText-2, validation."""
    return (shared / "data" / "wikitext2_valid.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("spaced", "plain"),
    [
        ("a length of 60 cm ( 24 in ) , and", "a length of 60 cm (24 in), and"),
        ("1 @,@ 000 @.@ 5 well @-@ known", "1,000.5 well-known"),
        ('becoming " lobster red " on', 'becoming "lobster red" on'),
        ("Attacks [ sic ] and { x }", "Attacks [sic] and {x}"),
        ("end . Next ! Why ? yes : no ; so", "end. Next! Why? yes: no; so"),
        ("the lobster 's claws", "the lobster's claws"),
        ("the lobsters ' claws", "the lobsters' claws"),
        (" = = Description = = \n \n Homarus", " == Description ==\n\nHomarus"),
        ("= = = Smaller = = =", "=== Smaller ==="),
        ("= = = = Smallest = = = =", "==== Smallest ===="),
        ("at 45 ° N", "at 45°N"),
        ("at 45 N in", "at 45 1 in"),  # the harness does so, and the same text makes scores comparable
    ],
)
def test_wikitext_rules(spaced: str, plain: str) -> None:
    assert detokenizers.wikitext(spaced) == plain


def test_wikitext_as_the_harness_does(valid: str) -> None:
    judge = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext", reason="lm-eval is not installed")
    for page in detokenizers.pages(valid):
        assert detokenizers.wikitext(page) == judge.wikitext_detokenizer({"page": page})


def test_hellaswag_as_the_harness_does() -> None:
    judge = pytest.importorskip("lm_eval.tasks.hellaswag.utils", reason="lm-eval is not installed")
    for text in (" a [title] b [step] c  d ", "[header] How to x [title] Y. [step] z", "plain", ""):
        assert detokenizers.hellaswag(text) == judge.preprocess(text)


def test_wikitext_loses_no_character(valid: str) -> None:
    # Only white space goes, the marks inside numbers lose their @, and the harness turns some N into 1.
    def ink(text: str) -> str:
        return re.sub(r"\s", "", text.replace("N", "1"))

    pages = list(detokenizers.pages(valid))
    for page in pages:
        assert ink(detokenizers.wikitext(page)) == ink(re.sub(r" @([-,.])@ ", r"\1", page))
    assert sum(len(page) - len(detokenizers.wikitext(page)) for page in pages) > 40_000


def test_wikitext_has_as_many_tokens_as_its_authors_say(valid: str) -> None:
    assert len(valid.split()) + valid.count("\n") == 217_646  # each line's end is a token


def test_wikitext_pages(valid: str) -> None:
    pages = list(detokenizers.pages(valid))
    assert len(pages) == 60  # articles of the validation set, as its authors count
    assert " \n" + "\n".join(pages) == valid  # but for the blank line before the first
    assert all(re.match(r" = [^=]+ = \n", page) for page in pages)
    assert len(list(detokenizers.pages("no heading\nat all"))) == 1


def test_wikitext_lines_are_the_rows_of_the_guide() -> None:
    # The rows of wikitext-2-raw-v1 on the hub: "", " = Title = \n", "", " Text . \n", ""
    text = " \n = Title = \n \n Text\u2028 . \n \n"
    rows = ["", " = Title = \n", "", " Text\u2028 . \n", ""]
    assert detokenizers.wikitext_lines(text) == "\n\n".join(rows)


def test_wikitext_lines_give_the_file_back(valid: str) -> None:
    rows = re.split(r"\n\n(?!\n)", detokenizers.wikitext_lines(valid))
    assert [row.strip("\n") for row in rows if row.strip()] == [row for row in valid.split("\n") if row.strip()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" [header] How to bake [title] Mix. [step] Stir the flour. ", " How to bake. Mix. Stir the flour."),
        ("A man is  sitting on a roof.", "A man is sitting on a roof."),
    ],
)
def test_hellaswag_rules(text: str, expected: str) -> None:
    assert detokenizers.hellaswag(text) == expected


def test_lambada_needs_none(shared: Path) -> None:
    data = read("lambada", {"lambada": shared / "data" / "lambada_test.jsonl"})
    items = data.items({"text": str})
    assert data.official
    assert len(items) == 5153
    # Plain text with real line breaks and quotation marks, and a word at the end, with nothing after it.
    assert all(re.search(r"\w$", item["text"]) for item in items)
    assert not any(mark in item["text"] for item in items for mark in ("``", " n't"))
