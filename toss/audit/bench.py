"""The benchmark: how fast scoring and training are, beside the machine's own ceiling and beside other loops.

    python -m toss.audit.bench                     a random model: llama3-8b's shape on CUDA, smollm2-135m's on the CPU
    python -m toss.audit.bench --model FOLDER      a real checkpoint (its weights; the rows stay random)
    python -m toss.audit.bench --run RUN           also what the methods of a run took, as multiples of plain fine-tuning

Arms: `ours` is toss.scoring.score and toss.training.train as they stand; `published` and `sorted` are explained in
toss/audit/published.py and are left out where transformers and peft are not installed. All arms see the same rows of
random ids and share their weights; they take turns, so that a busy machine is busy for all of them, and the first
turn only warms up. On the CPU rates are by the process's CPU seconds, which other processes disturb least. Writes
bench.md and bench.json under --out.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path

import torch

from model import load_checkpoint
from model.checkpoint import resolve
from model.errors import InputError, reported
from model.files import file_beside, read_json
from model.lora import add_adapter, remove_adapter
from model.transformer import Config, Transformer
from toss.audit import published
from toss.audit.command import run_folder
from toss.audit.compare import cost
from toss.audit.experiment import markdown
from toss.dataset import Tokens
from toss.run import git_commit
from toss.scoring import score
from toss.selection import Candidates, choose
from toss.settings import Settings
from toss.training import Clock, train

SHAPES = {
    "llama3-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "tie_word_embeddings": False},
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
        "max_position_embeddings": 8192, "tie_word_embeddings": True},
    "tiny": {
        "model_type": "llama", "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 2048, "tie_word_embeddings": True},
}  # fmt: skip
SEED, RESPONSE, COMPETING = 0, 0.6, 22_000_000  # of the rows; share of response tokens; tokens of the paper's custom set
CONVENTION = """
tokens/s: real tokens, prompt and response, padding not counted. FLOP a token, by convention: 2 N to score, 4 N to train LoRA on a
frozen base (forward, and backward through the activations), N = {n:,} parameters, all but the input embedding; attention's own
products are not counted, nor is it subtracted that the head runs on response positions only. Ceiling: the fastest sustained
product of two square matrices of that type, in this run. Peak memory: on CUDA what is allocated; on the CPU the process's,
libraries included. Seconds: the median of {repeats} turns, and [least, most]; {clock}."""
CLOCKS = {"cuda": "rates are by them", "cpu": "rates, shares and\nratios are by CPU seconds, the process's own over all threads, "
          "because others may use the cores too"}  # fmt: skip


def random_model(raw: dict, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A frozen model of config.json's dictionary `raw` with random weights, made on the device."""
    with torch.device("meta"):
        model = Transformer(Config.from_dict(raw, "--shape")).to(dtype)
    model.to_empty(device=device).requires_grad_(False)
    torch.manual_seed(SEED)
    for parameter in model.parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def random_rows(rows: int, mean: int, vocabulary: int) -> Tokens:
    """Rows of random ids; lengths evenly spread from a quarter to seven quarters of the mean, the last 60 % the response."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = torch.randint(max(2, mean // 4), max(3, 7 * mean // 4 + 1), (rows,), generator=generator)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    ids = torch.randint(vocabulary, (int(offsets[-1]),), generator=generator, dtype=torch.int32)
    place = torch.arange(len(ids)) - offsets[:-1].repeat_interleave(lengths)
    prompt = ((1 - RESPONSE) * lengths).long().clamp(min=1)
    response = place >= prompt.repeat_interleave(lengths)
    return Tokens(ids, offsets, response, torch.zeros_like(response), "random rows")


class Watch:
    """What one piece of work took: seconds by the wall, seconds of work (the same on CUDA, else CPU seconds), peak memory."""

    def __init__(self, device: torch.device):
        self.cuda, self.clock, self.cpu = device.type == "cuda", Clock(device), time.process_time()

    def stop(self) -> dict:
        peak = self.clock.stop()["peak_memory_gib"]  # waits for the device
        seconds = time.perf_counter() - self.clock.start
        return {"seconds": seconds, "work": seconds if self.cuda else time.process_time() - self.cpu, "peak_memory_gib": peak}


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of work of the fastest sustained square matrix product (half a second of each size)."""
    best = 0.0
    for n in (4096, 8192, 16384) if device.type == "cuda" else (512, 1024, 2048):
        a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
        out, times, work = a @ b, 0, 0.0
        watch = Watch(device)
        while work < 0.5:
            for _ in range(16 if device.type == "cuda" else 1):
                torch.mm(a, b, out=out)
                times += 1
            work = watch.stop()["work"]
        best = max(best, 2 * n**3 * times / work)
    return best


def take_turns(arms: dict[str, Callable[[], float]], device: torch.device, repeats: int) -> dict[str, dict]:
    """Run each arm in turn, 1 + repeats times, the first only to warm up; {arm: medians, the seconds' range, peak, loss}.

    An arm that runs out of memory is not in the result.
    """
    found: dict[str, list[dict]] = {name: [] for name in arms}
    for turn in range(1 + repeats):
        for name in list(found):
            watch = Watch(device)
            try:
                took = {"loss": arms[name](), **watch.stop()}
                found[name] += [took] if turn else []
            except torch.OutOfMemoryError:
                del found[name]
    result = {}
    for name, turns in found.items():
        seconds = [turn["seconds"] for turn in turns]
        result[name] = {"seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds),
                        "work": statistics.median(turn["work"] for turn in turns),
                        "peak_memory_gib": max(turn["peak_memory_gib"] for turn in turns), "loss": turns[0]["loss"]}
    return result


def speed(kind: str, model: Transformer, raw: dict, tokens: Tokens, settings: Settings, repeats: int) -> dict:
    """Measure the arms of one kind of work, "scoring" or "training", on a model; see the columns of `speed_table`."""
    device, budget, notes = model.device, settings.batch_tokens, []
    if kind == "scoring":
        add_adapter(model, "default", settings.rank, settings.alpha, settings.target_list, SEED)
        arms = {"ours": lambda: float(score(model, tokens, budget, "bench")[tokens.response].mean())}
    else:
        every = torch.ones_like(tokens.response)
        arms = {"ours": lambda: train(model, tokens, every, settings, budget, "bench")["last_loss"]}
    try:
        more = (tokens, budget) if kind == "scoring" else (tokens, settings, budget)
        arms |= getattr(published, kind)(model, raw, *more)
    except ImportError as error:
        notes.append(f"Arms left out: {error.name} is not installed.")
    n = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
    if not model.config.tie_word_embeddings:
        n -= model.model.embed_tokens.weight.numel()
    before = ceiling(device, model.dtype)
    found = take_turns(arms, device, repeats)
    notes += [f"{name}: out of memory." for name in arms if name not in found]
    best, count = max(before, ceiling(device, model.dtype)), sum(tokens.lengths)
    for arm in found.values():
        arm["tokens_per_second"] = count / arm["work"]
        arm["share_of_ceiling"] = arm["tokens_per_second"] * n * (2 if kind == "scoring" else 4) / best
        for other in published.ARMS:
            if other in found:
                arm[f"to_{other}"] = found[other]["work"] / arm["work"]
    remove_adapter(model, "default")
    return {"kind": kind, "device": device.type, "dtype": str(model.dtype).removeprefix("torch."), "ceiling": best,
            "parameters": n, "tokens": count, "arms": found, "notes": notes}


def speed_table(part: dict) -> str:
    """What `speed` measured, as Markdown."""
    others = [name for name in published.ARMS if name in part["arms"]]
    clock, on_cpu = ("CPU s", ["CPU s"]) if part["device"] == "cpu" else ("s", [])
    lines = [[name, f"{arm['tokens_per_second']:,.0f}", *(f"{arm['work']:.2f}" for _ in on_cpu),
              f"{arm['seconds']:.2f} [{arm['least']:.2f}, {arm['most']:.2f}]", f"{arm['share_of_ceiling']:.0%}",
              f"{arm['peak_memory_gib']:.2f}", *(f"{arm[f'to_{other}']:.2f}" for other in others), f"{arm['loss']:.4f}"]
             for name, arm in part["arms"].items()]
    head = f"### {part['kind'].capitalize()}, {part['dtype']}, ceiling {part['ceiling'] / 1e9:,.0f} GFLOP/{clock}"
    heads = ["arm", f"tokens/{clock}", *on_cpu, "seconds", "of ceiling", "peak GiB", *(f"x {other}" for other in others), "loss"]
    table = markdown(heads, lines)
    return "\n\n".join([head, table, *part["notes"]])


def cost_to_sft(harmful: int, utility: int, custom: int, epochs: int, rounds: int, k: int) -> tuple[float, float]:
    """FLOP of TOSS and of TOSS-Pro, from the base on, as multiples of plain fine-tuning's, for rows of equal mean length.

    Training costs 4 N a token and epoch, scoring 2 N a token and model. TOSS trains two references and scores D^cus
    under both; a round of TOSS-Pro trains a degraded model with k more rows and scores D^cus under it.

    >>> cost_to_sft(100, 100, 1000, 2, 1, 60)  # (800 + 800 + 2000 + 2000 + 8000) / 8000, and 4 * 2 * 160 + 2000 more
    (1.7, 2.11)
    """
    sft = 4 * epochs * custom
    toss = sft + 4 * epochs * (harmful + utility) + 2 * 2 * custom
    pro = toss + sum(4 * epochs * (harmful + t * k) + 2 * custom for t in range(1, rounds + 1))
    return toss / sft, pro / sft


def run_costs(folder: Path) -> list[list[str]]:
    """Seconds and tokens of a run's methods by its run.json, with multiples of plain fine-tuning's where that is there."""
    record = read_json(run_folder(folder) / "run.json")
    names = [stage.removeprefix("methods/") for stage in record.get("stages", {}) if stage.startswith("methods/")]
    costs = {name: found for name in names if (found := cost(record, name))}
    ratio = lambda name, what: f"{costs[name][what] / costs['sft'][what]:.2f}" if "sft" in costs else "-"  # noqa: E731
    return [[name, f"{found['seconds']:,.1f}", ratio(name, "seconds"), f"{found['tokens']:,}", ratio(name, "tokens")]
            for name, found in costs.items()]


def memory() -> tuple[int, int] | None:
    """Bytes of this process now and at its peak; None where the system does not tell (it is Linux's /proc)."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmRSS"].split()[0]) * 1024, int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def selection_cost(n: int) -> dict:
    """Seconds and extra memory of choosing among n competing tokens, in this process: run it in a fresh one."""
    tokens = random_rows(max(1, round(n / RESPONSE / 368)), 368, 384)
    losses = {name: torch.rand(len(tokens.input_ids), generator=torch.Generator().manual_seed(i))
              for i, name in enumerate(("loss_utility", "loss_degraded"))}
    watch, before = Watch(torch.device("cpu")), memory()
    entries = tokens.response.nonzero().squeeze(1)
    keep, _ = choose("toss", Candidates(tokens, entries, losses), 0.1)
    cost, after = watch.stop(), memory()
    return {"competing": len(entries), "discarded": int((~keep).sum()), "seconds": cost["seconds"], "work": cost["work"],
            "extra_gib": None if before is None else (after[1] - before[0]) / 2**30}


def in_fresh_process(n: int, repeats: int) -> dict:
    """selection_cost in a process of its own each time: median seconds, the highest memory."""
    found = []
    for _ in range(repeats):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found.append(pool.submit(selection_cost, n).result())
    medians = {name: statistics.median(one[name] for one in found) for name in ("seconds", "work")}
    return {**max(found, key=lambda one: one["extra_gib"] or 0), **medians}


def hardware(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} CPU threads"


def versions() -> dict[str, str]:
    """Versions of what the figures depend on; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def bench(args: argparse.Namespace) -> None:
    """Measure, print, and write bench.md and bench.json."""
    for name in ("rows", "tokens", "repeats", "threads", "batch_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device} cannot be used here ({str(error).splitlines()[0]})") from None
    if args.run:
        run_folder(args.run)
    chosen = in_fresh_process(COMPETING, args.repeats)  # first, while the machine's memory is free
    if args.threads:
        torch.set_num_threads(args.threads)
    cuda = device.type == "cuda"
    if args.model:
        what, raw = Path(args.model).name, read_json(resolve(args.model) / "config.json")
    else:
        what = args.shape or ("llama3-8b" if cuda else "smollm2-135m")
        raw = SHAPES[what]
    tokens = random_rows(args.rows or (384 if cuda else 16), args.tokens or (368 if cuda else 128), raw["vocab_size"])
    settings = Settings(epochs=1, batch_size=64 if cuda else 8, batch_tokens=args.batch_tokens or (8192 if cuda else 2048))
    parts = []
    for kind, dtype in (("scoring", torch.float16), ("training", torch.bfloat16)):
        dtype = dtype if cuda else torch.float32
        model = load_checkpoint(args.model, device, dtype) if args.model else random_model(raw, device, dtype)
        parts.append(speed(kind, model, raw, tokens, settings, args.repeats))
        del model
        gc.collect()  # transformers' modules hold on to one another, and with them to our weights
    about = {"hardware": hardware(device), "versions": versions(), "commit": git_commit(), "model": what,
             "rows": tokens.rows, "tokens": sum(tokens.lengths), "response_tokens": int(tokens.response.sum()),
             "batch_tokens": settings.batch_tokens, "rows_a_step": settings.batch_size, "rank": settings.rank,
             "targets": settings.targets, "repeats": args.repeats}
    toss, pro = cost_to_sft(11_200, 11_200, 112_000, 2, 1, 6_720)
    extra = "memory not measured (no /proc)" if chosen["extra_gib"] is None else f"{chosen['extra_gib']:.2f} GiB"
    text = [", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items() if name != "versions")
            + ", " + " ".join(f"{name} {value}" for name, value in about["versions"].items()),
            *map(speed_table, parts), CONVENTION.strip().format(
                n=parts[0]["parameters"], repeats=args.repeats, clock=CLOCKS[device.type]),
            f"### Selection\n\nThe mask of {chosen['competing']:,} competing tokens, in a process of its own: "
            f"{chosen['seconds']:.2f} s\n({chosen['work']:.2f} CPU seconds), {extra} beyond the flat arrays.",
            "### Cost of the whole method\n\nBy the convention above, as multiples of plain fine-tuning's, at the paper's sizes\n"
            f"(112k rows, references of a tenth, two epochs each): TOSS {toss:.2f}, TOSS-Pro (T = 1, k = 6 %) {pro:.2f}."]
    costs = run_costs(args.run) if args.run else []
    if args.run:
        text.append(f"Measured, {args.run} (training and scoring tokens count alike here):\n\n"
                    + markdown(["method", "seconds", "x sft", "tokens", "x sft"], costs))
    print(text := "\n\n".join(text))
    with file_beside(args.out / "bench.json") as file:
        record = {**about, "parts": parts, "selection": chosen, "flop_to_sft": {"toss": toss, "toss-pro": pro}, "run": costs}
        file.write_text(json.dumps(record, indent=2) + "\n")
    with file_beside(args.out / "bench.md") as file:
        file.write_text(f"{text}\n")
    print(f"\nwritten: {args.out}/bench.md, {args.out}/bench.json")


def main(argv: list[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m toss.audit.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="a checkpoint folder or hub id")
    what.add_argument("--shape", choices=list(SHAPES), help="a random model of this shape")
    parser.add_argument("--run", type=Path, help="also the measured cost of this run's methods")
    parser.add_argument("--rows", type=int, help="rows (default: 384 on CUDA, 16 on the CPU)")
    parser.add_argument("--tokens", type=int, help="mean tokens a row (default: 368 on CUDA, 128 on the CPU)")
    parser.add_argument("--repeats", type=int, default=3, help="turns that count (default: 3)")
    parser.add_argument("--device", help="cpu, cuda, cuda:N (default: CUDA if there is one)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--batch-tokens", type=int, help="tokens a forward pass, as in score.py")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (default: runs/bench)")
    args = parser.parse_args(argv)
    return reported(lambda: bench(args))


if __name__ == "__main__":
    sys.exit(main())
