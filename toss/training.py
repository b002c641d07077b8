"""The one training loop: both reference models, every TOSS-Pro round and the final model differ in data and mask only."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model.errors import InputError
from model.lora import adapter_parameters, add_adapter
from model.transformer import Transformer
from toss.dataset import Batch, Tokens, batches, collate, halved
from toss.loss import token_losses
from toss.parallel import rank, share, sum_over_processes
from toss.settings import Settings


def train(model: Transformer, tokens: Tokens, keep: Tensor, settings: Settings, budget: int, stage: str,
          log: Callable[[dict], None] = lambda line: None) -> dict:
    """Train a fresh LoRA adapter on the kept response tokens and leave it active. Returns the cost.

    The loss of one optimizer step is the paper's, over the rows of the step:

        (1 / sum_i L_i) * sum_i sum_j  m_ij * -log P(y_ij | x_i, y_i,<j)

    with L_i all response tokens of row i, discarded ones too. Gradients are of one sum over one count, so how a step
    is cut into micro-batches changes nothing beyond rounding. A discarded token stays in the input.

    keep: bool [N], the mask m over the flat arrays. budget: tokens a micro-batch, padding included. log: called with
    one dictionary a step. When memory runs out, the step is made again in micro-batches of half the size. Raises InputError
    naming the row when a loss is not finite, and when a single row does not fit.
    """
    add_adapter(model, "default", settings.rank, settings.alpha, settings.target_list, settings.seed)
    parameters = adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    steps = training_steps(tokens, settings)
    wanted = tokens.response & keep
    clock, seen = Clock(model.device), sum(tokens.lengths) * settings.epochs
    with tqdm(total=seen, desc=stage, unit="tok", unit_scale=True, leave=False, disable=rank() > 0 or None) as bar:
        for number, rows in enumerate(steps, start=1):
            lr = settings.lr * rate(settings.schedule, number - 1, len(steps))
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = None
            while loss is None:
                try:
                    loss = step_gradients(model, tokens, rows, wanted, budget)
                except torch.OutOfMemoryError:
                    longest = tokens.lengths[own_rows(tokens, rows, wanted)[0]]
                    budget = halved(budget, longest, stage, "give --gradient-checkpointing, or lower --max-length")
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
            if not math.isfinite(loss + norm):
                raise InputError(f"{stage}: {tokens.name}: {blame(model, tokens, rows, wanted)} at step {number}; "
                                 "lower --lr, or use --dtype float32")
            optimizer.step()
            log({"step": number, "loss": round(loss, 6), "grad_norm": round(norm, 6), "lr": lr})
            bar.update(sum(tokens.lengths[i] for i in rows))
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    for parameter in parameters:
        parameter.grad = None
    return {**clock.stop(), "tokens": seen, "steps": len(steps), "rows": tokens.rows, "skipped": tokens.skipped,
            "cut": tokens.cut, "last_loss": loss}


def training_steps(tokens: Tokens, settings: Settings) -> list[list[int]]:
    """The rows of every optimizer step: each epoch a new order by the seed alone, cut into steps of batch_size rows."""
    generator = torch.Generator().manual_seed(settings.seed)
    there = torch.tensor([i for i, length in enumerate(tokens.lengths) if length])
    steps = []
    for _ in range(settings.epochs):
        order = there[torch.randperm(len(there), generator=generator)]
        steps += [part.tolist() for part in order.split(settings.batch_size)]
    return steps


def step_gradients(model: Transformer, tokens: Tokens, rows: list[int], wanted: Tensor, budget: int) -> float:
    """Put the gradient of one optimizer step into the adapter's `.grad`; return the step's loss.

    A row without a kept token contributes zero to the sum and its length to the count, so it is not even run. Of several
    processes each runs its share of the rows.
    """
    parameters = adapter_parameters(model)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # zeros, not None: Adam's momentum moves on in an empty step too
    count = sum(int(tokens.response[tokens.offsets[i] : tokens.offsets[i + 1]].sum()) for i in rows)  # sum_i L_i
    total = torch.zeros((), device=model.device)
    for group in batches(own_rows(tokens, rows, wanted), tokens.lengths, budget):
        batch: Batch = collate(tokens, group, wanted, model.device)
        loss = token_losses(model, batch).sum() / count
        loss.backward()
        total += loss.detach()
    sum_over_processes([total, *(parameter.grad for parameter in parameters)])
    return float(total)


def own_rows(tokens: Tokens, rows: list[int], wanted: Tensor) -> list[int]:
    """The rows of a step that this process runs, longest first: its share of those that have a kept token."""
    live = [i for i in rows if wanted[tokens.offsets[i] : tokens.offsets[i + 1]].any()]
    return share(sorted(live, key=lambda i: -tokens.lengths[i]))


def blame(model: Transformer, tokens: Tokens, rows: list[int], wanted: Tensor) -> str:
    """Which of the rows makes the loss or its gradient not finite: run again one by one, only after it happened."""
    for i in rows:
        one = [i] if wanted[tokens.offsets[i] : tokens.offsets[i + 1]].any() else []
        loss = step_gradients(model, tokens, one, wanted, 1) if one else 0.0
        if not math.isfinite(loss) or not all(p.grad.isfinite().all() for p in adapter_parameters(model)):
            return f"the loss or its gradient is not finite on row {i} (counted from 0)"
    return "the gradient's norm is not finite"


def rate(schedule: str, step: int, steps: int) -> float:
    """Factor on the learning rate: 1 throughout (the paper), or half a cosine from 1 towards 0."""
    return 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / steps))


class Clock:
    """Seconds and peak memory of a stage."""

    def __init__(self, device: torch.device):
        self.cuda, self.device = device.type == "cuda", device
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # Linux forgets the peak of earlier stages; elsewhere it is the process's so far
                Path("/proc/self/clear_refs").write_text("5")
        self.start = time.perf_counter()

    def stop(self) -> dict:
        if self.cuda:
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:  # the whole process's; Linux counts in KiB, macOS in bytes
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"seconds": round(time.perf_counter() - self.start, 2), "peak_memory_gib": round(peak / 2**30, 3)}


def line_log(path: Path, stage: str) -> Callable[[dict], None]:
    """A log function that adds one JSON line a call to a file, for a stage whose earlier lines are dropped first."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line for line in lines if json.loads(line)["stage"] != stage), encoding="utf-8")

    def log(line: dict) -> None:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"stage": stage, **line}) + "\n")

    return log
