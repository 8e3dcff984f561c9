"""One process at a time in a run's directory: a lock that ends with the process that holds it, however that ends.

The lock is the operating system's (`flock`) on the file `.lock` in the directory, not the file itself: one that a
killed process left behind, or that came along when the directory was copied, locks nothing. It holds the owner's
process id and machine, for the message that another process gets.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from gptlab.checkpoints.files import refuse_bytes
from gptlab.errors import GptlabError
from gptlab.training.parallel import Group

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_held: set[int] = set()


@contextlib.contextmanager
def locked(run: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Keep every other process from training in a run's directory, which is made where it is not there.

    Afterwards the file is gone, and so are directories that were made and stayed empty.

    Args:
        run: the run's directory.
        say: told in a sentence where the file system does not support locks; then nothing is locked.

    Raises:
        GptlabError: another process has it, the directory cannot be written, or its path is not UTF-8.
    """
    refuse_bytes(run)
    made = [path for path in (run, *run.parents) if not path.exists()]
    handle = _take(run, say)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                (run / NAME).unlink()  # while the lock is held: whoever opened the file meanwhile finds out
            _held.discard(handle)
            os.close(handle)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def alone(run: Path, group: Group, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """As `locked`, for all the processes of a group: the first one has the lock, and all go on or none."""
    with contextlib.ExitStack() as stack:
        refused = None
        if group.first:
            try:
                stack.enter_context(locked(run, say))
            except GptlabError as error:
                refused = error
        if group.any(refused is not None):
            raise refused or GptlabError(f"the first process cannot train in {run}; see what it says")
        yield


def holder(run: Path) -> str:
    """Return in words which process trains in a run's directory, as far as the file in it says."""
    try:
        pid, _, machine = (run / NAME).read_text(encoding="utf-8").strip().partition(" ")
    except (OSError, ValueError):
        pid = machine = ""
    if not pid.isdecimal():
        return "another process"
    return f"process {pid}" if machine == socket.gethostname() else f"process {pid} on {machine}"


def refusal(run: Path) -> GptlabError:
    """Return what a process is told that comes second."""
    return GptlabError(
        f"the run {run} is being trained by {holder(run)}; wait for its end, or stop that process (SIGTERM saves), then"
        f" go on with gptlab train --resume {run}"
    )


def _take(run: Path, say: Callable[[str], None]) -> int | None:
    """Return the descriptor that holds the lock; None where there are no locks."""
    if fcntl is None:
        return None
    for attempt in itertools.count():
        try:
            run.mkdir(parents=True, exist_ok=True)
            handle = os.open(run / NAME, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < 100:
                continue  # one that ended removed the empty directory between the two
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise GptlabError(
                f"cannot write to {run}: {reason}; choose another place, and copy a run there to go on with it"
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise refusal(run) from None
        except OSError as error:
            os.close(handle)
            if error.errno not in _NO_LOCKS:
                raise GptlabError(f"the run {run} cannot be locked: {error.strerror}") from None
            say(f"the file system of {run} does not support locks; make sure that no other process trains in it")
            return None
        if _is(handle, run / NAME):
            with contextlib.suppress(OSError):  # a full disk: it is locked all the same
                os.truncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
            _held.add(handle)
            return handle
        os.close(handle)  # its owner ended meanwhile and took the file away
    raise AssertionError("not reached")


def _is(handle: int, path: Path) -> bool:
    """Is this open file still the one that has the name?"""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _let_go() -> None:
    """A process that is forked must not keep the lock when the owner is gone."""
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
