"""The one training loop: references, TOSS-Pro rounds and the final model differ in their data."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from model.io import InputError
from model.lora import Adapter, active, new_adapter, use
from model.process import halve_budget, out_of_memory
from model.products import fast
from model.sharding import in_step
from model.transformer import Transformer
from toss.config import TrainConfig
from toss.loss import token_log_probs, token_loss
from toss.parallel import over_processes, share
from toss.tokens import BATCH_TOKENS, Tokens, batches, collate

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
Resume = Callable[[torch.optim.Optimizer, str], tuple[int, int | None]]


@fast
def train(
    model: Transformer,
    tokens: Tokens,
    weights: Tensor,
    config: TrainConfig,
    objective: Objective = token_loss,
    start: Adapter | Resume | None = None,
    on_step: Callable[[dict], None] = lambda event: None,
) -> Adapter:
    """Train a LoRA adapter on the frozen base `model`. Returns it; the base is left without one.

    The loss of an optimizer step is the paper's, over the rows i of the step:

        (1 / sum_i L_i) * sum_i sum_j  w_ij * -log P(y_ij | x_i, y_i,<j)

    L_i counts all response tokens of row i, also those of weight 0, which stay in the input. How a
    step is cut into micro-batches changes nothing beyond rounding.

    weights: float32 [N], w over the flat arrays; only response tokens count. objective: takes the
    place of the sum, see loss.token_loss. start: an adapter to continue from, or a function that
    brings the optimizer to the state of an interrupted call and returns its step and tokens per
    batch; it is also given the plan, a text. on_step gets {"step", "steps", "loss", "grad_norm",
    "lr", "tokens"} after each step, with the optimizer as "work" and "tokens_per_batch", and
    {"remark": text} when batches are halved.
    Raises InputError naming the row when a loss is not finite, DoesNotFit for a row too long.
    """
    if not any(tokens.lengths):
        raise InputError(f"{tokens.name}: there are no rows to train on")
    targets = config.targets.replace(",", " ").split()
    fresh = lambda: new_adapter(model, config.rank, config.alpha, targets, config.seed)
    adapter = deepcopy(start) if isinstance(start, Adapter) else fresh()
    adapter = active(use(model, adapter))  # on the model's device
    parameters = [tensor.requires_grad_() for tensor in adapter.tensors()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    wanted = tokens.response & (weights != 0)
    step = Step(model, parameters, tokens, wanted, weights.to(model.device), objective)
    there = sum(map(bool, tokens.lengths))
    steps = config.epochs * math.ceil(there / config.batch_size)
    plan = f"optimizer steps: {steps} (rows: {there}, epochs: {config.epochs})"
    done, budget = start(optimizer, plan) if callable(start) else (0, None)
    given = config.batch_tokens or BATCH_TOKENS[model.device.type]
    budget = min(budget or given, given)
    for n, rows in islice(enumerate(training_steps(tokens, config), start=1), done, None):
        half_turn = math.pi * (n - 1) / steps
        factor = 1.0 if config.schedule == "constant" else 0.5 * (1 + math.cos(half_turn))
        optimizer.param_groups[0]["lr"] = lr = config.lr * factor
        while (loss := step.gradients(rows, budget)) is None:  # out of memory
            budget = halve_budget(budget, tokens.lengths[step.own_rows(rows)[0]], on_step)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        if not math.isfinite(loss + norm):
            bad = f"{tokens.name}: {step.find_bad_row(rows)} at step {n}"
            raise InputError(f"{bad}; lower --lr, or use --dtype float32")
        optimizer.step()
        seen = sum(tokens.lengths[i] for i in rows)
        event = {"step": n, "steps": steps, "tokens": seen, "loss": loss, "grad_norm": norm}
        on_step({**event, "lr": lr, "work": optimizer, "tokens_per_batch": budget})
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None
        if not parameter.isfinite().all():
            raise InputError(f"{tokens.name}: the trained adapter is not finite; lower --lr")
    use(model, None)
    return adapter


def training_steps(tokens: Tokens, config: TrainConfig) -> Iterator[list[int]]:
    """The rows of every optimizer step: a new order each epoch, by the seed alone."""
    generator = torch.Generator().manual_seed(config.seed)
    there = torch.tensor([i for i, length in enumerate(tokens.lengths) if length])
    for _ in range(config.epochs):
        order = there[torch.randperm(len(there), generator=generator)]
        yield from (part.tolist() for part in order.split(config.batch_size))


@dataclass
class Step:
    """The gradient of an optimizer step."""

    model: Transformer
    parameters: list[Tensor]
    tokens: Tokens
    wanted: Tensor  # bool [N]: response tokens of a weight other than 0
    weights: Tensor  # float32 [N], on the model's device
    objective: Objective

    def gradients(self, rows: list[int], budget: int) -> float | None:
        """Put a step's gradient into `.grad` and return its loss; None when memory runs out."""
        for parameter in self.parameters:  # zeros, not None: Adam's momentum moves on regardless
            parameter.grad = torch.zeros_like(parameter)
        tokens, total = self.tokens, torch.zeros((), device=self.model.device)
        count = int(tokens.response[tokens.places(rows)].sum())  # sum_i L_i
        try:
            groups = batches(self.own_rows(rows), tokens.lengths, budget)
            for group in in_step(self.model, groups):
                batch = collate(tokens, group, self.wanted, self.model.device)
                log_p, hidden = token_log_probs(self.model, batch)
                loss = self.objective(log_p, hidden, self.weights[batch.places]) / count
                loss.backward()
                total += loss.detach()
        except RuntimeError as error:
            if self.model.sharded or not out_of_memory(error):
                raise
            return None
        over_processes("SUM", total, *(parameter.grad for parameter in self.parameters))
        return float(total)

    def own_rows(self, rows: list[int]) -> list[int]:
        """This process's share of the rows that add to the sum, longest first."""
        live = [i for i in rows if self.wanted[self.tokens.places([i])].any()]
        return share(sorted(live, key=lambda i: -self.tokens.lengths[i]))

    def find_bad_row(self, rows: list[int]) -> str:
        """Find the row whose loss or gradient is not finite, by running rows one at a time."""
        for i in rows:
            loss, grads = self.gradients([i], 1), [parameter.grad for parameter in self.parameters]
            good = loss is None or math.isfinite(loss)  # None: too little memory now
            if not good or not all(grad.isfinite().all() for grad in grads):
                return f"the loss or its gradient is not finite on row {i} (counted from 0)"
        return "the norm of the gradient is not finite"
