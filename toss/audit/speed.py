"""What bench.py measures on random weights and rows: scoring and training, beside a plain loop.

`ours`: toss.scoring.score and toss.training.train as they are.
`plain`: the strongest plain loop on transformers and peft, on the weights of our model and with the
same attention kernels. Rows of similar length together, a batch bounded by tokens and padded on the
right, no padding mask (attention is causal), the head on response positions only, nothing
recomputed. It scores without an adapter, as if that had been merged. On the CPU a batch holds half
of our tokens: less padding, and fastest for it.
`compiled`: the same under torch.compile, on CUDA only.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from model.config import Config
from model.io import out_of_memory
from model.lora import new_adapter, use
from model.products import DEFAULT, ONEDNN, exact, products
from model.transformer import Transformer
from toss.config import TrainConfig
from toss.scoring import score
from toss.tokens import Tokens, batches
from toss.training import adamw, train, training_steps
from toss.workbench.progress import Cost

LIBRARIES = all(find_spec(name) for name in ("transformers", "peft"))


@dataclass
class Bench:
    """What is measured: the shape of a model, rows, and settings."""

    raw: dict  # config.json
    device: torch.device
    tokens: Tokens
    config: TrainConfig  # with batch_tokens
    repeats: int  # turns that count


# Models and rows


def random_model(raw: dict, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A frozen model of config.json's dictionary `raw` with random weights, made on the device."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # as load_checkpoint does
    with torch.device("meta"):
        model = Transformer(Config.from_dict(raw, "--model")).to(dtype)
    model.to_empty(device=device).requires_grad_(False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def theirs(model: Transformer, bench: Bench, part: str) -> nn.Module:
    """transformers' model on our weights; to train, with peft's adapter, which alone is trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = {**bench.raw, "use_cache": False, "dtype": model.dtype}
    with bench.device:
        config = AutoConfig.for_model(**raw)
        copy = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    copy.load_state_dict(model.state_dict(), assign=True)
    copy.requires_grad_(False).eval()
    if part == "score":
        return copy
    targets = bench.config.targets.split(",")
    lora = LoraConfig(r=bench.config.rank, lora_alpha=bench.config.alpha, target_modules=targets)
    return get_peft_model(copy, lora).base_model.model


def random_rows(rows: int, mean: int, vocabulary: int, lognormal: bool = False) -> Tokens:
    """Rows of random ids, two fifths of each a prompt.

    Lengths are spread evenly from 1/4 to 7/4 of the mean. lognormal: as chats are, with sigma 0.7,
    cut at 2,012 / 368 of the mean.
    """
    generator = torch.Generator().manual_seed(0)
    quantiles = (torch.randperm(rows, generator=generator) + 0.5) / rows
    factors = 0.25 + 1.5 * quantiles
    if lognormal:
        factors = (0.7 * torch.special.ndtri(quantiles) - 0.7**2 / 2).exp()
    lengths = (mean * factors.clamp(max=2012 / 368)).long().clamp(min=2)
    response = []
    for length in lengths.tolist():
        prompt = max(1, 2 * length // 5)
        response += [False] * prompt + [True] * (length - prompt)
    return Tokens(
        input_ids=torch.randint(vocabulary, (len(response),), generator=generator).int(),
        offsets=F.pad(lengths.cumsum(0), (1, 0)),
        response=torch.tensor(response),
        harmful=torch.zeros(len(response), dtype=torch.bool),
        name="random rows",
    )


# The loops: each does the work once and returns a loss, the mean of all or that of the last step


def score_ours(model: Transformer, bench: Bench) -> float:
    config = bench.config
    use(model, new_adapter(model, config.rank, config.alpha, config.targets.split(","), seed=0))
    losses = score(model, bench.tokens, config.batch_tokens)
    return float(losses[bench.tokens.response].mean())


def train_ours(model: Transformer, bench: Bench) -> float:
    steps = []
    weights = bench.tokens.response.float()
    train(model, bench.tokens, weights, bench.config, on_step=steps.append)
    return steps[-1]["loss"]


@torch.inference_mode()
def score_plain(copy: nn.Module, bench: Bench) -> float:
    losses = list(plain_losses(copy, bench, range(bench.tokens.rows)))
    return float(torch.cat(losses).mean())


def train_plain(copy: nn.Module, bench: Bench) -> float:
    """An epoch that goes on with the copy's adapter."""
    parameters = [p for p in copy.parameters() if p.requires_grad]
    optimizer = adamw(parameters, bench.config)
    for rows in training_steps(bench.tokens, bench.config):
        count = int(bench.tokens.response[bench.tokens.places(rows)].sum())
        total = torch.zeros((), device=bench.device)
        optimizer.zero_grad()
        for losses in plain_losses(copy, bench, rows):
            loss = losses.sum() / count
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return float(total)


def plain_losses(copy: nn.Module, bench: Bench, rows: Iterable[int]) -> Iterator[Tensor]:
    """The losses of the response tokens of each batch, float32 [n]."""
    tokens = bench.tokens
    budget = bench.config.batch_tokens
    if bench.device.type == "cpu":
        budget //= 2
    for group in batches(rows, tokens.lengths, budget):
        places = [tokens.places([row]) for row in group]
        ids = pad_sequence([tokens.input_ids[p].long() for p in places], batch_first=True)
        response = pad_sequence([tokens.response[p] for p in places], batch_first=True)
        ids = ids.to(bench.device)  # [B, T]
        response = response.to(bench.device)[:, 1:]  # [B, T - 1]
        hidden = copy.model(input_ids=ids).last_hidden_state[:, :-1]
        logits = copy.lm_head(hidden[response]).float()
        yield F.cross_entropy(logits, ids[:, 1:][response], reduction="none")


# Measuring


@dataclass
class Turn:
    """Work that was done once."""

    seconds: float  # see clock
    peak_gib: float  # on CUDA what was allocated, on the CPU the process's
    loss: float


def clock(device: torch.device) -> float:
    """Seconds, once the device has done its work; on the CPU the process's CPU seconds.

    Those depend least on what else the machine does.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def take_turn(work: Callable[[], float], device: torch.device) -> Turn | None:
    """Do the work; None if memory ran out."""
    cost = Cost(device)  # the peak of memory begins anew
    start = clock(device)
    try:
        loss = work()
    except RuntimeError as error:
        if out_of_memory(error):
            return None
        raise
    seconds = clock(device) - start
    return Turn(seconds, cost.read()["peak_memory_gib"], loss)


def take_turns(
    arms: dict[str, Callable[[], float]], device: torch.device, repeats: int
) -> dict[str, list[Turn]]:
    """Run each arm in turn, 1 + repeats times, so that a slow minute meets all of them.

    An arm that runs out of memory has no turns.
    """
    turns = {name: [] for name in arms}
    for _ in range(1 + repeats):
        for name, work in arms.items():
            if None not in turns[name]:
                turns[name].append(take_turn(work, device))
    for taken in turns.values():
        if None in taken:
            taken.clear()
    return turns


def median_seconds(turns: list[Turn]) -> float:
    """Of all but the first turn, which meets shapes that were not seen before."""
    return statistics.median(turn.seconds for turn in turns[1:])


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of the fastest square matrix product of several sizes.

    On the CPU the better of PyTorch's default and oneDNN's, if those are exact.
    """
    sizes = (4096, 8192, 16384) if device.type == "cuda" else (512, 1024, 2048)
    rates = []
    for kind in (DEFAULT, ONEDNN) if exact() else (DEFAULT,):
        with products(kind):
            rates += [product_rate(n, device, dtype) for n in sizes]
    return max(rates)


def product_rate(n: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of the product of two n x n matrices, repeated for half a second."""
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    out = a @ b
    count = 0
    seconds = 0.0
    start = clock(device)
    while seconds < 0.5:
        torch.mm(a, b, out=out)
        count += 1
        seconds = clock(device) - start
    return 2 * n**3 * count / seconds


# Of scoring and of training: our loop and the plain one; the arithmetic on CUDA; FLOP per token and
# parameter. By convention a forward pass takes 2. To train LoRA on a frozen base takes one, and a
# backward pass through the activations.
LOOPS = {"score": (score_ours, score_plain), "train": (train_ours, train_plain)}
DTYPES = {"score": torch.float16, "train": torch.bfloat16}
FLOP = {"score": 2, "train": 4}
TITLES = {"score": "Scoring", "train": "Training"}


@dataclass
class Comparison:
    """What was measured of scoring or of training."""

    kind: str
    dtype: torch.dtype
    ceiling: float  # FLOP per second
    flop: int  # of one turn
    turns: dict[str, list[Turn]]


def compare(bench: Bench, part: str) -> Comparison:
    """Measure "score" or "train": ours, and theirs if there are transformers and peft."""
    cuda = bench.device.type == "cuda"
    dtype = DTYPES[part] if cuda else torch.float32
    best = ceiling(bench.device, dtype)
    model = random_model(bench.raw, bench.device, dtype)

    ours, plain = LOOPS[part]
    arms = {"ours": partial(ours, model, bench)}
    if LIBRARIES:
        arms["plain"] = partial(plain, theirs(model, bench, part), bench)
    if LIBRARIES and cuda:
        copy = theirs(model, bench, part)
        copy.model.compile(dynamic=True)
        arms["compiled"] = partial(plain, copy, bench)
    turns = take_turns(arms, bench.device, bench.repeats)

    # The parameters that a token is multiplied with: the linear layers', the head among them.
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    parameters = sum(layer.weight.numel() for layer in layers)
    flop = FLOP[part] * parameters * len(bench.tokens.input_ids)
    return Comparison(TITLES[part], dtype, best, flop, turns)
