"""The loops that `bench` compares with, re-stated on transformers and peft; neither is needed by anything else here.

`published`: as the code published with the paper goes about it. Scoring: four rows in file order, padded to the longest,
logits of every position. Training: PEFT, one row at a time, gradient checkpointing, the mean of each row's losses.

`sorted`: the strongest plain loop on the same libraries. Rows of similar length together, a batch bounded by tokens,
no padding mask (attention is causal), the head on response positions only, nothing recomputed.

Both run the very weights of our model, which are shared and not copied. Scoring runs them without an adapter, as if it
had been merged, while ours carries its own. The published loops ran in bfloat16 on CUDA; here all arms share our type,
float16 to score, which is as fast.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.transformer import Transformer
from toss.dataset import Tokens, batches, collate
from toss.settings import Settings
from toss.training import training_steps

ARMS = ("published", "sorted")
PUBLISHED_ROWS = 4  # rows that the published scoring puts side by side


def theirs(model: Transformer, raw: dict) -> nn.Module:
    """transformers' model of config.json's dictionary `raw` on the weights of ours. ImportError without transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**raw)
    config.use_cache = False
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=model.dtype)
    with model.device:
        made.model.rotary_emb = type(made.model.rotary_emb)(config)  # its tables are not in the checkpoint
    made.load_state_dict({name: p for name, p in model.state_dict().items() if ".lora_" not in name}, assign=True)
    return made.requires_grad_(False).eval()


def scoring(model: Transformer, raw: dict, tokens: Tokens, budget: int) -> dict[str, Callable[[], float]]:
    """Arms that score every response token once and return the mean loss."""
    hf = theirs(model, raw)

    @torch.inference_mode()
    def published() -> float:
        losses = torch.zeros(len(tokens.input_ids))
        for start in range(0, tokens.rows, PUBLISHED_ROWS):
            rows = list(range(start, min(start + PUBLISHED_ROWS, tokens.rows)))
            ids, real, _ = padded(tokens, rows, model.device)
            logits = hf(input_ids=ids, attention_mask=real.long()).logits
            found = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
            found = found.view(len(rows), -1).cpu()
            for b, i in enumerate(rows):
                a, length = int(tokens.offsets[i]), tokens.lengths[i]
                losses[a + 1 : a + length] = found[b, : length - 1]
        return float(losses[tokens.response].mean())

    @torch.inference_mode()
    def in_order() -> float:
        losses = torch.zeros(len(tokens.input_ids), device=model.device)
        for group in batches(range(tokens.rows), tokens.lengths, budget):
            batch = collate(tokens, group, tokens.response, model.device)
            hidden = hf.model(input_ids=batch.ids).last_hidden_state.flatten(0, 1)[batch.before]
            losses[batch.entries] = F.cross_entropy(hf.lm_head(hidden).float(), batch.targets, reduction="none")
        return float(losses.cpu()[tokens.response].mean())

    return {"published": published, "sorted": in_order}


def training(model: Transformer, raw: dict, tokens: Tokens, settings: Settings, budget: int) -> dict[str, Callable[[], float]]:
    """Arms that train a LoRA adapter for an epoch and return the last step's loss; a later call trains the same one on."""
    from peft import LoraConfig, get_peft_model

    def adapted() -> nn.Module:
        lora = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=settings.target_list, task_type="CAUSAL_LM")
        return get_peft_model(theirs(model, raw), lora).train()

    def epoch(peft: nn.Module, step: Callable[[nn.Module, list[int]], Tensor]) -> float:
        parameters = [p for p in peft.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
        for rows in training_steps(tokens, settings):
            optimizer.zero_grad()
            loss = step(peft, rows)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        return float(loss)

    def one_by_one(peft: nn.Module, rows: list[int]) -> Tensor:
        total = torch.zeros((), device=model.device)
        for i in rows:
            ids, _, wanted = padded(tokens, [i], model.device)
            loss = peft(input_ids=ids, labels=ids.where(wanted, -100)).loss / len(rows)
            loss.backward()
            total += loss.detach()
        return total

    def in_order(peft: nn.Module, rows: list[int]) -> Tensor:
        total, hf = torch.zeros((), device=model.device), peft.base_model.model
        count = sum(int(tokens.response[tokens.offsets[i] : tokens.offsets[i + 1]].sum()) for i in rows)
        for group in batches(rows, tokens.lengths, budget):
            batch = collate(tokens, group, tokens.response, model.device)
            hidden = hf.model(input_ids=batch.ids).last_hidden_state.flatten(0, 1)[batch.before]
            loss = F.cross_entropy(hf.lm_head(hidden).float(), batch.targets, reduction="sum") / count
            loss.backward()
            total += loss.detach()
        return total

    frugal, plain = adapted(), adapted()
    frugal.enable_input_require_grads()
    frugal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return {"published": lambda: epoch(frugal, one_by_one), "sorted": lambda: epoch(plain, in_order)}


def padded(tokens: Tokens, rows: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows side by side: ids int64 [B, T], which of them are real, and which are response tokens (bool [B, T])."""
    shape = (len(rows), max(tokens.lengths[i] for i in rows))
    ids, real, wanted = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool), torch.zeros(shape).bool()
    for b, i in enumerate(rows):
        place = slice(int(tokens.offsets[i]), int(tokens.offsets[i + 1]))
        ids[b, : tokens.lengths[i]] = tokens.input_ids[place]
        real[b, : tokens.lengths[i]] = True
        wanted[b, : tokens.lengths[i]] = tokens.response[place]
    return ids.to(device), real.to(device), wanted.to(device)
