"""The text that the models of a study are asked about: whole documents, which nothing was chosen on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from gptlab.checkpoints.files import write_files
from gptlab.errors import GptlabError
from gptlab.study.settings import EvaluationSettings
from gptlab.text.documents import open_documents
from gptlab.text.shards import Dataset
from gptlab.text.splits import Part, is_whole, part_of
from gptlab.text.tokenizers import END_OF_TEXT

HELD_OUT = "held_out.txt"


class HeldOut(NamedTuple):
    """A text to evaluate on.

    Attributes:
        path: the file of its documents.
        name: what to call it.
        part: which of the documents of its source they are, None where all of them might be.
    """

    path: Path
    name: str
    part: Part | None


def write_held_out(settings: EvaluationSettings, dataset: Dataset | None, directory: Path) -> HeldOut:
    """Write the text that the models of a study are asked about.

    Of the documents that may be read, those come first whose hash is smallest, until there are enough; in the file they
    stand as in their source. A text that is one document is cut off where enough of it was read.

    Args:
        settings: of the study.
        dataset: what its variants are trained on, or None where none is.
        directory: of the study.

    Raises:
        GptlabError: no such text, no text named where nothing is trained, or no document in the part that is asked for.
    """
    part = settings.part
    if settings.text is not None:
        corpus = open_documents([settings.text])
        documents, name = [text for text in corpus if text.strip()], corpus.name
    elif dataset is not None:
        documents, name = _held_out(dataset), f"held-out part of {dataset.name}"
        if part is None and len({part_of(text)[0] for text in documents}) == 2:
            part = "test"
    else:
        raise GptlabError("a study of trained models needs a text to ask them about; set evaluate.text")
    chosen = _choose(documents, part, settings)
    if not chosen:
        raise GptlabError(
            f"none of the {len(documents)} documents of the {name} is one to {part}; hold more out, or leave"
            " evaluate.part out"
        )
    content = f"{END_OF_TEXT}\n".join(text if text.endswith("\n") else text + "\n" for text in chosen).encode()
    path = directory / HELD_OUT
    if not path.exists() or path.read_bytes() != content:
        write_files(directory, {HELD_OUT: content})
    return HeldOut(path, name, part)


def _held_out(dataset: Dataset) -> list[str]:
    """The held-out documents; all as one where their ends are not recorded."""
    tokenizer, split = dataset.tokenizer, dataset.validation
    ids = ([i for i in row.tolist() if i != tokenizer.end_of_text] for row in split.documents())
    texts = [text for row in ids if (text := tokenizer.decode(row)).strip()]
    if dataset.rule is None or dataset.rule.cut is None:
        return texts
    rule, items = dataset.rule, dataset.items
    # The beginning of one document was trained on, and this is its end.
    return [text for text in texts if is_whole(text, rule, items=items)] or texts


def _choose(documents: Sequence[str], part: Part | None, settings: EvaluationSettings) -> Iterable[str]:
    if len(documents) == 1 and part is None:
        return [documents[0].encode()[: settings.bytes].decode(errors="ignore")]
    placed = [(*part_of(text), i) for i, text in enumerate(documents)]
    chosen: list[int] = []
    n_bytes = 0
    for _, _, i in sorted((one for one in placed if part in (None, one[0])), key=lambda one: one[1]):
        if n_bytes >= settings.bytes and len(chosen) >= settings.documents:
            break
        chosen.append(i)
        n_bytes += len(documents[i].encode())
    return [documents[i] for i in sorted(chosen)]
