"""From the files of a model directory to a tokenizer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from gptlab.errors import GptlabError
from gptlab.placeholders import refuse_placeholder
from gptlab.text.tokenizers.base import END_OF_TEXT, Tokenizer
from gptlab.text.tokenizers.declared import FLAGS, NAMED, Declared, read_declared
from gptlab.text.tokenizers.files import FileTokenizer, UnsupportedTokenizer
from gptlab.text.tokenizers.gpt2 import GPT2Tokenizer, byte_alphabet, byte_level, gpt2_merges, gpt2_vocab

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""All files that `read_tokenizer` looks at, `config.json` aside."""

_OTHERS = {
    "vocab.txt": "BERT's (WordPiece, in vocab.txt)",
    "spiece.model": "SentencePiece (spiece.model)",
    "sentencepiece.bpe.model": "SentencePiece (sentencepiece.bpe.model)",
    "tokenizer.model": "SentencePiece (tokenizer.model)",
}


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """Read the tokenizer of a model directory; None when there is none.

    Tokens of a model's own, and the ids at which its texts begin and end, are taken from the files of `TOKENIZER_FILES`
    and `config.json`. An id counts there if the tokenizer can decode it and the model has a row for it.

    Raises:
        UnsupportedTokenizer: a kind that is not supported.
        GptlabError: its files are damaged.
    """
    from tokenizers import Tokenizer as Engine

    for name in TOKENIZER_FILES:
        refuse_placeholder(directory / name)
    try:
        values = _values(directory)
        if values is None:
            return None
        declared = read_declared(directory)
        _complete(values, declared, new_layout=(directory / "tokenizer.json").exists())
        tokenizer = GPT2Tokenizer() if _is_gpt2(values) else FileTokenizer(Engine.from_str(json.dumps(values)))
    except GptlabError:
        raise
    except Exception as error:  # the Rust side raises bare Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GptlabError(f"the tokenizer in {directory} cannot be read ({reason}); restore its files") from None
    _set_borders(tokenizer, declared)
    tokenizer.chat_template = declared.chat_template
    if lost := sorted(set(declared.ends) - _known(tokenizer, declared)):
        warnings.warn(
            f"{directory} has eos_token_id {', '.join(map(str, lost))} in its configuration, for which the tokenizer"
            " has no token or the model no row: it is ignored",
            stacklevel=2,
        )
    for part in ("bos_token", "eos_token"):
        if (content := declared.named.get(part)) in declared.without_id:
            warnings.warn(
                f"{directory} names {content!r} as its {part}, which has no id and for which the model has no row:"
                " it is read as text",
                stacklevel=2,
            )
    return tokenizer


def _values(directory: Path) -> dict[str, Any] | None:
    """Return what a `tokenizer.json` says or would say, without the tokens of the files beside it."""
    path, vocab, merges = (directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if path.exists():
        values = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            raise ValueError("tokenizer.json describes no model")
        return values
    if not vocab.exists():  # as OpenAI named the two
        vocab, merges = directory / "encoder.json", directory / "vocab.bpe"
    if vocab.exists() and merges.exists():
        lines = merges.read_text(encoding="utf-8-sig").splitlines()
        pairs = [(a, b) for a, b in (line.split(" ") for line in lines if line and not line.startswith("#version"))]
        table = json.loads(vocab.read_text(encoding="utf-8-sig"))
        values = json.loads(byte_level({}, [], special=()).to_str())
        values["model"].update(vocab=table, merges=pairs)
        return dict(values)
    if other := next((name for name in _OTHERS if (directory / name).exists()), None):
        raise UnsupportedTokenizer(
            f"the tokenizer of {directory} is {_OTHERS[other]}, which gptlab does not read; it reads byte-level BPE as"
            " GPT-2's (tokenizer.json, or vocab.json and merges.txt)"
        )
    return None


def _complete(values: dict[str, Any], declared: Declared, new_layout: bool) -> None:
    """Bring what the files beside it declare into the contents of a `tokenizer.json`."""
    model = values["model"]
    model["dropout"] = None  # random merges, for training only
    if not isinstance(model.get("vocab"), dict):
        return
    tokens = {token["content"]: dict(token) for token in values.setdefault("added_tokens", [])}
    for content, (token, flags) in declared.added.items():
        known = tokens.get(content) or _token(content, model["vocab"].get(content, token))
        tokens[content] = {**known, **flags}
    for content, flags in declared.special.items():
        if content in tokens or content in model["vocab"]:
            known = tokens.get(content) or {**_token(content, model["vocab"][content]), **flags}
            tokens[content] = {**known, "special": True}
    declared.without_id = _give_ids(model["vocab"], tokens, declared)
    values["added_tokens"] = _numbered(model["vocab"], tokens)
    _set_unknown(model, declared)
    splitter = values.get("pre_tokenizer") or {}
    if declared.add_prefix_space is not None and splitter.get("type") == "ByteLevel":
        splitter["add_prefix_space"] = declared.add_prefix_space
    if not new_layout and (declared.add_bos or declared.add_eos):
        values["post_processor"] = _template(
            declared, {token["content"]: token["id"] for token in values["added_tokens"]}
        )


def _token(content: str, token: int) -> dict[str, Any]:
    return {"id": token, "content": content, **dict.fromkeys(FLAGS, False)}


def _give_ids(vocab: dict[str, int], tokens: dict[str, dict[str, Any]], declared: Declared) -> list[str]:
    """Give special tokens that are named without an id the next ones, as transformers does; return those left without.

    These are the ones that the model has no row for. ``<|endoftext|>`` is never one of them: it is the name that some
    programs write where nobody chose one.
    """
    named = dict.fromkeys(declared.named[part] for part in NAMED if part in declared.named)
    missing = [content for content in {**named, **declared.special} if content not in (*tokens, *vocab, END_OF_TEXT)]
    following = 1 + max([*vocab.values(), *(int(token["id"]) for token in tokens.values())], default=-1)
    rows = len(missing) if declared.rows is None else max(0, declared.rows - following)
    for token, content in enumerate(missing[:rows], following):
        tokens[content] = {**_token(content, token), **declared.special.get(content, {}), "special": True}
    return missing[rows:]


def _numbered(vocab: dict[str, int], tokens: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return added tokens by id, and see to it that each keeps its id.

    The library numbers tokens that the vocabulary lacks one after the other, whatever the file says. Those that would
    get another id than theirs go into the vocabulary, where they change nothing: merges do not know them.
    """
    owners = {i: token for token, i in vocab.items()}
    following = len(vocab) if len(owners) == max(owners, default=-1) + 1 else -1
    numbered = sorted(tokens.values(), key=lambda token: int(token["id"]))
    for token in numbered:
        content = token["content"]
        token["id"] = vocab.get(content, token["id"])
        if owners.setdefault(token["id"], content) != content:
            raise ValueError(f"the id {token['id']} belongs to {owners[token['id']]!r} and to {content!r}")
        if content not in vocab:
            if token["id"] == following:
                following += 1
            else:
                vocab[content], following = token["id"], -1
    return numbered


def _set_unknown(model: dict[str, Any], declared: Declared) -> None:
    """Let a BPE that cannot write every byte use its unknown token, where it has one of that purpose alone."""
    if model.get("type") != "BPE":
        return
    if model.get("unk_token") not in model["vocab"]:
        model["unk_token"] = None
    unknown = declared.named.get("unk_token")
    borders = (END_OF_TEXT, declared.named.get("bos_token"), declared.named.get("eos_token"))
    whole = all(character in model["vocab"] for character in byte_alphabet())
    if model["unk_token"] is None and not whole and unknown in model["vocab"] and unknown not in borders:
        model["unk_token"] = unknown


def _template(declared: Declared, ids: dict[str, int]) -> dict[str, Any]:
    """Return the post-processor that puts the first and last token around a text."""
    names = [declared.named.get(name, END_OF_TEXT) for name in ("bos_token", "eos_token")]
    bos, eos = (
        [{"SpecialToken": {"id": name, "type_id": 0}}] if wanted and name in ids else []
        for name, wanted in zip(names, (declared.add_bos, declared.add_eos), strict=True)
    )
    single = [*bos, {"Sequence": {"id": "A", "type_id": 0}}, *eos]
    used = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names if name in ids}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": used}


def _is_gpt2(values: dict[str, Any]) -> bool:
    """Is this `tokenizer.json` GPT-2's own, so that the faster engine may take its place?"""
    model = values.get("model") or {}
    merges = tuple(tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges") or ())
    splitter = values.get("pre_tokenizer") or {}
    return (
        merges == gpt2_merges()
        and model.get("vocab") == gpt2_vocab()
        and values.get("normalizer") is None
        and splitter.get("type") == "ByteLevel"
        and not splitter.get("add_prefix_space")
        and splitter.get("use_regex", True)
        and not _adds_tokens(values.get("post_processor"))
        and all(
            token["content"] == END_OF_TEXT and not (token["lstrip"] or token["rstrip"] or token["single_word"])
            for token in values.get("added_tokens", ())
        )
    )


def _adds_tokens(processor: dict[str, Any] | None) -> bool:
    """Does this post-processor put tokens around a text?"""
    match (processor or {}).get("type", "ByteLevel"), processor or {}:
        case "ByteLevel", _:
            return False
        case "Sequence", steps:
            return any(map(_adds_tokens, steps["processors"]))
        case "TemplateProcessing", template:
            return any("SpecialToken" in piece for piece in template["single"])
    return True


def _known(tokenizer: Tokenizer, declared: Declared) -> set[int]:
    """Return the ids that the tokenizer can decode and the model has a row for."""
    return set(tokenizer.known_ids(tokenizer.vocab_size if declared.rows is None else declared.rows))


def _set_borders(tokenizer: Tokenizer, declared: Declared) -> None:
    """Set where texts begin and end: as the configurations say, else as the tokenizer's own files do."""
    known = _known(tokenizer, declared)
    contents = (declared.named.get("bos_token"), declared.named.get("eos_token"), END_OF_TEXT)
    bos, eos, usual = (
        [token for name, token in tokenizer.special_tokens.items() if name == content and token in known]
        for content in contents
    )
    ends = [token for token in declared.ends if token in known] or eos or usual
    # Between documents: the end that has the usual name, or the tokenizer's own, before any other.
    between = [*(token for token in (*usual, *eos) if token in ends), *eos, *usual, *ends, None]
    starts = [*(token for token in declared.starts if token in known), *bos, None]
    tokenizer.set_borders(end_of_text=between[0], start=starts[0], ends=ends)
