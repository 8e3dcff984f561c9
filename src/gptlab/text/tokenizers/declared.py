"""What the small files beside a tokenizer say: added and special tokens, and where a text begins and ends.

`added_tokens.json`, `special_tokens_map.json` and `tokenizer_config.json` as Hugging Face's library has written them
over the years, read by the rules of its version 5; `generation_config.json` and `config.json` as its `generate` reads
them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptlab.errors import GptlabError
from gptlab.text.tokenizers.base import END_OF_TEXT

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED = ("additional_special_tokens", "extra_special_tokens")


@dataclass
class Declared:
    """What the files beside a tokenizer say.

    Attributes:
        added: ids and flags of tokens beyond the vocabulary, by their text.
        special: flags of the tokens that are special, by their text; a vocabulary need not have them.
        named: which of them plays which part, as ``bos_token``.
        add_bos: put the first token before a prompt, where no `tokenizer.json` says what belongs there.
        add_eos: put the last token after it.
        add_prefix_space: treat a text as if a space stood before it; None is what `tokenizer.json` says.
        starts: ids from which a text without a prompt starts, the first that there is.
        ends: ids that end a text.
        rows: of the model's embedding, where a configuration says so.
        without_id: special tokens that no file gives an id and the model no row.
        chat_template: see `Tokenizer`; in a file of its own, or in `tokenizer_config.json`.
    """

    added: dict[str, tuple[int, dict[str, bool]]] = field(default_factory=dict)
    special: dict[str, dict[str, bool]] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_prefix_space: bool | None = None
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    rows: int | None = None
    without_id: list[str] = field(default_factory=list)
    chat_template: str | None = None


def read_declared(directory: Path) -> Declared:
    """Read the files of a model directory that say something about its tokenizer; any of them may be missing.

    Raises:
        GptlabError: one of them is damaged.
    """
    declared = Declared()
    config = _read(directory / "tokenizer_config.json")
    listed = _by_id(config.get("added_tokens_decoder"), directory / "tokenizer_config.json")
    declared.added = {content: (token, flags) for token, (content, flags) in listed.items()}
    # Where the configuration lists the added tokens, it is the younger file and the special ones are named there too.
    names = config if listed else {**config, **_read(directory / "special_tokens_map.json")}
    for key, value in names.items():
        if key in NAMED or (key.endswith("_token") and isinstance(value, str | dict)):
            for content, flags in _tokens([value]):
                declared.special[content], declared.named[key] = flags, content
        elif key in _LISTED and isinstance(value, list | dict):
            declared.special.update(_tokens(value.values() if isinstance(value, dict) else value))
    declared.special.setdefault(END_OF_TEXT, {})
    for content, token in _read(directory / "added_tokens.json").items():
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise GptlabError(f"{directory / 'added_tokens.json'} is damaged ({content!r} has no id); restore it")
        is_special = content in declared.special
        declared.added.setdefault(content, (token, {"normalized": not is_special, "special": is_special}))
    declared.add_bos, declared.add_eos = config.get("add_bos_token") is True, config.get("add_eos_token") is True
    prefix = config.get("add_prefix_space")
    declared.add_prefix_space = prefix if isinstance(prefix, bool) else None
    declared.chat_template = _chat_template(directory, config.get("chat_template"))
    _read_borders(directory, declared)
    return declared


def _chat_template(directory: Path, stated: Any) -> str | None:
    """Return the template in a file of its own, else the stated one; of several under names the default one."""
    with contextlib.suppress(OSError, ValueError):
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(stated, list):
        named = {each.get("name"): each.get("template") for each in stated if isinstance(each, dict)}
        stated = named.get("default")
    return stated if isinstance(stated, str) else None


def _read_borders(directory: Path, declared: Declared) -> None:
    """`generation_config.json` comes first, then what `config.json` says."""
    model = _read(directory / "config.json")
    generation = _read(directory / "generation_config.json")
    for name, ids in (("bos_token_id", declared.starts), ("eos_token_id", declared.ends)):
        value = model.get(name) if generation.get(name) is None else generation[name]
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in values):
            raise GptlabError(f"{directory} has {name}={value!r} in its configuration, where a token id belongs")
        ids += values
    rows = model.get("vocab_size")
    declared.rows = rows if isinstance(rows, int) and not isinstance(rows, bool) else None


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, an empty one where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise GptlabError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise GptlabError(f"{path} is damaged (not valid JSON: {error}); restore it, or remove it") from None
    if not isinstance(values, dict):
        raise GptlabError(f"{path} is damaged (not a JSON object); restore it, or remove it")
    return values


def _by_id(values: Any, path: Path) -> dict[int, tuple[str, dict[str, bool]]]:
    """Return the tokens of an ``added_tokens_decoder`` with their flags, by id."""
    if not values:
        return {}
    try:
        return {int(token): (str(about["content"]), _flags(about)) for token, about in values.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise GptlabError(f"{path} is damaged (added_tokens_decoder lists no tokens by id); restore it") from None


def _tokens(values: Iterable[Any]) -> Iterable[tuple[str, dict[str, bool]]]:
    """Yield text and flags of tokens that are written as text, or as an object with ``content``."""
    for value in values:
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            yield value["content"], {name: flag for name, flag in _flags(value).items() if name != "special"}
        elif isinstance(value, str) and value:
            yield value, {}


def _flags(about: dict[str, Any]) -> dict[str, bool]:
    return {name: about[name] for name in FLAGS if isinstance(about.get(name), bool)}
