"""The benchmark: how fast scoring and training are, as shares of the machine's ceiling.

    python -m toss.audit.bench [--model SHAPE] [--part score]

Weights and rows are random, the shape alone counts. By default it is llama3-8b on CUDA and
smollm2-135m on the CPU. Prints a table in Markdown.
"""

import statistics
import sys
import time
from argparse import Namespace
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model.config import Config
from model.lora import new_adapter, use
from model.products import DEFAULT, ONEDNN, exact, products
from model.transformer import Transformer
from toss.audit.tables import markdown
from toss.config import TrainConfig
from toss.scoring import score
from toss.tokens import BATCH_TOKENS, Tokens
from toss.training import train
from toss.workbench import flags
from toss.workbench.base import find_device
from toss.workbench.progress import Cost

FIELDS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads rope_theta tie_word_embeddings""".split()
SHAPES = {
    "llama3-8b": (128256, 4096, 14336, 32, 32, 8, 500000.0, False),
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 100000.0, True),
    "tiny": (384, 32, 64, 2, 4, 2, 10000.0, True),
}
# By device: the shape, the rows, their mean length in tokens, and rows per step.
DEFAULTS = {"cuda": ("llama3-8b", 384, 368, 64), "cpu": ("smollm2-135m", 16, 128, 8)}
# The arithmetic on CUDA, and FLOP per token and parameter: a forward pass takes 2 by convention;
# training LoRA on a frozen base takes one, and a backward pass through the activations.
DTYPES = {"score": torch.float16, "train": torch.bfloat16}
FLOP = {"score": 2, "train": 4}
NOTES = """\
Tokens are those of prompts and responses, without padding. Of ceiling: by convention a token takes
2 FLOP per parameter to score and 4 to train LoRA on a frozen base, input embedding aside;
attention's own products are not counted, and it is not subtracted that the head runs on response
positions only. On CUDA scoring is in float16, training in bfloat16. Ceiling: the fastest product of
two square matrices of that type, repeated for half a second (on the CPU the better of PyTorch's
default and oneDNN's). Seconds: the median of all turns but the first, which meets shapes that were
not seen before, [the least, the most]; on the CPU they are the process's CPU seconds, which other
load changes least. Peak memory: on CUDA what is allocated, on the CPU the process's, libraries
included."""


@dataclass
class Bench:
    """What is measured: a model on a device, rows, and settings."""

    model: Transformer
    tokens: Tokens
    config: TrainConfig  # with batch_tokens
    repeats: int  # turns that count


def shape_config(name: str) -> dict:
    """The config.json of one of SHAPES."""
    return {"model_type": "llama", **dict(zip(FIELDS, SHAPES[name]))}


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


def random_rows(rows: int, mean: int, vocabulary: int) -> Tokens:
    """Rows of random ids, two fifths of each a prompt; lengths from 1/4 to 7/4 of the mean."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(mean // 4, 7 * mean // 4, rows).long()
    response = []
    for length in lengths.tolist():
        prompt = 2 * length // 5
        response += [False] * prompt + [True] * (length - prompt)
    return Tokens(
        input_ids=torch.randint(vocabulary, (len(response),), generator=generator).int(),
        offsets=F.pad(lengths.cumsum(0), (1, 0)),
        response=torch.tensor(response),
        harmful=torch.zeros(len(response), dtype=torch.bool),
        name="random rows",
    )


# Measuring


def clock(device: torch.device) -> float:
    """Seconds: of the wall on CUDA, of this process on the CPU, which other load changes least."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def work(bench: Bench, part: str) -> None:
    """Score all rows under a new adapter, or train one on them for an epoch."""
    config = bench.config
    if part == "train":
        train(bench.model, bench.tokens, bench.tokens.response.float(), config)
        return
    targets = config.targets.split(",")
    use(bench.model, new_adapter(bench.model, config.rank, config.alpha, targets, seed=0))
    score(bench.model, bench.tokens, config.batch_tokens)


def measure(bench: Bench, part: str) -> dict[str, str]:
    """Measure "score" or "train": a line of the table."""
    device = bench.model.device
    best = ceiling(device, bench.model.dtype)
    cost = Cost(device)
    seconds = []
    for _ in range(1 + bench.repeats):
        start = clock(device)
        work(bench, part)
        seconds.append(clock(device) - start)
    later = seconds[1:]
    median = statistics.median(later)
    count = len(bench.tokens.input_ids)
    rate = FLOP[part] * linear_parameters(bench.model) * count / median
    return {
        "part": part,
        "tokens/s": f"{count / median:,.0f}",
        "of ceiling": f"{rate / best:.0%}",
        "ceiling, GFLOP/s": f"{best / 1e9:,.0f}",
        "seconds": f"{median:.2f} [{min(later):.2f}, {max(later):.2f}]",
        "peak GiB": f"{cost.read()['peak_memory_gib']:.2f}",
    }


def linear_parameters(model: Transformer) -> int:
    """The parameters that a token is multiplied with: those of the linear layers."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return sum(layer.weight.numel() for layer in layers)


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


# The command


def bench_of(args: Namespace, device: torch.device, part: str) -> Bench:
    """What the flags ask for."""
    shape, rows, mean, rows_per_step = DEFAULTS[device.type]
    raw = shape_config(args.model or shape)
    dtype = DTYPES[part] if device.type == "cuda" else torch.float32
    model = random_model(raw, device, dtype)
    tokens = random_rows(args.rows or rows, mean, model.config.vocab_size)
    budget = args.batch_tokens or BATCH_TOKENS[device.type]
    config = TrainConfig(epochs=1, batch_size=rows_per_step, batch_tokens=budget)
    return Bench(model, tokens, config, args.repeats)


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.bench", __doc__)
    add = parser.add_argument
    add("--model", choices=list(SHAPES), help="the shape (default: see above)")
    add("--rows", type=flags.count, help="rows (default: 384 on CUDA, 16 on the CPU)")
    add("--part", choices=list(FLOP), help="measure this alone")
    add("--repeats", type=flags.count, default=3, help="turns that count (default: 3)")
    flags.add_device_flags(parser, dtype=False)
    args = parser.parse_args(argv)
    device = find_device(args.device)
    torch.set_num_threads(args.threads or torch.get_num_threads())

    lines = []
    for part in [args.part] if args.part else FLOP:
        bench = bench_of(args, device, part)
        line = measure(bench, part)
        lines.append(list(line.values()))
    table = markdown(list(line), lines)
    machine = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    rows = f"{bench.tokens.rows} rows, {len(bench.tokens.input_ids):,} tokens"
    print(f"{machine}, torch {torch.__version__}, {rows}\n\n{table}\n\n{NOTES}")


if __name__ == "__main__":
    sys.exit(flags.run(main))
