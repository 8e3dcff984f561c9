import ast
import hashlib

import pytest

from gptlab.errors import GptlabError
from gptlab.text.corpora import Corpus, read_corpus

TEXTS = tuple(f"document {i}\n" for i in range(300))


def write(directory, files):
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(directory)


# --- reading -------------------------------------------------------------------------------------------------


def test_a_file_is_one_document(tmp_path):
    write(tmp_path, {"poem.txt": "rose\nnaïve 🌹\n"})
    corpus = read_corpus(str(tmp_path / "poem.txt"))
    assert corpus == Corpus("poem", ("rose\nnaïve 🌹\n",))
    assert corpus.n_bytes == len("rose\nnaïve 🌹\n".encode())


def test_lines_of_end_of_text_separate_documents(tmp_path):
    text = "one\n<|endoftext|>\ntwo <|endoftext|> of two\n\n<|endoftext|>\n<|endoftext|>\n \n<|endoftext|>\nlast"
    write(tmp_path, {"a.txt": text})
    # Only a line of its own separates; documents without any text are left out.
    assert read_corpus(str(tmp_path / "a.txt")).documents == ("one\n", "two <|endoftext|> of two\n\n", "last")


@pytest.mark.parametrize("end", ["", "\n", "\r\n"], ids=ascii)
def test_a_separator_may_be_the_last_line(tmp_path, end):
    write(tmp_path, {"a.txt": "one\n<|endoftext|>\ntwo\n<|endoftext|>" + end})
    assert read_corpus(str(tmp_path / "a.txt")).documents == ("one\n", "two\n")


def test_a_line_that_only_ends_with_the_separator_is_text(tmp_path):
    write(tmp_path, {"a.txt": "see <|endoftext|>\n<|endoftext|>!\n"})
    assert read_corpus(str(tmp_path / "a.txt")).documents == ("see <|endoftext|>\n<|endoftext|>!\n",)


def test_a_directory_gives_its_texts_in_the_order_of_their_names(tmp_path):
    files = {"b.txt": "b", "a/z.md": "z", "c.py": "c\n<|endoftext|>\nd", "a/empty.txt": "", "x.bin": b"\xff"}
    corpus = read_corpus(write(tmp_path / "texts", files))
    assert corpus == Corpus("texts", ("z", "b", "c\n", "d"))


def test_a_directory_may_be_named_by_a_dot(tmp_path, monkeypatch):
    write(tmp_path / "texts", {"a.txt": "a"})
    monkeypatch.chdir(tmp_path / "texts")
    assert read_corpus(".") == Corpus("texts", ("a",))


def test_the_standard_library():
    corpus = read_corpus("stdlib")
    assert corpus.name == "stdlib"
    assert len(corpus.documents) > 300
    assert corpus.n_bytes > 5_000_000
    with open(ast.__file__, encoding="utf-8") as file:
        assert file.read() in corpus.documents


def test_refusals(tmp_path):
    write(tmp_path, {"empty/x.bin": b"1", "latin.txt": b"caf\xe9", "blank.txt": " \n\n<|endoftext|>\n"})
    for source, message in {
        "no/such/place": "no corpus at no/such/place; give a text file, a directory of them, or 'stdlib'",
        str(tmp_path / "empty"): "holds no .txt, .md or .py file",
        str(tmp_path / "latin.txt"): r"latin.txt is no UTF-8 text \(byte 3\)",
        str(tmp_path / "blank.txt"): "there is no text in .*blank.txt",
        str(tmp_path): "latin.txt is no UTF-8 text",  # one bad file of a directory is not skipped silently
    }.items():
        with pytest.raises(GptlabError, match=message) as caught:
            read_corpus(source)
        assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": "a"})

    def refuse(self, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "read_text", refuse)  # chmod would not stop root
    with pytest.raises(GptlabError, match=r"a\.txt cannot be read: Permission denied"):
        read_corpus(str(tmp_path / "a.txt"))


# --- hash ----------------------------------------------------------------------------------------------------


def test_the_hash_depends_on_texts_order_and_borders_only():
    corpus = Corpus("a", ("ab", "c"))
    expected = hashlib.sha256(hashlib.sha256(b"ab").digest() + hashlib.sha256(b"c").digest()).hexdigest()
    assert corpus.sha256 == expected == Corpus("other name", ("ab", "c")).sha256
    others = [("a", "bc"), ("c", "ab"), ("abc",), ("ab", "c", ""), ("ab", "C")]
    assert len({expected, *(Corpus("a", documents).sha256 for documents in others)}) == 1 + len(others)


# --- split ---------------------------------------------------------------------------------------------------


def test_a_split_parts_the_documents_and_keeps_their_order():
    training, held_out = Corpus("c", TEXTS).split(0.1)
    assert (training.name, held_out.name) == ("c", "c (held out)")
    assert sorted(training.documents + held_out.documents) == sorted(TEXTS)
    for part in (training.documents, held_out.documents):
        assert list(part) == sorted(part, key=TEXTS.index)
    assert 15 <= len(held_out.documents) <= 45  # 30 expected, standard deviation 5


def test_added_documents_move_none_to_the_other_side():
    small, large = Corpus("c", TEXTS[:100]).split(0.1), Corpus("c", TEXTS).split(0.1)
    for fewer, more in zip(small, large, strict=True):
        assert set(fewer.documents) < set(more.documents)


def test_a_larger_share_holds_out_more_of_the_same():
    few, many = (set(Corpus("c", TEXTS).split(share)[1].documents) for share in (0.05, 0.3))
    assert few < many


def test_equal_documents_stay_on_one_side():
    training, held_out = Corpus("c", TEXTS[:50] * 3).split(0.2)
    assert not set(training.documents) & set(held_out.documents)
    assert len(training.documents) + len(held_out.documents) == 150


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.5, 0.999999, 1.0])
def test_two_documents_always_give_one_to_each_part(share):
    for i in range(0, 40, 2):
        training, held_out = Corpus("c", TEXTS[i : i + 2]).split(share)
        assert {*training.documents, *held_out.documents} == set(TEXTS[i : i + 2])
        assert len(training.documents) == len(held_out.documents) == 1


def test_a_single_document_is_cut_at_the_end_of_a_line():
    text = "".join(f"line {i}\n" for i in range(100))
    training, held_out = Corpus("c", (text,)).split(0.1)
    (first,), (last,) = training.documents, held_out.documents
    assert first + last == text
    assert first.endswith("\n")
    assert 0 <= 0.9 * len(text) - len(first) < len("line 99\n")


def test_copies_count_once_when_one_text_must_stay():
    for documents in (("a", "b", "b"), ("a", "a", "b")):
        training, held_out = Corpus("c", documents).split(1.0)
        assert set(training.documents) | set(held_out.documents) == {"a", "b"}


@pytest.mark.parametrize("documents", [("no line ends here",), ("a",), ("a\n",), ("same", "same")])
def test_too_little_text_to_split_is_refused(documents):
    with pytest.raises(GptlabError, match="the corpus tale is too short to hold a part of it out; add text"):
        Corpus("tale", documents).split(0.5)
