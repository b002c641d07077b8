"""float32 products on the CPU at full speed: oneDNN's in place of PyTorch's default, MKL's.

On an AMD core MKL's run at 45 % of the speed of oneDNN's (106 against 240 GFLOP/s). Both are as
exact as float32: oneDNN's error is 1.7 times MKL's, where bfloat16's is 10,000 times as large.
PyTorch sends float32 products to oneDNN when they may be rounded to bfloat16, which only some
processors do: an Intel core with AMX was seen to, with 8,000 times MKL's error. So products are
checked once per process, and where they were rounded all stays with the default (which is at full
speed there: 188 GFLOP/s). Of one kind, they are equal to the bit each time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 256  # hidden size from which it pays at once: a kernel is made for every new shape
LONG = 256  # tokens per row from which it pays inside attention, whose products are small: twelve
# rows of 170 take 62 ms there and 39 ms with the default, two of 1,024 take 91 and 153
SETTING = getattr(torch.backends.mkldnn, "matmul", None)  # PyTorch 2.9 or newer
DEFAULT, ONEDNN = ("ieee", "bf16") if SETTING else ("highest", "medium")


def chosen() -> str:
    return SETTING.fp32_precision if SETTING else torch.get_float32_matmul_precision()


def choose(value: str) -> None:
    if SETTING:
        SETTING.fp32_precision = value
    else:
        torch.set_float32_matmul_precision(value)


@contextmanager
def products(kind: str) -> Iterator[None]:
    """All products of the process are of a kind, DEFAULT or ONEDNN; on leaving, as before."""
    before = chosen()
    choose(kind)
    try:
        yield
    finally:
        choose(before)


@cache
def exact() -> bool:
    """True if there is oneDNN and its products are float32's, hardly less exact than MKL's."""
    if not torch.backends.mkldnn.is_available():
        return False
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    errors = {}
    for kind in (DEFAULT, ONEDNN):
        with products(kind):  # laid out as forward, and as both gradients
            pairs = (a, b.T), (a, b), (a.T, b)
            errors[kind] = max(float((x @ y - x.double() @ y.double()).norm()) for x, y in pairs)
    return errors[ONEDNN] < 4 * errors[DEFAULT]


def pays(model) -> bool:
    """True if the model's products go to oneDNN in `fast`."""
    suits = model.onednn and model.device.type == "cpu" and model.dtype == torch.float32
    return suits and model.config.hidden_size >= SMALLEST and exact()


def fast(function: Callable) -> Callable:
    """Decorator of a function of a model: its products are oneDNN's where that pays."""

    @wraps(function)
    def run(model, *args, **more):
        with products(ONEDNN if pays(model) else chosen()):
            return function(model, *args, **more)

    return run


def attention(q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
    """scaled_dot_product_attention; between short rows without oneDNN, twice as fast."""
    if q.is_cuda or q.shape[2] >= LONG or chosen() != ONEDNN:
        return F.scaled_dot_product_attention(q, k, v, **how)
    with products(DEFAULT):
        y = F.scaled_dot_product_attention(q, k, v, **how)
    if y.grad_fn is not None:  # and the backward pass
        y.grad_fn.register_prehook(lambda grads: choose(DEFAULT))
        y.grad_fn.register_hook(lambda inputs, grads: choose(ONEDNN))
    return y
