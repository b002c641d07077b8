"""The benchmark: how fast scoring and training are, beside the machine's ceiling and a plain loop.

    python -m toss.audit.bench [--model FOLDER] [--part score]

Weights are random: of --model, a checkpoint or the name of a shape, the shape alone counts. By
default it is llama3-8b on CUDA and smollm2-135m on the CPU. The arms, explained in
toss/audit/speed.py, take turns on the same rows of random ids; `plain` and `compiled` need
transformers and peft. Prints the table of each part when it is done, and writes all to OUT.md.
"""

import math
import platform
import shlex
import sys
import time
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

from model.config import Config
from model.io import read_json
from toss.audit.command import markdown, write_text
from toss.audit.tables import hardware
from toss.workbench import flags

PARTS = ("score", "train")
FIELDS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads rope_theta tie_word_embeddings""".split()
SHAPES = {
    "llama3-8b": (128256, 4096, 14336, 32, 32, 8, 500000.0, False),
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 100000.0, True),
    "tiny": (384, 32, 64, 2, 4, 2, 10000.0, True),
}
DEFAULTS = {
    "cuda": {"model": "llama3-8b", "rows": 384, "tokens": 368, "rows_per_step": 64},
    "cpu": {"model": "smollm2-135m", "rows": 16, "tokens": 128, "rows_per_step": 8},
}
NOTES = """\
Tokens are those of prompts and responses, without padding. Of ceiling: by convention a token takes
2 FLOP per parameter to score (forward) and 4 to train LoRA on a frozen base (backward through the
activations, too), input embedding aside; attention's own products are not counted, and it is not
subtracted that the head runs on response positions only. Ceiling: the fastest product of two square
matrices of that type, repeated for half a second (on the CPU the better of PyTorch's default and
oneDNN's). Seconds: the median of the later turns, [the least, the most]; on the CPU they are the
process's CPU seconds, which other load changes least. First: the first turn, of shapes that were
not seen before; it counts nowhere else. Peak memory: on CUDA what is allocated, on the CPU the
process's, libraries included. Loss: of the first turn; equal ones say that equal work was done."""


def shape_config(name: str) -> dict:
    """The config.json of one of SHAPES."""
    return {"model_type": "llama", **dict(zip(FIELDS, SHAPES[name]))}


def machine(args: Namespace) -> str:
    """The device and the versions, in words."""
    import torch

    from toss.audit.speed import LIBRARIES

    libraries = ["torch", "transformers", "peft"] if LIBRARIES else ["torch"]
    versions = [f"{library} {version(library)}" for library in libraries]
    if torch.version.cuda:
        versions.append(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    python = f"python {platform.python_version()}"
    return ", ".join([hardware(args.device, args.threads), python, *versions])


def bench_of(args: Namespace, device):
    """What the flags ask for, as a speed.Bench."""
    from model.hub import resolve
    from toss.audit.speed import Bench, random_rows
    from toss.config import TrainConfig
    from toss.tokens import BATCH_TOKENS

    defaults = DEFAULTS[device.type]
    args.model = args.model or defaults["model"]
    if args.model in SHAPES:
        raw = shape_config(args.model)
    else:
        raw = read_json(resolve(args.model, weights=False) / "config.json")
    vocabulary = Config.from_dict(raw, args.model).vocab_size
    rows = args.rows or defaults["rows"]
    mean = args.tokens or defaults["tokens"]
    tokens = random_rows(rows, mean, vocabulary, args.lengths == "lognormal")
    budget = args.batch_tokens or BATCH_TOKENS[device.type]
    config = TrainConfig(epochs=1, batch_size=defaults["rows_per_step"], batch_tokens=budget)
    return Bench(raw, device, tokens, config, args.repeats)


def table(found, bench) -> str:
    """A speed.Comparison as Markdown."""
    from toss.audit.speed import median_seconds

    second = "CPU s" if bench.device.type == "cpu" else "s"
    header = ["arm", f"tokens/{second}", "of ceiling", "ours is faster by", second, "first"]
    header += ["peak GiB", "loss"]
    ours = median_seconds(found.turns["ours"]) if found.turns["ours"] else math.nan
    lines = []
    for arm, turns in found.turns.items():
        if not turns:
            lines.append([arm, "out of memory", *["-"] * 6])
            continue
        seconds = median_seconds(turns)
        later = [turn.seconds for turn in turns[1:]]
        lines.append(
            [
                arm,
                f"{len(bench.tokens.input_ids) / seconds:,.0f}",
                f"{found.flop / seconds / found.ceiling:.0%}",
                f"{seconds / ours:.2f}",
                f"{seconds:.2f} [{min(later):.2f}, {max(later):.2f}]",
                f"{turns[0].seconds:.2f}",
                f"{max(turn.peak_gib for turn in turns):.2f}",
                f"{turns[0].loss:.4f}",
            ]
        )
    # The heading says what was measured, and the ceiling that it is compared with.
    dtype = str(found.dtype).removeprefix("torch.")
    title = f"### {found.kind}, {dtype}, ceiling {found.ceiling / 1e9:,.0f} GFLOP/{second}"
    text = f"{title}\n\n{markdown(header, lines)}"
    if "plain" not in found.turns:
        text += "\n\ntransformers or peft is not installed: there is no plain loop beside ours."
    return text


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write OUT.md."""
    parser = flags.Parser("python -m toss.audit.bench", __doc__)
    add = parser.add_argument
    add("--model", help=f"a checkpoint folder, a hub id, or a shape: {', '.join(SHAPES)}")
    add("--rows", type=flags.count, help="rows (default: 384 on CUDA, 16 on the CPU)")
    text = "mean tokens per row (default: 368 on CUDA, 128 on the CPU)"
    add("--tokens", type=flags.count, help=text)
    text = "how the lengths of rows are spread"
    add("--lengths", choices=["even", "lognormal"], default="even", help=text)
    add("--part", choices=PARTS, help="measure this alone")
    add("--repeats", type=flags.count, default=3, help="turns that count (default: 3)")
    flags.add_device_flags(parser, dtype=False)
    add("--out", type=Path, default=Path("runs/bench"), help="OUT.md (default: runs/bench.md)")
    args = parser.parse_args(argv)

    import torch  # after parsing: it takes a while

    from toss.audit.speed import compare
    from toss.workbench.base import find_device
    from toss.workbench.runfile import git_commit

    # What is measured: the device, the model's shape, the rows.
    start = time.perf_counter()
    device = find_device(args.device)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    bench = bench_of(args, device)

    # The head of the page.
    words = sys.argv[1:] if argv is None else argv
    command = f"python -m toss.audit.bench {shlex.join(words)}".strip()
    facts = [
        f"{Path(args.model).name}, rows: {bench.tokens.rows}, lengths: {args.lengths}",
        f"tokens: {len(bench.tokens.input_ids):,}, of responses: {bench.tokens.response.sum():,}",
        f"tokens per batch: {bench.config.batch_tokens}, rows per step: {bench.config.batch_size}",
        f"LoRA of rank {bench.config.rank} on {bench.config.targets}, turns: 1 + {args.repeats}",
    ]
    about = f"{machine(args)}\n\n{'; '.join(facts)}"
    print(about, flush=True)

    # Written after each part, so that a long measurement which is stopped leaves the first ones.
    texts = [about]
    for part in [args.part] if args.part else PARTS:
        texts.append(table(compare(bench, part), bench))
        print(f"\n{texts[-1]}", flush=True)
        minutes = (time.perf_counter() - start) / 60
        first = f"`{command}`, commit {git_commit()}, {minutes:.1f} minutes"
        write_text(f"{args.out}.md", "\n\n".join(["# Benchmark", first, *texts, NOTES, ""]))
    print(f"\n{NOTES}")


if __name__ == "__main__":
    sys.exit(flags.run(main))
