"""Put what a finished study found into docs/results/, for the page docs/results.md.

    gptlab study standard --out studies/standard
    python tools/keep_results.py studies/standard standard
    make docs

Two files are kept: `results.json` without what is large and what the page does not show (the attention maps; of
conversions, which are many, the heads and samples too), and `timings.json`. Lists of numbers stand on one line each.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from build_docs import ROOT, STUDIES, kept

from gptlab.checkpoints.files import write_files
from gptlab.errors import GptlabError
from gptlab.study.results import Results, read_results, read_timings

MOST_BYTES = 450_000
"""Of a file; git keeps every version."""


def keep(directory: Path, name: str, folder: Path) -> list[Path]:
    """Write the results of a study into a folder; return the two files.

    Raises:
        GptlabError: an unfinished study, another one than ``name`` says, or one too large.
    """
    results = read_results(directory)
    if results.study.name != name:
        raise GptlabError(f"{directory} holds the study {results.study.name!r}, not {name!r}; name that one")
    pair = (trim(results), read_timings(directory))
    contents = {file: encode(values.model_dump(mode="json")) for file, values in zip(kept(name), pair, strict=True)}
    for file, content in contents.items():
        if len(content) > MOST_BYTES:
            raise GptlabError(f"{file} would have {len(content):,} bytes, more than {MOST_BYTES:,}; leave more out")
    write_files(folder, contents)
    return [folder / file for file in contents]


def trim(results: Results) -> Results:
    """Return the results without what is large, and without the folders that a corpus or a model lay in."""
    about = results.study.model_copy(update={"recipe": _without_folders(results.study.recipe)})
    if about.conversion is not None and about.conversion.recipe:
        recipe = _without_folders(about.conversion.recipe)
        about = about.model_copy(update={"conversion": about.conversion.model_copy(update={"recipe": recipe})})
    variants = {}
    for label, variant in results.variants.items():
        more = {"heads": None, "samples": []} if variant.source == "converted" else {}
        variants[label] = variant.model_copy(update={"attention_map": None, **more})
    return results.model_copy(update={"study": about, "variants": variants})


def _without_folders(recipe: dict[str, Any]) -> dict[str, Any]:
    if "data" not in recipe:
        return recipe
    corpus = [Path(corpus).name for corpus in recipe["data"]["corpus"]]
    return {**recipe, "data": {**recipe["data"], "corpus": corpus}}


def encode(values: Any) -> bytes:
    """Return JSON in which every list of numbers stands on one line."""
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    # Strings are passed over, whatever brackets they hold.
    lists = re.compile(r'"(?:[^"\\]|\\.)*"|\[[^\[\]{}"]*\]')
    return lists.sub(lambda m: m[0] if m[0][0] == '"' else re.sub(r"\s+", " ", m[0]), text).encode() + b"\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path, help="what `gptlab study --out` made")
    parser.add_argument("name", choices=STUDIES, help="of the study")
    arguments = parser.parse_args()
    try:
        files = keep(arguments.directory, arguments.name, ROOT / "docs" / "results")
    except GptlabError as error:
        parser.error(str(error))
    for file in files:
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size:,} bytes")
    print("now run: make docs")


if __name__ == "__main__":
    main()
