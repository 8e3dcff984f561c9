import hashlib
import itertools
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.errors import GptlabError
from gptlab.text.tokenizers import (
    END_OF_TEXT,
    KINDS,
    FileTokenizer,
    GPT2Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    gpt2_vocab,
    make_tokenizer,
    read_tokenizer,
    train_bpe,
)

CORPUS = ["the cat sat on the mat, the cat's mat; they'll sit\n" * 20, "  naïve café 東京 🙂 1234\n\n" * 10]

# What regular expressions disagree about: separators that Python calls white space and Unicode does not
# (\x1c-\x1f), the reverse, former white space (\u180e), look-alikes (\u200b, \ufeff), and contractions.
ODD = (
    *("\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\xa0", "\u1680", "\u180e", "\u2003", "\u200b", "\u2028", "\u2029"),
    *("\u202f", "\u205f", "\u3000", "\ufeff", " ", "  ", "\t", "\n", "\r\n", "\v", "\f", "\0", "\x7f", "\xad"),
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "’s", "'", "e\u0301", "\u0300", "👩‍👩‍👧", "🇩🇪", "ß", "İ"),
    *("½", "Ⅷ", "٣", "漢", "ﬁ", "\U000e0001", "\U0010ffff", "\ufffd", "\uffff", "!!", "...", "_", END_OF_TEXT),
)
unicode_text = st.lists(
    st.one_of(st.sampled_from(ODD), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), max_size=20
).map("".join)
many = settings(max_examples=400, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module")
def gpt2():
    return GPT2Tokenizer()


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(CORPUS, 290)


@pytest.fixture(scope="module")
def all_kinds(gpt2, bpe):
    return {"gpt2": gpt2, "bytes": byte_tokenizer(), "chars": char_tokenizer(CORPUS), "bpe": bpe}


@pytest.fixture(scope="module")
def judge(gpt2, tmp_path_factory):
    """transformers' GPT-2 tokenizer, made from the files that ours saves."""
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2Tokenizer.from_pretrained(str(save(gpt2, tmp_path_factory.mktemp("gpt2"))))


@pytest.fixture(scope="module")
def judge_ids(judge):
    """Text -> ids by the outside tokenizer, with special tokens read as text."""
    engine = judge.backend_tokenizer
    engine.encode_special_tokens = True
    yield lambda text: engine.encode(text, add_special_tokens=False).ids
    engine.encode_special_tokens = False


def save(tokenizer, directory, names=None):
    for name, content in tokenizer.files().items():
        if names is None or name in names:
            (directory / name).write_bytes(content)
    return directory


# --- GPT-2's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("Hello, my name is", [15496, 11, 616, 1438, 318]),
        ("The dog", [464, 3290]),
        (
            "The dog was found in a field near the intersection of West and West Streets.",
            [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13],
        ),
        ("\n\nThe dog", [198, 198, 464, 3290]),
    ],
)
def test_gpt2_known_ids(gpt2, text, ids):
    assert gpt2.encode(text) == ids
    assert gpt2.decode(ids) == text


def test_gpt2_sizes(gpt2):
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)


def test_gpt2_files_are_openais(gpt2):
    files = gpt2.files()
    assert hashlib.sha256(files["merges.txt"]).hexdigest() == (
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    )
    # encoder.json is not shipped: the table made from the merges has its very bytes.
    assert hashlib.sha256(files["vocab.json"]).hexdigest() == (
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    )


@many
@given(text=unicode_text)
def test_gpt2_equals_the_outside_tokenizer(gpt2, judge_ids, text):
    assert gpt2.encode(text) == judge_ids(text)


@many
@given(texts=st.lists(unicode_text, max_size=4))
def test_gpt2_batch_equals_one_by_one(gpt2, texts):
    assert gpt2.encode_batch(texts) == [gpt2.encode(text) for text in texts]


@many
@given(ids=st.lists(st.integers(0, 50256), max_size=30))
def test_gpt2_decodes_any_ids_as_the_outside_tokenizer(gpt2, judge, ids):
    assert gpt2.decode(ids) == judge.decode(ids, clean_up_tokenization_spaces=False)


def shared_texts(shared):
    if not (shared / "data").is_dir():
        pytest.skip("shared/data is absent")
    return sorted(path for path in (shared / "data").iterdir() if path.suffix in (".txt", ".jsonl"))


def test_gpt2_on_real_files_equals_the_outside_tokenizer(gpt2, judge_ids, shared):
    for path in shared_texts(shared):
        text = path.read_text(encoding="utf-8")[:4_000_000]
        assert gpt2.encode(text) == judge_ids(text), path.name


@pytest.mark.slow
def test_gpt2_on_the_whole_of_wikipedia_equals_the_outside_tokenizer(gpt2, judge_ids, shared):
    for path in shared_texts(shared):
        # By documents: the outside tokenizer keeps some hundred bytes for each token of one text.
        for document in path.read_text(encoding="utf-8").split(f"{END_OF_TEXT}\n"):
            assert gpt2.encode(document) == judge_ids(document), (path.name, document[:80])


# --- very long runs ------------------------------------------------------------------------------------------

LIMIT = 20_000  # from this length on, runs of white space are cut out before tiktoken sees them
RUNS = (" ", "\n", "\t ", " \n", "\n ", "\r\n", "\x85", "\u3000 ", " \u2028")
BEFORE = ("", "a", "it's", "7", "!", "\x1c", " x", "<|endoftext|>")
AFTER = ("", "a", "7", "!", "'s", "\x1c", "\u180e", "\u200bz", "é", "x  y", "<|endoftext|>")


@pytest.mark.parametrize("run", RUNS, ids=ascii)
def test_cutting_long_white_space_changes_no_id(gpt2, judge_ids, run):
    for i, (before, after) in enumerate(itertools.product(BEFORE, AFTER)):
        n = LIMIT + i % 3 - 1
        text = before + (run * n)[:n] + after
        ids = gpt2.encode(text)
        # tiktoken alone manages runs up to about 100,000.
        assert ids == gpt2._encoding.encode_ordinary(text), (before, after, n)
        assert ids == judge_ids(text), (before, after, n)


def test_several_long_runs_in_one_text_and_batch(gpt2, judge_ids):
    run = " " * LIMIT
    texts = [f"a{run}b\n{run}\n{run}!{run}", "short", run, f"{run}\u3000c", f"{run}\x1c{run}"]
    assert gpt2.encode_batch(texts) == [judge_ids(text) for text in texts]


def test_the_end_of_a_document_after_a_long_run(gpt2):
    run = " " * LIMIT
    ids = gpt2.encode(f"a{run}{END_OF_TEXT}{run}b", special=True)
    assert ids == [*gpt2.encode("a" + run), gpt2.end_of_text, *gpt2.encode(run + "b")]


LONG = {
    "spaces": " ",
    "letter": "a",
    "newlines": "\n",
    "marks": "!",
    "wide spaces": "\u3000",
    "emoji": "🙂",
}


def check_long(tokenizer, unit, size, seconds):
    for text in (unit * size, unit * size + "word"):
        start = time.process_time()
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert time.process_time() - start < seconds
        # A wrong cut would show at the border: this is how the same text ends when it is short.
        assert ids[-1] == tokenizer.encode(unit * 4096 + text[size:])[-1]


@pytest.mark.parametrize("unit", LONG.values(), ids=LONG)
def test_a_million_equal_characters(gpt2, unit):
    check_long(gpt2, unit, 1_000_000, seconds=6)


@pytest.mark.slow
@pytest.mark.parametrize("unit", LONG.values(), ids=LONG)
def test_ten_million_equal_characters(gpt2, unit):
    check_long(gpt2, unit, 10_000_000, seconds=60)


@pytest.mark.parametrize("unit", [" ", "a", "\n", "!"], ids=ascii)
def test_a_trained_vocabulary_takes_long_runs_too(bpe, unit):
    text = unit * 300_000 + "word"
    assert bpe.decode(bpe.encode(text)) == text


# --- every kind ----------------------------------------------------------------------------------------------


@many
@given(text=unicode_text)
def test_decode_gives_the_text_back(all_kinds, text):
    for kind in ("gpt2", "bytes", "bpe"):
        assert all_kinds[kind].decode(all_kinds[kind].encode(text)) == text


@many
@given(text=unicode_text)
def test_bytes_are_bytes(all_kinds, text):
    assert all_kinds["bytes"].vocab_size == 257
    assert all_kinds["bytes"].encode(text) == list(text.encode())


@many
@given(text=unicode_text.filter(bool))
def test_characters_are_characters(text):
    tokenizer = char_tokenizer([text])
    ids = tokenizer.encode(text)
    table = sorted(set(text))
    assert ids == [table.index(c) for c in text]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (len(table), len(table) + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["\ud800", "ab\udfffcd", "\ude00\ud83d"], ids=ascii)
def test_lone_surrogates_are_refused_in_words(all_kinds, kind, text):
    with pytest.raises(GptlabError, match=r"lone surrogate \(U\+D[0-9A-F]{3}\) at character [02]"):
        all_kinds[kind].encode(text)


@pytest.mark.parametrize("kind", ["chars", "bpe"])
def test_lone_surrogates_are_refused_in_training_texts(kind):
    with pytest.raises(GptlabError, match="lone surrogate"):
        make_tokenizer(kind, ["fine", "\ud800"], 300)


@pytest.mark.parametrize("kind", KINDS)
def test_end_of_text_in_a_text_is_text_unless_asked(all_kinds, kind):
    tokenizer = char_tokenizer([END_OF_TEXT, "ab"]) if kind == "chars" else all_kinds[kind]
    text = f"a{END_OF_TEXT}{END_OF_TEXT}b"
    plain = tokenizer.encode(text)
    assert tokenizer.end_of_text not in plain
    assert tokenizer.decode(plain) == text
    (a,), (b,), end = tokenizer.encode("a"), tokenizer.encode("b"), tokenizer.end_of_text
    assert tokenizer.encode(text, special=True) == [a, end, end, b]
    assert tokenizer.encode_batch([text, "a", END_OF_TEXT], special=True) == [[a, end, end, b], [a], [end]]
    assert tokenizer.decode([a, end, b]) == f"a{END_OF_TEXT}b"


def test_special_tokens_equal_the_outside_tokenizers(gpt2, judge):
    text = f"one {END_OF_TEXT} two{END_OF_TEXT}\n"
    assert gpt2.encode(text, special=True) == judge(text).input_ids


def test_special_without_such_a_token_is_refused():
    from tokenizers import Tokenizer, models

    tokenizer = FileTokenizer(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    assert tokenizer.end_of_text is None
    with pytest.raises(GptlabError, match=r"no <\|endoftext\|> token"):
        tokenizer.encode("a", special=True)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_outside_the_vocabulary_are_refused(all_kinds, kind):
    tokenizer = all_kinds[kind]
    for token in (-1, tokenizer.vocab_size, 2**40):
        with pytest.raises(GptlabError, match=f"token id {token} is outside the vocabulary of {tokenizer.vocab_size}"):
            tokenizer.decode([0, token])
    assert tokenizer.decode([]) == ""
    assert all(tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size))


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "bpe"])
def test_a_token_may_hold_part_of_a_character(all_kinds, kind):
    tokenizer = all_kinds[kind]
    ids = tokenizer.encode("🦙")
    assert len(ids) > 1
    assert "\ufffd" in tokenizer.decode(ids[:1])
    assert b"".join(tokenizer.decode_bytes([token]) for token in ids) == "🦙".encode()


def test_an_unknown_character_is_named(all_kinds):
    with pytest.raises(GptlabError, match="the character 'Q' is not among the"):
        all_kinds["chars"].encode("the Q")


def test_characters_of_nothing_are_refused():
    with pytest.raises(GptlabError, match="no text to take characters from"):
        char_tokenizer(["", ""])


def test_an_unknown_kind_is_answered_with_the_nearest():
    with pytest.raises(GptlabError, match=r"unknown tokenizer 'byte'.*did you mean 'bytes'.*gpt2, bytes, chars, bpe"):
        make_tokenizer("byte")


@pytest.mark.parametrize("kind", KINDS)
def test_made_by_name(all_kinds, kind):
    made = make_tokenizer(kind, CORPUS, 290)
    assert made.files() == all_kinds[kind].files()


# --- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [257, 258, 290, 300])
def test_a_trained_vocabulary_has_exactly_the_size_asked_for(vocab_size):
    tokenizer = train_bpe(CORPUS, vocab_size)
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.end_of_text == vocab_size - 1


def test_a_text_too_small_gives_fewer_ids():
    tokenizer = train_bpe(["abab"], 5000)
    assert 257 < tokenizer.vocab_size < 265
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1


def test_training_is_repeatable_and_compresses(bpe):
    assert train_bpe(CORPUS, 290).files() == bpe.files()
    assert len(bpe.encode(CORPUS[0])) < len(CORPUS[0]) / 2


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(GptlabError, match="at least 257 entries, got 256"):
        train_bpe(CORPUS, 256)


# --- on disk -------------------------------------------------------------------------------------------------

SAMPLE = "the cat's mat\n  they'll 1234 sit"


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_read_back_the_same(all_kinds, kind, tmp_path):
    tokenizer = all_kinds[kind]
    back = read_tokenizer(save(tokenizer, tmp_path))
    assert type(back) is type(tokenizer)
    assert (back.vocab_size, back.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert back.files() == tokenizer.files()
    for text in (*CORPUS, SAMPLE, ""):
        assert back.encode(text) == tokenizer.encode(text)
    every = range(tokenizer.vocab_size)
    assert [back.decode_bytes([i]) for i in every] == [tokenizer.decode_bytes([i]) for i in every]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_file_too(all_kinds, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = all_kinds[kind]
    path = save(tokenizer, tmp_path, ["tokenizer.json"]) / "tokenizer.json"
    outside = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert len(outside) == tokenizer.vocab_size
    for text in (*CORPUS, SAMPLE):
        ids = tokenizer.encode(text)
        assert outside(text, add_special_tokens=False).input_ids == ids
        assert outside.decode(ids, clean_up_tokenization_spaces=False) == text


def test_vocab_and_merges_alone_are_enough_for_gpt2(gpt2, tmp_path):
    back = read_tokenizer(save(gpt2, tmp_path, ["vocab.json", "merges.txt"]))
    assert isinstance(back, GPT2Tokenizer)


def test_vocab_and_merges_alone_are_enough_for_any_other(bpe, tmp_path):
    model = json.loads(bpe.files()["tokenizer.json"])["model"]
    (tmp_path / "vocab.json").write_text(json.dumps({**model["vocab"], END_OF_TEXT: bpe.end_of_text}))
    merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    back = read_tokenizer(tmp_path)
    assert (back.vocab_size, back.end_of_text) == (bpe.vocab_size, bpe.end_of_text)
    for text in (*CORPUS, SAMPLE, END_OF_TEXT):
        assert back.encode(text) == bpe.encode(text)


def test_what_transformers_saves_for_gpt2_is_recognised(judge, gpt2, tmp_path):
    judge.save_pretrained(tmp_path)
    back = read_tokenizer(tmp_path)
    assert isinstance(back, GPT2Tokenizer)
    assert back.files() == gpt2.files()


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"normalizer": {"type": "Lowercase"}},
    ],
    ids=["prefix space", "no splitting", "lower case"],
)
def test_what_only_resembles_gpt2_is_not_taken_for_it(gpt2, tmp_path, change):
    from tokenizers import Tokenizer

    values = {**json.loads(gpt2.files()["tokenizer.json"]), **change}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    text = "Hello, My name is !'s"
    expected = Tokenizer.from_str(json.dumps(values)).encode(text).ids
    assert expected != gpt2.encode(text)
    assert read_tokenizer(tmp_path).encode(text) == expected


def test_padding_and_truncation_saved_with_a_tokenizer_do_not_touch_the_text(bpe, tmp_path):
    from tokenizers import Tokenizer

    engine = Tokenizer.from_str(bpe.files()["tokenizer.json"].decode())
    engine.enable_truncation(4)
    engine.enable_padding(length=50)
    engine.save(str(tmp_path / "tokenizer.json"))
    back = read_tokenizer(tmp_path)
    assert back.encode_batch([SAMPLE, "a"]) == bpe.encode_batch([SAMPLE, "a"])


def test_no_tokenizer_is_none(gpt2, tmp_path):
    assert read_tokenizer(tmp_path) is None
    assert read_tokenizer(save(gpt2, tmp_path, ["vocab.json"])) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{}",
        b"[]",
        b"null",
        b'{"model": 3}',
        b"\xff\xfe\x00",
        b'{"model": {"type": "BPE"}}',
        b"version https",
    ],
)
def test_a_damaged_tokenizer_json_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(GptlabError) as caught:
        read_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_tokenizer_json_is_refused(bpe, tmp_path):
    content = bpe.files()["tokenizer.json"]
    for cut in range(1, len(content), len(content) // 20):
        (tmp_path / "tokenizer.json").write_bytes(content[:cut])
        with pytest.raises(GptlabError, match="cannot be read"):
            read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("vocab", "merges"),
    [
        ("{", "#version: 0.2\na b\n"),
        ("[]", "#version: 0.2\na b\n"),
        ('{"a": 0}', "#version: 0.2\na b\n"),
        ('{"a": 0, "b": 1, "ab": 2}', "#version: 0.2\na b c\n"),
        ('{"a b": 0}', "#version: 0.2\n"),
    ],
    ids=["broken json", "a list", "missing tokens", "three in a line", "not byte-level"],
)
def test_damaged_vocab_and_merges_are_refused(tmp_path, vocab, merges):
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(GptlabError, match="cannot be read") as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_tokens_that_do_not_say_their_bytes_are_refused(tmp_path):
    from tokenizers import Tokenizer, decoders, models

    engine = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}))
    engine.decoder = decoders.WordPiece()
    engine.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(GptlabError, match="WordPiece decoder is not supported; GPT-2's is ByteLevel"):
        read_tokenizer(tmp_path)


def test_the_vocabulary_is_a_bijection():
    assert sorted(gpt2_vocab().values()) == list(range(50257))
