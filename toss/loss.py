"""The one per-token loss that scoring and training share: -log P(y_ij | x_i, y_i,<j), in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.transformer import Transformer
from toss.dataset import Batch

LOGITS = 2**26  # elements of logits that exist at once (256 MiB in float32), whatever the vocabulary and the batch


def token_losses(model: Transformer, batch: Batch) -> Tensor:
    """Losses of the batch's n wanted tokens, float32 [n] (nats), with gradients where the model's adapter has them.

    Logits are built only at the wanted positions, and a chunk of them at a time. In training each chunk is recomputed
    in the backward pass, so that no more than one chunk is ever kept.
    """
    hidden = model(batch.ids).flatten(0, 1)[batch.before]  # (n, D)
    size = max(1, LOGITS // model.lm_head.out_features)
    if len(hidden) <= size:
        return head_loss(model.lm_head, hidden, batch.targets)
    losses = []
    for h, target in zip(hidden.split(size), batch.targets.split(size)):
        if torch.is_grad_enabled():
            losses.append(checkpoint(head_loss, model.lm_head, h, target, use_reentrant=False, preserve_rng_state=False))
        else:
            losses.append(head_loss(model.lm_head, h, target))
    return torch.cat(losses)


def head_loss(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the head's logits against the targets, in float32, one value a token."""
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")
