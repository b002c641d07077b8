"""A laboratory: an experiment is data, and this runs it, once per seed.

For each case of an experiment: take its rows, train and score the references, fine-tune each arm by
the scripts' own commands, and measure the models. The scripts skip finished stages, so an
interrupted experiment goes on where it stopped.
"""

import ctypes
import functools
import importlib.util
import os
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from types import ModuleType

from model.io import read_json
from toss.audit import rivals
from toss.audit.command import read_jsonl, run_of
from toss.audit.outcomes import cost_of, measures_of, measures_of_mask
from toss.audit.tables import SWEPT, Result, Summary, results_of, with_ratios
from toss.methods import METHODS
from toss.workbench.flags import DEMO, ROOT, TRAINING_FLAGS

FROM_BASE = {"base", "kl-base"}  # methods whose S has the base in place of theta^u


# An experiment


@dataclass(frozen=True)
class Case:
    """Arms on one variant of the rows."""

    # How each model is made, by its name in the table: flags of select.py, or of toss.audit.rivals
    # for a rival. "name" is the method's folder (default: the arm's name). "discard" may be
    # "calibrated", and "mask" is the variant whose toss made it. "base" is the untrained base.
    arms: dict[str, dict]
    label: object = ""  # of the variant, in the table and the picture
    variant: str = ""  # its run is run-VARIANT, that of "" is run
    draw: dict = field(default_factory=dict)  # what the world's rows are drawn with, if anew
    change: Callable[["Setup"], dict[str, str]] | None = None  # the files that are others, by name
    references: str = "own"  # "none": not needed; "main": those of the unchanged rows
    evaluation: dict = field(default_factory=dict)  # of the experiment's, what is other here

    def run(self, main: Path) -> Path:
        """The folder of its run. main: of that of the unchanged rows."""
        return variant_folder(main, self.variant) if self.variant else main


def variant_folder(main: Path, variant: str) -> Path:
    return main.with_name(f"{main.name}-{variant}")


@dataclass(frozen=True)
class Experiment:
    """Cases on the rows of a world. See experiments.json for examples."""

    name: str
    title: str
    cases: list[Case]
    tables: Sequence[Sequence[str]] = (SWEPT,)  # measures, for each table
    heading: str = ""  # what the cases' labels are, for the tables
    picture: Callable[[Summary], str] | None = None  # SVG, "" for none
    paired: Sequence[str] = ()  # measures whose differences on the same prompts are shown
    legend: Sequence[str] = ()  # lines below the tables
    evaluation: dict = field(default_factory=dict)  # fields of evaluate.EvaluationConfig
    # Of an experiment on a checkpoint: how many rows are drawn, and how it is trained.
    rows: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    # Where rows and base come from, given the seed, the folders of the run and of the rows, and
    # the case's `draw` (default: the embedded world).
    world: Callable[..., "Setup"] | None = None

    def arms(self) -> list[str]:
        """The names of all arms."""
        names = {}
        for case in self.cases:
            names |= case.arms
        return list(names)

    def only(self, arms: Sequence[str]) -> "Experiment":
        """The same with these arms, and the base."""
        cases = []
        for case in self.cases:
            chosen = {arm: flags for arm, flags in case.arms.items() if arm in (*arms, "base")}
            if set(chosen) - {"base"}:
                cases.append(replace(case, arms=chosen))
        return replace(self, cases=cases)


def run_seed(
    experiment: Experiment, seed: int, folder: Path, common: dict | None = None
) -> list[Result]:
    """Run what is missing of one seed; its results.

    folder: of the run of the unchanged rows; those of variants lie beside it. common: more flags
    for all scripts.
    """
    world = experiment.world or drawn_world
    rows = folder.with_name("rows").absolute()
    main = world(seed, folder, rows)
    main.common |= common or {}
    setups = {"": main}
    results = []
    for case in experiment.cases:
        if case.variant not in setups:
            setups[case.variant] = variant_of(main, case, seed, world)
        results += run_case(case, seed, setups, experiment.evaluation | case.evaluation)
    return with_ratios(results)


def variant_of(main: "Setup", case: Case, seed: int, world: Callable) -> "Setup":
    """A case's Setup, with the files in which it differs from that of the unchanged rows."""
    setup = main.beside(case.variant)
    if case.draw:
        rows = main.folder.with_name(f"rows-{case.variant}").absolute()
        setup.files = world(seed, setup.folder, rows, **case.draw).files
    if case.change:
        setup.files |= case.change(setup)
    return setup


def run_case(case: Case, seed: int, setups: dict[str, "Setup"], evaluation: dict) -> list[Result]:
    """Fine-tune and measure the arms of a case. setups: by variant."""
    setup = setups[case.variant]
    print(f"\n{setup.folder}: {', '.join(case.arms)}\n")
    if case.references != "none":
        setup.prepare(from_main=case.references == "main")

    names = {arm: how.get("name", arm) for arm, how in case.arms.items()}
    discards = {}
    for arm, how in case.arms.items():
        if names[arm] == "base":  # it is measured, not fine-tuned
            continue
        flags = {**how, "name": names[arm]}
        if "mask" in how:  # the mask that toss made on the rows of that variant
            maker = setups[how["mask"]].folder.absolute()
            flags["mask"] = maker / "methods/toss/selection.safetensors"
        discards[arm] = setup.finetune(**flags)

    metrics = setup.evaluate(list(names.values()), **evaluation)
    record = read_json(setup.folder / "run.json")
    results = []
    for arm, name in names.items():
        measures = measures_of(metrics[name], cost_of(record, name))
        measures["discard"] = discards.get(arm)
        measures |= measures_of_mask(setup.folder, name, setup.files["custom"])
        results += results_of(seed, case.label, arm, measures)
    return results


# A run


@dataclass
class Setup:
    """A run directory, the files that it is made from, and how its models are trained.

    The scripts apply data/demo.json by themselves to the demo. To others all inputs and settings
    are given as flags.
    """

    folder: Path
    files: dict[str, str]  # by name, as in data/demo.json
    settings: dict  # reference, finetune, discard, forbidden_words: as in data/demo.json
    common: dict  # flags that all scripts are given
    is_demo: bool = False
    prepared: bool = False
    main: "Setup | None" = None  # of the unchanged rows, if this is a variant

    def beside(self, variant: str) -> "Setup":
        """The same in the folder RUN-VARIANT."""
        folder = variant_folder(self.folder, variant)
        return Setup(folder, dict(self.files), self.settings, dict(self.common), main=self)

    def open(self, *omitted: str):
        """Its Run, with the device flags of `common` but these."""
        return run_of(Namespace(run=self.folder, **self.common), *omitted)

    def call(self, script_name: str, **flags) -> None:
        """Run one of the scripts, or toss.audit.rivals, on these files."""
        # In the demo the scripts know all this. Else each input and setting is a flag: those of the
        # references for train.py, those of the methods for the rest.
        given = {}
        if not self.is_demo:
            given |= self.settings["reference" if script_name == "train" else "finetune"]
            given |= self.common
            inputs = ["model", "custom"]
            if script_name == "train":
                inputs = ["model", "harmful", "utility"]
            elif "pro" in flags:
                inputs.append("harmful")  # a run with references made elsewhere does not know it
            for name in inputs:
                given[name] = self.files[name]
        if script_name == "score":  # it trains nothing, and --dtype is that of training alone
            given = {name: x for name, x in given.items() if name not in (*TRAINING_FLAGS, "dtype")}

        words = [f"--run={self.folder}"]
        for name, value in (given | flags).items():
            flag = f"--{name.replace('_', '-')}"
            words.append(flag if value is True else f"{flag}={value}")
        module = rivals if script_name == "rivals" else script(script_name)
        module.main(words)

    def prepare(self, from_main: bool = False) -> None:
        """Both references, or those of the unchanged rows; and the scores, also under the base."""
        if self.prepared:
            return
        if from_main:
            self.main.prepare()
            for role in ("degraded", "utility"):
                source = self.main.folder / role
                shutil.copytree(source, self.folder / role, dirs_exist_ok=True)
        else:
            self.call("train")
        self.call("score", base=True)
        self.prepared = True

    def finetune(self, **flags) -> float | None:
        """Fine-tune in one way; returns its d: 0 if nothing is left out, None if no d decides.

        flags: see Case.arms.
        """
        method = flags.get("method")
        is_rival = method in rivals.RIVALS
        _, inputs, options = rivals.RIVALS.get(method, ("", [], {}))
        discard = flags.pop("discard", self.settings["discard"])
        if discard == "calibrated":
            discard = self.calibrated(flags["name"], method, "pro" in flags)
        # A mask says itself which tokens go, and so do some methods.
        if "mask" not in flags and (is_rival or METHODS[method].uses_d):
            flags["discard"] = discard
        if is_rival:
            for name in ("safety", "unaligned"):
                if name in self.files:
                    flags[name] = self.files[name]
        if "methods/sft" in inputs:  # goes on from it
            self.call("select", method="sft")
        self.call("rivals" if is_rival else "select", **flags)
        if method == "sft" or (is_rival and "discard" not in options):
            return 0.0
        return None if method in METHODS and not METHODS[method].uses_d else discard

    def calibrated(self, name: str, method: str, pro: bool) -> float:
        """The d that calibrate.py chooses for an arm; of a finished one the d that it has, so that
        the held-out rows are not scored again."""
        from toss.audit.calibrate import calibrate

        run = self.open("dtype")  # S is compared in the dtype of the scores, not of training
        known = run.runfile.section("stages", f"methods/{name}", "recipe", "settings")
        if "discard" in known:
            return known["discard"]
        maker = "base" if method in FROM_BASE else "toss"
        if pro:
            maker = "toss-pro"
        return calibrate(run, self.files["calibration"], method=maker)["discard"]

    def evaluate(self, names: Sequence[str], **fields) -> dict:
        """Metrics of the named methods; "base" is the model that they all start from.

        fields: of EvaluationConfig; `prefill` counts only where harmful prompts have a response.
        """
        from toss.audit.evaluate import EvaluationConfig, evaluate_run

        files = {
            "harmful": self.files["eval_forbidden"],
            "benign": self.files["eval_benign"],
            "utility": self.files["eval_facts"],
        }
        fields = {"words": self.settings["forbidden_words"], **fields}
        if not any("response" in row for row in read_jsonl(files["harmful"])):
            fields["prefill"] = []
        return evaluate_run(self.open(), names, files, EvaluationConfig(**fields))


@functools.cache
def script(name: str) -> ModuleType:
    """train.py, score.py or select.py as a module, loaded by its path."""
    spec = importlib.util.spec_from_file_location(f"toss_script_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def world_files() -> dict[str, str]:
    """The base and the shipped rows, by their names in data/demo.json."""
    files = {}
    for name, path in read_json(DEMO).items():
        if isinstance(path, str):
            files[name] = str(ROOT / path)
    return files


# Where rows and base come from


def shipped(seed: int, folder: Path, rows: Path) -> Setup:
    """The demo: the rows in data/rows, which are those of one seed."""
    return Setup(folder, world_files(), read_json(DEMO), {}, is_demo=True)


def drawn_world(seed: int, folder: Path, rows: Path, **draw) -> Setup:
    """The embedded world's rows, drawn into `rows`. draw: see data.world.make_rows."""
    from data.world import write_rows

    write_rows(seed, rows, **draw)
    files = world_files()
    for name, path in files.items():
        if path.endswith(".jsonl"):
            files[name] = str(rows / Path(path).name)
    return Setup(folder, files, read_json(DEMO), {"seed": seed})


# Seeds side by side


def per_seed(job: Callable, tasks: list[tuple], jobs: int) -> list:
    """job(*task) for each task, `jobs` at a time in processes of their own, in the given order.

    A signal ends the seeds at work, too; the same command goes on from what they have saved.
    """
    if jobs == 1:
        return [job(*task) for task in tasks]
    os.environ["OMP_NUM_THREADS"] = "1"  # thread pools that compete for cores are ten times slower
    with ProcessPoolExecutor(jobs, get_context("spawn"), die_with_parent) as pool:
        try:
            futures = [pool.submit(job, *task) for task in tasks]
            return [future.result() for future in futures]
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
