"""Recipes and studies on disk: TOML that the package carries under a name, or a file."""

from __future__ import annotations

import tomllib
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from gptlab.errors import GptlabError, nearest


def toml_names(folder: Traversable) -> list[str]:
    """Return the names of the TOML files in a folder of the package."""
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def read_toml(kind: str, name_or_path: str, folder: Traversable) -> dict[str, Any]:
    """Read a file that the package carries, or one of the user's.

    Args:
        kind: what it is, for messages: ``recipe`` or ``study``.
        name_or_path: a name in ``folder``, or a path.
        folder: in the package.

    Raises:
        GptlabError: an unknown name (with the nearest right one), or a file that cannot be read or is not TOML.
    """
    names, path = toml_names(folder), Path(name_or_path)
    try:
        if name_or_path in names:
            text = (folder / f"{name_or_path}.toml").read_text(encoding="utf-8")
        elif path.is_file():
            text = path.read_text(encoding="utf-8-sig")
        else:
            hint = nearest(name_or_path, names)
            raise GptlabError(f"no {kind} {name_or_path!r}{hint}; give a .toml file or one of {', '.join(names)}")
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise GptlabError(f"the {kind} {name_or_path} is not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise GptlabError(f"the {kind} {name_or_path} cannot be read: {error}") from None
