"""The one loss that scoring and training share, and the place where a fork puts another one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.transformer import Transformer
from toss.tokens import Batch

LOGITS = 2**26  # elements of logits alive at once (256 MiB in float32), whatever the vocabulary


def token_loss(log_p: Tensor, hidden: Tensor, weights: Tensor) -> Tensor:
    """The paper's objective: sum_ij w_ij * -log P(y_ij | x_i, y_i,<j), a scalar.

    An objective maps what a batch has of its n weighted tokens to one summed loss: log_p, their
    log-probabilities, float32 [n]; hidden, the hidden states they were predicted from, [n, D]; and
    weights, float32 [n]. TOSS's weights are 0 or 1, and tokens of weight 0 are not among the n.
    """
    return -(weights * log_p).sum()


def token_log_probs(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """log P(y_ij | x_i, y_i,<j) of the batch's n wanted tokens, float32 [n], and hidden [n, D].

    Logits are built for one chunk of wanted positions at a time; in training each chunk is
    recomputed in the backward pass.
    """
    hidden = model(batch.ids, bounds=batch.bounds)[batch.before]  # (n, D)
    few = not (hidden.is_cuda or hidden.requires_grad)  # 16 MiB stay in the CPU's caches
    size = (LOGITS // 16 if few else LOGITS) // model.lm_head.out_features
    size = max(1, size // 256 * 256 or size)  # a GPU's products work on tiles of 128 or 256 rows
    if len(hidden) <= size:
        return head_log_probs(model.lm_head, hidden, batch.targets), hidden
    parts = []
    for h, target in zip(hidden.split(size), batch.targets.split(size)):
        arguments = (head_log_probs, model.lm_head, h, target)
        if torch.is_grad_enabled():
            parts.append(checkpoint(*arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(head_log_probs(*arguments[1:]))
    return torch.cat(parts), hidden


def head_log_probs(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target under the head's logits, computed in float32, [n]."""
    return -F.cross_entropy(head(hidden).float(), targets, reduction="none")
