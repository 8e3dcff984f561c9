"""Documents from files, directories, patterns, pipes and names; what is not text is refused in words."""

from __future__ import annotations

import ast
import gzip
import io
import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from gptlab.errors import GptlabError
from gptlab.text.documents import Documents, documents_of, open_documents
from gptlab.text.segmentation import PIECE

JSON_LINES = '{"text": "one\\nline"}\n\n{"text": " "}\n{"id": 3, "text": "naïve \\u2028 🌹"}\n'
FROM_JSON = ["one\nline", "naïve \u2028 🌹"]


def write(directory: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return directory


def read(*sources: str | Path, per_line: bool = False) -> list[str]:
    documents = open_documents([str(source) for source in sources], per_line=per_line)
    first = list(documents)
    assert list(documents) == first, "a second reading gives something else"
    return first


# --- files ----------------------------------------------------------------------------------------------------


def test_a_file_is_one_document(tmp_path: Path) -> None:
    write(tmp_path, {"poem.txt": "rose\nnaïve 🌹\n"})
    assert read(tmp_path / "poem.txt") == ["rose\nnaïve 🌹\n"]
    assert open_documents([str(tmp_path / "poem.txt")]).name == "poem"


def test_lines_of_end_of_text_separate_documents(tmp_path: Path) -> None:
    text = "one\n<|endoftext|>\ntwo '<|endoftext|>' of two\n\n<|endoftext|>\n<|endoftext|>\n \n<|endoftext|>\nlast"
    assert read(write(tmp_path, {"a.txt": text}) / "a.txt") == ["one\n", "two '<|endoftext|>' of two\n\n", "last"]


@pytest.mark.parametrize("end", ["", "\n", "\r\n"], ids=ascii)
def test_a_separator_may_be_the_last_line(tmp_path: Path, end: str) -> None:
    assert read(write(tmp_path, {"a": "one\n<|endoftext|>\ntwo\n<|endoftext|>" + end}) / "a") == ["one\n", "two\n"]


@pytest.mark.parametrize("text", ["a\r\nb\r\n", "a\rb\r", "\r\n\r\r\n\r", "x\r", "a\r\n<|endoftext|>\r\nb"], ids=ascii)
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_ends_of_lines_are_those_of_python_wherever_chunks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, size: int
) -> None:
    monkeypatch.setattr("gptlab.text.documents.PIECE", size)
    path = write(tmp_path, {"a.txt": "é🌹" + text}) / "a.txt"
    assert "\n<|endoftext|>\n".join(read(path)).replace("\n\n<", "\n<") == path.read_text(encoding="utf-8")


def test_json_lines(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": JSON_LINES, "crlf.jsonl": '{"text": "a"}\r\n{"text": "b"}'})
    assert read(tmp_path / "a.jsonl") == FROM_JSON
    assert read(tmp_path / "crlf.jsonl") == ["a", "b"]


def test_compressed_files(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt.gz": gzip.compress(b"one\n"), "b.jsonl.gz": gzip.compress(JSON_LINES.encode())})
    assert read(tmp_path / "a.txt.gz", tmp_path / "b.jsonl.gz") == ["one\n", *FROM_JSON]
    assert open_documents([str(tmp_path / "b.jsonl.gz")]).name == "b"


def test_a_document_may_be_longer_than_a_piece(tmp_path: Path) -> None:
    text = "word " * (PIECE // 2)
    documents = open_documents([str(write(tmp_path, {"a.txt": text}) / "a.txt")])
    pieces = list(documents.pieces())
    assert [piece.ends for piece in pieces] == [False, False, True]
    assert all(len(piece.text) <= PIECE and piece.text.endswith(("d", " ")) for piece in pieces)
    assert list(documents) == [text]


@pytest.mark.parametrize("content", ["emma\n\n olivia \n \nava", "emma\r\n\r\n olivia \r\nava\r\n"], ids=ascii)
def test_lines_as_documents(tmp_path: Path, content: str) -> None:
    write(tmp_path, {"names.txt": content + "\n<|endoftext|>\n"})
    assert read(tmp_path / "names.txt", per_line=True) == ["emma", " olivia ", "ava"]
    assert open_documents([str(tmp_path / "names.txt")], per_line=True).items


# --- several at once ------------------------------------------------------------------------------------------


def test_a_directory_gives_its_texts_in_the_order_of_their_names(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"b.txt": "b", "a/z.md": "z", "c.py": "c\n<|endoftext|>\nd", "a/empty.txt": ""}
    files |= {"x.bin": b"\xff", "d.jsonl": JSON_LINES, "a/y.txt.gz": gzip.compress(b"y"), "x.gz": b"\xff"}
    documents = open_documents([str(write(tmp_path / "texts", files))])
    assert (documents.name, list(documents)) == ("texts", ["y", "z", "b", "c\n", "d", *FROM_JSON])


def test_tokenizers_in_a_directory_are_no_texts(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "a", "data/merges.txt": "t h", "data/tokenizer.json": "{}", "merges.txt": "mine"})
    assert read(tmp_path) == ["a", "mine"]


def test_a_directory_may_be_named_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path / "texts", {"a.txt": "a"}))
    assert open_documents(["."]).name == "texts"


def test_patterns(tmp_path: Path) -> None:
    write(tmp_path / "in", {"part-2.txt": "2", "part-1.txt": "1", "other.txt": "o", "deep/part-3.text": "3"})
    assert read(tmp_path / "in" / "part-*.txt") == ["1", "2"]
    assert read(tmp_path / "in" / "**" / "part-*") == ["3", "1", "2"]
    assert open_documents([str(tmp_path / "in" / "part-*.txt")]).name == "part"
    assert open_documents([str(tmp_path / "in" / "*.txt")]).name == "in"


def test_several_sources_in_their_order_and_none_twice(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "a", "b.txt": "b", "c.txt": "c"})
    assert read(tmp_path / "b.txt", tmp_path / "a.txt", tmp_path / "b.txt", tmp_path) == ["b", "a", "c"]
    names = [str(tmp_path / f"{name}.txt") for name in "abc"]
    assert open_documents(names).name == "a+b+c"
    assert open_documents([*names, str(tmp_path)]).name == "a+3-more"


# --- what can be read once only -------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "expected"), [("one\ntwo\n", ["one\ntwo\n"]), (JSON_LINES, FROM_JSON)])
def test_standard_input(monkeypatch: pytest.MonkeyPatch, content: str, expected: list[str]) -> None:
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content.encode())))
    documents = open_documents(["-"])
    assert documents.name == "stdin"
    assert list(documents) == list(documents) == expected


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes there")
def test_a_named_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[b"emma\nava\n"])
    writer.start()
    documents = open_documents([str(tmp_path / "pipe")], per_line=True)
    writer.join()
    assert list(documents) == list(documents) == ["emma", "ava"]


def test_the_copy_of_standard_input_is_gone_afterwards(tmp_path: Path) -> None:
    code = (
        "import os; from gptlab.text.documents import open_documents; documents = open_documents(['-'])\n"
        "assert list(documents) == ['text'] and len(os.listdir(os.environ['TMPDIR'])) == 1"
    )
    command = [sys.executable, "-c", code]
    subprocess.run(command, input=b"text", check=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert not list(tmp_path.iterdir())


# --- names ----------------------------------------------------------------------------------------------------


def test_the_standard_library() -> None:
    documents = open_documents(["stdlib"])
    texts = list(documents)
    assert documents.name == "stdlib"
    assert len(texts) > 300
    assert Path(str(ast.__file__)).read_text(encoding="utf-8") in texts


def test_the_language_reference() -> None:
    texts = read("pydoc")
    assert 50 < len(texts) < 200
    assert sum(map(len, texts)) > 300_000
    assert any(text.startswith('The "for" statement\n') for text in texts)


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "position"),
    [(b"caf\xe9", 3), (b"a" * PIECE + b"\n\xff", PIECE + 1), (b"caf\xc3", 3)],
    ids=["one", "later", "end"],
)
def test_where_a_text_is_not_utf8_is_said(tmp_path: Path, content: bytes, position: int) -> None:
    path = write(tmp_path, {"a.txt": content}) / "a.txt"
    with pytest.raises(GptlabError, match=rf"a\.txt is not UTF-8 text \(byte {position}\); convert it"):
        read(path)


def test_a_character_across_two_chunks_is_counted_from_where_it_begins(tmp_path: Path) -> None:
    good = b"a" * (PIECE - 2) + "🌹".encode()
    write(tmp_path, {"good.txt": good, "bad.txt": good[:-1] + b"x"})
    assert read(tmp_path / "good.txt") == [good.decode()]
    with pytest.raises(GptlabError, match=rf"\(byte {PIECE - 2}\)"):
        read(tmp_path / "bad.txt")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("no json", "line 2 of .*a.jsonl is not a JSON object with a text"),
        ('{"txt": "a"}', "line 2 of .* is not a JSON object with a text"),
        ('{"text": 3}', "line 2 of .* is not a JSON object with a text"),
        ('["text"]', "line 2 of .* is not a JSON object with a text"),
        ("[" * 100_000, "line 2 of .* is not a JSON object with a text"),
        (r'{"text": "\ud800"}', r"line 2 of .*: the text holds a lone surrogate \(U\+D800\)"),
    ],
    ids=lambda value: value[:20],
)
def test_json_lines_that_are_none(tmp_path: Path, line: str, complaint: str) -> None:
    path = write(tmp_path, {"a.jsonl": json.dumps({"text": "a"}) + f"\n{line}\n"}) / "a.jsonl"
    with pytest.raises(GptlabError, match=complaint) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_json_lines_that_are_not_utf8(tmp_path: Path) -> None:
    first = '{"text": "é"}\n'.encode()
    path = write(tmp_path, {"a.jsonl": first + b'{"text": "\xe9"}'}) / "a.jsonl"
    with pytest.raises(GptlabError, match=rf"a\.jsonl is not UTF-8 text \(byte {len(first) + 10}\)"):
        read(path)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-10], lambda data: b"no gzip", lambda data: data[:20] + b"\0" * 20]
)
def test_damaged_gzip_files(tmp_path: Path, damage: object) -> None:
    content = gzip.compress(b"some text, again and again, " * 100)
    path = write(tmp_path, {"a.txt.gz": damage(content)}) / "a.txt.gz"  # type: ignore[operator]
    with pytest.raises(GptlabError, match=r"a\.txt\.gz is not an intact gzip file"):
        read(path)


def test_nothing_there(tmp_path: Path) -> None:
    write(tmp_path, {"empty/x.bin": b"1", "blank.txt": " \n\n<|endoftext|>\n", "none.txt": ""})
    for source, message in {
        "no/such/place": "no corpus at no/such/place; give a text file, a directory of them, '-', or one of stdlib",
        "stdlbi": r"no corpus at stdlbi \(did you mean 'stdlib'\?\)",
        str(tmp_path / "empty"): "holds no .txt, .md, .py or .jsonl file",
        str(tmp_path / "*.md"): r"no file matches .*\*\.md; check the pattern",
        str(tmp_path / "blank.txt"): "there is no text in blank; name another corpus",
        str(tmp_path / "none.txt"): "there is no text in none",
    }.items():
        for per_line in (False, True):
            with pytest.raises(GptlabError, match=message) as caught:
                read(source, per_line=per_line)
            assert "\n" not in str(caught.value)
    with pytest.raises(GptlabError, match="no corpus is named"):
        open_documents([])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, {"a.txt": "a"}) / "a.txt"

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)  # chmod would not stop root
    with pytest.raises(GptlabError, match=r"a\.txt cannot be read: Permission denied"):
        read(path)


def test_texts_in_memory() -> None:
    documents = documents_of("mine", iter(["a", "b" * 10]), items=True)
    assert isinstance(documents, Documents)
    assert (documents.name, documents.items) == ("mine", True)
    assert list(documents) == list(documents) == ["a", "b" * 10]
