"""What is seen and kept of a long piece of work: a progress bar, a log, its seconds and memory."""

import json
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


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


class Progress:
    """The callback that `train` and `score` report to.

    log: where training's steps go, one JSON object per line; None: nowhere. silent: no bar.
    """

    def __init__(self, name: str, device: torch.device, log: Path | None, silent: bool):
        self.name, self.log, self.clock = name, log, Clock(device)
        self.bar = tqdm(desc=name, unit="step", leave=False, disable=silent or None)
        self.cost: dict[str, Any] = {"tokens": 0}

    def __call__(self, event: dict[str, Any]) -> None:
        if "remark" in event:
            print(f"{self.name}: {event['remark']}")
            return
        self.cost["tokens"] += event["tokens"]
        self.bar.total = event["steps"]
        self.bar.update()
        if "loss" in event:
            self.bar.set_postfix(loss=f"{event['loss']:.3f}", refresh=False)
            self.cost["last_loss"] = event["loss"]
        if "loss" in event and self.log:  # the first step's line replaces an earlier log
            line = {name: event[name] for name in ("step", "steps", "loss", "grad_norm", "lr")}
            line |= {name: round(event[name], 6) for name in ("loss", "grad_norm")}
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "w" if event["step"] == 1 else "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if event["step"] == event["steps"]:
            self.bar.close()
            self.cost |= self.clock.read()


def cost_of(parts: dict[str, Progress]) -> dict[str, Any]:
    """What a stage's parts took together, and each of them: tokens, seconds, peak memory."""
    costs = {name: part.cost for name, part in parts.items()}
    last = [cost["last_loss"] for cost in costs.values() if "last_loss" in cost][-1:]
    return {
        "tokens": sum(cost["tokens"] for cost in costs.values()),
        "seconds": round(sum(cost.get("seconds", 0) for cost in costs.values()), 2),
        "peak_memory_gib": max((c.get("peak_memory_gib", 0) for c in costs.values()), default=0),
        **({"last_loss": last[0]} if last else {}),
        "parts": costs,
    }
