"""Per-token losses of a dataset under the active adapter, and the scores made of them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import load_adapter
from model.checkpoint import open_tensors, put_weight, shards
from model.errors import DoesNotFit, InputError, NotFinite
from model.transformer import Transformer
from toss.base import Base
from toss.dataset import Tokens, batches, collate, halved, take
from toss.loss import token_losses
from toss.parallel import rank, share, size, sum_over_processes
from toss.selection import select_tokens
from toss.training import Clock


@torch.inference_mode()
def score(model: Transformer, tokens: Tokens, budget: int, name: str) -> Tensor:
    """-log P(y_ij | x_i, y_i,<j) of every response token under the model as it stands, float32 [N] on the CPU.

    Entry t belongs to token t of the flat arrays; it is 0 where that is not a response token. budget: tokens a batch,
    padding included; halved when memory runs out. name: for the progress bar and errors. Of several processes each runs its
    share of the batches, and all hold the result. Raises NotFinite naming the row for a NaN or an infinity.
    """
    losses = torch.zeros(len(tokens.input_ids), device=model.device)
    groups = share(batches([i for i, length in enumerate(tokens.lengths) if length], tokens.lengths, budget))
    seen = sum(tokens.lengths[i] for group in groups for i in group)
    with tqdm(total=seen, desc=name, unit="tok", unit_scale=True, leave=False, disable=rank() > 0 or None) as bar:
        while groups:
            try:
                batch = collate(tokens, groups[0], tokens.response, model.device)
                losses[batch.entries] = token_losses(model, batch)
            except torch.OutOfMemoryError:
                budget = halved(budget, tokens.lengths[groups[0][0]], name, "lower --max-length")
                groups = batches([i for group in groups for i in group], tokens.lengths, budget)
                continue
            bar.update(sum(tokens.lengths[i] for i in groups.pop(0)))
    sum_over_processes([losses])  # each place was filled by one of them
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
    in bfloat16 where that does not fit. An overflow shows in the losses, which need no watch on every layer: PyTorch's
    float16 does not saturate, and an infinity that a block adds to the float32 residual stream stays there, becomes NaN in
    the next norm, and through the keys reaches all later positions of the row. (Keys themselves: see Attention.)
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
        except (torch.OutOfMemoryError, DoesNotFit) as error:
            # Several processes cannot go their own ways, and a type that was asked for is not given up.
            if base.dtypes["score"] != "tf32" or base.run.settings.dtype == "tf32" or size() > 1:
                raise InputError(f"{name}: does not fit into memory as {base.dtypes['score']} ({str(error).splitlines()[0]}); "
                                 "give another --dtype, or lower --max-length") from None
            problem, base.dtypes["score"] = "float32 does not fit", "bfloat16"
        if problem:  # outside the handlers, where the failed attempt no longer holds the old weights
            print(f"warning: {problem}; scoring again in {base.dtypes['score']}")
    return losses, {**clock.stop(), "tokens": sum(tokens.lengths) * len(adapters), "dtype": base.dtypes["score"]}


@contextmanager
def in_float32(model: Transformer) -> Iterator[None]:
    """Inside, the model computes in float32, whatever its weights' dtype, in less memory than a float32 base takes.

    Each block takes its weights in float32 from the checkpoint's files for as long as it computes, and then its own again;
    the embedding, the last norm and the head keep theirs until the end. That is what it costs: these in float32, and a block.
    """
    opened = ExitStack()
    files = [opened.enter_context(open_tensors(file, model.device)) for file in shards(model.source)]
    stored = {name: file for file in files for name in file.keys()}
    prefix = {layer: f"model.layers.{i}." for i, layer in enumerate(model.model.layers)}
    prefix |= {model.model.embed_tokens: "model.embed_tokens.", model.model.norm: "model.norm."}
    prefix[model.lm_head] = "model.embed_tokens." if model.config.tie_word_embeddings else "lm_head."
    own: dict[nn.Module, dict[str, nn.Parameter]] = {}

    def enter(module: nn.Module, _=None) -> None:
        if module in own:  # a pass was broken off here, and is made again in smaller batches
            leave(module)
        names = {name: prefix[module] + name for name, _ in module.named_parameters() if prefix[module] + name in stored}
        own[module] = swap(module, {name: nn.Parameter(stored[key].get_tensor(key).float(), requires_grad=False)
                                    for name, key in names.items()})

    def leave(module: nn.Module, *_) -> None:
        swap(module, own.pop(module))

    hooks = [layer.register_forward_pre_hook(enter) for layer in model.model.layers]
    hooks += [layer.register_forward_hook(leave) for layer in model.model.layers]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        with opened:
            for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
                enter(module)
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for hook in hooks:
            hook.remove()
        for module in list(own):  # these three, and the block at which a pass was broken off
            leave(module)


def swap(module: nn.Module, weights: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Give a module other weights, by their names in it; returns those that it had."""
    had = {name: module.get_parameter(name) for name in weights}
    for name, weight in weights.items():
        put_weight(module, name, weight)
    return had


def rounding_noise(base: Base, tokens: Tokens, adapters: dict[str, Path | None], losses: dict[str, Tensor], d: float,
                   sample: int = 64) -> str:
    """What half precision does to S, on `sample` rows spread evenly: scored again in float32 and compared, as a line.

    S is a difference of two close losses, so the arithmetic decides part of the mask.
    """
    spread = torch.linspace(0, tokens.rows - 1, min(sample, tokens.rows)).long().unique().tolist()
    part, exact = take(tokens, spread), {}
    try:
        for name in ("loss_utility", "loss_degraded"):
            model = base.load("score")
            load_adapter(model, adapters[name])
            with in_float32(model):
                exact[name] = score(model, part, base.budget, f"{name} in float32")
    except (torch.OutOfMemoryError, DoesNotFit):
        if size() > 1:  # the others wait for this process's share
            raise
        return f"rounding noise of S under {base.dtypes['score']}: not measured, a block in float32 does not fit"
    places = torch.cat([torch.arange(tokens.offsets[i], tokens.offsets[i + 1]) for i in spread])
    true = (exact["loss_utility"] - exact["loss_degraded"])[part.response]
    ours = (losses["loss_utility"] - losses["loss_degraded"])[places][part.response]
    gone = ~select_tokens(true, d)
    same = gone & ~select_tokens(ours, d)
    shared = f"{100 * int(same.sum()) / int(gone.sum()):.1f} %" if gone.any() else "all"
    noise = (ours - true).square().mean().sqrt()
    return (f"rounding noise of S under {base.dtypes['score']}: {noise:.4f} nats rms on {len(spread)} rows, beside a standard "
            f"deviation of {true.std():.3f}; {shared} of float32's discards at d = {d} are the same")
