"""Element-wise functions as one kernel each on a GPU: eager, they pass through its memory often.

torch.compile makes a kernel for all shapes at once. By arithmetic the three in transformer.py then
save a tenth of the time of an 8B model; on a GPU nothing was measured.
"""

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor

DEVICES = {"cuda"}  # where functions are compiled
SMALLEST = 2**20  # elements from which memory takes the time, not the start of a kernel
GRAPHS = 64  # per function: dtypes, head counts, with and without gradients
BACKEND = "inductor"


def double(x: Tensor) -> Tensor:
    return x * 2


@cache
def works(device: str) -> bool:
    """True if torch.compile works on the device; a line says so if not."""
    try:
        torch._dynamo.config.cache_size_limit = GRAPHS
        torch.compile(double, backend=BACKEND)(torch.ones(2, device=device))
    except Exception as error:  # no Triton, C compiler or Python headers: each has its own kind
        reason = str(error).strip().partition("\n")[0]
        print(f"note: kernels are not compiled, so a GPU is slower ({reason})")
        return False
    return True


def fused(function: Callable) -> Callable:
    """Decorator of a function whose first argument is a tensor: compiled where that pays."""

    @cache
    def compiled() -> Callable:
        return torch.compile(function, dynamic=True, backend=BACKEND)

    @wraps(function)
    def run(x: Tensor, *args):
        pays = x.device.type in DEVICES and x.numel() >= SMALLEST
        if pays and works(x.device.type):
            return compiled()(x, *args)
        return function(x, *args)

    return run
