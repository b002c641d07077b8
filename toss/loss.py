"""The one loss that scoring and training share, and the place where a fork puts another one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.transformer import Transformer
from toss.tokens import Batch

LOGITS = 2**26  # elements of logits alive at once (256 MiB in float32), whatever the vocabulary


def token_loss(model: Transformer, batch: Batch, weights: Tensor) -> Tensor:
    """The paper's objective: sum_ij w_ij * -log P(y_ij | x_i, y_i,<j), a scalar.

    An objective maps the model, a batch and the weights of its n targets, float32 [n], to one
    summed loss. TOSS's weights are 0 or 1, and tokens of weight 0 are not among the targets. With
    --shard it must call the model exactly once.
    """
    log_p = token_log_probs(model, batch)
    return -(weights * log_p).sum()


def token_log_probs(model: Transformer, batch: Batch) -> Tensor:
    """log P(y_ij | x_i, y_i,<j) of the batch's n targets, float32 [n]."""
    return log_probs(model.lm_head, hidden_states(model, batch), batch.targets)


def hidden_states(model: Transformer, batch: Batch) -> Tensor:
    """What predicts each target: the hidden state of the token before it, [n, D]."""
    return model(batch.ids, bounds=batch.bounds)[batch.before]


def log_probs(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """log P of each target, float32 [n], from hidden states [n, D].

    Logits are built for one chunk of targets at a time. In training, where there are several, each
    is recomputed in the backward pass.
    """
    training = torch.is_grad_enabled()
    size = chunk_size(head.out_features, training, hidden.is_cuda)
    chunks = []
    for states, chunk_targets in zip(hidden.split(size), targets.split(size)):
        if training and len(hidden) > size:
            options = {"use_reentrant": False, "preserve_rng_state": False}
            chunk = checkpoint(chunk_log_probs, head, states, chunk_targets, **options)
        else:
            chunk = chunk_log_probs(head, states, chunk_targets)
        chunks.append(chunk)
    return torch.cat(chunks)


def chunk_log_probs(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """log P of a chunk of targets, float32 [n], by way of logits [n, V]."""
    return -F.cross_entropy(head(hidden).float(), targets, reduction="none")


def chunk_size(vocabulary: int, training: bool, cuda: bool) -> int:
    """Targets whose logits are built at once."""
    logits = LOGITS
    if not training and not cuda:
        logits = LOGITS // 16  # 16 MiB stay in the CPU's caches
    size = max(1, logits // vocabulary)
    if size > 256:
        size = size // 256 * 256  # a GPU's products work on tiles of 128 or 256 rows
    return size
