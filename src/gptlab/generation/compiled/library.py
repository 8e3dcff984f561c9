"""Builds the C++ of this directory once, for this processor, and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from gptlab.errors import GptlabError

_HERE = Path(__file__).parent
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math")
_PATIENCE = 600
"""Seconds that a compiler is given."""


class NoLibraryError(GptlabError):
    """There is no compiled step here; its text says why."""


def cache_directory() -> Path:
    """Where compiled steps are kept: ``$GPTLAB_CACHE``, or ``~/.cache/gptlab``."""
    try:
        return Path(os.environ.get("GPTLAB_CACHE") or Path.home() / ".cache" / "gptlab") / "compiled"
    except RuntimeError:
        raise NoLibraryError("this user has no home directory; set GPTLAB_CACHE") from None


def find_compiler() -> str | None:
    """Return a C++ compiler: ``$CXX``, or the first of c++, g++ and clang++ that is there."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def is_built() -> bool:
    """Whether `library` finds a step for this processor, so that it costs nothing."""
    try:
        return library_path().exists()
    except (NoLibraryError, OSError):
        return False


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled step, built when this processor has none yet (about ten seconds).

    Raises:
        NoLibraryError: no compiler, or one that fails.
    """
    if os.environ.get("GPTLAB_COMPILED") == "0":
        raise NoLibraryError("GPTLAB_COMPILED=0 switches the compiled step off")
    target = library_path()
    was_there = is_built()
    if not was_there:
        build()
    try:
        loaded = ctypes.CDLL(str(target))
    except OSError as error:
        if not was_there:
            raise NoLibraryError(f"{target} cannot be loaded ({error})") from None
        build()  # what lay there was cut short, by a full disk or a power cut
        try:
            loaded = ctypes.CDLL(str(target))
        except OSError:
            raise NoLibraryError(f"{target} cannot be loaded ({error}); delete it") from None
    loaded.gptlab_step.restype = loaded.gptlab_linear.restype = ctypes.c_int32
    return loaded


@functools.cache
def library_path() -> Path:
    """Where the step for this processor lies, or will."""
    sources = sorted(_HERE.glob("*.cpp")) + sorted(_HERE.glob("*.h"))
    digest = hashlib.sha256("\0".join([*_FLAGS, _processor(), *(file.read_text() for file in sources)]).encode())
    return cache_directory() / f"step-{digest.hexdigest()[:16]}.so"


def build() -> None:
    """Compile the step for this processor, in place of the one that may be there.

    Raises:
        NoLibraryError: no compiler, one that fails, or nowhere to write.
    """
    compiler, target = find_compiler(), library_path()
    sources = [str(path) for path in sorted(_HERE.glob("*.cpp"))]
    if compiler is None:
        raise NoLibraryError("there is no C++ compiler (install g++ or clang++)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch) / target.name
            for processor in ("-march=native", "-mcpu=native", None):  # each compiler knows one of the first two
                options = [*_FLAGS, *([processor] if processor else [])]
                made = subprocess.run(
                    [compiler, *options, *sources, "-o", str(built)],
                    capture_output=True,
                    text=True,
                    errors="replace",
                    check=False,
                    stdin=subprocess.DEVNULL,
                    timeout=_PATIENCE,
                )
                if made.returncode == 0:
                    os.replace(built, target)
                    return
    except subprocess.TimeoutExpired:
        raise NoLibraryError(f"{compiler} has not compiled it in {_PATIENCE} seconds") from None
    except OSError as error:
        raise NoLibraryError(f"{target} cannot be written ({error.strerror}); set GPTLAB_CACHE") from None
    reason = (made.stderr.strip() or f"exit code {made.returncode}").splitlines()[0]
    raise NoLibraryError(f"{compiler} does not compile it ({reason:.200})")


def _processor() -> str:
    """What the code is compiled for: a cache may be shared by machines with processors of different abilities."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
