"""float32 products on the CPU at full speed: oneDNN's in place of PyTorch's default, MKL's.

On one AMD core MKL's run at 45 % of the speed of oneDNN's (106 against 240 GFLOP/s), on another, a
Zen 4, at 85 % (84 against 98). Both are as exact as float32: oneDNN's error is 1.7 times MKL's,
where bfloat16's is 10,000 times as large.
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

# Hidden size from which oneDNN pays at once: it makes a kernel for every new shape.
SMALLEST = 256
# Tokens per row from which it pays inside attention, whose products are small: twelve rows of 170
# take 62 ms with oneDNN and 39 ms with the default, two of 1,024 take 91 and 153.
LONG = 256

# The setting is one of the whole process. PyTorch 2.9 has one for products alone.
SETTING = getattr(torch.backends.mkldnn, "matmul", None)
DEFAULT, ONEDNN = ("ieee", "bf16") if SETTING else ("highest", "medium")


def chosen() -> str:
    if SETTING:
        return SETTING.fp32_precision
    return torch.get_float32_matmul_precision()


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
    return largest_error(ONEDNN, a, b) < 4 * largest_error(DEFAULT, a, b)


def largest_error(kind: str, a: Tensor, b: Tensor) -> float:
    """The distance from float64's products, laid out as in a forward pass and in its gradients."""
    errors = []
    with products(kind):
        for x, y in [(a, b.T), (a, b), (a.T, b)]:
            errors.append(float((x @ y - x.double() @ y.double()).norm()))
    return max(errors)


def pays(model) -> bool:
    """True if the model's products go to oneDNN in `fast`."""
    on_cpu = model.device.type == "cpu" and model.dtype == torch.float32
    return on_cpu and model.config.hidden_size >= SMALLEST and exact()


def fast(function: Callable) -> Callable:
    """Decorator of a function of a model: its products are oneDNN's where that pays."""

    @wraps(function)
    def run(model, *args, **options):
        with products(ONEDNN if pays(model) else chosen()):
            return function(model, *args, **options)

    return run


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, grouped: bool
) -> Tensor:
    """scaled_dot_product_attention, causal without a mask.

    Between short rows it goes without oneDNN, which is twice as fast.
    grouped: there are fewer heads in k and v than in q.
    """
    short = q.shape[2] < LONG and mask is None and not grouped
    if short and not q.is_cuda and chosen() == ONEDNN:
        return ShortAttention.apply(q, k, v, scale)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


class ShortAttention(torch.autograd.Function):
    """Causal attention on the CPU, with the default products forward and backward.

    The backward pass runs later, when oneDNN's are chosen again, so it has to be spelled out. These
    are the two operators that PyTorch calls for attention and for its gradient.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        with products(DEFAULT):
            y, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, is_causal=True, scale=scale
            )
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, y, logsumexp)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # with gradient checkpointing this runs the block again
        with products(DEFAULT):
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, *saved, dropout_p=0.0, is_causal=True, scale=ctx.scale
            )
        return *gradients, None
