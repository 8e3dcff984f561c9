# Protocols: known answers of a model that knows nothing, and a trained one judged by `transformers`.
from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from helpers.theirs import at_once, by_windows, small, theirs
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Engine

import gptlab
from gptlab import GPT, GptlabError, ModelConfig
from gptlab.evaluation import detokenizers, texts
from gptlab.evaluation.lambada import STOP_WORDS
from gptlab.evaluation.pairs import encode_pair
from gptlab.evaluation.paper import TABLE_3
from gptlab.evaluation.scoring import Result
from gptlab.evaluation.tasks import TASKS, evaluate, protocol_of
from gptlab.text.tokenizers import FileTokenizer, Tokenizer, byte_tokenizer, char_tokenizer
from gptlab.verification import known_text

ITEMS = Path(__file__).parent / "hellaswag_items.jsonl"
V = 257


@pytest.fixture(scope="module")
def even() -> GPT:
    """All weights 0: every token is as likely as any other."""
    model = GPT(ModelConfig.preset("tiny", vocab_size=V)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.fixture(scope="module")
def trained() -> tuple[GPT, Tokenizer, transformers.GPT2LMHeadModel]:
    lm = gptlab.load("pocket")
    return lm.model, lm.needs_tokenizer(), theirs(lm.model)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def file(text: str) -> Path:
        path = tmp_path / "file"
        path.write_text(text, encoding="utf-8")
        return path

    return file


def nats(result: Result) -> float:
    return sum(score.nats for score in result.scores)


# --- text -----------------------------------------------------------------------------------------------------


def test_text_by_a_model_that_knows_nothing(even: GPT, write: Callable[[str], Path]) -> None:
    documents = ["naïve café\n", "two  words\n", "a"]
    path = write("<|endoftext|>\n".join(documents))
    result = evaluate(even, byte_tokenizer(), f"text:{path}", name="even")
    n_bytes = sum(len(document.encode()) for document in documents)  # each is a token of this tokenizer
    assert result.metrics == pytest.approx(
        {
            "nats_per_token": math.log(V),
            "token_perplexity": V,
            "word_perplexity": V ** (n_bytes / 5),
            "bits_per_byte": math.log2(V),
        }
    )
    assert [(score.tokens, score.words, score.bytes) for score in result.scores] == [
        (13, 2, 13),
        (11, 2, 11),
        (1, 1, 1),
    ]
    assert result.settings == {"context": 64, "dtype": "float32", "limit": None, "stride": 64}
    assert result.model["name"] == "even"
    assert result.model["parameters"] == sum(p.numel() for p in even.parameters())
    json.dumps(result.to_dict(), allow_nan=False)


def test_each_document_begins_with_the_end_of_text(write: Callable[[str], Path]) -> None:
    model, tokenizer = small(), byte_tokenizer()
    judge = theirs(model)
    documents = [f"document {i}" * (i % 3 + 1) for i in range(texts.FEW)]
    path = write("\n<|endoftext|>\n".join(documents))
    result = evaluate(model, tokenizer, f"text:{path}")
    assert len(result.scores) == texts.FEW
    for score, document in zip(result.scores, [*(d + "\n" for d in documents[:-1]), documents[-1]], strict=True):
        logprobs = at_once(judge, [256, *document.encode()])
        assert score.nats == pytest.approx(-logprobs.sum().item(), abs=1e-4)
        assert (score.tokens, score.words, score.bytes) == (len(logprobs), len(document.split()), len(document))


def test_a_tokenizer_without_end_of_text_leaves_the_first_token_out(even: GPT, write: Callable[[str], Path]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.end_of_text = None
    result = evaluate(even, tokenizer, f"text:{write('some text')}")
    assert [(score.tokens, score.bytes) for score in result.scores] == [(8, 8)]
    assert result.metrics["bits_per_byte"] == pytest.approx(math.log2(V))
    with pytest.raises(GptlabError, match="a single token"):
        evaluate(even, tokenizer, f"text:{write('x')}")


def test_a_long_document_is_scored_in_parts(
    trained: tuple[GPT, Tokenizer, object], write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, _ = trained
    text = known_text() + " naïve café \N{SNOWMAN}"
    path = write(text)
    monkeypatch.setattr(texts, "FEW", 0)
    whole = evaluate(model, tokenizer, f"text:{path}")
    monkeypatch.setattr(texts, "FEW", 20)
    monkeypatch.setattr(texts, "PART", 100)
    parts = evaluate(model, tokenizer, f"text:{path}")
    assert len(whole.scores) == 1
    assert len(parts.scores) == math.ceil(len(text.encode()) / 100)
    assert parts.metrics == pytest.approx(whole.metrics)
    for name in ("tokens", "words", "bytes"):
        assert sum(getattr(score, name) for score in parts.scores) == getattr(whole.scores[0], name)
    assert all(score.bytes == 100 for score in parts.scores[:-1])
    # A token belongs where its first byte is.
    starts, at = [], 0
    for token in tokenizer.encode(text):
        starts.append(at)
        at += len(tokenizer.decode_bytes([token]))
    assert [score.tokens for score in parts.scores[:3]] == [sum(s // 100 == i for s in starts) for i in range(3)]
    # Parts are the same for every tokenizer.
    by_byte = evaluate(small(), byte_tokenizer(), f"text:{path}")
    assert [s.bytes for s in by_byte.scores] == [s.bytes for s in parts.scores]
    assert [s.words for s in by_byte.scores] == [s.words for s in parts.scores]


@pytest.fixture(scope="module")
def odd() -> dict[str, Tokenizer]:
    """Tokenizers whose tokens are not the bytes of the text: an unknown one in their place, ids with holes, a space."""
    characters = {c: 7 * i for i, c in enumerate("\u0120\u010aabcdeglo,.")}
    found: dict[str, Tokenizer] = {}
    for name, space in (("unknown", False), ("unknown and a space in front", True)):
        engine = Engine(models.BPE({**characters, "<unk>": 95}, [], unk_token="<unk>"))
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)
        engine.decoder = decoders.ByteLevel()
        engine.add_special_tokens([AddedToken("<unk>", special=True)])
        found[name] = FileTokenizer(engine)
    vocabulary = {c: 2 * i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    engine = Engine(models.BPE(vocabulary, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    found["holes"] = FileTokenizer(engine)
    return found


@pytest.mark.parametrize("name", ["unknown", "unknown and a space in front", "holes"])
@pytest.mark.parametrize("text", ["éa", "a cold égg, a good bed.\n" * 9 + "東京" * 40, "東京" * 60 + " a"])
@pytest.mark.parametrize("start", [None, 14])
def test_parts_where_tokens_are_not_the_bytes_of_the_text(
    odd: dict[str, Tokenizer],
    name: str,
    text: str,
    start: int | None,
    write: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the parts hold is what the whole holds, and no part has less than nothing."""
    tokenizer = copy.copy(odd[name])
    tokenizer.set_borders(end_of_text=start, start=start, ends=[])
    model, path = small(vocab_size=600, context_length=512), write(text)
    ids = tokenizer.encode(text)
    monkeypatch.setattr(texts, "PART", 50)
    parts = evaluate(model, tokenizer, f"text:{path}").scores
    logprobs = at_once(theirs(model), [*([] if start is None else [start]), *ids])
    assert len(parts) == math.ceil(len(text.encode()) / 50)
    assert sum(score.nats for score in parts) == pytest.approx(-logprobs.sum().item(), abs=1e-3)
    assert sum(score.tokens for score in parts) == len(logprobs)
    assert sum(score.words for score in parts) == len(text.split())
    assert all(0 <= score.bytes <= 50 for score in parts)
    if start is not None:
        assert sum(score.bytes for score in parts) == len(text.encode())
    assert sum(score.bytes for score in parts) > 0


def test_the_token_from_which_a_document_is_read_is_named(even: GPT, write: Callable[[str], Path]) -> None:
    tokenizer = byte_tokenizer()
    path = write("some text")
    assert evaluate(even, tokenizer, f"text:{path}").data["from"] == "<|endoftext|>"
    tokenizer.set_borders(end_of_text=256, start=ord("^"), ends=[256])
    assert evaluate(even, tokenizer, f"text:{path}").data["from"] == "^"
    tokenizer.set_borders(end_of_text=None, start=None, ends=[])
    assert evaluate(even, tokenizer, f"text:{path}").data["from"] is None


def test_stride_and_limit(write: Callable[[str], Path]) -> None:
    model, tokenizer = small(), byte_tokenizer()
    path = write("first " * 30 + "\n<|endoftext|>\n" + "second " * 30)
    result = evaluate(model, tokenizer, f"text:{path}", stride=20, limit=1)
    logprobs = by_windows(theirs(model), [256, *("first " * 30 + "\n").encode()], 64, 20)
    assert nats(result) == pytest.approx(-logprobs.sum().item(), abs=1e-3)
    assert result.settings["stride"] == 20
    assert result.settings["limit"] == 1


def test_a_text_shorter_than_the_window_warns_of_a_stride(even: GPT, write: Callable[[str], Path]) -> None:
    path = write("short")
    with pytest.warns(UserWarning, match="stride 5 has no effect"):
        evaluate(even, byte_tokenizer(), f"text:{path}", stride=5)


# --- WikiText -------------------------------------------------------------------------------------------------

WIKI = (
    " \n = One = \n \n A lobster 's claws ( two ) , weigh 1 @,@ 000 g . \n \n = = More = = \n \n Yes . \n"
    " = Two = \n \n The end . \n"
)


def test_wikitext_word_divides_by_the_original(even: GPT, write: Callable[[str], Path]) -> None:
    result = evaluate(even, byte_tokenizer(), "wikitext:word", data={"wikitext": write(WIKI)})
    pages = [WIKI[2 : WIKI.index(" = Two")].removesuffix("\n"), WIKI[WIKI.index(" = Two") :]]
    plain = [
        " = One =\n\nA lobster's claws (two), weigh 1,000 g.\n\n== More ==\n\nYes. ",
        " = Two =\n\nThe end.\n",
    ]
    assert [score.tokens for score in result.scores] == [len(text) for text in plain]
    assert [score.bytes for score in result.scores] == [len(page) for page in pages]
    # Counted by hand, and two more: nothing before the space at the start, nothing after the one at the end.
    assert [score.words for score in result.scores] == [3 + 14 + 5 + 2 + 2, 3 + 3 + 2]
    total = sum(map(len, plain))
    assert result.metrics["word_perplexity"] == pytest.approx(V ** (total / (26 + 8)))
    assert result.metrics["bits_per_byte"] == pytest.approx(math.log2(V) * total / sum(map(len, pages)))
    assert result.data["official"] is False


def test_wikitext_word_counts_as_the_harness_does(shared: Path) -> None:
    judge = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext", reason="lm-eval is not installed")
    text = (shared / "data" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    for page in list(detokenizers.pages(text))[:10]:
        counts = judge.process_results({"page": page}, (0.0,))
        assert counts["word_perplexity"] == (0.0, len(re.split(r"\s+", page)))


def test_wikitext_token_is_hugging_faces_guide(
    trained: tuple[GPT, Tokenizer, transformers.GPT2LMHeadModel], write: Callable[[str], Path], shared: Path
) -> None:
    model, tokenizer, judge = trained
    raw = (shared / "data" / "wikitext2_valid.txt").read_text(encoding="utf-8")[:5000]
    result = evaluate(model, tokenizer, "wikitext:token", data={"wikitext": write(raw)}, stride=256)
    ids = torch.tensor([tokenizer.encode(detokenizers.wikitext_lines(raw))])
    # The loop of the guide "Perplexity of fixed-length models".
    total, n, previous = 0.0, 0, 0
    for begin in range(0, ids.shape[1], 256):
        end = min(begin + 512, ids.shape[1])
        targets = ids[:, begin:end].clone()
        targets[:, : -(end - previous)] = -100
        with torch.no_grad():
            loss = judge(ids[:, begin:end], labels=targets, use_cache=False).loss
        kept = int((targets != -100).sum()) - 1
        total, n, previous = total + loss.item() * kept, n + kept, end
        if end == ids.shape[1]:
            break
    # The guide's windows have 511 predictions where ours have 512: the same protocol, not the same bits.
    assert result.metrics["token_perplexity"] == pytest.approx(math.exp(total / n), rel=5e-3)
    assert sum(score.tokens for score in result.scores) == ids.shape[1] - 1


# --- LAMBADA --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def passages(trained: tuple[GPT, Tokenizer, transformers.GPT2LMHeadModel]) -> list[str]:
    """Beginnings of sentences, every second one with the word that the model itself would put there."""
    _, tokenizer, judge = trained
    sentences = [s.strip() for s in known_text().replace("\n", " ").split(". ") if len(s.split()) > 6][:12]
    out = []
    for i, sentence in enumerate(sentences):
        words = sentence.split(" ")[:10]
        if i % 2:
            ids = torch.tensor([tokenizer.encode(" ".join(words[:-1]))])
            made = judge.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
            words[-1] = tokenizer.decode(made[0, ids.shape[1] :].tolist()).split(" ")[1].strip("\n")
        out.append(" ".join(words))
    return out


@pytest.fixture
def lambada(passages: list[str], write: Callable[[str], Path]) -> Path:
    return write("".join(json.dumps({"text": text}) + "\n" for text in passages))


@torch.no_grad()
def answer(judge: transformers.GPT2LMHeadModel, before: list[int], after: list[int]) -> tuple[float, torch.Tensor]:
    """Their loss on the right answer and their logits for it."""
    logits = judge(torch.tensor([before + after[:-1]]), use_cache=False).logits[0, -len(after) :]
    return -torch.log_softmax(logits, -1)[range(len(after)), after].sum().item(), logits


def test_lambada_last_word(
    trained: tuple[GPT, Tokenizer, transformers.GPT2LMHeadModel], passages: list[str], lambada: Path
) -> None:
    model, tokenizer, judge = trained
    result = evaluate(model, tokenizer, "lambada:last-word", data={"lambada": lambada})
    losses, right = [], []
    for text in passages:
        context, word = text.rsplit(" ", 1)
        before = tokenizer.encode(context)
        after = tokenizer.encode(text)[len(before) :]
        losses.append(answer(judge, before, after)[0])
        ids = torch.tensor([before])
        made = judge.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=len(after))
        right.append(made[0, len(before) :].tolist() == after)
        assert tokenizer.decode(after) == f" {word}"
    assert 0 < sum(right) < len(right)
    assert result.metrics["accuracy"] == sum(right) / len(right)
    assert [score.correct for score in result.scores] == right
    assert result.metrics["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    share = sum(right) / len(right)
    assert result.metrics["accuracy_error"] == pytest.approx(math.sqrt(share * (1 - share) / (len(right) - 1)))


def test_lambada_last_token(
    trained: tuple[GPT, Tokenizer, transformers.GPT2LMHeadModel], passages: list[str], lambada: Path
) -> None:
    model, tokenizer, judge = trained
    result = evaluate(model, tokenizer, "lambada:last-token", data={"lambada": lambada})
    filtered = evaluate(model, tokenizer, "lambada:last-token-stopwords", data={"lambada": lambada})
    stop = torch.tensor([tokenizer.decode([i]).strip() in STOP_WORDS for i in range(tokenizer.vocab_size)])
    losses, right, right_filtered = [], [], []
    for text in passages:
        *before, last = tokenizer.encode(text)
        loss, logits = answer(judge, before, [last])
        losses.append(loss)
        right.append(logits[0].argmax().item() == last)
        right_filtered.append(logits[0].masked_fill(stop, -torch.inf).argmax().item() == last)
    assert [score.correct for score in result.scores] == right
    assert [score.correct for score in filtered.scores] == right_filtered
    assert right != right_filtered
    assert result.metrics["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert set(filtered.metrics) == {"accuracy", "accuracy_error"}
    assert all(score.tokens == 1 for score in result.scores)


def test_stop_words_of_a_padded_vocabulary(lambada: Path) -> None:
    model = small(vocab_size=300)  # 43 more ids than the tokenizer has
    result = evaluate(model, byte_tokenizer(), "lambada:last-token-stopwords", data={"lambada": lambada}, limit=2)
    assert len(result.scores) == 2
    assert len(STOP_WORDS) == 127


def test_white_space_goes_to_the_answer() -> None:
    tokenizer = byte_tokenizer()
    assert encode_pair(tokenizer, "a \n", "b") == (list(b"a"), list(b" \nb"))
    judge = pytest.importorskip("lm_eval.api.model", reason="lm-eval is not installed")
    harness = type("Any", (), {"backend": "causal", "tok_encode": lambda self, text: tokenizer.encode(text)})()
    for context, continuation in (("a \n", "b"), ("a", " b"), ("ab  ", " c")):
        expected = judge.TemplateLM._encode_pair(harness, context, continuation)
        assert encode_pair(tokenizer, context, continuation) == expected


# --- HellaSwag ------------------------------------------------------------------------------------------------


def test_hellaswag_completion(trained: tuple[GPT, Tokenizer, transformers.GPT2LMHeadModel]) -> None:
    model, tokenizer, judge = trained
    result = evaluate(model, tokenizer, "hellaswag:completion", data={"hellaswag": ITEMS})
    plain, norm = [], []
    for item in map(json.loads, ITEMS.read_text().splitlines()):
        rows = [(tokenizer.encode(item["ctx"]), tokenizer.encode(f" {end}")) for end in item["endings"]]
        losses = [answer(judge, *row)[0] for row in rows]
        means = [loss / len(after) for loss, (_, after) in zip(losses, rows, strict=True)]
        plain.append(losses.index(min(losses)) == item["label"])
        norm.append(means.index(min(means)) == item["label"])
    assert 0 < sum(norm) < len(norm)
    assert (result.metrics["accuracy"], result.metrics["accuracy_norm"]) == (
        sum(plain) / len(plain),
        sum(norm) / len(norm),
    )
    assert [score.correct for score in result.scores] == norm


def test_hellaswag_as_the_harness(trained: tuple[GPT, Tokenizer, transformers.GPT2LMHeadModel]) -> None:
    model, tokenizer, judge = trained
    result = evaluate(model, tokenizer, "hellaswag:lm-eval", data={"hellaswag": ITEMS})

    def clean(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    plain, norm = [], []
    for item in map(json.loads, ITEMS.read_text().splitlines()):
        query = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
        before = tokenizer.encode(query.rstrip())
        choices = [clean(end) for end in item["endings"]]
        space = query[len(query.rstrip()) :]
        losses = [answer(judge, before, tokenizer.encode(f"{query} {c}")[len(before) :])[0] for c in choices]
        assert space in ("", " ")
        means = [loss / len(choice) for loss, choice in zip(losses, choices, strict=True)]
        plain.append(losses.index(min(losses)) == item["label"])
        norm.append(means.index(min(means)) == item["label"])
    assert 0 < sum(plain) < len(plain)
    assert (result.metrics["accuracy"], result.metrics["accuracy_norm"]) == (
        sum(plain) / len(plain),
        sum(norm) / len(norm),
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [({"label": ""}, "item 1 of file names no right ending"), ({"label": 4}, "no right ending"), ({"ctx": 1}, "'ctx'")],
)
def test_hellaswag_items_that_cannot_be_scored(
    even: GPT, write: Callable[[str], Path], change: dict[str, object], words: str
) -> None:
    item = json.loads(ITEMS.read_text().splitlines()[0])
    path = write(json.dumps({**item, **change}))
    with pytest.raises(GptlabError, match=words):
        evaluate(even, byte_tokenizer(), "hellaswag:completion", data={"hellaswag": path})


def test_labels_may_be_written_as_text(even: GPT, write: Callable[[str], Path]) -> None:
    item = json.loads(ITEMS.read_text().splitlines()[0])
    path = write(json.dumps({**item, "label": str(item["label"])}))
    result = evaluate(even, byte_tokenizer(), "hellaswag:completion", data={"hellaswag": path})
    assert len(result.scores) == 1


# --- the table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("lambada", "measured by several protocols; name one: lambada:last-word,"),
        ("lambda:last-word", "did you mean 'lambada:last-word'"),
        ("text:", "needs the path"),
        ("text", "needs the path"),
        ("piqa", "unknown task 'piqa'"),
    ],
)
def test_unknown_tasks(task: str, words: str) -> None:
    with pytest.raises(GptlabError, match=words):
        protocol_of(task)


def test_refused_settings(even: GPT, write: Callable[[str], Path]) -> None:
    with pytest.raises(GptlabError, match="there is no text"):
        evaluate(even, byte_tokenizer(), f"text:{write('')}")
    text = f"text:{write('some text')}"
    for task, settings, words in [
        ("lambada:last-word", {"stride": 5}, "stride has no meaning in lambada:last-word"),
        (text, {"stride": 65}, "stride must be 1 to 64"),
        (text, {"limit": 0}, "limit must be at least 1"),
        (text, {"context": 65}, "learned positions"),
    ]:
        with pytest.raises(GptlabError, match=words):
            evaluate(even, byte_tokenizer(), task, **settings)


def test_a_tokenizer_of_another_model_is_refused(write: Callable[[str], Path]) -> None:
    model = small(vocab_size=100)
    with pytest.raises(GptlabError, match="the model has 100: they do not fit"):
        evaluate(model, byte_tokenizer(), f"text:{write('some text')}")
    with pytest.raises(GptlabError, match="'x' is not among"):
        evaluate(model, char_tokenizer(["some text".replace("x", "")]), f"text:{write('some text')}")


def test_weights_and_ids_have_their_hashes(write: Callable[[str], Path]) -> None:
    path, tokenizer = write("some text"), byte_tokenizer()
    one = evaluate(small(), tokenizer, f"text:{path}")
    again = evaluate(small(), tokenizer, f"text:{path}")
    assert (one.model, one.data, one.scores) == (again.model, again.data, again.scores)
    moved = small()
    with torch.no_grad():
        moved.wte.weight[0, 0] += 1e-3
    other = evaluate(moved, char_tokenizer(["some text"]), f"text:{path}")
    assert other.model["sha256"] != one.model["sha256"]
    assert other.data["sha256"] == one.data["sha256"]
    assert other.data["ids_sha256"] != one.data["ids_sha256"]


def test_the_table_is_consistent() -> None:
    for name, protocol in TASKS.items():
        assert protocol.name == name
        assert set(protocol.original) <= set(protocol.metrics)
        assert bool(protocol.original) == bool(protocol.source)
    for row in TABLE_3:
        assert row.protocol is None or row.metric in TASKS[row.protocol].metrics


@pytest.mark.parametrize(
    ("task", "line", "words"),
    [
        ("lambada:last-word", '{"text": "single"}', "passage 2 of .* has no words before its last one; leave it out"),
        ("lambada:last-token", '{"text": "single"}', "passage 2 of .* has no words before its last one"),
        ("lambada:last-token", '{"text": "ends in white "}', "passage 2 of .* ends in white space, not in a word"),
        ("hellaswag:completion", ["a", ""], "item 2 of .* has '' as its ending 2, which is not text"),
        ("hellaswag:lm-eval", [5, "b"], "item 2 of .* has 5 as its ending 1, which is not text"),
        ("hellaswag:lm-eval", ["a", "[title]"], "item 2 of .* has an ending with nothing outside its brackets"),
    ],
)
def test_items_that_ask_nothing(
    even: GPT, write: Callable[[str], Path], task: str, line: str | list[object], words: str
) -> None:
    def item(endings: list[object]) -> str:
        fields = {"ctx": "c d", "ctx_a": "c", "ctx_b": "d", "activity_label": "e", "endings": endings, "label": 0}
        return json.dumps(fields)

    lines = ['{"text": "\u00e9 b c"}', line] if isinstance(line, str) else [item(["f g", "h"]), item(line)]
    path = write("\ufeff" + "\n\n".join(lines) + "\n\n")
    data = {task.partition(":")[0]: path}
    evaluate(even, byte_tokenizer(), task, data=data, limit=1)  # a byte-order mark and blank lines are nothing
    with pytest.raises(GptlabError, match=words):
        evaluate(even, byte_tokenizer(), task, data=data)


def test_a_model_that_answers_nan(even: GPT, write: Callable[[str], Path]) -> None:
    model = copy.deepcopy(even)
    with torch.no_grad():
        model.ln_f.bias.fill_(math.nan)
    result = evaluate(model, byte_tokenizer(), f"text:{write('a b c')}")
    assert result.metrics
    assert all(map(math.isnan, result.metrics.values()))
