"""Time the architectures of a kept study again, on this machine and by today's code.

    python tools/retime.py standard
    make docs

Speed and memory do not depend on what a model has learned, so random weights of the kept configurations do. It replaces
docs/results/NAME-timings.json; nothing else should compute meanwhile.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from build_docs import ROOT, STUDIES, kept
from keep_results import encode

from gptlab.checkpoints.files import write_files
from gptlab.study.results import read_results
from gptlab.study.run import time_variants
from gptlab.study.settings import read_study
from gptlab.training.recipe import make_recipe, read_recipe


def say(row: dict[str, Any]) -> None:
    print(row.get("text") or f"{row.get('what')}, {row.get('seconds_left', 0):.0f} s left", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("name", choices=STUDIES, help="of the study")
    name = parser.parse_args().name
    folder = ROOT / "docs" / "results"
    results = read_results(folder, kept(name)[0])
    configs = {label: variant.config for label, variant in results.variants.items()}
    study = read_study(name)
    recipe = make_recipe(results.study.recipe) if results.study.recipe else read_recipe(study.recipe, study.set)
    with tempfile.TemporaryDirectory() as cache:
        timings = time_variants(study, recipe, configs, results, Path(cache), device=torch.device("cpu"), report=say)
    write_files(folder, {kept(name)[1]: encode(timings.model_dump(mode="json"))})
    print("now run: make docs")


if __name__ == "__main__":
    main()
