"""A byte-level BPE in the metadata of a GGUF file and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptlab.errors import GptlabError
from gptlab.text.tokenizers import (
    END_OF_TEXT,
    FileTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    UnsupportedTokenizer,
    gpt2_merges,
    gpt2_vocab,
    read_tokenizer,
)
from gptlab.text.tokenizers.gpt2 import byte_level

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
WORDS = ("gpt-2", "gpt2", "default")
"""llama.cpp's names for GPT-2's way to cut a text into words."""
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
"""The same with a word for each digit."""
_WORDS_OF = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3, QWEN_2 = _WORDS_OF % r"\p{N}{1,3}", _WORDS_OF % r"\p{N}"
PATTERNS = {"llama-bpe": LLAMA_3, "llama3": LLAMA_3, "llama-v3": LLAMA_3, "qwen2": QWEN_2}
"""llama.cpp's names for other ways, as the models' own `tokenizer.json` states them."""
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
"""Those in which a word of the vocabulary is a token, whether merges make it or not."""


def read_vocabulary(metadata: Mapping[str, Any], path: Path) -> Tokenizer | None:
    """Return the tokenizer in a file's metadata; None where there is none.

    Raises:
        UnsupportedTokenizer: no byte-level BPE, or one that cuts texts in a way of its own.
        GptlabError: it is damaged.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    words = metadata.get("tokenizer.ggml.pre", WORDS[0])
    known = (*WORDS, *SINGLE_DIGITS, *PATTERNS)
    if kind != "gpt2" or words not in known:
        if beside := _beside(path):
            return beside
        raise UnsupportedTokenizer(
            f"{path} has a tokenizer of kind {kind!r} ({words!r}), which gptlab does not read; it reads byte-level BPE"
            f" of the kinds {', '.join(known)}: put the model's tokenizer.json beside the file"
        )
    try:
        return _build(metadata, words)
    except Exception as error:  # the Rust side raises bare Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GptlabError(f"the tokenizer in {path} is damaged ({reason}); copy the file again") from None


def _beside(path: Path) -> Tokenizer | None:
    """Return the tokenizer whose files lie beside a GGUF file."""
    return read_tokenizer(path.parent) if (path.parent / "tokenizer.json").exists() else None


def _build(metadata: Mapping[str, Any], words: str) -> Tokenizer:
    from tokenizers import AddedToken, Regex, pre_tokenizers, processors

    tokens = list(metadata["tokenizer.ggml.tokens"])
    kinds = list(metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens))
    merges = [(a, b) for a, b in (line.split(" ") for line in metadata["tokenizer.ggml.merges"])]
    if len(kinds) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens, but {len(kinds)} types")
    used = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    if len(used) != sum(kind != UNUSED for kind in kinds):
        raise ValueError("a token is there twice")
    tokenizer: Tokenizer
    if used == gpt2_vocab() and tuple(merges) == gpt2_merges() and words in WORDS:
        tokenizer = GPT2Tokenizer()
    else:
        engine = byte_level(used, merges, special=())
        if words in SINGLE_DIGITS:
            engine.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        elif words in PATTERNS:
            cut = pre_tokenizers.Split(Regex(PATTERNS[words]), "isolated")
            whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            engine.pre_tokenizer = pre_tokenizers.Sequence([cut, whole])
            engine.model.ignore_merges = words in WHOLE_WORDS
        for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
            added = [
                AddedToken(token, special=special, normalized=False) for token, i in used.items() if kinds[i] == kind
            ]
            (engine.add_special_tokens if special else engine.add_tokens)(added)
        bos = metadata.get("tokenizer.ggml.bos_token_id")
        # Of Llama 3's kind llama.cpp puts the first token before a text unless a file says otherwise.
        if metadata.get("tokenizer.ggml.add_bos_token", words in WHOLE_WORDS) is True and bos is not None:
            engine.post_processor = processors.TemplateProcessing(
                single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
            )
        tokenizer = FileTokenizer(engine)
    known = set(tokenizer.known_ids(len(tokens)))
    start, end, turn = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot"))
    # llama.cpp ends a text at a control token of this name, too: the end of a document where the end is that of a turn.
    usual = used.get(END_OF_TEXT) if END_OF_TEXT in tokenizer.special_tokens else None
    ends = [token for token in dict.fromkeys((end, turn, usual)) if token in known]
    if ends:
        tokenizer.set_borders(end_of_text=ends[0], start=start if start in known else None, ends=ends)
    template = metadata.get("tokenizer.chat_template")
    tokenizer.chat_template = template if isinstance(template, str) else None
    return tokenizer


def add_vocabulary(writer: Any, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """Write a tokenizer into a `gguf.GGUFWriter`.

    Raises:
        GptlabError: a kind that llama.cpp does not compute.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(vocab_size)
        return
    values = json.loads(tokenizer.files()["tokenizer.json"])
    words = _words(values)
    merges = [line if isinstance(line, str) else " ".join(line) for line in values["model"].get("merges") or []]
    if not merges:
        raise GptlabError("llama.cpp has no tokenizer of single bytes or characters: its BPE needs at least one merge")
    if tokenizer.vocab_size > vocab_size:
        raise GptlabError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}; llama.cpp needs a row for each"
        )
    added = {token["content"]: token for token in values["added_tokens"]}
    vocab = {**values["model"]["vocab"], **{content: token["id"] for content, token in added.items()}}
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for content, i in vocab.items():
        tokens[i] = content
        kinds[i] = NORMAL if content not in added else CONTROL if added[content]["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    if tokenizer.start_of_text is not None:
        writer.add_bos_token_id(tokenizer.start_of_text)
    if tokenizer.end_of_text is not None:
        writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(tokenizer.before != ())
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _words(values: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the way in which a `tokenizer.json` cuts a text into words."""
    splitter = values["pre_tokenizer"] or {}
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    last = steps[-1]
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space") and last.get("use_regex", True)
    if values["model"]["type"] == "BPE" and plain and values["normalizer"] is None:
        if len(steps) == 1:
            return WORDS[0]
        if len(steps) == 2 and steps[0] == {"type": "Digits", "individual_digits": True}:
            return SINGLE_DIGITS[0]
    if values["model"]["type"] == "BPE" and values["normalizer"] is None and len(steps) == 2 and _only_bytes(last):
        cut, ignore = steps[0], bool(values["model"].get("ignore_merges"))
        for name, pattern in PATTERNS.items():
            split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            if cut == split and ignore == (name in WHOLE_WORDS):
                return name
    raise GptlabError(
        f"llama.cpp does not cut texts as this model's tokenizer does ({values['model']['type']}, words by"
        f" {splitter.get('type')}); it knows GPT-2's byte-level BPE"
    )


def _only_bytes(splitter: Mapping[str, Any]) -> bool:
    return (
        splitter.get("type") == "ByteLevel"
        and not splitter.get("add_prefix_space")
        and not splitter.get("use_regex", True)
    )
