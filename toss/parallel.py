"""Several processes of one job, one a GPU: `torchrun --nproc-per-node N -- score.py ...`.

Every process does the same work on the same files, but for two things: in scoring each takes its share of the batches,
and in training its share of an optimizer step's rows. The losses and the gradients are then summed over all, so each
holds the same result. The first process alone writes into the run and speaks. One process alone needs none of this.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from model.errors import InputError


def rank() -> int:
    """Which process this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: list) -> list:
    """This process's part of a list that is sorted by cost: every size-th item, so that the parts cost about the same.

    >>> share([5, 4, 3, 2, 1])  # one process alone takes all
    [5, 4, 3, 2, 1]
    """
    return items[rank() :: size()]


def sum_over_processes(tensors: list[Tensor]) -> None:
    """Add up each tensor over all processes, in place, in one exchange. All are of one dtype and on one device."""
    if size() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started (gloo between CPUs, nccl between GPUs); nothing to do without it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if torch.cuda.is_available():
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise InputError(f"torchrun started a process for GPU {local}, but there are {there}: lower --nproc-per-node")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    spoken = sys.stdout
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    try:
        yield
        dist.destroy_process_group()  # not after an error: the others may still wait for this one, and torchrun ends them
    finally:
        sys.stdout = spoken
