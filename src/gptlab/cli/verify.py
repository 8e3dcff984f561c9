"""`gptlab verify`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer


def verify(
    model: Annotated[str | None, typer.Argument(help="gpt2: check the original weights as well.")] = None,
    path: Annotated[Path | None, typer.Option(help="Where those weights are; else the hub.")] = None,
    scores: Annotated[
        bool, typer.Option("--scores", help="Also check gpt2's published scores, each by its protocol: hours on a CPU.")
    ] = False,
    data: Annotated[list[str] | None, typer.Option(help="name=FILE, as in lambada=lambada_test.jsonl.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Let the program prove itself: a table of what was checked, PASS or FAIL."""
    from gptlab import verification
    from gptlab.errors import GptlabError
    from gptlab.evaluation.data import parse_paths

    if model is not None and path is not None:
        if not path.exists():
            raise GptlabError(f"no file or directory {path}; check --path")
        path = path.absolute()  # here, even where it has the name of a model
    results = []
    for check in verification.checks(model, path, scores, parse_paths(data or [])):
        result = check()
        results.append(result)
        if not as_json:
            print(verification.line(result), flush=True)
    failed = sum(not result.passed for result in results)
    if as_json:
        values = {**verification.setting(), "checks": [dataclasses.asdict(result) for result in results]}
        print(json.dumps(values, indent=2))
    else:
        seconds = sum(result.seconds for result in results)
        print(f"{len(results) - failed} of {len(results)} checks passed in {seconds:.0f} seconds")
    if failed:
        raise typer.Exit(1)
