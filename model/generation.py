"""Batched greedy generation with a key-value cache."""

import torch
from torch import Tensor

from model.errors import InputError
from model.transformer import Cache, Transformer


@torch.inference_mode()
def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int, eos_id: int, batch_tokens: int = 16384,
             progress=None) -> list[list[int]]:
    """The most likely continuation of each prompt: new ids only, up to (and without) `eos_id`.

    Prompts may differ in length. A batch holds at most `batch_tokens` slots of cache (rows x longest); `progress`,
    when given, is called with the number of prompts that each batch has finished.
    """
    if max_new_tokens < 0:
        raise InputError(f"the number of new tokens cannot be {max_new_tokens}")
    highest = max((max(prompt) for prompt in prompts), default=0)
    if highest >= model.config.vocab_size:
        raise InputError(f"a prompt holds the id {highest}, but the model has {model.config.vocab_size} embeddings")
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    while order:
        rows = max(1, batch_tokens // (len(prompts[order[0]]) + max_new_tokens))
        batch, order = order[:rows], order[rows:]
        for i, new in zip(batch, generate_batch(model, [prompts[i] for i in batch], max_new_tokens, eos_id)):
            answers[i] = new
        if progress is not None:
            progress(len(batch))
    return answers


def generate_batch(model: Transformer, prompts: list[list[int]], max_new_tokens: int, eos_id: int) -> list[list[int]]:
    """generate for one batch. Prompts are padded on the right; each row writes on at its own position, over the padding."""
    device, longest = model.device, max(map(len, prompts))
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.tensor([p + [eos_id] * (longest - len(p)) for p in prompts], device=device)  # (B, T)
    cache = Cache(model.config, len(prompts), longest + max_new_tokens, device, model.dtype)
    positions = torch.arange(longest, device=device).expand_as(ids)
    hidden = model(ids, positions, cache)[torch.arange(len(prompts), device=device), lengths - 1]  # (B, D)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    new: list[Tensor] = []
    for step in range(max_new_tokens):
        token = model.lm_head(hidden).float().argmax(dim=-1)  # (B,)
        done |= token == eos_id
        new.append(torch.where(done, eos_id, token))
        if step + 1 == max_new_tokens or bool(done.all()):
            break
        # The slot at `lengths + step` may hold a padding token's key: it is overwritten before anyone looks at it.
        hidden = model(token[:, None], (lengths + step)[:, None], cache)[:, 0]  # (B, D)
    columns = torch.stack(new, dim=1).tolist() if new else [[] for _ in prompts]
    return [row[: row.index(eos_id)] if eos_id in row else row for row in columns]
