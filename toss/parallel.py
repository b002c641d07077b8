"""Several processes of one job, one a GPU: `torchrun --nproc-per-node N -- score.py ...`.

Every process does the same work on the same files, but for two things: in scoring each takes its share of the batches,
and in training its share of an optimizer step's rows. The losses and the gradients are then summed over all, so each
holds the same result. The first process alone writes into the run and prints; an error is told by whoever has it. One
process alone needs none of this.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

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
    if size() > 1 and len(tensors) == 1:
        dist.all_reduce(tensors[0])
    elif size() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))


def own_gpu() -> torch.device:
    """The GPU of this process: torchrun's number for it, or PyTorch's choice where there is one process."""
    if size() > 1:
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise InputError(f"torchrun started a process for GPU {local}, counted from 0, but there are {there}: lower "
                             "--nproc-per-node")
        torch.cuda.set_device(local)
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started (gloo between CPUs, nccl between GPUs); nothing to do without it.

    For a `with` block, or around a function: `processes()(work)`. When one of them fails, torchrun ends the others, which
    clean up after themselves.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))  # one sum a model: a slower card may be hours behind
    spoken = sys.stdout
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    try:
        yield
        dist.destroy_process_group()  # not after an error: the others may still wait for this one, and torchrun ends them
    except InputError as error:
        raise InputError(f"process {rank()} of {size()}: {error}") from None
    finally:
        sys.stdout = spoken
