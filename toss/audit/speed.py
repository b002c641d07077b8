"""What bench.py measures on random rows: three ways of scoring and of training, and selecting.

`ours`: toss.scoring.score and toss.training.train as they are. The other two use transformers and
peft on the very weights of our model; they score without an adapter, as if it had been merged.
`published`: as in the code published with the paper. Scoring: four rows in file order, padded to
the longest, logits of every position. Training: PEFT, one row at a time, gradient checkpointing,
the mean of each row's losses. Only the dtype is ours.
`sorted`: the strongest plain loop on the same libraries. Rows of similar length together, a batch
bounded by tokens, no padding mask (attention is causal), the head on response positions only,
nothing recomputed. On the CPU a batch holds half of our tokens: less padding, and fastest for it.
`compiled`: the same under torch.compile, on CUDA only.
Parts `sdp` and `compile` compare `ours` with itself: with cuDNN attention; eager; rows padded.
"""

import gc
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import fused, load_checkpoint
from model.config import Config
from model.io import DoesNotFit, out_of_memory
from model.lora import new_adapter, use
from model.packed import send
from model.products import DEFAULT, ONEDNN, chosen, exact, products
from model.transformer import Transformer
from toss.config import TrainConfig
from toss.scoring import score
from toss.selection import competing_tokens, select_tokens
from toss.tokens import Tokens, batches, collate
from toss.training import train, training_steps
from toss.workbench.progress import Cost

OTHERS = all(map(find_spec, ("transformers", "peft")))
RESPONSE = 0.6  # share of response tokens
LONG = 60  # seconds
KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
KERNELS += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Arms = dict[str, Callable[[], object]]  # each does the work once and returns its loss


def random_model(raw: dict, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A frozen model of config.json's dictionary `raw` with random weights, made on the device."""
    with torch.device("meta"):
        model = Transformer(Config.from_dict(raw, "--shape")).to(dtype)
    model.to_empty(device=device).requires_grad_(False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def random_rows(rows: int, mean: int, vocabulary: int, lognormal: bool = False) -> Tokens:
    """Rows of random ids, their lengths spread evenly from 1/4 to 7/4 of the mean.

    lognormal: as chats are, with sigma 0.7, cut at 2,012 / 368 of the mean.
    """
    generator = torch.Generator().manual_seed(0)
    bounds = max(2, mean // 4), max(3, 7 * mean // 4 + 1)
    lengths = torch.randint(*bounds, (rows,), generator=generator)
    if lognormal:
        logs = torch.randn(rows, generator=generator) * 0.7 + math.log(mean) - 0.7**2 / 2
        lengths = logs.exp().long().clamp(2, 2012 * mean // 368)
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    ids = torch.randint(vocabulary, (int(offsets[-1]),), generator=generator, dtype=torch.int32)
    position = torch.arange(len(ids)) - offsets[:-1].repeat_interleave(lengths)
    prompt = ((1 - RESPONSE) * lengths).long().clamp(min=1)
    response = position >= prompt.repeat_interleave(lengths)
    return Tokens(ids, offsets, response, torch.zeros_like(response), "random rows")


def theirs(model: Transformer, raw: dict) -> nn.Module:
    """transformers' model of config.json's dictionary `raw` on our weights; needs transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{**raw, "use_cache": False, "dtype": model.dtype})
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with model.device:  # what no checkpoint holds: rotary tables, and Gemma's scale
        made.model.rotary_emb = type(made.model.rotary_emb)(config)
        made.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    made.load_state_dict(model.state_dict(), assign=True)
    return made.requires_grad_(False).eval()


def padded(tokens: Tokens, rows: list[int], device: torch.device) -> list[Tensor]:
    """Rows padded on the right: ids [B, T]; where they are real, [B, T]; `before` among the B * T
    positions and `targets` as in a Batch."""
    batch = collate(tokens, rows, tokens.response, torch.device("cpu"))
    lengths = batch.bounds.diff()
    ids = nn.utils.rnn.pad_sequence(batch.ids.split(lengths.tolist()), batch_first=True)
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    parts = ids, real.long(), real.flatten().nonzero()[batch.before, 0], batch.targets
    return [send(part, device) for part in parts]


def published_losses(hf: nn.Module, tokens: Tokens, rows: list[int], n: int) -> Iterator[Tensor]:
    """The losses of the response tokens, n rows at a time, from logits of every position."""
    for group in (rows[i : i + n] for i in range(0, len(rows), n)):
        ids, real, before, _ = padded(tokens, group, hf.device)
        logits = hf(input_ids=ids, attention_mask=real).logits.flatten(0, 1).float()
        yield F.cross_entropy(logits, ids.roll(-1, 1).flatten(), reduction="none")[before]


def sorted_losses(hf: nn.Module, tokens: Tokens, rows: list[int], n: int) -> Iterator[Tensor]:
    """The same in batches of at most n tokens, from logits of their positions only."""
    ours = isinstance(hf, Transformer)
    for group in batches(rows, tokens.lengths, n):
        ids, _, before, targets = padded(tokens, group, hf.device)
        hidden = hf(ids) if ours else hf.model(input_ids=ids).last_hidden_state
        hidden = hidden.flatten(0, 1)[before]
        yield F.cross_entropy(hf.lm_head(hidden).float(), targets, reduction="none")


def scoring(model: Transformer, raw: dict, tokens: Tokens, config: TrainConfig, few: int) -> Arms:
    """The arms that score; each returns the mean loss. `padded` is `ours` without packing.

    few: tokens in a batch of `sorted`.
    """
    adapter = new_adapter(model, config.rank, config.alpha, config.targets.split(","), seed=0)

    def ours() -> float:
        losses = score(use(model, adapter), tokens, config.batch_tokens)
        return float(losses[tokens.response].mean())

    @torch.inference_mode()
    def mean(net: nn.Module, losses: Callable, n: int) -> float:
        return float(torch.cat(list(losses(net, tokens, range(tokens.rows), n))).mean())

    def padded():
        return mean(use(model, adapter), sorted_losses, config.batch_tokens)

    arms = {"ours": ours, "padded": padded}
    if OTHERS:
        hf, fast = theirs(model, raw), theirs(model, raw)
        fast.model.compile(dynamic=True)
        arms["published"] = lambda: mean(hf, published_losses, 4)
        arms["sorted"] = lambda: mean(hf, sorted_losses, few)
        arms["compiled"] = lambda: mean(fast, sorted_losses, few)
    return arms


def training(model: Transformer, raw: dict, tokens: Tokens, config: TrainConfig, few: int) -> Arms:
    """The arms that train an epoch; each returns the loss of the last step. few: see scoring."""

    def ours() -> float:
        steps: list[dict] = []
        train(model, tokens, tokens.response.float(), config, on_step=steps.append)
        return steps[-1]["loss"]

    if not OTHERS:
        return {"ours": ours}
    from peft import LoraConfig, get_peft_model

    how = {"lora_alpha": config.alpha, "target_modules": config.targets.split(",")}
    lora = LoraConfig(r=config.rank, **how)

    def make():
        return get_peft_model(theirs(model, raw), lora).base_model.model

    frugal, plain, fast = make(), make(), make()
    fast.model.compile(dynamic=True)
    frugal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def epoch(hf: nn.Module, losses: Callable, n: int) -> float:  # goes on with hf's adapter
        parameters = [p for p in hf.train().parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, config.lr, (0.9, 0.95), weight_decay=0.0)
        for rows in training_steps(tokens, config):
            count, total = int(tokens.response[tokens.places(rows)].sum()), 0.0
            optimizer.zero_grad()
            for part in losses(hf, tokens, rows, n):
                loss = part.mean() / len(rows) if hf is frugal else part.sum() / count
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        return float(total)

    return {
        "ours": ours,
        "published": lambda: epoch(frugal, published_losses, 1),
        "sorted": lambda: epoch(plain, sorted_losses, few),
        "compiled": lambda: epoch(fast, sorted_losses, few),
    }


def variants(part: str, arms: Arms, device: torch.device) -> Arms:
    """The arms of a part: score, train, sdp or compile."""

    ours = arms["ours"]
    if part == "sdp":
        return {"ours": ours, "cuDNN": sdpa_kernel(KERNELS)(ours)}
    if part == "compile":
        eager = patch.object(fused, "SMALLEST", math.inf)(ours)
        return {"eager": eager, **{n: arms[n] for n in ("ours", "padded") if n in arms}}
    left_out = ("padded", *["compiled"] * (device.type == "cpu"))
    return {name: work for name, work in arms.items() if name not in left_out}


def paddings(kind: Callable, tokens: Tokens, config: TrainConfig, few: int) -> dict[str, int]:
    """The "real" tokens, and those of each arm with padding (in `ours` that inside attention)."""
    steps = training_steps(tokens, config) if kind is training else [range(tokens.rows)]
    rows_each, lengths, found = 1 if kind is training else 4, tokens.lengths, Counter()
    for rows in map(list, steps):
        plain = [rows[i : i + rows_each] for i in range(0, len(rows), rows_each)]
        cuts = {"ours": batches(rows, lengths, config.batch_tokens), "published": plain}
        for name, parts in {**cuts, "sorted": batches(rows, lengths, few)}.items():
            found[name] += sum(len(part) * max(lengths[i] for i in part) for part in parts)
    like_ours = dict.fromkeys(("eager", "cuDNN", "padded"), found["ours"])
    return {"real": sum(lengths), **found, **like_ours, "compiled": found["sorted"]}


def timed(work: Callable[[], object], device: torch.device) -> tuple:
    """Seconds, seconds of work (on the CPU the process's CPU seconds), peak GiB, and the result."""
    clock, cpu = Cost(device), time.process_time()
    result = work()
    peak = clock.read()["peak_memory_gib"]  # waits for the device
    seconds, cpu = time.perf_counter() - clock.started, time.process_time() - cpu
    return seconds, cpu if device.type == "cpu" else seconds, peak, result


def ceiling(device: torch.device, dtype: torch.dtype) -> dict:
    """The dtype, and FLOP per second of work of the fastest square matrix product.

    "sustained": half a second of each size. "burst": 20 products (of 8192 on CUDA), before a GPU
    that gets warm slows down. On the CPU the better of PyTorch's default and oneDNN, if that is
    exact.
    """
    sizes, times = ((4096, 8192, 16384), 16) if device.type == "cuda" else ((512, 1024, 2048), 1)
    kinds = [DEFAULT, ONEDNN] if device.type == "cpu" and exact() else [chosen()]
    best = {"dtype": str(dtype).removeprefix("torch."), "burst": 0.0, "sustained": 0.0}
    for n, kind in product(sizes, kinds):
        a, b = torch.randn(2, n, n, device=device, dtype=dtype)
        out, done, work = a @ b, 0, 0.0

        def some(m, a=a, b=b, out=out):
            return timed(lambda: [torch.mm(a, b, out=out) for _ in range(m)], device)[1]

        with products(kind):
            if n == sizes[1]:
                time.sleep(0.5)
                best["burst"] = max(best["burst"], 2 * n**3 * 20 / some(20))
            while work < 0.5:
                work += some(times)
                done += times
        best["sustained"] = max(best["sustained"], 2 * n**3 * done / work)
    return best


def take_turns(arms: Arms, device: torch.device, repeats: int) -> dict[str, dict]:
    """Run each arm in turn, 1 + repeats times; the first turn, of shapes seen first, is apart.

    An arm that takes more than LONG seconds is run once. One that runs out of memory is not in the
    result.
    """
    found: dict[str, list[tuple]] = {name: [] for name in arms}
    for turn in range(1 + repeats):
        for name in list(found):
            try:
                if not turn or found[name][0][0] < LONG:
                    found[name].append(timed(arms[name], device))
            except (RuntimeError, DoesNotFit) as error:
                if not (isinstance(error, DoesNotFit) or out_of_memory(error)):
                    raise
                del found[name]
    result = {}
    for name, turns in found.items():
        seconds, work, peaks, losses = zip(*(turns[1:] or turns))
        spread = {"least": min(seconds), "most": max(seconds), "loss": losses[0]}
        middle = {"seconds": statistics.median(seconds), "work": statistics.median(work)}
        result[name] = {**middle, **spread, "peak_memory_gib": max(peaks), "first": turns[0][0]}
    return result


def speed(arms: Arms, model: Transformer, sizes: dict, work: int, best: dict, n: int) -> dict:
    """Measure arms in n turns.

    sizes: of paddings. work: FLOP per token and parameter. best: of ceiling.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    if not model.config.tie_word_embeddings:
        count -= model.model.embed_tokens.weight.numel()
    found = take_turns(arms, model.device, n)
    notes = [f"{name}: out of memory." for name in arms if name not in found]
    notes += [] if OTHERS else ["Arms left out: transformers or peft is not installed."]
    for name, arm in found.items():
        for key, tokens in (("", sizes["real"]), ("padded_", sizes[name])):
            arm[f"{key}tokens_per_second"] = rate = tokens / arm["work"]
            arm[f"{key}share_of_ceiling"] = rate * work * count / best["sustained"]
        arm |= {f"to_{name}": found[name]["work"] / arm["work"] for name in found}
    about = {"device": model.device.type, "ceiling": best, "parameters": count}
    return {**about, "arms": found, "notes": notes}


def selection_cost(n: int, repeats: int) -> dict:
    """Time, and memory beyond the flat arrays, of choosing among about n ranked tokens."""
    tokens, cpu = random_rows(max(1, round(n / RESPONSE / 368)), 368, 384), torch.device("cpu")
    utility, degraded = torch.rand(2, len(tokens.input_ids))

    def choose():
        return select_tokens((utility - degraded)[competing_tokens(tokens)], 0.1)

    before = Cost(cpu).read()["peak_memory_gib"]  # the peak was just reset to what is in use
    took = take_turns({"toss": choose}, cpu, repeats)["toss"]
    keep, extra = took.pop("loss"), took["peak_memory_gib"] - before
    return {"competing": len(keep), "discarded": int((~keep).sum()), "extra_gib": extra, **took}


SCORE, TRAIN = (scoring, torch.float16, 2), (training, torch.bfloat16, 4)  # FLOP as in `speed`
KINDS = {"score": [SCORE], "train": [TRAIN]}  # other parts have both


def measure(
    args, raw: dict, folder: Path | None, device: torch.device, competing: int
) -> Iterator[tuple[str, dict]]:
    """Yield "about" with facts about rows and settings; then each part's name and what it found.

    raw: a config.json. folder: of the checkpoint; None: random weights.
    """
    cuda = device.type == "cuda"
    rows, mean, step, budget = (384, 368, 64, 8192) if cuda else (16, 128, 8, 1024)
    config = TrainConfig(epochs=1, batch_size=step, batch_tokens=args.batch_tokens or budget)
    few = config.batch_tokens // (1 if cuda else 2)
    vocabulary, lognormal = raw["vocab_size"], args.lengths == "lognormal"
    tokens = random_rows(args.rows or rows, args.tokens or mean, vocabulary, lognormal)
    facts = {"rows": tokens.rows, "lengths": args.lengths, "tokens": sum(tokens.lengths)}
    facts |= {"response_tokens": int(tokens.response.sum()), "batch_tokens": config.batch_tokens}
    facts |= {"rows_per_step": step, "rank": config.rank, "targets": config.targets}
    yield "about", {**facts, "repeats": args.repeats}
    for part in args.part:
        if part == "selection":  # first, while memory is free
            yield part, selection_cost(competing, args.repeats)
            continue
        torch.set_num_threads(args.threads or torch.get_num_threads())
        for kind, dtype, work in KINDS.get(part, [SCORE, TRAIN]):
            dtype = dtype if cuda else torch.float32
            best = ceiling(device, dtype)
            if part == "ceiling":
                yield part, best
                continue
            load = load_checkpoint if folder else random_model
            model = load(folder or raw, device, dtype)
            arms = variants(part, kind(model, raw, tokens, config, few), device)
            sizes = paddings(kind, tokens, config, few)
            found = speed(arms, model, sizes, work, best, args.repeats)
            yield part, {"kind": kind.__name__, **found}
            del model, arms
            gc.collect()  # transformers' modules hold on to one another, and so to our weights
