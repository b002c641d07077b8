"""Several processes of one job, one per GPU; and what to say when memory runs out.

`torchrun --nproc-per-node N -- score.py ...`: every process does the same work on the same files,
but in scoring each takes its share of the batches, and in training of an optimizer step's rows.
Losses and gradients are then summed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.io import InputError, out_of_memory


class Watch:
    """What training and scoring call to report and to save what they do. This one does neither.

    The scripts' is in toss/workbench/progress.py; for another, override what you need.
    """

    def on_step(self, event: dict[str, Any]) -> None:
        """Called after each step: see there for what the event holds."""

    def load(self, part: int) -> dict[str, Any] | None:
        """What was saved of this call's work; None if nothing was.

        part: several processes may save one each.
        """

    def is_due(self, last: bool) -> bool:
        """True if it is time to save. last: after the last step."""
        return False

    def save(self, values: dict[str, Any], part: int) -> None:
        """Replace what was saved. values: tensors, numbers, texts, lists and dictionaries."""


UNWATCHED = Watch()


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


def agreed(value: Any) -> Any:
    """What the first process has decided, in every process. value: of JSON's types."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


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
