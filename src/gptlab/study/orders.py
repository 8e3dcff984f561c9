"""What was asked of a study, and the directory that holds it: `study.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from gptlab.checkpoints.files import write_files
from gptlab.errors import GptlabError
from gptlab.study import stages
from gptlab.study.files import StudySettings, make_study
from gptlab.study.results import STUDY, VERSION, encode
from gptlab.study.variants import Cell

FORMAT = "gptlab study settings"


@dataclass(frozen=True)
class Order:
    """A study, and what the command line changes of it.

    Attributes:
        study: the study's file.
        set: changes to its recipe, ``section.key=value``.
        data: prepared data, in place of the recipe's corpus.
        only: variants to look at beside the base; none is all.
        seeds: how many seeds, from 0 on, in place of the file's.
        device: ``cpu``, ``cuda``, ...; None takes a GPU where there is one.
    """

    study: StudySettings
    set: tuple[str, ...] = ()
    data: Path | None = None
    only: tuple[str, ...] = ()
    seeds: int | None = None
    device: str | None = None


def claim_directory(
    order: Order, out: Path, variants: Sequence[Cell], racers: Sequence[Cell], data: str | None
) -> None:
    """Write `study.json`, after making sure that the directory is free or holds this study.

    It is the same study as long as name, base and data are the same and no variant is defined otherwise: variants may
    be added, and seeds.

    Args:
        order: what is asked.
        out: the directory.
        variants: all that the study has.
        racers: of its race.
        data: what tells the training data from others, or None where nothing is trained.

    Raises:
        GptlabError: the directory holds something else, or cannot be written.
    """
    whole = {"name": order.study.name, "base": order.study.base, "data": data}
    parts = {f"variant {cell.name}": _definition(cell) for cell in variants}
    parts |= {f"race of {cell.name}": _definition(cell) for cell in racers}
    if (out / STUDY).exists():
        before = _read(out)
        for what, value in whole.items():
            if before["whole"][what] != value:
                raise GptlabError(
                    f"{out} holds another study ({what} {before['whole'][what]!r}, not {value!r}); choose another --out"
                )
        for name in sorted(before["parts"].keys() & parts.keys()):
            if before["parts"][name] != parts[name]:
                raise GptlabError(f"{out} holds another study: {name} is defined otherwise; choose another --out")
        parts = before["parts"] | parts
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GptlabError(f"{out} holds something that is no study; choose another --out")
    about = {"format": FORMAT, "version": VERSION, "order": _plain(order), "whole": whole, "parts": parts}
    write_files(out, {STUDY: encode(about)})


def read_order(out: Path) -> Order:
    """Return what was asked last of the study in a directory, to go on with it.

    Raises:
        GptlabError: no study there, or a `study.json` that is damaged or of another version.
    """
    order = _read(out)["order"]
    data = None if order["data"] is None else Path(order["data"])
    chosen = tuple(order["set"]), data, tuple(order["only"]), order["seeds"], order["device"]
    return Order(make_study(order["study"]), *chosen)


def _read(out: Path) -> dict[str, Any]:
    path = out / STUDY
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = (values["format"], values["version"]) == (FORMAT, VERSION)
        if known and not {"order", "whole", "parts"} <= values.keys():
            raise ValueError("it is incomplete")
    except FileNotFoundError:
        raise GptlabError(f"{out} holds no study to go on with; name the directory that --out was given") from None
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise GptlabError(f"{path} cannot be read ({error}); restore it, or choose another --out") from None
    if not known:
        raise GptlabError(f"{path} was written by another version of gptlab; choose another --out")
    return cast(dict[str, Any], values)


def _plain(order: Order) -> dict[str, Any]:
    study = order.study.model_dump(mode="json")
    for section in (study, *study["variant"], *(study["race"] or {}).get("variant", ())):
        if section.get("uptrain") is None:  # what is not asked for is not mentioned
            section.pop("uptrain", None)
    return {
        "study": study,
        "set": list(order.set),
        "data": None if order.data is None else str(order.data.resolve()),
        "only": list(order.only),
        "seeds": order.seeds,
        "device": order.device,
    }


def _definition(cell: Cell) -> dict[str, Any]:
    found: dict[str, Any] = {"load": cell.load, "recipe": None if cell.recipe is None else stages.plain(cell.recipe)}
    if cell.convert is not None:
        found["convert"] = cell.convert.to_dict()
    if cell.uptrain is not None:
        found["uptrain"] = {"recipe": stages.plain(cell.uptrain.recipe), "of": cell.uptrain.of}
    return found
