"""The one training loop: references, TOSS-Pro rounds and the final model differ in their data."""

import math
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from model.io import InputError, digest
from model.lora import Adapter, active, new_adapter, use
from model.products import fast
from model.sharding import with_dummy_passes
from model.transformer import Transformer
from toss.config import TrainConfig
from toss.loss import token_loss
from toss.parallel import State, fitting, ignore, over_processes, rank, share
from toss.tokens import BATCH_TOKENS, Batch, Tokens, batches, check_ids, collate

Objective = Callable[[Transformer, Batch, Tensor], Tensor]
MAX_NORM = 1.0  # the gradient of a step is clipped to it: the paper's setting


def adamw(parameters: list[Tensor], config: TrainConfig) -> Optimizer:
    """The paper's optimizer. Any other function of these two takes its place; see train."""
    return AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)


@fast
def train(
    model: Transformer,
    tokens: Tokens,
    weights: Tensor,
    config: TrainConfig,
    objective: Objective = token_loss,
    optimizer: Callable[[list[Tensor], TrainConfig], Optimizer] = adamw,
    start: Adapter | None = None,
    state: State | None = None,
    on_step: Callable[[dict[str, Any]], None] = ignore,
) -> Adapter:
    """Train a LoRA adapter on the frozen base `model`. Returns it; the base is left without one.

    The loss of an optimizer step is the paper's, over the rows i of the step:

        (1 / sum_i |y_i|) * sum_i sum_j  w_ij * -log P(y_ij | x_i, y_i,<j)

    |y_i| counts all response tokens of row i, also those of weight 0, which stay in the input. How
    a step is cut into micro-batches changes nothing beyond rounding. The gradient of a step is
    clipped to norm 1, as in the paper.

    weights: float32 [N], w over the flat arrays; only response tokens count. objective: takes the
    place of the sum, see loss.token_loss. optimizer: makes it; what its state_dict() holds is saved
    and brought back. start: an adapter to continue from.
    state: where the work of this call, and of no other, is saved and taken up again. on_step gets
    {"step", "steps", "loss", "grad_norm", "lr", "tokens", "model"} after each step,
    and {"resumed", "steps"} before the first one if work is taken up.
    Raises InputError naming the row when a loss is not finite, and with advice when memory runs
    out. That shows at once: the largest micro-batch is rehearsed before the first step, as step 0.
    """
    check_ids(tokens, model.config.vocab_size)
    if start is None:
        targets = config.targets.replace(",", " ").split()
        start = new_adapter(model, config.rank, config.alpha, targets, config.seed)
    use(model, None)  # so that the block below, however it ends, leaves the base alone
    with use(model, deepcopy(start)):
        adapter = active(model)  # on the model's device
        parameters = [tensor.requires_grad_() for tensor in adapter.tensors()]
        optim = optimizer(parameters, config)
        for group in optim.param_groups:
            group.setdefault("initial_lr", group["lr"])  # a group may have a rate of its own

        # Go on where an interrupted call has stopped: the steps that it made are skipped below.
        work = digest({"ids": tokens.input_ids, "weights": weights.cpu()}, config.recipe())
        saved = restore(state, work, parameters, optim)
        finished = saved.get("step", 0)
        steps = count_steps(tokens, config)
        if finished:
            on_step({"resumed": finished, "steps": steps})

        # An optimizer step: its learning rate, the gradient over its rows, clipping, the update.
        gradient = Gradient(model, parameters, tokens, weights, objective, config)
        with fitting(gradient.batch_tokens, gradient.longest):
            if finished < steps:
                gradient.rehearse(training_steps(tokens, config))
            for step, rows in enumerate(training_steps(tokens, config), start=1):
                if step <= finished:
                    continue
                factor = decay(config.schedule, (step - 1) / steps)
                for group in optim.param_groups:
                    group["lr"] = group["initial_lr"] * factor
                loss = gradient.compute(rows, step)
                norm = float(torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM))
                if not math.isfinite(loss + norm):
                    place = f"{tokens.name}: {gradient.describe_bad_row(rows, step)} at step {step}"
                    raise InputError(f"{place}; lower --lr, or use --dtype float32")
                optim.step()

                event = {"step": step, "steps": steps, "loss": loss, "grad_norm": norm}
                event["lr"] = optim.param_groups[0]["lr"]  # the first group's
                event["tokens"] = sum(tokens.lengths[row] for row in rows)
                event["model"] = model
                on_step(event)
                # The optimizer is the same in all processes, so the first one saves it.
                if state and rank() == 0 and state.is_due(last=step == steps):
                    values = {"work": work, "step": step, "parameters": parameters}
                    values["optimizer"] = optim.state_dict()
                    state.save(values, part=0)

    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
        if not parameter.isfinite().all():
            raise InputError(f"{tokens.name}: the trained adapter is not finite; lower --lr")
    return adapter


def restore(
    state: State | None, work: str, parameters: list[Tensor], optim: Optimizer
) -> dict[str, Any]:
    """Bring back what an interrupted call has saved, and return it; {} if there is nothing.

    work: what the state must be of. Raises InputError if it is of something else.
    """
    saved = state.load(part=0) if state else None
    if not saved:
        return {}
    if saved["work"] != work:
        raise InputError("the saved state is of other rows, weights or settings: remove it")
    optim.load_state_dict(saved["optimizer"])
    for parameter, tensor in zip(parameters, saved["parameters"]):
        parameter.data.copy_(tensor)
    return saved


def decay(schedule: str, progress: float) -> float:
    """The factor of the learning rate. progress: share of the steps that are done, in [0, 1)."""
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    raise InputError(f"the schedule {schedule!r} is neither constant nor cosine")


def count_steps(tokens: Tokens, config: TrainConfig) -> int:
    """The number of optimizer steps. Raises InputError if there are none."""
    rows = len(tokens.filled)
    if rows == 0 or config.epochs < 1:
        raise InputError(f"{tokens.name}: {config.epochs} epochs of {rows} rows train nothing")
    return config.epochs * math.ceil(rows / config.batch_size)


def training_steps(tokens: Tokens, config: TrainConfig) -> Iterator[list[int]]:
    """The rows of every optimizer step: a new order each epoch, by the seed alone."""
    generator = torch.Generator().manual_seed(config.seed)
    rows = torch.tensor(tokens.filled)
    for _ in range(config.epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for part in order.split(config.batch_size):
            yield part.tolist()


@dataclass
class Gradient:
    """The gradient of an optimizer step."""

    model: Transformer
    parameters: list[Tensor]
    tokens: Tokens
    weights: Tensor  # float32 [N]
    objective: Objective
    config: TrainConfig

    def __post_init__(self):
        self.wanted = self.tokens.response & (self.weights != 0)  # bool [N]
        self.weights = self.weights.to(self.model.device)
        self.batch_tokens = self.config.batch_tokens or BATCH_TOKENS[self.model.device.type]
        used = self.tokens.row_of(self.wanted.nonzero()[:, 0]).unique().tolist()
        self.used = set(used)  # the rows that add to the sum
        self.longest = max((self.tokens.lengths[row] for row in used), default=0)

    def rehearse(self, steps: Iterable[list[int]]) -> None:
        """Run the largest micro-batch of all steps, whose gradient the first step drops."""
        lengths = self.tokens.lengths
        largest = []
        size = 0
        for rows in steps:
            for batch_rows in self.micro_batches(rows):
                padded = len(batch_rows) * lengths[batch_rows[0]]  # attention pads to the longest
                if padded > size:
                    largest = [batch_rows]
                    size = padded
        for batch_rows in with_dummy_passes(self.model, largest):
            self.add(batch_rows, count=1, step=0)

    def compute(self, rows: list[int], step: int) -> float:
        """Put the gradient of a step's loss into `.grad`; returns the loss."""
        # Zeros, not None: an optimizer skips a parameter without a gradient, and processes sum it.
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        count = int(self.tokens.response[self.tokens.places(rows)].sum())  # sum_i |y_i|
        total = torch.zeros((), device=self.model.device)
        for batch_rows in with_dummy_passes(self.model, self.micro_batches(rows)):
            total += self.add(batch_rows, count, step)
        gradients = [parameter.grad for parameter in self.parameters]
        over_processes("SUM", total, *gradients)
        return float(total)

    def add(self, batch_rows: list[int], count: int, step: int) -> Tensor:
        """Add a micro-batch's gradient of the loss, divided by `count`; returns that loss."""
        batch = collate(self.tokens, batch_rows, self.wanted, self.model.device, step)
        loss = self.objective(self.model, batch, self.weights[batch.places]) / count
        loss.backward()
        return loss.detach()

    def micro_batches(self, rows: list[int]) -> list[list[int]]:
        """This process's share of a step's rows, in parts that fit, longest first."""
        used = [row for row in rows if row in self.used]
        used.sort(key=lambda row: -self.tokens.lengths[row])
        return batches(share(used), self.tokens.lengths, self.batch_tokens)

    def describe_bad_row(self, rows: list[int], step: int) -> str:
        """The row whose loss or gradient is not finite, in words: rows are run one at a time."""
        for row in rows:
            loss = self.compute([row], step)
            finite = [bool(parameter.grad.isfinite().all()) for parameter in self.parameters]
            if not math.isfinite(loss) or not all(finite):
                return f"the loss or its gradient is not finite on row {row} (counted from 0)"
        return "the norm of the gradient is not finite"
