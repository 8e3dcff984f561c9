"""PyTorch's own files of tensors, which are pickles: read as tensors by name, or refused, and never run."""

from __future__ import annotations

import functools
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from gptlab.checkpoints.files import Lazy
from gptlab.errors import GptlabError
from gptlab.placeholders import refuse_placeholder


def open_pickle(path: Path) -> Lazy:
    """Open a PyTorch file of tensors; never unpickle anything else, which could run code.

    Raises:
        GptlabError: it is damaged, or holds anything but tensors by name.
    """
    refuse_placeholder(path)
    try:
        # Files of before torch 1.6 are no zip archives and cannot be memory-mapped.
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols; what counts is said below
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise GptlabError(
            f"{path} is no file of tensors alone: loading it could run code, so it was not loaded; get the"
            " model as safetensors"
        ) from None
    except Exception as error:  # a damaged pickle can stumble in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GptlabError(f"{path} is damaged ({reason}); copy or download it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise GptlabError(f"{path} holds something else than tensors by name; it is no pytorch_model.bin")
    return {str(name): functools.partial(tensors.__getitem__, name) for name in tensors}
