"""`gptlab import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gptlab.errors import GptlabError


def import_model(
    source: Annotated[str, typer.Argument(help="A file or directory of another program, or a name as for --model.")],
    out: Annotated[Path, typer.Option(help="Directory to write gptlab's own format into; must not exist.")],
    characters: Annotated[
        Path | None,
        typer.Option(help="Of a character-level model: its training text, or a text that holds each character once."),
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="Where the file does not say it, as nanoGPT's: gelu (erf) or gelu_tanh.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="To save the weights in: float32, bfloat16, float16, int8 or int4.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Read a model in another program's format and save it in gptlab's own."""
    if out.exists():
        raise GptlabError(f"{out} already exists; choose another --out, or remove it")
    import gptlab
    from gptlab import checkpoints
    from gptlab.checkpoints import gguf, hub
    from gptlab.config import ModelConfig
    from gptlab.model import cost
    from gptlab.text.tokenizers import char_tokenizer

    tokenizer = None if characters is None else char_tokenizer([_text(characters)], end_of_text=False)
    place = hub.locate(source)
    format_name = checkpoints.name_of(checkpoints.format_of(place))
    if activation is not None and format_name != "nanogpt":
        raise GptlabError(f"--activation is for nanoGPT's files, which do not state it; {source} does: leave it out")
    lm = gptlab.load(source, tokenizer=tokenizer, dtype=dtype)
    if tokenizer is not None and tokenizer.vocab_size != lm.config.vocab_size:
        raise GptlabError(
            f"{characters} holds {tokenizer.vocab_size} different characters, the model {source} knows"
            f" {lm.config.vocab_size}; give the text that it was trained on"
        )
    if activation is not None:
        lm.config = lm.model.config = ModelConfig.from_dict({**lm.config.to_dict(), "activation": activation})
    about = {
        "source": source,
        "format": format_name,
        **({"card": gguf.read_card(place)} if format_name == "gguf" else {}),
    }
    gptlab.save(lm, out, files={"import.json": json.dumps(about, indent=2).encode() + b"\n"})
    facts = {
        "source": source,
        "format": format_name,
        "model": lm.config.to_dict(),
        "parameters": sum(cost.parameters(lm.config).values()),
        "tokenizer": None if lm.tokenizer is None else lm.tokenizer.vocab_size,
        "out": str(out),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print(f"{source}: {facts['parameters']:,} parameters, read as {checkpoints.FORMATS[format_name].ABOUT}")
    print(f"saved: {out}\ntry it: gptlab {'generate --model' if lm.tokenizer else 'inspect'} {out}")
    if lm.tokenizer is None:
        characters_too = ", or give the training text of a character-level model with --characters"
        print(
            "it came without a tokenizer; put its tokenizer.json, or vocab.json and merges.txt, beside the source"
            + (characters_too if format_name == "nanogpt" else "")
        )


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:  # a carriage return is a character of its own
            return file.read()
    except OSError as error:
        raise GptlabError(f"{path} cannot be read: {error.strerror}; check --characters") from None
    except UnicodeDecodeError:
        raise GptlabError(f"{path} is not text in UTF-8; check --characters") from None
