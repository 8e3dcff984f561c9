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
from gptlab.report.view import Study, read_study

MOST_BYTES = 400_000
"""Of a file; git keeps every version."""


def keep(directory: Path, name: str, folder: Path) -> list[Path]:
    """Write the results of a study into a folder; return the two files.

    Raises:
        GptlabError: an unfinished study, another one than ``name`` says, or one too large.
    """
    study = read_study(directory)
    if study.about["name"] != name:
        raise GptlabError(f"{directory} holds the study {study.about['name']!r}, not {name!r}; name that one")
    if study.timings is None:
        raise GptlabError(f"{directory} has no timings; finish the study: gptlab study --resume --out {directory}")
    contents = {file: encode(values) for file, values in zip(kept(name), (trim(study), study.timings), strict=True)}
    for file, content in contents.items():
        if len(content) > MOST_BYTES:
            raise GptlabError(f"{file} would have {len(content):,} bytes, more than {MOST_BYTES:,}; leave more out")
    write_files(folder, contents)
    return [folder / file for file in contents]


def trim(study: Study) -> dict[str, Any]:
    """Return the results without what is large, and without the folders that a corpus or a model lay in."""
    about = {**study.about, "recipe": _without_folders(study.about["recipe"])}
    if "conversion" in about and about["conversion"]["recipe"]:
        about["conversion"] = {**about["conversion"], "recipe": _without_folders(about["conversion"]["recipe"])}
    variants = {name: {**values, "attention_maps": None} for name, values in study.variants.items()}
    for values in variants.values():
        if values["source"] == "converted":
            values |= {"heads": None, "samples": []}
    return {**study.results, "study": about, "variants": variants}


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
