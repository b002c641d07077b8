"""What is printed and noted of the work: a bar or a line, a log of the steps, and the cost."""

import json
import math
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from model.io import whole_file, writing
from toss.parallel import rank

# Seconds until the first line without a terminal, and between two.
FIRST_LINE = 5
EVERY = 30


class Progress:
    """What training or scoring reports after each step: shown, and written to a log."""

    def __init__(self, name: str, log: Path):
        self.bar = Bar(name)
        self.log = StepLog(log)

    def report(self, event: dict[str, Any]) -> None:
        """What training and scoring call after each step."""
        if rank() == 0:
            self.log.write(event)
        self.bar.show(event)


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
        # What an interrupted call has done counts as done, but not for the time that is left.
        if "resumed" in event:
            print(f"{self.name}: goes on after {unit} {step} of {steps}")
            self.first = self.bar.initial = step
        if self.first is None:
            self.first = 0
        # The bar on a terminal; without one, a line every half minute.
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

    def describe(self, name: str, epochs: int) -> list[str]:
        """What a finished training has learnt: its loss in the first and in the last epoch.

        These are of the same rows. Of a single epoch the halves are compared.
        """
        if not self.file.is_file():  # an interrupted training had finished, and its log was removed
            return []
        losses = [json.loads(line)["loss"] for line in self.file.read_text().splitlines()]
        count = math.ceil(len(losses) / max(epochs, 2))
        first = sum(losses[:count]) / count
        last = sum(losses[-count:]) / count
        lines = [f"loss of {name}: {first:.3f} in its first {count} steps, {last:.3f} in the last"]
        if last > 0.99 * first > 0:
            advice = "give a higher --lr, more --epochs or a smaller --batch-size, and --overwrite"
            lines.append(f"warning: {name} hardly learnt its rows: {advice}")
        return lines


class Cost:
    """Tokens, seconds and peak memory of a stage, from now on."""

    def __init__(self, device: torch.device):
        self.device = device
        self.tokens = 0
        self.earlier_seconds = 0.0  # that processes before this one worked
        self.facts: dict[str, int] = {}  # about the rows that were worked on last
        self.started = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # resets the peak on Linux; elsewhere it stays
                Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> dict[str, Any]:
        """The cost so far, and what changes the last bits without being a setting.

        Memory: what was allocated on CUDA, the process's on the CPU.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:  # Linux counts in KiB, macOS in bytes
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if sys.platform != "darwin":
                peak *= 1024
        seconds = time.perf_counter() - self.started + self.earlier_seconds
        return {
            "tokens": self.tokens,
            "seconds": round(seconds, 2),
            "peak_memory_gib": round(peak / 2**30, 3),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            **self.facts,
        }


def describe_cost(cost: dict[str, Any]) -> str:
    """What a stage took, in words."""
    text = f"{cost['seconds']:.1f} s"
    if cost["tokens"]:  # none for a mask alone
        speed = cost["tokens"] / max(cost["seconds"], 1e-9)
        text = f"{cost['tokens']} tokens in {text} ({speed:,.0f} per second)"
    return f"{text}, peak memory {cost['peak_memory_gib']:.2f} GiB"
