"""Files that are not what their names promise: a git-lfs pointer, a web page, or an error message in their place."""

from __future__ import annotations

import re
from pathlib import Path

from gptlab.errors import GptlabError

_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v\d+\s")
_PAGE = re.compile(rb"\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head)\b", re.IGNORECASE | re.DOTALL)
_REFUSAL = re.compile(
    rb"\s*((Entry|Repository) not found|Invalid username or password|Access to (model|dataset) |<Error>|<\?xml)",
    re.IGNORECASE,
)


def refuse_pointer(head: bytes, name: object) -> None:
    """Raise GptlabError where a file that begins like this is a git-lfs pointer."""
    if _POINTER.match(head):
        raise GptlabError(f"{name} is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder")


def refuse_placeholder(path: Path) -> None:
    """Refuse a file that stands for another; a file that is not there, or is anything else, passes.

    Raises:
        GptlabError: it is a git-lfs pointer, an HTML page, or an error message of a download.
    """
    try:
        with path.open("rb") as file:
            head = file.read(1024).removeprefix(b"\xef\xbb\xbf")
    except OSError:
        return
    refuse_pointer(head, path)
    if _PAGE.match(head):
        raise GptlabError(
            f"{path} is an HTML page, not the file itself; download it again, on the Hugging Face hub from the address"
            " with /resolve/ where the page has /blob/"
        )
    if _REFUSAL.match(head):
        line = head.split(b"\n")[0].decode("utf-8", "replace").strip()[:80]
        raise GptlabError(f"{path} holds the error message of a download ({line!r}), not the file itself; get it again")
