"""Several processes of one job, one per GPU; and what to say when memory runs out.

`torchrun --nproc-per-node N -- score.py ...`: every process does the same work on the same files,
but in scoring each takes its share of the batches, and in training of an optimizer step's rows.
Losses and gradients are then summed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from model.io import InputError, out_of_memory


class State(Protocol):
    """Where unfinished work is saved, so that the same call goes on from there.

    The scripts' is in toss/workbench/states.py. part: several processes may save one each.
    """

    def load(self, part: int) -> dict[str, Any] | None: ...

    def is_due(self, last: bool) -> bool: ...

    def save(self, values: dict[str, Any], part: int) -> None: ...


def ignore(event: dict[str, Any]) -> None:
    """Report nothing: what training and scoring call after each step by default."""


def rank() -> int:
    """Index of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: list) -> list:
    """This process's part of a list sorted by cost: every size-th item, so all parts cost alike."""
    return items[rank() :: size()]


def over_processes(operation: str, *tensors: Tensor) -> None:
    """Replace each tensor by the "SUM" or the "MAX" of all processes' entries, in place."""
    if size() == 1:
        return
    for tensor in tensors:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))


def meet() -> None:
    """Wait until every process is here. (dist.barrier would be NCCL's, all on the first GPU.)"""
    over_processes("MAX", torch.zeros(1))


@contextmanager
def fitting(batch_tokens: int, longest: int) -> Iterator[None]:
    """Turn running out of memory into an error that says what to do.

    batch_tokens: per batch. longest: tokens of the longest row, which no batch can be without.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        advice = f"give --batch-tokens {batch_tokens // 2}"
        if batch_tokens <= longest:
            advice = "lower --max-length, or train with --gradient-checkpointing"
        problem = f"out of memory with {batch_tokens} tokens per batch, the longest row {longest}"
        raise InputError(f"{problem}: {advice}; the command goes on from what is saved") from None
