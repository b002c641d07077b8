"""Several processes of one job, one per GPU, and batches that fit into memory.

`torchrun --nproc-per-node N -- score.py ...`: every process does the same work on the same files,
but in scoring each takes its share of the batches, and in training of an optimizer step's rows.
Losses and gradients are then summed.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from model.io import DoesNotFit, out_of_memory
from model.sharding import dummy_pass
from model.transformer import Transformer
from toss.tokens import batches


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


def any_process(flag: bool) -> bool:
    """True if `flag` holds in any process. All processes must ask together."""
    value = torch.tensor(int(flag))
    over_processes("MAX", value)
    return bool(value)


def over_processes(operation: str, *tensors: Tensor) -> None:
    """Replace each tensor by the "SUM" or the "MAX" of all processes' entries, in place."""
    if size() == 1:
        return
    for tensor in tensors:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))


def meet() -> None:
    """Wait until every process is here. (dist.barrier would be NCCL's, all on the first GPU.)"""
    over_processes("MAX", torch.zeros(1))


def attempt(model: Transformer, work: Callable, *arguments: Any) -> Any:
    """work(*arguments), or None if memory ran out. An error if the base is spread over processes.

    Spread processes must run equally many batches, so one alone cannot make its own smaller.
    """
    try:
        return work(*arguments)
    except RuntimeError as error:
        if model.sharded or not out_of_memory(error):
            raise
    # Here the error no longer holds the batch's memory. CUDA's libraries allocate by themselves.
    torch.cuda.empty_cache()
    return None


def halve(budget: int, longest: int, report: Callable[[dict], None]) -> int:
    """Half the tokens per batch, after running out of memory; DoesNotFit if a batch is one row."""
    if budget <= longest:
        advice = "lower --max-length, or train with --gradient-checkpointing"
        raise DoesNotFit(f"out of memory on a single row of at most {longest} tokens; {advice}")
    remark = f"out of memory with {budget} tokens per batch; continuing with {budget // 2}"
    report({"remark": f"{remark} (--batch-tokens)"})
    return budget // 2


def run_in_batches(
    model: Transformer,
    work: Callable[[list[int]], Any],
    groups: list[list[int]],
    lengths: list[int],
    budget: int,
    report: Callable[[dict], None],
) -> Iterator[tuple[list[int], Any]]:
    """Run work(batch) for each batch of rows, and yield the batch with its result.

    groups: this process's batches, of at most `budget` tokens; cut anew to half of that when memory
    runs out. The processes take equally many turns, so that they can do something together in each.
    One that has finished nothing in a turn yields no rows and None.
    """
    waiting = list(groups)
    while any_process(len(waiting) > 0):
        if not waiting:
            dummy_pass(model)
            yield [], None
            continue

        batch = waiting[0]
        result = attempt(model, work, batch)
        if result is None:
            budget = halve(budget, lengths[batch[0]], report)
            remaining = [row for group in waiting for row in group]
            waiting = batches(remaining, lengths, budget)
            yield [], None
            continue

        waiting.pop(0)
        yield batch, result
