"""The one loss that scoring and training share, and the place where a fork puts another one."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
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
    training, head = torch.is_grad_enabled(), model.lm_head
    few = not (training or hidden.is_cuda)  # 16 MiB stay in the CPU's caches
    size = (LOGITS // 16 if few else LOGITS) // head.out_features
    size = max(1, size // 256 * 256 or size)  # a GPU's products work on tiles of 128 or 256 rows
    log_p = lambda h, target: -F.cross_entropy(head(h).float(), target, reduction="none")
    if training and len(hidden) > size:
        log_p = partial(checkpoint, log_p, use_reentrant=False, preserve_rng_state=False)
    return torch.cat(list(map(log_p, hidden.split(size), batch.targets.split(size)))), hidden
