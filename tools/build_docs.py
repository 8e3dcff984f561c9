"""Write the generated parts of README.md and docs/ from result files; `--check` only says whether they are current.

Two things are generated: what stands between `<!-- NAME -->` and `<!-- end NAME -->`, and the line numbers of
links such as [`GPT.forward`](src/gptlab/model/gpt.py), which name a definition in the linked file.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[`([\w.]+)`\]\(((?:\.\./)*src/[\w/]+\.py)(?:#L\d+)?\)")


def results(name: str) -> dict:
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def verification() -> str:
    values = results("verification")
    rows = ["| | checked | found | expected | seconds |", "|---|---|---|---|---:|"]
    for check in values["checks"]:
        verdict = "PASS" if check["passed"] else "**FAIL**"
        words = " | ".join(check[key].replace("|", "\\|") for key in ("name", "found", "expected"))
        rows.append(f"| {verdict} | {words} | {check['seconds']:.1f} |")
    rows += [
        "",
        f"torch {values['torch']}, Python {values['python']}, {values['machine']}, {values['threads']} threads.",
    ]
    return "\n".join(rows)


def generated() -> str:
    values = results("generate")
    text = values["prompt"] + values["continuations"][0]["text"]
    wrapped = "\n".join(textwrap.fill(line, 110) for line in text.splitlines())
    card = card_of(values["model"])
    return (
        f'```\n$ gptlab generate --model {values["model"]} "{values["prompt"]}" --seed {values["seed"]}\n'
        f"{wrapped}\n```\n\n"
        f"That is a built-in model: {card['parameters'] / 1e6:.1f} million parameters, trained on"
        f" {card['tokens_trained'] / 1e6:.1f} million tokens of Wikipedia on two processor cores. It has learned\nthe"
        " sound of an encyclopaedia, not its facts."
    )


def card_of(name: str) -> dict:
    return json.loads((ROOT / f"src/gptlab/assets/{name}/card.json").read_text(encoding="utf-8"))


def cards() -> dict[str, dict]:
    names = sorted((path.parent.name for path in ROOT.glob("src/gptlab/assets/*/card.json")), key=len)
    return {name: card_of(name) for name in names}


def card(name: str) -> str:
    values = card_of(name)
    epochs = values["tokens_trained"] / values["training_tokens"]
    rows = {
        "parameters": f"{values['parameters']:,}",
        "tokens trained": f"{values['tokens_trained']:,} ({epochs:.2f} epochs)",
        "validation split": f"{values['validation_documents']} articles, {values['validation_bytes']:,} bytes",
        "bits per byte": f"{values['bits_per_byte']:.4f}",
        "nats per token": f"{values['nats_per_token']:.4f} ({values['protocol']})",
        "file": f"{values['file_bytes'] / 1e6:.2f} MB, bfloat16",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def built_ins() -> str:
    rows = ["| model | parameters | nats a token | bits a byte |", "|---|---:|---:|---:|"]
    for name, values in cards().items():
        figures = f"{values['parameters']:,} | {values['nats_per_token']:.3f} | {values['bits_per_byte']:.4f}"
        rows.append(f"| [`{name}`](src/gptlab/assets/{name}/README.md) | {figures} |")
    values = card_of("pocket")
    rows.append(
        f"\nThe same {values['tokens_trained'] / 1e6:.1f} million tokens of Wikipedia, the same order and start, one"
        f" seed; validation split of {values['validation_documents']} articles, {values['protocol']}."
    )
    return "\n".join(rows)


def attention() -> str:
    values = results("attention")
    kinds = list(dict.fromkeys(row["variant"] for row in values["rows"]))
    rows = []
    for backward in (False, True):
        rows += [f"Milliseconds (extra peak memory, MB), {'forward and backward' if backward else 'forward'}:", ""]
        rows += [f"| tokens | {' | '.join(kinds)} |", "|---:|" + "---:|" * len(kinds)]
        found = {(r["length"], r["variant"]): r for r in values["rows"] if r["backward"] == backward}
        for length in sorted({length for length, _ in found}):
            cells = [found.get((length, kind)) for kind in kinds]
            texts = ("" if c is None else f"{c['milliseconds']:,.0f} ({c['extra_megabytes']:,.0f})" for c in cells)
            rows.append(f"| {length:,} | {' | '.join(texts)} |")
        rows.append("")
    growth = (f"{kind} {value:.2f}" for kind, value in values["exponent_4096_to_16384"].items() if value is not None)
    rows.append(f"Time grows from 4,096 to 16,384 tokens with the exponent: {'; '.join(growth)}.")
    rows.append(
        f"\n{values['work']}; medians of {values['rounds']} rounds in turn; torch {values['torch']},"
        f" {values['threads']} threads on {values['cores']} CPU cores; `make bench-attention`."
    )
    return "\n".join(rows)


def decode_attention() -> str:
    values = results("decode_attention")
    kinds = list(dict.fromkeys(row["variant"] for row in values["rows"]))
    rows = [f"| batch | cached tokens | {' | '.join(kinds)} |", "|---:|---:|" + "---:|" * len(kinds)]
    found = {(row["batch"], row["context"], row["variant"]): row for row in values["rows"]}
    for batch, context in dict.fromkeys((row["batch"], row["context"]) for row in values["rows"]):
        cells = (found[batch, context, kind] for kind in kinds)
        texts = (f"{cell['milliseconds']:,.1f} ({cell['megabytes_read']:,.0f})" for cell in cells)
        rows.append(f"| {batch} | {context:,} | {' | '.join(texts)} |")
    rows.append(
        f"\nMilliseconds a step (MB of keys and values to read). {values['work'].capitalize()}; medians of"
        f" {values['rounds']}; torch {values['torch']}, {values['threads']} threads on {values['cores']} CPU cores;"
        " `make bench-attention`."
    )
    return "\n".join(rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "verification": verification,
    "generated": generated,
    "built-ins": built_ins,
    "attention": attention,
    "decode_attention": decode_attention,
}


def definitions(source: str) -> dict[str, int]:
    """Line numbers of all classes, functions and constants of a module, by qualified name."""
    found: dict[str, int] = {}

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                found[prefix + child.name] = child.lineno
                walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.Assign | ast.AnnAssign):
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                found.update({prefix + t.id: child.lineno for t in targets if isinstance(t, ast.Name)})

    walk(ast.parse(source), "")
    return found


def current(path: Path) -> str:
    """What the file should contain."""

    def link(match: re.Match[str]) -> str:
        name, target = match[1], match[2]
        lines = definitions((path.parent / target).read_text(encoding="utf-8"))
        if name not in lines:
            sys.exit(f"{path.name}: {target} defines no {name}")
        return f"[`{name}`]({target}#L{lines[name]})"

    text = path.read_text(encoding="utf-8")
    made = dict(BLOCKS)
    if path.parent.parent.name == "assets":
        made["card"] = lambda: card(path.parent.name)
    for name, make in made.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if begin in text:
            head, rest = text.split(begin, 1)
            text = head + begin + make() + "\n" + end + rest.split(end, 1)[1]
    return LINK.sub(link, text)


def main() -> None:
    stale = []
    for path in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *ROOT.glob("src/gptlab/assets/*/README.md"),
    ]:
        text = current(path)
        if text != path.read_text(encoding="utf-8"):
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"out of date: {', '.join(stale)}; run `make docs`")


if __name__ == "__main__":
    main()
