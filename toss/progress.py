"""What is seen and kept of a long piece of work: bar, log, cost, and the state to go on from."""

import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from model.atomic import atomic_file, writing
from model.io import InputError, load_tensors, made_from, save_tensors
from model.process import Stopped, meet, stop
from toss.parallel import rank


class Clock:
    """Seconds and peak memory of a piece of work."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # resets the peak on Linux; elsewhere it stays
                Path("/proc/self/clear_refs").write_text("5")
        self.start = time.perf_counter()

    def read(self) -> dict[str, float]:
        """{"seconds", "peak_memory_gib"} since the start: CUDA's memory, or the process's."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:  # Linux counts in KiB, macOS in bytes
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak *= 1 if sys.platform == "darwin" else 1024
        seconds = time.perf_counter() - self.start
        return {"seconds": round(seconds, 2), "peak_memory_gib": round(peak / 2**30, 3)}


class Planned(Exception):
    """A dry run has come to where the work begins."""


Saving = tuple[Path, dict, float, Callable[[], None]]
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


class Progress:
    """The callback that `train` and `score` report to.

    folder: of the run, for log/NAME.jsonl, a line per step of training. saving: where the state to
    go on from is kept, the recipe of the stage that it belongs to, the minutes between two, and
    what is called after each; it is also written at the end, and when a signal asks the process to
    stop. None: no state. dry: raise Planned in place of the first step.
    """

    def __init__(
        self, name: str, device: torch.device, folder: Path, saving: Saving | None, dry: bool
    ):
        self.name, self.log, self.clock = name, folder / "log" / f"{name}.jsonl", Clock(device)
        self.states, self.recipe, self.minutes, self.saved_one = saving or (None, {}, 0, None)
        self.dry, self.due = dry, 5.0  # seconds until the time left is told
        self.first: int | None = 0  # steps that were done before; None: not known yet
        self.bar = tqdm(desc=name, unit="step", leave=False, disable=rank() > 0 or None)
        self.cost: dict[str, Any] = {"tokens": 0}
        self.saved = self.began = time.monotonic()

    def resume(self, work: Optimizer | Tensor, plan: str) -> tuple[int, int | None]:
        """Say the plan, and bring an optimizer, or a tensor of losses, to where they were left.

        Returns the steps that are done and the tokens per batch; (0, None) where there is no state.
        Of several processes the first saves the optimizer, and each one the losses it computed.
        """
        print(f"{self.name}: {plan}")
        if self.dry:
            raise Planned
        record, tensors = read_state(self.state(work), self.recipe) if self.states else ({}, {})
        step, steps = record.get("at", (0, None))
        if record:
            for name, tensor in state_of(work).items():
                tensor.copy_(tensors[name])
            if rank() == 0 and self.log.is_file():
                keep_lines(self.log, step)
            self.cost = record["cost"]
            self.clock.start -= self.cost["seconds"]
            self.first = None
            print(f"{self.name}: goes on after step {step} of {steps}{changed(record)}")
        meet()  # nobody works, and changes the files, before all have read them
        stop.deferred = self.states is not None and step != steps
        self.began = time.monotonic()
        return step, record.get("tokens_per_batch")

    def __call__(self, event: dict[str, Any]) -> None:
        if "remark" in event:
            print(f"{self.name}: {event['remark']}")
            return
        step, steps = event["step"], event["steps"]
        self.cost["tokens"] += event["tokens"]
        if self.first is None:  # a scoring that goes on may cut other batches, and count anew
            self.first = self.bar.n = self.bar.initial = self.bar.last_print_n = step - 1
        self.bar.total = steps
        self.bar.update(step - self.bar.n)
        if self.bar.disable and step < steps:
            self.tell(step, steps, event)
        if "loss" in event:
            self.bar.set_postfix(loss=f"{event['loss']:.3f}", refresh=False)
            self.cost["last_loss"] = event["loss"]
        if "loss" in event and rank() == 0:  # the first step's line replaces an earlier log
            line = {name: event[name] for name in ("step", "steps", "loss", "grad_norm", "lr")}
            line |= {name: round(event[name], 6) for name in ("loss", "grad_norm")}
            with writing(self.log):
                self.log.parent.mkdir(parents=True, exist_ok=True)
                with open(self.log, "w" if step == 1 else "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        if step == steps:
            self.bar.close()
            self.cost |= self.clock.read()
        if self.states:
            self.keep(event)

    def tell(self, step: int, steps: int, event: dict[str, Any]) -> None:
        """Without a terminal, which has a bar: a line every half minute, the first one sooner."""
        spent = time.monotonic() - self.began
        if spent >= self.due:
            left = spent / (step - self.first) * (steps - step)
            loss = f", loss {event['loss']:.3f}" if "loss" in event else ""
            unit = event.get("unit", "step")
            print(f"{self.name}: {unit} {step} of {steps}{loss}, {left / 60:.1f} minutes left")
            self.due = spent + 30

    def keep(self, event: dict[str, Any]) -> None:
        """Save the state if it is time, or the end; end the process if a signal asks for it."""
        step, steps = at = event["step"], event["steps"]
        if step == steps or stop.signal or time.monotonic() - self.saved >= 60 * self.minutes:
            work, self.saved = event["work"], time.monotonic()
            record = {"recipe": self.recipe, "at": at, "cost": {**self.cost, **self.clock.read()}}
            record |= {"tokens_per_batch": event.get("tokens_per_batch"), **arithmetic()}
            if isinstance(work, Tensor) or rank() == 0:
                with atomic_file(self.state(work)) as file:
                    tensors = {name: tensor.cpu() for name, tensor in state_of(work).items()}
                    save_tensors(tensors, file, record)
            if rank() == 0:
                self.saved_one()
        if stop.signal:
            saved = f"{self.name} is saved after step {step} of {steps}"
            raise Stopped(stop.signal, f"{saved}: the same command goes on from there")
        stop.deferred = step != steps

    def state(self, work: Optimizer | Tensor) -> Path:
        """The file for a state."""
        process = rank() if isinstance(work, Tensor) else 0
        return self.states / f"{self.name}-{process}.safetensors"


def state_of(work: Optimizer | Tensor) -> dict[str, Tensor]:
    """What is saved and filled again: the losses, or AdamW's parameters and the moments of each."""
    if isinstance(work, Tensor):
        return {"losses": work}
    tensors = {}
    for i, parameter in enumerate(work.param_groups[0]["params"]):
        if not work.state[parameter]:  # before the first step
            moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
            work.state[parameter] = {"step": torch.tensor(0.0), **moments}
        parts = {"": parameter.detach(), **work.state[parameter]}
        tensors |= {f"{i}{name}": tensor for name, tensor in parts.items()}
    return tensors


def read_state(file: Path, recipe: dict) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors of a state; empty if there is none of this recipe."""
    with suppress(InputError):
        record = made_from(file)
        if record.get("recipe") == recipe:
            return record, load_tensors(file)
    return {}, {}


def led_to(states: Path, recipe: dict) -> bool:
    """True if all states in a folder are of the work that led to a result of this recipe."""
    with suppress(InputError):
        made = (made_from(file).get("recipe", {}) for file in states.glob("*.safetensors"))
        return all(one.items() >= recipe.items() for one in made)
    return False


def keep_lines(log: Path, count: int) -> None:
    """Cut a log off after its first lines: the steps behind them are made again."""
    lines = log.read_bytes().splitlines(keepends=True)[:count]
    with atomic_file(log) as file:
        file.write_bytes(b"".join(line for line in lines if line.endswith(b"\n")))


def changed(record: dict[str, Any]) -> str:
    """A remark if a state or a result was made with another arithmetic than the process has."""
    now = arithmetic()
    differs = [f"{k} {record[k]}, now {now[k]}" for k in now if record.get(k, now[k]) != now[k]]
    return f" (made with {'; '.join(differs)}: the last bits may differ)" if differs else ""


def arithmetic() -> dict[str, Any]:
    """What changes the last bits of a result without being a setting of it."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def cost_of(parts: dict[str, Progress]) -> dict[str, Any]:
    """What a stage's parts took together, and each of them: tokens, seconds, peak memory."""
    costs = [part.cost for part in parts.values()]
    last = [cost["last_loss"] for cost in costs if "last_loss" in cost][-1:]
    return {
        "tokens": sum(cost["tokens"] for cost in costs),
        "seconds": round(sum(cost.get("seconds", 0) for cost in costs), 2),
        "peak_memory_gib": max(cost.get("peak_memory_gib", 0) for cost in costs),
        **({"last_loss": last[0]} if last else {}),
        "parts": {name: part.cost for name, part in parts.items()},
    }
