"""Per-token losses of a dataset under the active adapter, and the scores made of them."""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model import load_adapter
from model.errors import InputError, NotFinite
from model.transformer import Transformer
from toss.base import Base
from toss.dataset import Tokens, batches, collate, take
from toss.loss import token_losses
from toss.selection import select_tokens
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
    rounds small updates away. When float16 overflows, all of them are scored again in float32 with TF32 products, or
    in bfloat16 where that does not fit.
    """
    clock = Clock(base.device)
    losses: dict[str, Tensor] = {}
    while len(losses) < len(adapters):
        problem = ""
        try:
            losses = {}
            for name, adapter in adapters.items():
                base.load("score")
                if adapter is not None:
                    load_adapter(base.model, adapter)
                losses[name] = score(base.model, tokens, base.budget, name)
        except NotFinite as error:
            if base.dtypes["score"] != "float16":
                raise
            problem, base.dtypes["score"] = str(error), "tf32"
        except torch.OutOfMemoryError as error:
            if base.dtypes["score"] != "tf32" or base.run.settings.dtype == "tf32":  # it was not we who chose it
                raise InputError(f"{name}: out of memory; lower --batch-tokens ({str(error).splitlines()[0]})") from None
            problem, base.dtypes["score"] = "float32 does not fit", "bfloat16"
        if problem:  # outside the handlers, where the failed attempt no longer holds the old weights
            print(f"warning: {problem}; scoring again in {base.dtypes['score']}")
    return losses, {**clock.stop(), "tokens": sum(tokens.lengths) * len(adapters), "dtype": base.dtypes["score"]}


def rounding_noise(base: Base, tokens: Tokens, adapters: dict[str, Path | None], losses: dict[str, Tensor], d: float,
                   sample: int = 64) -> str:
    """What half precision does to S, on `sample` rows spread evenly: scored again in float32 and compared, as a line.

    S is a difference of two close losses, so the arithmetic decides part of the mask.
    """
    spread = torch.linspace(0, tokens.rows - 1, min(sample, tokens.rows)).long().unique().tolist()
    part = take(tokens, spread)
    used = base.dtypes["score"]
    base.dtypes["score"] = "float32"
    try:
        exact, _ = score_under(base, part, adapters)
    except InputError:
        return f"rounding noise of S under {used}: not measured, the base in float32 does not fit"
    finally:
        base.dtypes["score"] = used
    places = torch.cat([torch.arange(tokens.offsets[i], tokens.offsets[i + 1]) for i in spread])
    true = (exact["loss_utility"] - exact["loss_degraded"])[part.response]
    ours = (losses["loss_utility"] - losses["loss_degraded"])[places][part.response]
    gone = ~select_tokens(true, d)
    same = gone & ~select_tokens(ours, d)
    shared = f"{100 * int(same.sum()) / int(gone.sum()):.1f} %" if gone.any() else "all"
    return (f"rounding noise of S under {used}: {(ours - true).square().mean().sqrt():.4f} nats rms on {len(spread)} rows, "
            f"beside a standard deviation of {true.std():.3f}; {shared} of float32's discards at d = {d} are the same")
