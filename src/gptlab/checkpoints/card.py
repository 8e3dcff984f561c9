"""The model card of an export: what the model is, what it was trained and converted with, how it scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptlab.config import ModelConfig

SOURCES = ("card.json", "conversion.json", "import.json", "training.json")
"""Files beside a checkpoint that say where it comes from."""


def read_facts(directory: Path) -> dict[str, Any]:
    """Return what the files beside a checkpoint say of it, by their stems; damaged ones are left out."""
    facts: dict[str, Any] = {}
    run = directory.parent.parent / "run.json"
    for path in [*(directory / name for name in SOURCES), *([run] if directory.parent.name == "checkpoints" else [])]:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(values, dict):
            facts[path.stem] = values
    return facts


def make_card(
    config: ModelConfig, facts: Mapping[str, Any], *, opening: str, rewritten: Sequence[str], lost: Sequence[str]
) -> str:
    """Return the model card as Markdown.

    Args:
        config: of the model that was exported.
        facts: as `read_facts` gives them; ``name`` is the title. The card of a file that the model was imported from,
            ``card`` in ``import``, is quoted at the end.
        opening: what the model is in the other program, and how to load it there.
        rewritten: what is written otherwise than it was, with the same function.
        lost: what the other program does not have.
    """
    heads = f"{config.n_head} query heads on {config.kv_heads} key/value heads, {config.head_dim} wide"
    window = (
        "full causal attention" if set(config.windows) == {None} else f"attention windows of {config.window} tokens"
    )
    feed_forward = "swiglu" if config.mlp == "swiglu" else config.activation
    extras = [f"{config.sinks} sinks"] if config.sinks else []
    extras += [f"dilation {config.dilation}"] if set(config.dilations) != {1} else []
    sections = [
        "# " + str(facts.get("name", "A model from gptlab")),
        opening,
        "## Architecture\n"
        + _list(
            f"{config.n_layer} layers, {config.n_embd} channels, feed-forward {config.inner} ({feed_forward}),"
            f" {config.norm} norms{'' if config.bias else ', no biases'}",
            heads,
            ", ".join([f"{config.position} positions, context {config.context_length:,}", window, *extras]),
            f"vocabulary {config.vocab_size:,}, output head {'tied' if config.tie_embeddings else 'of its own'}",
        ),
    ]
    if rewritten or lost:
        sections.append("## As it is written here\n" + _list(*rewritten, *(f"what is lost: {what}" for what in lost)))
    sections += [
        section
        for section in (_data(facts), _training(facts), _evaluation(facts), _history(facts), _earlier_card(facts))
        if section
    ]
    return "\n\n".join(sections) + "\n"


def _list(*items: str) -> str:
    return "\n".join(f"- {item}" for item in items)


def _data(facts: Mapping[str, Any]) -> str:
    card, run = _of(facts, "card"), _of(facts, "run", "data")
    items = [f"corpus: {card['corpus']}"] if card.get("corpus") else []
    items += [f"trained on {card['training_tokens']:,} different tokens"] if _number(card, "training_tokens") else []
    digest = card.get("data_sha256") or run.get("sha256")
    items += [f"sha256 of the prepared data: {digest}"] if digest else []
    return "## Data\n" + _list(*items) if items else ""


def _training(facts: Mapping[str, Any]) -> str:
    card, training = _of(facts, "card"), _of(facts, "training")
    recipe = card.get("recipe") or _of(facts, "run").get("recipe")
    items = [f"{card['tokens_trained']:,} tokens"] if _number(card, "tokens_trained") else []
    items += [f"step {training['step']:,} of its run"] if _number(training, "step") else []
    parts = [f"## Training\n{_list(*items)}"] if items or recipe else []
    if recipe:
        parts.append(f"The whole recipe:\n\n```json\n{json.dumps(recipe, indent=2)}\n```")
    return "\n\n".join(parts)


def _evaluation(facts: Mapping[str, Any]) -> str:
    card, training = _of(facts, "card"), _of(facts, "training")
    items = [f"{card['nats_per_token']:.4f} nats per token"] if _number(card, "nats_per_token") else []
    items += [f"{card['bits_per_byte']:.4f} bits per byte"] if _number(card, "bits_per_byte") else []
    if items and isinstance(card.get("protocol"), str):
        items.append(f"protocol: {card['protocol']}")
    if not items and _number(training, "validation_loss"):
        items = [f"{training['validation_loss']:.4f} nats per token on the run's validation stream"]
    return "## Evaluation\n" + _list(*items) if items else ""


def _history(facts: Mapping[str, Any]) -> str:
    """Every conversion on the way to this model, the last one first."""
    items = []
    conversion, imported = facts.get("conversion"), _imported(facts)
    while isinstance(conversion, dict):
        source = _of(conversion, "source")
        steps = [step for step in conversion.get("steps") or [] if isinstance(step, dict)]
        changes = "; ".join(f"{step.get('name')}: {step.get('change')}" for step in steps)
        outputs = conversion.get("outputs")
        moved = ""
        if isinstance(outputs, dict) and _number(outputs, "before") and _number(outputs, "after"):
            moved = f" ({outputs['before']:.4f} to {outputs['after']:.4f} nats per token on a text not fitted on)"
        items.append(f"converted from {source.get('name', 'another model')}: {changes}{moved}")
        conversion = source.get("conversion")
    if imported.get("source"):
        items.append(f"imported from {imported['source']} (format: {imported.get('format')})")
    return "## Conversion history\n" + _list(*items) if items else ""


def _imported(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the import at the beginning of all conversions."""
    while isinstance(facts.get("conversion"), dict):
        facts = _of(facts, "conversion", "source")
    return _of(facts, "import")


def _earlier_card(facts: Mapping[str, Any]) -> str:
    imported = _imported(facts)
    card = imported.get("card")
    if not isinstance(card, str) or not card.strip():
        return ""
    quoted = "\n".join(f"> {line}".rstrip() for line in card.strip().splitlines())
    return f"## The model card of {imported.get('source', 'the imported file')}\n{quoted}"


def _of(facts: Mapping[str, Any], *names: str) -> dict[str, Any]:
    value: Any = facts
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _number(values: Mapping[str, Any], name: str) -> bool:
    return isinstance(values.get(name), (int, float)) and not isinstance(values[name], bool)
