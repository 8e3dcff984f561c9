import codecs
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.generation.continuation import Continuation
from gptlab.text.tokenizers import Tokenizer, byte_tokenizer

many = settings(max_examples=600, derandomize=True, deadline=None, database=None)


class Scripted(Tokenizer):
    """Token i stands for the i-th of some given bytes; one more id ends the text."""

    def __init__(self, *tokens):
        self.tokens = [token.encode() if isinstance(token, str) else token for token in tokens]
        self.end_of_text = len(tokens)
        self.vocab_size = len(tokens) + 1

    def _decode(self, ids):
        return b"".join(self.tokens[i] for i in ids)

    def _encode_ordinary(self, texts):
        raise NotImplementedError

    def files(self):
        raise NotImplementedError


def run(tokens, stop=(), finish="length"):
    """Feed the tokens one by one; return the pieces, the last from closing, and the continuation."""
    continuation = Continuation(Scripted(*tokens), stop)
    pieces = []
    for i in range(len(tokens)):
        pieces.append(continuation.add(i))
        if continuation.finish:
            return pieces, continuation
    return [*pieces, continuation.close(finish)], continuation


def test_each_token_is_given_out_at_once():
    pieces, continuation = run(["Hel", "lo", " ", "you"])
    assert pieces == ["Hel", "lo", " ", "you", ""]
    assert continuation.tokens == [0, 1, 2, 3]


@pytest.mark.parametrize("character", ["é", "東", "🦙"])
def test_a_character_in_several_tokens_appears_whole(character):
    *head, last = [bytes([b]) for b in character.encode()]
    pieces, _ = run(["a", *head, last + b"b"])
    assert pieces == ["a", *[""] * len(head), character + "b", ""]


def test_a_family_of_emoji_in_bytes():
    text = "naïve 👩‍👩‍👧 東京\n"
    tokenizer = byte_tokenizer()
    continuation = Continuation(tokenizer)
    pieces = [continuation.add(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)


def test_bytes_that_are_no_utf8_are_replaced():
    assert run([b"a\xff", b"b\xe6", b"c", b"\xf0\x9f"])[0] == ["a\ufffd", "b", "\ufffdc", "", "\ufffd"]


def test_a_stop_string_across_tokens_is_never_seen():
    pieces, continuation = run(["one E", "N", "D two"], ["END"])
    assert pieces == ["one ", "", ""]
    assert (continuation.text, continuation.finish) == ("one ", "stop")


def test_a_stop_string_inside_one_token():
    pieces, continuation = run(["ab", "c\n\nd", "e"], ["\n\n"])
    assert pieces == ["ab", "c"]
    assert continuation.tokens == [0, 1]  # all that were drawn for the text, the last one partly shown


def test_a_stop_string_at_the_very_beginning_gives_no_text():
    assert run(["\n", "\n", "x"], ["\n\n"])[0] == ["", ""]


def test_the_earliest_of_several_stop_strings_counts():
    assert run(["a", "b-c.d", "e"], [".", "-", "zzz"])[1].text == "ab"
    assert run(["x STO", "P! y"], ["P!", "STOP"])[1].text == "x "


def test_a_stop_string_of_several_bytes_cut_inside_a_character():
    llama = "🦙".encode()
    pieces, continuation = run([b"a" + llama[:2], llama[2:] + b"b"], ["🦙"])
    assert (pieces, continuation.finish) == (["a", ""], "stop")


def test_what_could_have_been_a_stop_string_is_given_out_when_it_is_none():
    assert run(["EN", "EN", "x"], ["END"])[0] == ["", "EN", "ENx", ""]


def test_overlapping_beginnings_of_a_stop_string():
    pieces, continuation = run(["a", "a", "a", "b", "c"], ["aab"])
    assert pieces == ["", "", "a", ""]
    assert (continuation.text, continuation.finish) == ("a", "stop")


@pytest.mark.parametrize("finish", ["length", "context"])
def test_what_was_held_back_is_given_out_at_the_end(finish):
    pieces, continuation = run(["abc", "EN"], ["END"], finish)
    assert pieces == ["abc", "", "EN"]
    assert (continuation.text, continuation.finish) == ("abcEN", finish)


def test_the_end_of_text_gives_out_what_was_held_back():
    continuation = Continuation(Scripted("abEN", b"\xe6"), ["END"])
    assert [continuation.add(0), continuation.add(1), continuation.add(2)] == ["ab", "", "EN\ufffd"]
    assert (continuation.text, continuation.finish, continuation.tokens) == ("abEN\ufffd", "end_of_text", [0, 1])


def test_a_text_ends_once_only():
    _, continuation = run(["a.b"], ["."])
    assert continuation.close("length") == ""
    assert (continuation.text, continuation.finish) == ("a", "stop")


def test_a_tokenizer_without_an_end_of_text_goes_on():
    tokenizer = Scripted("a", "b")
    tokenizer.end_of_text = None
    continuation = Continuation(tokenizer)
    assert [continuation.add(1), continuation.add(0)] == ["b", "a"]
    assert continuation.finish is None


# Few letters, so that stop strings are met, and cut characters of two, three and four bytes.
pieces_of_text = st.lists(
    st.one_of(st.sampled_from([b"a", b"b", b"ab", b"ba", b"aab", "é東🦙".encode()]), st.binary(max_size=3)).filter(
        bool
    ),
    max_size=14,
)
stop_words = st.lists(st.text("abé🦙", min_size=1, max_size=4), max_size=3)


@many
@given(text=st.text(st.sampled_from("abé東🦙\n"), max_size=12), data=st.data())
def test_any_cut_of_a_text_gives_the_text(text, data):
    whole = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)))) | {0, len(whole)})
    pieces, continuation = run([whole[a:b] for a, b in itertools.pairwise(cuts)])
    assert "".join(pieces) == continuation.text == text


@many
@given(tokens=pieces_of_text, stop=stop_words)
def test_pieces_joined_are_the_text_up_to_the_first_stop_string(tokens, stop):
    pieces, continuation = run(tokens, stop)
    assert "".join(pieces) == continuation.text
    assert not any(word in continuation.text for word in stop)

    # Told from the whole text at once: the first token that completes a stop string ends it.
    n = len(continuation.tokens)
    so_far = b"".join(tokens[:n]).decode(errors="replace")
    if continuation.finish == "stop":
        ends = [so_far.find(word) for word in stop if word in so_far]
        assert continuation.text == so_far[: min(ends)]
        before = codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(tokens[: n - 1]))
        assert not any(word in before for word in stop)
    else:
        assert (continuation.finish, n) == ("length", len(tokens))
        assert continuation.text == so_far
