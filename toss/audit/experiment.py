"""A laboratory: draw rows, run the scripts on them, evaluate, summarise over seeds.

compare.py, sweep.py and real.py share this. The scripts skip finished stages, so an interrupted
experiment continues where it stopped.
"""

import ctypes
import functools
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import active_children, get_context
from pathlib import Path
from types import ModuleType

from model.io import read_json
from toss.audit import rivals
from toss.audit.command import DEVICE, markdown, write_text
from toss.workbench.flags import DEMO, ROOT, TRAINING

HEADS = {  # of the tables' columns, where they are not the names of the measures
    "forbidden/held-out": "forbidden",
    "refusals_kept": "refusals kept",
    "over_refusal": "over-refusal",
    "accuracy/benign-rows": "benign facts",
    "accuracy/harmful-rows": "harmful-row facts",
    "auc": "AUC",
    "seconds_to_sft": "x sft",
    "tokens_to_sft": "x sft",
    "peak_memory_gib": "peak GiB",
    "discard": "d",
    "harmful_share": "harmful tokens",
    "forbidden/identity": "forbidden, asked as persona",
    "purity": "added rows with harm",
    "shared": "shared with own toss",
}


@functools.cache
def script(name: str) -> ModuleType:
    """train.py, score.py or select.py as a module, loaded by its path."""
    spec = importlib.util.spec_from_file_location(f"toss_script_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def world_files() -> dict[str, str]:
    """The base and the shipped rows, by their names in data/demo.json."""
    return {name: str(ROOT / path) for name, path in read_json(DEMO).items() if type(path) is str}


class Experiment:
    """A run directory. files: by name, see world_files. common: flags that all scripts are given.

    world: how both trainings are done, and more, as in data/demo.json, which is the default. With
    the shipped files and nothing else given, the run is the demo, and the scripts apply that file
    by themselves. Otherwise its settings and all inputs are passed to them as flags.
    """

    def __init__(self, folder: Path, files: dict[str, str], world: dict | None = None, **common):
        self.folder, self.files, self.common = folder, files, common
        self.world, self.prepared = world or read_json(DEMO), False
        self.demo = files == world_files() and not common

    @classmethod
    def drawn(cls, place: Path, seed: int, **custom) -> "Experiment":
        """An experiment in place/run on rows drawn into place/rows; see data/world.py."""
        from data.world import write_rows

        rows = place.absolute() / "rows"
        write_rows(seed, rows, **custom)
        files = {n: Path(p) for n, p in world_files().items()}
        files |= {n: rows / p.name for n, p in files.items() if p.suffix == ".jsonl"}
        return cls(place / "run", {n: str(p) for n, p in files.items()}, seed=seed)

    def beside(self, name: str, **files: str) -> "Experiment":
        """The same with some other files, in the folder RUN-NAME."""
        folder = self.folder.with_name(f"{self.folder.name}-{name}")
        return Experiment(folder, {**self.files, **files}, self.world, **self.common)

    def open(self, *but: str):
        """Its Run, with the device flags of `common` but these."""
        from toss.workbench.run import open_run

        common = {name: x for name, x in self.common.items() if name in DEVICE and name not in but}
        return open_run(self.folder, **common)

    def call(self, name: str, /, **more) -> None:
        """Run one of the scripts, or toss.audit.rivals, on these files."""
        inputs = ("model", "harmful", "utility") if name == "train" else ("model", "custom")
        flags = self.world["reference" if name == "train" else "finetune"] | self.common
        if name == "score":  # it trains nothing
            flags = {key: x for key, x in flags.items() if key not in (*TRAINING, "dtype")}
        inputs += ("harmful",) * ("pro" in more)  # unknown to a run of references made elsewhere
        flags = {} if self.demo else flags | {key: self.files[key] for key in inputs}
        flags |= {"run": self.folder, **more}

        def name_of(key):
            return f"--{key.replace('_', '-')}"

        words = [name_of(key) + f"={x}" * (x is not True) for key, x in flags.items()]
        (rivals if name == "rivals" else script(name)).main(words)

    def prepare(self, references: Path | None = None) -> None:
        """Both references, or those of another run; and the scores, also under the base."""
        if self.prepared:
            return
        if references is None:
            self.call("train")
        else:
            for role in ("degraded", "utility"):
                shutil.copytree(references / role, self.folder / role, dirs_exist_ok=True)
        self.call("score", base=True)
        self.prepared = True

    def finetune(self, name: str, **how) -> float:
        """Fine-tune in one way, into methods/NAME; returns its d.

        how: flags of select.py, or a rival's. The discard "calibrated" is chosen by calibrate.py,
        for TOSS-Pro with the last degraded model of methods/toss-pro; a finished arm keeps its d.
        """
        d = how.pop("discard", self.world["discard"])
        if d == "calibrated":
            from toss.audit.calibrate import calibrate

            run, method = self.open("dtype"), "toss-pro" if "pro" in how else "toss"
            recipe = run.record.get("stages", {}).get(f"methods/{name}", {}).get("recipe", {})
            d = recipe.get("settings", {}).get("discard")
            d = d or calibrate(run, self.files["calibration"], method=method)["discard"]
        choice = {} if "mask" in how else {"discard": d}  # a mask says itself which tokens go
        if rival := how.get("method") in rivals.RIVALS:
            choice |= {key: x for key, x in self.files.items() if key in ("safety", "unaligned")}
            if "methods/sft" in rivals.RIVALS[how["method"]][0]:  # goes on from it
                self.call("select", method="sft")
        self.call("rivals" if rival else "select", name=name, **how, **choice)
        fixed = {"sft", "first-5", *rivals.RIVALS} - {"kl-discarded"}
        return 0.0 if how.get("method") in fixed else d

    def evaluate(self, names: list[str], prefill: Iterable[int] = (), length: int = 40) -> dict:
        """Metrics of the named methods; "base" is the model they all start from."""
        from toss.audit.evaluate import evaluate_run

        roles = {"harmful": "eval_forbidden", "benign": "eval_benign", "utility": "eval_facts"}
        sets = {role: self.files[name] for role, name in roles.items()}
        return evaluate_run(
            self.open(), names, sets, self.world["forbidden_words"], length, prefill
        )


def per_seed(job: Callable, tasks: list[tuple], jobs: int) -> list:
    """job(*task) for each task, `jobs` at a time in processes of their own, in the given order.

    A signal ends the seeds at work, too; the same command goes on from what they have saved.
    """
    if jobs == 1:
        return [job(*task) for task in tasks]
    os.environ["OMP_NUM_THREADS"] = "1"  # thread pools that compete for cores are ten times slower
    with ProcessPoolExecutor(jobs, get_context("spawn"), die_with_parent) as pool:
        try:
            return [future.result() for future in [pool.submit(job, *task) for task in tasks]]
        except BaseException:
            for process in active_children():
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def die_with_parent() -> None:
    """In a process of per_seed: its parent alone hears signals, and it ends with it."""
    with suppress(OSError, AttributeError):  # Linux
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def value(metrics: dict, name: str) -> float | None:
    """A metric's value, None if it was not measured; `refusals_kept` is 1 - `not_refused`."""
    if name == "refusals_kept":
        not_refused = value(metrics, "not_refused")
        return None if not_refused is None else round(1 - not_refused, 4)
    return metrics[name]["value"] if name in metrics else None


def spread(found: list[tuple[object, dict]]) -> dict[object, dict]:
    """Results (label, {name: number or None}) as {label: {name: summary over equal labels}}."""
    groups = {}
    for label, numbers in found:
        row = groups.setdefault(label, {})
        for name, number in numbers.items():
            if number is not None:
                row.setdefault(name, []).append(number)
    for row in groups.values():
        for name, v in row.items():
            row[name] = {"mean": round(statistics.fmean(v), 4), "least": min(v), "most": max(v)}
            row[name]["seeds"] = len(v)
    return groups


def cell(entry: dict | None, name: str = "") -> str:
    """A summary as text: the mean, and the range where the seeds differ."""
    if entry is None:
        return "-"
    if name in ("seconds", "tokens"):
        return f"{entry['mean']:,.0f}"
    form = ".3f" if name in ("nll", "discard") else ".2f"
    mean, least, most = (format(entry[key], form) for key in ("mean", "least", "most"))
    return mean if least == most else f"{mean} [{least}, {most}]"


def table(corner: list[str], rows: dict[object, dict], names: Iterable[str]) -> str:
    """Summaries {label or labels: {name: summary}} as Markdown; "" if none of the names occurs."""
    names = [name for name in names if any(name in row for row in rows.values())]
    lines = [[cell(row.get(name), name) for name in names] for row in rows.values()]
    labels = [[label] if isinstance(label, str) else list(label) for label in rows]
    head = [*corner, *(HEADS.get(name, name) for name in names)]
    return markdown(head, [a + b for a, b in zip(labels, lines)]) if names else ""


def save(path: Path, text: str, record: dict) -> None:
    """Write PATH.md with the text, and PATH.json with the numbers and where they come from."""
    from toss.workbench.runfile import git_commit

    about = {"commit": git_commit(), "hardware": platform.processor() or platform.machine()}
    write_text(path.with_suffix(".json"), json.dumps({**about, **record}, indent=1) + "\n")
    write_text(path.with_suffix(".md"), f"{text}\n")
    print("written:", ", ".join(str(file) for file in sorted(path.parent.glob(f"{path.name}.*"))))
