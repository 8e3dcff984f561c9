"""Write the generated parts of README.md and docs/ from result files; `--check` only says whether they are current.

Two things are generated: what stands between `<!-- NAME -->` and `<!-- end NAME -->`, and the figures of the studies.
Links such as [`GPT.forward`](src/gptlab/model/gpt.py) are checked: the linked file must hold the definition they name.
Drawings differ a little from one matplotlib to the next, so a figure is current when it says that it was drawn from
the results that are there; one that is deleted is drawn again.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptlab.study.results import Results

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ("standard", "papers", "modern", "rates", "ages", "convert", "convert-8m", "real")
"""Those whose results the docs show, where a page has a place for them; tools/keep_results.py puts them there."""
LINK = re.compile(r"\[`([\w.]+)`\]\(((?:\.\./)*src/[\w/]+\.py)(#\w*)?\)")


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
    rows = ["| model | parameters | nats per token | bits per byte |", "|---|---:|---:|---:|"]
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
        by_case = {(r["length"], r["variant"]): r for r in values["rows"] if r["backward"] == backward}
        for length in sorted({length for length, _ in by_case}):
            cells = [by_case.get((length, kind)) for kind in kinds]
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
    by_case = {(row["batch"], row["context"], row["variant"]): row for row in values["rows"]}
    for batch, context in dict.fromkeys((row["batch"], row["context"]) for row in values["rows"]):
        cells = (by_case[batch, context, kind] for kind in kinds)
        texts = (f"{cell['milliseconds']:,.1f} ({cell['megabytes_read']:,.0f})" for cell in cells)
        rows.append(f"| {batch} | {context:,} | {' | '.join(texts)} |")
    rows.append(
        f"\nMilliseconds per step (MB of keys and values to read). {values['work'].capitalize()}; medians of"
        f" {values['rounds']}; torch {values['torch']}, {values['threads']} threads on {values['cores']} CPU cores;"
        " `make bench-attention`."
    )
    return "\n".join(rows)


def training_step() -> str:
    values = results("train")
    rows = [
        "| tokens | dtype | program | tokens per second | memory above weights, gradients, optimizer, libraries, GB |",
        "|---|---|---|---:|---:|",
    ]
    for row in values["rows"]:
        figures = f"{row['tokens_per_second']:,.0f} | {row['above_state_gigabytes']:.2f}"
        rows.append(f"| {row['batch']} × {row['length']:,} | {row['dtype']} | {row['program']} | {figures} |")
    rows.append(
        f"\n{values['work'][:1].upper()}{values['work'][1:]}; medians of {values['rounds']} rounds in turn;"
        f" torch {values['torch']}, transformers {values['transformers']}, {values['threads']} threads on"
        f" {values['cores']} CPU cores;"
        " nanoGPT's model transcribed operation by operation; `make bench-train`."
    )
    return "\n".join(rows)


def prepare_speed() -> str:
    values = results("prepare")
    rows = ["| program | MB per second and core | share of tiktoken's rate |", "|---|---:|---:|"]
    for row in values["rates"]:
        share = f"{100 * row['share_of_tiktoken']:.0f}%"
        rows.append(f"| {row['program']} | {row['megabytes_per_second_and_core']:.2f} | {share} |")
    rows += ["", "| input | tokenizer | MB | peak memory, MB |", "|---|---|---:|---:|"]
    for row in values["memory"]:
        size, peak = f"{row['megabytes']:,.0f}", f"{row['peak_memory_megabytes']:,.0f}"
        rows.append(f"| {row['input']} | {row['tokenizer']} | {size} | {peak} |")
    rows.append(
        f"\n{values['work']}; medians of {values['rounds']} rounds in turn on {values['cores']} CPU cores; tiktoken"
        f" {values['tiktoken']}, which has the documents in memory and leaves ids there; `make bench-prepare`."
    )
    return "\n".join(rows)


def evaluation_speed() -> str:
    values = results("evaluate")
    rows = ["| program | dtype | passages per second | gptlab is faster by |", "|---|---|---:|---:|"]
    for row in values["rows"]:
        figures = f"{row['passages_per_second']:.2f} | {row['gptlab_is_faster_by']:.2f}"
        rows.append(f"| {row['program']} | {row['dtype']} | {figures} |")
    worst = max(row["largest_difference_in_nats"] for row in values["rows"] if row["dtype"] == "float32")
    rows.append(
        f"\n{values['work']}; the answers differ by at most {worst:.0e} nats in float32. {values['rounds']} rounds in"
        f" turn; torch {values['torch']}, transformers {values['transformers']}, {values['threads']} threads on"
        f" {values['cores']} CPU cores; `make bench-evaluate`."
    )
    return "\n".join(rows)


def peers() -> str:
    if not (ROOT / "docs/results/peers.json").exists():
        return "Not measured yet."
    values = results("peers")
    works, machine = values["works"], values["machine"]
    names = {"decode": "new tokens, batch {batch}", "prefill": "reading {prompt:,} tokens"}
    said = {name: names[work["work"]].format(**work) for name, work in works.items()}
    rows = ["| work | precision | beside | times as fast | target |", "|---|---|---|---:|---|"]
    for row in values["ratios"]:
        reached = "reached" if row["ratio"] >= (row["target"] or 0) else "**missed**"
        target = "none" if row["target"] is None else f"{row['target']:.1f}, {reached}"
        rows.append(f"| {said[row['work']]} | {row['precision']} | {row['beside']} | {row['ratio']:.2f} | {target} |")
    for name, work in works.items():
        rows += [
            "",
            f"Tokens per second, {said[name]}:",
            "",
            "| program | weights | | of the bandwidth |",
            "|---|---|---:|---:|",
        ]
        for row in work["rows"]:
            share = f"{100 * row['share']:.0f}%" if "share" in row else ""
            rows.append(f"| {row['program']} | {row['precision']} | {row['tokens_per_second']:,.1f} | {share} |")
        bandwidth = f"{work['bandwidth']['bytes_per_second'] / 1e9:.1f} GB/s"
        rows.append(f"\nMemory was read at {bandwidth} in the same run; medians of {work['rounds']} rounds in turn.")
        if cautious := work["without_special_buffers"]:
            rows.append(f"Not with llama.cpp's kernels for AMX, which crashed here: {', '.join(cautious)}.")
    versions = sorted({row["version"] for work in works.values() for row in work["rows"]})
    rows.append(
        f"\n{values['model'].capitalize()}, a prompt of 128 tokens, greedy choice; {machine['processor']},"
        f" {machine['threads']} threads for every program; {', '.join(versions)}; `make bench-peers`."
    )
    return "\n".join(rows)


def precisions() -> str:
    if not (ROOT / "docs/results/precisions.json").exists():
        return "Not measured yet."
    values = results("precisions")
    dtypes = list(values["quality"][0]["nats_per_token"])
    rows = [f"| model | tokens | {' | '.join(dtypes)} |", "|---|---:|" + "---:|" * len(dtypes)]
    for row in values["quality"]:
        nats = row["nats_per_token"]
        changes = (f"{nats[dtype] - nats['float32']:+.4f}" for dtype in dtypes[1:])
        rows.append(f"| {row['model']} | {row['tokens']:,} | {nats['float32']:.4f} | {' | '.join(changes)} |")
    rows += [
        f"\nNats per token on {values['text']}, windows of the context; else the change from float32.",
        "\nMegabytes of anonymous memory while GPT-2's 124M decodes 128 tokens after 128, above its libraries:",
        "\n| weights | weights and cache | loading | reading the prompt | decoding | most, over weights and cache |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in values["memory"]:
        held = row["weights"] + row["cache"]
        cells = [held, row["loading"], row["reading"], row["decoding"]]
        ratio = f"{max(cells[1:]) / held:.2f}"
        rows.append(f"| {row['dtype']} | {' | '.join(f'{cell / 1e6:,.0f}' for cell in cells)} | {ratio} |")
    rows.append(f"\ntorch {values['machine']['torch']}; `make bench-quality`. The target is 1.3.")
    return "\n".join(rows)


def conversion_heads() -> str:
    if not (ROOT / "docs/results/conversion_heads.json").exists():
        return ""
    values = results("conversion_heads")
    by_case = {(row["method"], row["grouping"], row["n_kv_head"]): row for row in values["rows"]}
    counts = list(dict.fromkeys(row["n_kv_head"] for row in values["rows"]))
    rows = [f"| method, groups | {' | '.join(map(str, counts))} |", "|---|" + "---|" * len(counts)]
    for method, grouping in dict.fromkeys((method, grouping) for method, grouping, _ in by_case):
        cells = []
        for n_kv_head in counts:
            # One group of all heads is the same either way.
            row = by_case.get((method, grouping, n_kv_head)) or by_case[method, "contiguous", n_kv_head]
            cells.append(f"{row['qk_mean']:.3f} / {row['ov_mean']:.3f}")
        rows.append(f"| {method}, {grouping} | {' | '.join(cells)} |")
    rows += [
        f"\nQK / OV, by number of key/value heads, means over the 12 layers: {values['work']}.",
        "\n![Relative error by layer](images/conversion_heads.png)",
    ]
    return "\n".join(rows)


def positional_heads() -> str:
    if not (ROOT / "docs/results/positional_heads.json").exists():
        return ""
    values = results("positional_heads")
    layers, built_in = values["distance"], values["built_in"]
    rows = [f"| layer | {' | '.join(map(str, range(len(layers))))} |", "|---|" + "---:|" * len(layers)]
    for title, row in (
        ("GPT-2's heads, mean", [statistics.fmean(layer) for layer in layers]),
        ("its least", [min(layer) for layer in layers]),
        ("its most", [max(layer) for layer in layers]),
        ("random queries and keys", values["control_by_layer"]),
    ):
        rows.append(f"| {title} | {' | '.join(f'{value:.2f}' for value in row)} |")
    found = {method: built_in[method]["rank_correlation"] for method in ("abrupt", "fit")}
    rows.append(
        f"\nShare of distance: {values['work']}. What rotation can compute falls short of it by"
        f" at most {values['rotary_short_of_distance_at_most']:.5f} in any head."
        f" {100 * values['control_above']:.0f}% of random heads have more than GPT-2's median."
        f" In `{built_in['model']}`, {sum(map(len, built_in['distance']))} heads: rank"
        " correlation of the share with what a conversion does to a head's attention (mean KL over"
        f" {built_in['rows']} texts of {built_in['length']} tokens) {found['abrupt']:.2f} after `abrupt`,"
        f" {found['fit']:.2f} after `fit`. `python benchmarks/positional_heads.py gpt2-attention`,"
        " [positional_heads.json](results/positional_heads.json)."
    )
    return "\n".join(rows)


def llama_sizes() -> str:
    from gptlab.config import ModelConfig
    from gptlab.model import cost

    switches: dict[str, dict[str, Any]] = {
        "GPT-2 small": {},
        "rotary positions": {"position": "rope"},
        "4 key/value heads": {"n_kv_head": 4},
        "RMSNorm": {"norm": "rms"},
        "SwiGLU": {"mlp": "swiglu"},
        "no biases": {"bias": False},
    }
    rows = ["| | parameters | cache of 1,024 tokens | arithmetic per token |", "|---|---:|---:|---:|"]
    values: dict[str, Any] = {}
    for name, switch in switches.items():
        values |= switch
        config = ModelConfig.preset("gpt2", **values)
        cache = cost.cache_bytes(config, 1024, 2) / 2**20
        flops = cost.forward_flops(config, 1024).total / 1024 / 1e6
        total = sum(cost.parameters(config).values())
        rows.append(f"| {'and ' if len(values) > 1 else ''}{name} | {total:,} | {cache:.0f} MiB | {flops:.1f} MFLOP |")
    rows.append("\nCounted from the configuration: a cache in bfloat16, a forward pass over 1,024 tokens.")
    return "\n".join(rows)


def study_results(name: str) -> Results:
    from gptlab.study.results import read_results

    return read_results(ROOT / "docs" / "results", kept(name)[0])


def conversion_table() -> str:
    from conversion_tables import STUDIES, table

    there = (name for name in STUDIES if (ROOT / "docs" / "results" / kept(name)[0]).exists())
    return table({name: study_results(name) for name in there})


def conversion_digest() -> str:
    from conversion_tables import DIGEST, STUDIES, table

    there = (name for name in STUDIES if (ROOT / "docs" / "results" / kept(name)[0]).exists())
    return table({name: study_results(name) for name in there}, DIGEST)


def conversion_headline() -> str:
    from conversion_tables import STUDIES, headline

    there = (ROOT / "docs" / "results" / kept(STUDIES[0])[0]).exists()
    return headline(study_results(STUDIES[0])) if there else ""


def real_table() -> str:
    from real_study import table

    return table(study_results("real")) if (ROOT / "docs" / "results" / kept("real")[0]).exists() else ""


def real_uptraining() -> str:
    from real_study import uptrained

    file = ROOT / "docs/results/real-uptraining.json"
    return uptrained(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else ""


def real_layers() -> str:
    from real_study import layers

    file = ROOT / "docs/results/real-layers.json"
    return layers(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else ""


def modern_ladder() -> str:
    from study_tables import ladder

    return ladder(study_results("modern")) if (ROOT / "docs" / "results" / kept("modern")[0]).exists() else ""


def viewed(name: str) -> Any:
    """A kept study as the report asks for it."""
    from gptlab.report.view import read_study

    return read_study(ROOT / "docs" / "results", kept(name))


def small_models() -> str:
    from study_tables import small_models

    return small_models(viewed("standard"))


def measured(change: str) -> str:
    from study_tables import measured

    return measured(change, viewed("standard"), cards())


def predicted() -> str:
    from study_tables import predicted

    return predicted(viewed("standard"))


def shown(name: str) -> str:
    """The table of a study that `study_tables` has a function of the same name for."""
    import study_tables

    there = (ROOT / "docs" / "results" / kept(name)[0]).exists()
    return str(getattr(study_tables, name)(viewed(name))) if there else ""


def gpt2_sizes() -> str:
    from study_tables import gpt2_sizes

    return gpt2_sizes(viewed("standard"), viewed("real"), cards())


def drawings() -> dict[Path, bytes]:
    """Figures of the benchmarks that are not there or not current, by where they belong."""
    return _heads_drawing() | _real_drawing()


def _heads_drawing() -> dict[Path, bytes]:
    path, image = ROOT / "docs/results/conversion_heads.json", ROOT / "docs/images/conversion_heads.png"
    if not path.exists():
        return {}
    from draw_conversion import draw, stamp

    content = path.read_bytes()
    if image.exists() and stamp(content).encode() in image.read_bytes():
        return {}
    return {image: draw(content)}


def _real_drawing() -> dict[Path, bytes]:
    folder, end = ROOT / "docs/images", stamp("real")
    if not (ROOT / "docs" / "results" / kept("real")[0]).exists():
        return {}
    from real_study import draw, draw_windows, windows

    values = study_results("real")
    made = {"real.svg": draw} | ({"real-windows.svg": draw_windows} if windows(values) else {})
    old = {name for name in made if (folder / name).exists() and (folder / name).read_bytes().endswith(end)}
    return {folder / name: make(values) + end for name, make in made.items() if name not in old}


def kept(name: str) -> tuple[str, str]:
    """The names under docs/results/ of a study's results and timings."""
    return f"{name}.json", f"{name}-timings.json"


@functools.cache
def excerpt(folder: Path, name: str) -> tuple[Any, list] | None:
    """A study and what the page says of it; None where its results are not there."""
    if not (folder / kept(name)[0]).exists():
        return None
    from gptlab.report.page import excerpt
    from gptlab.report.view import read_study

    study = read_study(folder, kept(name))
    return study, excerpt(study, " and ".join(f"[{file}](../results/{file})" for file in kept(name)))


def study(name: str) -> str:
    kept = excerpt(ROOT / "docs" / "results", name)
    if kept is None:
        return ""
    from gptlab.report.page import render

    return render("report.md.j2", *kept, {}, folder=f"../results/{name}").strip()


def figures(name: str) -> dict[Path, bytes]:
    """The figures of a study, by where they belong."""
    folder = ROOT / "docs" / "results"
    kept = excerpt(folder, name)
    if kept is None:
        return {}
    from gptlab.report.page import draw

    return {folder / name / file: content + stamp(name) for file, content in draw(kept[1], ("svg",)).items()}


def stamp(name: str) -> bytes:
    """What ends a figure: the results that it was drawn from."""
    files = (ROOT / "docs" / "results" / file for file in kept(name))
    content = b"".join(file.read_bytes() for file in files if file.exists())
    return f"<!-- drawn from {hashlib.sha256(content).hexdigest()} -->\n".encode()


BLOCKS: dict[str, Callable[[], str]] = {
    "verification": verification,
    "generated": generated,
    "built-ins": built_ins,
    "attention": attention,
    "decode_attention": decode_attention,
    "training step": training_step,
    "prepare speed": prepare_speed,
    "evaluation speed": evaluation_speed,
    "peers": peers,
    "precisions": precisions,
    "conversion heads": conversion_heads,
    "positional heads": positional_heads,
    "conversion table": conversion_table,
    "conversion digest": conversion_digest,
    "conversion headline": conversion_headline,
    "llama sizes": llama_sizes,
    "real table": real_table,
    "real uptraining": real_uptraining,
    "real layers": real_layers,
    "modern ladder": modern_ladder,
    "ages table": lambda: shown("ages"),
    "rates table": lambda: shown("rates"),
    "small models": small_models,
    "gpt2 sizes": gpt2_sizes,
    "predicted": predicted,
    **{f"measured {change}": functools.partial(measured, change) for change in ("rope", "gqa", "swa")},
    **{name: functools.partial(study, name) for name in STUDIES},
}


def definitions(source: str) -> set[str]:
    """The qualified names of all classes, functions and constants of a module."""
    names: set[str] = set()

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                names.add(prefix + child.name)
                walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.Assign | ast.AnnAssign):
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                names.update(prefix + t.id for t in targets if isinstance(t, ast.Name))

    walk(ast.parse(source), "")
    return names


def check_links(path: Path, text: str) -> None:
    """Exit where a link to the source leads to no file, names a symbol that the file does not define, or a line."""
    for name, target, line in LINK.findall(text):
        source = path.parent / target
        if not source.is_file():
            sys.exit(f"{path.name}: there is no {target}")
        if name not in definitions(source.read_text(encoding="utf-8")):
            sys.exit(f"{path.name}: {target} defines no {name}")
        if line:
            sys.exit(f"{path.name}: the link to {name} ends in {line}; a line number goes stale, the name does not")


def current(path: Path) -> str:
    """What the file should contain."""
    text = path.read_text(encoding="utf-8")
    made = dict(BLOCKS)
    if path.parent.parent.name == "assets":
        made["card"] = lambda: card(path.parent.name)
    for name, make in made.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if begin in text:
            head, rest = text.split(begin, 1)
            text = head + begin + make() + "\n" + end + rest.split(end, 1)[1]
    check_links(path, text)
    return text


def pages() -> list[Path]:
    """All files with generated parts."""
    cards = ROOT.glob("src/gptlab/assets/*/README.md")
    docs = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/appendix").glob("*.md"))]
    return [ROOT / "README.md", *ROOT.glob("CONTRIBUTING.md"), *docs, *sorted(cards)]


def stale() -> dict[Path, bytes | None]:
    """Every file that is not current, with what it should contain; None for one that should not be there."""
    changes: dict[Path, bytes | None] = {}
    for path in pages():
        text = current(path).encode()
        if text != path.read_bytes():
            changes[path] = text
    changes |= drawings()
    for name in STUDIES:
        drawn = figures(name)
        there = set((ROOT / "docs" / "results" / name).glob("*.svg"))
        changes |= dict.fromkeys(there - drawn.keys())
        end = stamp(name)
        changes |= {
            path: new for path, new in drawn.items() if path not in there or not path.read_bytes().endswith(end)
        }
    return changes


def main() -> None:
    changes = stale()
    if "--check" in sys.argv:
        if changes:
            names = ", ".join(str(path.relative_to(ROOT)) for path in changes)
            sys.exit(f"out of date: {names}; run `make docs`")
        return
    for path, content in changes.items():
        if content is None:
            path.unlink()
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)


if __name__ == "__main__":
    main()
