"""A base that is too large for one GPU: its blocks are spread over the processes of a job.

PyTorch's fully_shard gathers a block where it is at work and drops it afterwards, so all processes
must make equally many passes. The embedding, the last norm and the head stay whole in each: the
head runs in chunks of tokens, as many as a process happens to have.
"""

import gc
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.io import InputError


def check_processes() -> None:
    """Raise InputError where a base cannot be spread."""
    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) < (2, 7):
        raise InputError(f"--shard needs PyTorch 2.7 or newer, and this is {torch.__version__}")
    if not dist.is_initialized():
        raise InputError("--shard spreads the base over several processes: start it with torchrun")


def spread(model: nn.Module, device: str | torch.device) -> None:
    """Spread the blocks of a model without memory (see checkpoint.skeleton) over all processes."""
    check_processes()
    from torch.distributed.fsdp import fully_shard

    gc.collect()  # an earlier model, which its hooks hold in cycles
    mesh = dist.init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    whole = {model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight}
    model.requires_grad_(False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=whole)  # holds nothing; gathers a block ahead
    model.sharded = True


def read_tensor(tensors, name: str, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """A tensor of an open safetensors file in the form of `weight`, and whether it is finite.

    Of a weight that is spread each process reads its own rows alone. As fully_shard has it, all
    have equally many, and the last ones fewer or none.
    """
    if not hasattr(weight, "device_mesh"):
        tensor = tensors.get_tensor(name).to(dtype)
        return tensor, bool(tensor.isfinite().all())
    from torch.distributed.tensor import DTensor

    rows = weight.shape[0]
    rows_each = math.ceil(rows / dist.get_world_size())
    start = min(dist.get_rank() * rows_each, rows)
    end = min(start + rows_each, rows)
    local = tensors.get_slice(name)[start:end].to(dtype)
    finite = local.isfinite().all().cpu().int()
    dist.all_reduce(finite, dist.ReduceOp.MIN)  # so that all raise the same error
    tensor = DTensor.from_local(
        local,
        weight.device_mesh,
        weight.placements,
        shape=weight.shape,
        stride=weight.stride(),
    )
    return tensor, bool(finite)


def with_dummy_passes(model: nn.Module, groups: list) -> Iterator:
    """A step's batches; if the base is spread, then empty passes until all had equally many."""
    passes = torch.tensor(len(groups))
    if model.sharded:
        dist.all_reduce(passes, dist.ReduceOp.MAX)
    yield from groups
    for _ in range(int(passes) - len(groups)):
        dummy_pass(model)


def dummy_pass(model: nn.Module) -> None:
    """If the base is spread, run a token through it for the others' sake, in training also back."""
    if model.sharded:
        token = torch.zeros(1, dtype=torch.int64, device=model.device)
        hidden = model(token, bounds=torch.tensor([0, 1]))
        zero = 0 * hidden.sum()  # its gradient changes nothing
        if zero.requires_grad:
            zero.backward()
