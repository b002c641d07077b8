"""What is told and saved of the work: lines, a log of the steps, states, and what it cost."""

import io
import json
import math
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from model.io import as_input_error, whole
from toss.parallel import Watch, rank

LOGGED = ("step", "steps", "loss", "grad_norm", "lr")  # of a step of training


class Progress(Watch):
    """Lines about one piece of work, and if they are given places, its log and its states.

    A line comes after 5 seconds, and then whenever the work has lasted a tenth longer, but not
    within 10 seconds. The time that is left is told by finished steps after the first, which also
    pays for compilation and warm-up; the prompts of a batch are reported one behind the other.

    log: JSONL, a line per step of training. states: a folder that belongs to one recipe and one
    version of the code, so that a state is never taken for another's. minutes: between two states.
    """

    def __init__(
        self,
        name: str,
        log: Path | None = None,
        states: Path | None = None,
        minutes: float = 2.0,
    ):
        self.name = name
        self.log = log
        self.states = states
        self.minutes = minutes
        self.first = 0  # the step that this process begins after
        self.earlier_seconds = 0.0  # that processes before this one worked
        self.started = time.monotonic()
        self.next_line = self.started + 5
        self.last_save = self.started
        # Step and time: when the first batch had ended, and of the last report.
        self.warm = (0, math.inf)
        self.latest = (0, self.started)

    # Lines and the log

    def on_step(self, event: dict[str, Any]) -> None:
        """Print a line if it is time for one, and log a step of training; see train and score."""
        step = event.get("resumed", event.get("step", 0))
        unit = event.get("unit", "step")
        place = f"{self.name}: {unit} {step} of {event['steps']}"
        if "resumed" in event:
            self.first = step
            print(f"{place} was reached before; it goes on from there")
        if rank() == 0 and self.log and "loss" in event:
            self.write_step(event)
        now = time.monotonic()
        if step <= self.first:
            return
        of_the_first = self.latest == self.warm and now - self.latest[1] < 0.01
        if self.latest[0] <= self.first or of_the_first:
            self.warm = (step, now)
        if now > self.next_line:
            self.next_line = now + max(10, 0.1 * (now - self.started))
            loss = f", loss {event['loss']:.3f}" if "loss" in event else ""
            print(f"{place}{loss}{self.time_left(event['steps'] - step)}")
        self.latest = (step, now)

    def time_left(self, steps: int) -> str:
        """The time for so many steps, in words; "" while it is not known."""
        done = self.latest[0] - self.warm[0]
        if done <= 0:
            return ""
        seconds = (self.latest[1] - self.warm[1]) / done * steps
        return f", {seconds / 60:.1f} minutes left"

    def write_step(self, event: dict[str, Any]) -> None:
        """Add a step to the log, in place of those that a process which died made after it."""
        if event["step"] == self.first + 1:
            kept = [json.dumps(line) + "\n" for line in read_log(self.log)[: self.first]]
            with whole(self.log) as file:
                file.write_text("".join(kept), encoding="utf-8")
        add_line(self.log, {name: event[name] for name in LOGGED})

    def describe(self, epochs: int) -> None:
        """Say what a finished training has learnt: its loss in the first and in the last epoch.

        These are of the same rows. Of a single epoch the halves are compared.
        """
        losses = [line["loss"] for line in read_log(self.log)]
        count = math.ceil(len(losses) / max(epochs, 2))
        if not count:  # it was interrupted when it had finished, and its log was removed
            return
        first = sum(losses[:count]) / count
        last = sum(losses[-count:]) / count
        print(f"{self.name}: loss {first:.3f} in the first {count} steps, {last:.3f} in the last")
        if last > 0.99 * first > 0:
            advice = "give a higher --lr, more --epochs or a smaller --batch-size, and --overwrite"
            print(f"warning: {self.name} hardly learnt its rows: {advice}")

    # States

    def state(self, part: int) -> Path:
        return self.states / f"{self.name}-{part}.pt"

    def load(self, part: int) -> dict[str, Any] | None:
        """What was saved; None if nothing was."""
        if self.states is None or not self.state(part).exists():
            return None
        with as_input_error(f"{self.state(part)}: cannot be read, so remove it"):
            values = torch.load(self.state(part), map_location="cpu", weights_only=True)
        self.earlier_seconds = values.pop("seconds")
        return values

    def is_due(self, last: bool) -> bool:
        """True if it is time to save, or if this is the last step."""
        if self.states is None:
            return False
        return last or time.monotonic() - self.last_save >= 60 * self.minutes

    def save(self, values: dict[str, Any], part: int) -> None:
        """Replace what was saved."""
        self.last_save = time.monotonic()
        seconds = self.earlier_seconds + self.last_save - self.started
        buffer = io.BytesIO()  # a full disk would be torch's RuntimeError
        torch.save({**values, "seconds": seconds}, buffer)
        with whole(self.state(part)) as file:
            file.write_bytes(buffer.getvalue())


class Cost:
    """Tokens, seconds and peak memory of a result, from now on."""

    def __init__(self, device: torch.device):
        self.device = device
        self.tokens = 0
        self.rows = 0  # that were worked on last
        self.earlier_seconds = 0.0  # that processes before this one worked
        self.started = time.monotonic()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def add_line_of(self, result: str, folder: Path) -> None:
        """Begin with what a result that is added to has cost, by its last line."""
        for line in read_log(folder / "log" / "costs.jsonl"):
            if line["stage"] == result:
                self.tokens = line["tokens"]
                self.earlier_seconds = line["seconds"]

    def read(self) -> dict[str, Any]:
        """The cost so far. Memory: what was allocated on CUDA, on the CPU the process's peak."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:  # Linux counts in KiB, macOS in bytes
            unit = 1 if sys.platform == "darwin" else 1024
            peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "tokens": self.tokens,
            "rows": self.rows,
            "seconds": round(self.earlier_seconds + time.monotonic() - self.started, 2),
            "peak_memory_gib": round(peak / 2**30, 3),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }


# JSONL


def read_log(log: Path) -> list[dict[str, Any]]:
    """The lines of a log; none if there is no such file. A line that was torn is left out."""
    if not log.exists():
        return []
    found = []
    for line in log.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # torn when a process died, or by a full disk
            found.append(json.loads(line))
    return found


def add_line(log: Path, values: dict[str, Any]) -> None:
    """Add a line to a log, and make the log if it is not there."""
    with as_input_error(f"{log}: cannot be written", OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a+", encoding="utf-8") as file:
            file.seek(0)
            text = file.read()
            if text and not text.endswith("\n"):  # the last line was torn
                file.write("\n")
            file.write(json.dumps(values) + "\n")
