"""What is told of a part of a stage: a bar or a line, a log of its steps, and its cost."""

import json
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from model.io import whole_file, writing
from toss.config import TrainConfig
from toss.parallel import rank
from toss.tokens import Tokens
from toss.training import count_steps
from toss.workbench.states import SavedState

FIRST_LINE, EVERY = 5, 30  # seconds until the first line without a terminal, and between two


class Progress:
    """A part of a stage, such as the training of a reference, as it is seen and counted.

    Prints what will be done. tokens: the rows that it is about. config: of a training.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        tokens: Tokens,
        config: TrainConfig | None,
        log: Path,
    ):
        rows = sum(length > 0 for length in tokens.lengths)
        passes = 1
        if config is None:
            print(f"{name}: rows: {rows}, tokens: {len(tokens.input_ids)}, the longest rows first")
        else:
            passes = config.epochs
            steps = count_steps(tokens, config)
            print(f"{name}: optimizer steps: {steps} (rows: {rows}, epochs: {config.epochs})")
        self.name = name
        self.tokens = tokens
        self.bar = Bar(name)
        self.log = StepLog(log)
        self.cost = Cost(device, passes * len(tokens.input_ids))
        self.state: SavedState | None = None

    def report(self, event: dict[str, Any]) -> None:
        """What training and scoring call after each step."""
        self.bar.show(event)
        self.cost.count(event)
        if rank() == 0:
            self.log.write(event)

    def total(self) -> dict[str, Any]:
        """The cost, with the time of the processes that saved their work before this one."""
        cost = dict(self.cost.result)
        if self.state:
            cost["seconds"] = round(cost["seconds"] + self.state.earlier_seconds, 2)
        return cost


class Bar:
    """How far the work is: a bar on a terminal, else a line every half minute."""

    def __init__(self, name: str):
        self.name = name
        self.first: int | None = None  # the step that this process begins after
        self.started = time.monotonic()
        self.due = FIRST_LINE
        self.bar = tqdm(desc=name, leave=False, disable=rank() > 0 or None)  # None: no terminal

    def show(self, event: dict[str, Any]) -> None:
        """Show an event of training or scoring; see train."""
        if "remark" in event:
            print(f"{self.name}: {event['remark']}")
            return
        step = event.get("step", event.get("resumed"))
        steps = event["steps"]
        unit = event.get("unit", "step")
        if "resumed" in event:
            print(f"{self.name}: goes on after {unit} {step} of {steps}")
            self.first = self.bar.initial = step
        if self.first is None:
            self.first = 0
        self.bar.total = steps
        self.bar.unit = unit
        self.bar.update(step - self.bar.n)
        if "loss" in event:
            self.bar.set_postfix(loss=f"{event['loss']:.3f}", refresh=False)
        if step == steps:
            self.bar.close()
        elif self.bar.disable and step > self.first:
            self.print_line(step, steps, unit, event.get("loss"))

    def print_line(self, step: int, steps: int, unit: str, loss: float | None) -> None:
        """Print the step and the time left, if a line is due."""
        elapsed = time.monotonic() - self.started
        if elapsed < self.due:
            return
        self.due = elapsed + EVERY
        remaining = elapsed / (step - self.first) * (steps - step) / 60
        value = "" if loss is None else f", loss {loss:.3f}"
        print(f"{self.name}: {unit} {step} of {steps}{value}, {remaining:.1f} minutes left")


class StepLog:
    """log/NAME.jsonl: a line per optimizer step."""

    def __init__(self, file: Path):
        self.file = file

    def write(self, event: dict[str, Any]) -> None:
        """Add the line of a step. The first step begins the file anew."""
        if "resumed" in event:
            self.keep_lines(event["resumed"])
        if "loss" not in event:
            return
        line = {name: event[name] for name in ("step", "steps", "loss", "grad_norm", "lr")}
        line["loss"] = round(line["loss"], 6)
        line["grad_norm"] = round(line["grad_norm"], 6)
        with writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            mode = "w" if event["step"] == 1 else "a"
            with open(self.file, mode, encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def keep_lines(self, count: int) -> None:
        """Cut the log off after its first lines: the steps behind them are made again."""
        if not self.file.is_file():
            return
        lines = self.file.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines[:count] if line.endswith(b"\n")]
        if whole != lines:
            with whole_file(self.file) as file:
                file.write_bytes(b"".join(whole))


class Cost:
    """Seconds, tokens and peak memory of a piece of work, the last loss of a training."""

    def __init__(self, device: torch.device, tokens: int = 0):
        self.device = device
        self.tokens = tokens
        self.last_loss: float | None = None
        self.started = time.perf_counter()
        self.result: dict[str, Any] = {"tokens": tokens, "seconds": 0.0, "peak_memory_gib": 0.0}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # resets the peak on Linux; elsewhere it stays
                Path("/proc/self/clear_refs").write_text("5")

    def count(self, event: dict[str, Any]) -> None:
        """Take notice of a step; the last one ends the count."""
        self.last_loss = event.get("loss", self.last_loss)
        if "step" in event and event["step"] == event["steps"]:
            self.result = self.read()

    def read(self) -> dict[str, Any]:
        """The cost so far. Memory: what was allocated on CUDA, the process's on the CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:  # Linux counts in KiB, macOS in bytes
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if sys.platform != "darwin":
                peak *= 1024
        cost = {
            "tokens": self.tokens,
            "seconds": round(time.perf_counter() - self.started, 2),
            "peak_memory_gib": round(peak / 2**30, 3),
        }
        if self.last_loss is not None:
            cost["last_loss"] = self.last_loss
        return cost


def total_cost(parts: dict[str, Progress]) -> dict[str, Any]:
    """What the parts of a stage took together, and each of them; facts about its rows."""
    costs = {name: part.total() for name, part in parts.items()}
    total: dict[str, Any] = {"tokens": 0, "seconds": 0.0, "peak_memory_gib": 0.0}
    for cost in costs.values():
        total["tokens"] += cost["tokens"]
        total["seconds"] = round(total["seconds"] + cost["seconds"], 2)
        total["peak_memory_gib"] = max(total["peak_memory_gib"], cost["peak_memory_gib"])
        if "last_loss" in cost:
            total["last_loss"] = cost["last_loss"]
    for part in parts.values():  # the rows of the last part
        total |= {name: getattr(part.tokens, name) for name in ("rows", "skipped", "cut")}
    return {**total, "parts": costs, **arithmetic()}


def arithmetic() -> dict[str, Any]:
    """What changes the last bits of a result without being a setting of it."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def describe_cost(cost: dict[str, Any]) -> str:
    """What a stage took, in words."""
    speed = cost["tokens"] / max(cost["seconds"], 1e-9)
    text = f"{cost['tokens']} tokens in {cost['seconds']:.1f} s ({speed:,.0f} per second), "
    text += f"peak memory {cost['peak_memory_gib']:.2f} GiB"
    if "last_loss" in cost:
        text += f", last loss {cost['last_loss']:.3f}"
    return text
