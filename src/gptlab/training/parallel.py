"""Several processes as one: what torchrun starts, DDP and FSDP2, all from outside the model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gptlab.devices import find_device
from gptlab.model.gpt import GPT


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are.
        device: where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Is this the process that prints and writes?"""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Is this so on any process?"""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def share(self, n: int) -> slice:
        """Return this process's part of ``n`` rows."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)


@contextlib.contextmanager
def join(device: str | None = None) -> Iterator[Group]:
    """Join the processes that torchrun started, or be the only one.

    Args:
        device: ``cpu``, ``cuda``, ...; None takes a GPU where there is one.
    """
    place = find_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group(0, 1, place)
        return
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), size, place)
    finally:
        dist.destroy_process_group()


def spread(model: GPT, kind: str, group: Group) -> nn.Module:
    """Return the module to call in training: the model itself, or one that keeps all processes' gradients alike.

    With ``fsdp`` the parameters of ``model`` become divided tensors in place, block by block (FSDP2, PyTorch's
    ``fully_shard``); with ``ddp`` they stay whole on each process.
    """
    if group.size == 1:
        return model
    if kind == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    mesh = init_device_mesh(group.device.type, (group.size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextlib.contextmanager
def synchronised(module: nn.Module, now: bool) -> Iterator[None]:
    """Exchange gradients in this backward pass, or leave it to a later one that adds to them."""
    if isinstance(module, DistributedDataParallel):
        with contextlib.nullcontext() if now else module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)
    yield


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor in one piece, wherever its parts are. All processes must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor, divided and placed as ``parameter`` is; the inverse of `whole`."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
