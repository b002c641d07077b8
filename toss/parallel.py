"""Several processes of one job, one per GPU: `torchrun --nproc-per-node N -- score.py ...`.

Every process does the same work on the same files, but in scoring each takes its share of the
batches, and in training of an optimizer step's rows. Losses and gradients are then summed.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Index of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: list) -> list:
    """This process's part of a list sorted by cost: every size-th item, so all parts cost alike."""
    return items[rank() :: size()]


def any_process(busy: bool) -> bool:
    """True if `busy` holds in any process. They meet here: one that hangs ends the others."""
    over_processes("MAX", busy := torch.tensor(int(busy)))
    return bool(busy)


def over_processes(how: str, *tensors: Tensor) -> None:
    """Replace each tensor by the "SUM" or the "MAX" of all processes' entries, in place."""
    for tensor in tensors if size() > 1 else ():
        dist.all_reduce(tensor, getattr(dist.ReduceOp, how))
