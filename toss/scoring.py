"""Per-token losses of a dataset under the active adapter, and the scores made of them."""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model import load_adapter
from model.errors import InputError
from model.transformer import Transformer
from toss.base import Base
from toss.dataset import Tokens, batches, collate
from toss.loss import token_losses
from toss.training import Clock


@torch.inference_mode()
def score(model: Transformer, tokens: Tokens, budget: int, name: str) -> Tensor:
    """-log P(y_ij | x_i, y_i,<j) of every response token under the model as it stands, float32 [N] on the CPU.

    Entry t belongs to token t of the flat arrays; it is 0 where that is not a response token. budget: tokens a batch,
    padding included. name: for the progress bar and errors. Raises NotFinite naming the row for a NaN or an infinity.
    """
    losses = torch.zeros(len(tokens.input_ids), device=model.device)
    rows = [i for i, length in enumerate(tokens.lengths) if length]
    with tqdm(total=sum(tokens.lengths), desc=name, unit="tok", unit_scale=True, leave=False, disable=None) as bar:
        for group in batches(rows, tokens.lengths, budget):
            batch = collate(tokens, group, tokens.response, model.device)
            losses[batch.entries] = token_losses(model, batch)
            bar.update(sum(tokens.lengths[i] for i in group))
    losses = losses.cpu()
    if not losses.isfinite().all():
        entry = (~losses.isfinite()).nonzero()[0]
        row = int(tokens.row_of(entry))
        raise NotFinite(f"{name}: {tokens.name}: the loss of token {int(entry) - int(tokens.offsets[row])} of row {row} "
                        f"(both counted from 0) is not finite under {model.dtype}")
    return losses


def score_under(base: Base, tokens: Tokens, adapters: dict[str, Path | None]) -> tuple[dict[str, Tensor], dict]:
    """Losses of the tokens under each adapter (None: the base alone), and the cost of getting them.

    One base stays in memory and the adapters are swapped on it, never merged: a merge into a half-precision base
    rounds small updates away. When float16 overflows, all of them are scored again in float32 with TF32 products.
    """
    clock = Clock(base.device)
    try:
        losses = {}
        for name, adapter in adapters.items():
            model = base.load("score")
            if adapter is not None:
                load_adapter(model, adapter)
            losses[name] = score(model, tokens, base.budget, name)
    except NotFinite as error:
        if base.dtypes["score"] != "float16":
            raise
        print(f"warning: {error}; scoring again in float32 with TF32 products")
        base.dtypes["score"] = "tf32"
        return score_under(base, tokens, adapters)
    return losses, {**clock.stop(), "tokens": sum(tokens.lengths) * len(adapters), "dtype": base.dtypes["score"]}


class NotFinite(InputError):
    """A loss overflowed or is NaN."""
