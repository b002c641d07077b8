"""The embedded world as a laboratory: draw rows, run the three scripts' stages on them, evaluate, over seeds.

What compare.py and sweep.py share. Whatever is there already is skipped by the stages themselves, so an experiment
that was broken off goes on where it was.
"""

import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from safetensors.torch import load_file

from model.errors import InputError
from model.files import read_json
from toss.audit.calibrate import QUANTILE, calibrate
from toss.audit.evaluate import evaluate_run
from toss.pipeline import finetune, score_custom, train_references
from toss.run import Run
from toss.settings import DEMO, INPUTS, ROOT, Settings, demo_values

Metrics = dict[str, dict]  # {metric: {"value", "n", "low", "high"}}


def row_files(folder: Path | None = None) -> dict[str, str]:
    """The world's files by the names that data/demo.json gives them; those of a folder that data.world has written."""
    files = {name: path for name, path in read_json(DEMO).items() if str(path).endswith(".jsonl")}
    return {name: str(folder.absolute() / Path(path).name if folder else ROOT / path) for name, path in files.items()}


def drawn(seed: int, folder: Path, **custom) -> dict[str, str]:
    """Draw the rows of a seed into a folder; custom: harmful_rows and eroding, see data/world.py."""
    from data.world import write_rows

    write_rows(seed, folder, **custom)
    return row_files(folder)


class Experiment:
    """One run directory on the embedded world's base.

    files: see row_files. common: settings for all stages (seed, and model for another base). One CPU thread, by demo.json.
    """

    def __init__(self, folder: Path, files: dict[str, str], **common):
        self.folder, self.files, self.common = folder, files, common
        if (folder / "run.json").exists() and not read_json(folder / "run.json").get("demo"):
            raise InputError(f"{folder} was begun with inputs of its own; this is for the embedded default")

    def settings(self, script: str, **more) -> Settings:
        """The embedded default's settings for one script on these rows."""
        inputs = {name: self.files[name] for name in INPUTS if name != "model"}
        return Settings(**{**demo_values(script), **inputs, "run": str(self.folder), "demo": True, "script": script,
                           **self.common, **more}).check()

    def prepare(self) -> None:
        """Both references, and the scores, the base's losses with them."""
        train_references(self.settings("train"))
        score_custom(self.settings("score"))

    def finetune(self, name: str, method: str, **more) -> None:
        """One way of fine-tuning, in methods/name."""
        finetune(self.settings("select", method=method, name=name, **more))

    def calibrated(self, quantile: float = QUANTILE, method: str = "toss") -> dict:
        """d from the held-out rows; see calibrate.py."""
        return calibrate(Run(self.settings("score")), self.files["calibration"], quantile, method)

    def harmful_share(self) -> float:
        """The true share of harmful tokens among the custom set's response tokens."""
        scores = load_file(self.folder / "scores.safetensors")
        return round(float(scores["harmful"][scores["response"].bool()].double().mean()), 4)

    def evaluate(self, names: list[str], prefill: tuple[int, ...] = ()) -> dict[str, Metrics]:
        """Metrics of ways of fine-tuning by name ("base": the model they all start from)."""
        sets = {"harmful": self.files["eval_forbidden"], "benign": self.files["eval_benign"], "utility": self.files["eval_facts"]}
        demo = read_json(DEMO)
        run = Run(self.settings("select"))
        return evaluate_run(run, names, sets, demo["forbidden_words"], prefill=prefill)


def over_seeds(job: Callable, tasks: list[tuple], jobs: int) -> list:
    """job(seed, ...) for each task (seed, ...), `jobs` at a time in processes of their own, in the order of the tasks."""
    if jobs < 1 or any(not 0 <= task[0] < 2**63 for task in tasks):
        raise InputError("--jobs must be at least 1, and --seeds 0 or more")
    if jobs == 1:
        return [job(*task) for task in tasks]
    os.environ["OMP_NUM_THREADS"] = "1"  # two pools that spin for each other's cores are ten times slower
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(job, *task) for task in tasks]]


def value(metrics: Metrics, name: str) -> float | None:
    """A metric's value; `refusals_kept` is one less `not_refused`."""
    if name == "refusals_kept":
        return None if (v := value(metrics, "not_refused")) is None else round(1 - v, 4)
    return metrics[name]["value"] if name in metrics else None


def summary(values: list[float]) -> dict | None:
    """Mean, least, most and count of the seeds' values; None where there is none."""
    if not values:
        return None
    return {"mean": round(statistics.fmean(values), 4), "least": min(values), "most": max(values), "seeds": len(values)}


def cell(entry: dict | None) -> str:
    """A summary as text: the mean, and the range where the seeds differ."""
    if entry is None:
        return "-"
    least, most = f"{entry['least']:.2f}", f"{entry['most']:.2f}"
    return f"{entry['mean']:.2f}" + (f" [{least}, {most}]" if least != most else "")


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    rows = [header, *lines]
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(header))]
    text = ["| " + " | ".join(f"{str(item):<{width}}" for item, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])
