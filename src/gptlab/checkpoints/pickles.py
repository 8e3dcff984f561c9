"""PyTorch's own files (`.bin`, `.pt`), which are pickles: read as tensors, numbers and text, or refused, never run.

`torch.load(weights_only=True)` runs no foreign code, but it builds whatever the file asks for of a hundred classes,
with any arguments. So before it is called, the pickle is read, not executed: it may name tensors, their storages and
ordered dictionaries, which is all that a checkpoint of weights is made of.
"""

from __future__ import annotations

import functools
import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from gptlab.checkpoints.files import Lazy
from gptlab.errors import GptlabError
from gptlab.placeholders import refuse_placeholder

_ALLOWED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch \w+Storage"
    r"|torch (Size|device|bfloat16|float(16|32|64)|int(8|16|32|64)|uint8|bool)"
)
LARGEST_PICKLE = 2**24
MOST_TUPLES = 20_000
"""Tuples in tuples, as keys of a dictionary, overflow the stack of Python at 80,000; a checkpoint has four a tensor."""
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Names under which training loops put a model's tensors, beside their own state."""
MOST_SHARED = 3
"""Times the size of the file; embedding and head are often one tensor, and more than that nothing needs."""
_ZIP = b"PK\x03\x04"
_OLD_PICKLES = 5  # before torch 1.6: a number, a version, the machine, the object, the names of its storages


class Foreign(Exception):
    """A class or a function that no checkpoint of tensors names."""


def open_pickle(path: Path) -> Lazy:
    """Open a PyTorch file of tensors by name, alone or under a name of `WRAPPERS`; errors as `load_pickle`."""
    tensors = load_pickle(path)
    if isinstance(tensors, dict):
        if isinstance(tensors.get("model_args"), dict):
            raise GptlabError(
                f"{path} is nanoGPT's ckpt.pt under another name; rename it to ckpt.pt and name that file"
            )
        tensors = next((tensors[name] for name in WRAPPERS if isinstance(tensors.get(name), dict)), tensors)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise GptlabError(
            f"{path} holds something other than tensors by name, alone or under {', '.join(map(repr, WRAPPERS))}; save"
            " model.state_dict() alone as pytorch_model.bin"
        )
    return {str(name): functools.partial(tensors.__getitem__, name) for name in tensors}


def load_pickle(path: Path) -> Any:
    """Return the tensors, numbers and text in a PyTorch file; of one in a zip archive the tensors stay on disk.

    Raises:
        GptlabError: damaged, or it holds anything else, which could run code.
    """
    refuse_placeholder(path)
    try:
        zipped = zipfile.is_zipfile(path)
        with path.open("rb") as file:
            if not zipped and file.read(4) == _ZIP:
                raise ValueError("it is cut short")  # an archive's list of contents is at its end
            file.seek(0)
            for pickled in _zipped(file) if zipped else [file] * _OLD_PICKLES:
                _check(pickled)
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols; what counts is said below
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        n_bytes = 0
        for tensor in tensors_in(values):
            _check_tensor(tensor)
            n_bytes += tensor.numel() * tensor.element_size()
        if n_bytes > MOST_SHARED * path.stat().st_size:
            raise ValueError("its tensors share their numbers")
    except Foreign as error:
        what = (
            f"{path} is not a file of tensors alone ({error} is in it): loading it could run code, so it was not loaded"
        )
        if str(error).startswith("numpy"):
            raise GptlabError(
                f"{what}; where you trust it, turn NumPy's numbers in it into Python's (x.item()) and save it again"
            ) from None
        raise GptlabError(
            f"{what}; get the model as safetensors, or save only its tensors and plain numbers again where you trust it"
        ) from None
    except Exception as error:  # a damaged file can stumble in any way
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise GptlabError(f"{path} is damaged ({reason}); copy or download it again") from None
    return values


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield every tensor in dictionaries and lists at any depth."""
    left, seen = [values], set()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value


def _zipped(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Yield the pickles of an archive, which torch stores uncompressed: nothing is larger than the file."""
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError("its archive is compressed, which PyTorch never does")
            if info.filename.endswith(".pkl"):
                if info.file_size > LARGEST_PICKLE:
                    raise ValueError(f"its pickle has more than {LARGEST_PICKLE:,} bytes")
                yield io.BytesIO(archive.read(info))


def _check(pickled: IO[bytes]) -> None:
    n_tuples = 0
    for code, argument, _ in pickletools.genops(pickled):
        n_tuples += code.name.startswith("TUPLE")
        if n_tuples > MOST_TUPLES:
            raise ValueError("its pickle is nested too deeply")
        if code.name == "GLOBAL" and not _ALLOWED.fullmatch(argument or ""):
            raise Foreign((argument or "").replace(" ", ".", 1))
        if code.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            raise Foreign(f"the instruction {code.name}")


def _check_tensor(tensor: Tensor) -> None:
    """Refuse what is not as many numbers in memory as its shape says."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        raise ValueError("a tensor is sparse, quantized, or has no numbers")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has fewer numbers than that")
