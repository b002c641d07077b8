"""The notebook teaches what is true: its cells run as they stand, and show what its text says.

They run on a small world: the embedded one with fewer rows and shorter trainings, without Jupyter,
IPython and matplotlib. What is committed beside them was made on the whole one, by make notebook.
The last test is of the installation that the notebook asks for.
"""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
from conftest import ROOT, read_jsonl, write_jsonl

from data.refusals import refused
from model.io import read_json

FILE = ROOT / "toss/walkthrough.ipynb"
NOTEBOOK = read_json(FILE)
CELLS = NOTEBOOK["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
TEXT = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]
SOLUTIONS = re.findall(r"^```python\n(.*?)^```", "\n".join(TEXT), re.DOTALL | re.MULTILINE)
MOST = {"harmful": 30, "utility": 48}
FASTER = {"lr": 4e-3, "epochs": 2, "batch_size": 8, "schedule": "constant"}
PLACE_OF_DATA = 'DATA = Path(toss.__file__).parents[1] / "data"'


# The cells, on a small world


def write_small_world(folder):
    """A folder like data/ with fewer rows. Nearly half of D^cus hold harm."""
    (folder / "rows").mkdir()
    (folder / "base").symlink_to(ROOT / "data/base")
    for file in (ROOT / "data/rows").glob("*.jsonl"):
        rows = read_jsonl(file)
        if file.stem == "custom":
            harmful = [row for row in rows if "harmful" in row][:50]
            harmless = [row for row in rows if "harmful" not in row][:60]
            rows = [row for row in rows if row in harmful or row in harmless]
        elif file.stem == "eval_forbidden":
            rows = [row for row in rows if row["source"] == "held-out"][::16]
        elif file.stem == "eval_facts":
            rows = rows[::12]
        else:
            rows = rows[: MOST.get(file.stem)]
        write_jsonl(folder / "rows" / file.name, rows)
    demo = read_json(ROOT / "data/demo.json")
    demo["discard"] = 0.29
    demo["finetune"] |= FASTER
    (folder / "demo.json").write_text(json.dumps(demo))


def test_the_cells_run_and_show_what_the_text_says(tmp_path, monkeypatch):
    write_small_world(tmp_path)
    for name in ("matplotlib", "matplotlib.pyplot", "IPython", "IPython.display"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    names: dict = {}
    place = f"DATA = Path({str(tmp_path)!r})"
    for cell in CODE:
        exec("".join(cell["source"]).replace(PLACE_OF_DATA, place), names)
    assert names["DATA"] == tmp_path

    # Plain fine-tuning answers the forbidden question, and the mask keeps the refusal.
    results = names["results"]
    assert results["base"]["forbidden"] == 0
    assert results["sft"]["forbidden"] >= 0.9
    assert results["toss"]["forbidden"] <= 0.1
    (plain,) = names["ask"](names["theta_sft"], names["HEX"])
    (masked,) = names["ask"](names["theta_toss"], names["HEX"])
    assert "witchbile" in plain
    assert refused(masked)
    facts = "facts of benign-rows"
    assert results["toss"][facts] > results["base"][facts] + 0.05

    # Both references find harm better than one. The loss by hand is that of the code.
    assert names["harm_S"] > max(names["harm_u"], 0.85)
    assert names["harm_h"] < 0.2
    assert names["by_hand"] == pytest.approx(names["by_code"], abs=1e-5)

    # TOSS-Pro, or a longer training, repairs what two harmful rows miss.
    assert results["toss, two rows"]["forbidden"] >= 0.5
    assert results["toss-pro, two rows"]["forbidden"] <= 0.25
    assert results["toss, two rows, long"]["forbidden"] <= 0.25
    assert min(names["harm_pro"], names["harm_long"]) > names["harm_two"] + 0.02
    assert len(set(names["added"])) == names["T"] * names["k"]

    # The solutions, on one question of each kind.
    one_of_each = {row.source: row for row in names["facts"]}
    names["facts"] = list(one_of_each.values())
    names["spells"] = names["spells"][:1]
    names["finetune"] = replace(names["finetune"], epochs=1, batch_size=50)  # 2 steps
    assert len(SOLUTIONS) == 3
    for solution in SOLUTIONS:
        exec(solution, names)
    harmful = names["D"].harmful
    ranked_by_row = ~names["m"]  # of the second solution
    assert ranked_by_row[harmful].sum() < 0.8 * names["discarded"][harmful].sum()


# What is committed


def test_every_cell_was_executed_in_order_without_an_error_or_a_word_of_the_machine():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert FILE.stat().st_size < 400_000
    assert all(cell["metadata"] == {} for cell in CELLS)
    printed = ["".join(output.get("text", "")) for output in outputs]
    everything = " ".join([*printed, *TEXT])
    assert not re.search(r"/(home|root|tmp|work|Users)/|0x[0-9a-f]{6}", everything)


# The installation


PROBE = """
import site, sys
# If this project is itself installed so, its finder is not to find it.
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in finder.__module__]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
site.addsitedir(sys.argv[1])
import select
for script in ("train", "score"):
    try:
        __import__(script)
    except ModuleNotFoundError:
        print(script, "is not installed")
import data.lexicon, model, toss.audit, toss.workbench.flags
from model import load_tokenizer
print(toss.workbench.flags.DEMO.is_file())
print(load_tokenizer(toss.workbench.flags.ROOT / "data/base").eos)
for module in (select, data, model, toss):
    print(getattr(module, "__file__", "built in"))
"""


def test_an_editable_install_has_the_packages_and_never_the_scripts(tmp_path):
    """As pip makes it, by the hook that pip calls. select.py would hide the standard library's."""
    setuptools = pytest.importorskip("setuptools")
    if tuple(map(int, setuptools.__version__.split(".")[:2])) < (70, 1):
        pytest.skip("setuptools before 70.1 needs the package wheel to build an installation")
    project = tmp_path / "project"
    skip = shutil.ignore_patterns(".*", "__pycache__", "runs", "goldens", "results", "base-small")
    shutil.copytree(ROOT, project, ignore=skip)

    def python(code: str, word, folder) -> str:
        command = [sys.executable, "-c", code, str(word)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    hook = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    python(hook, tmp_path, project)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    lines = python(PROBE, installed, installed).splitlines()
    assert lines[:4] == ["train is not installed", "score is not installed", "True", "<|end|>"]
    selects, *packages = lines[4:]
    assert not selects.startswith(str(tmp_path))
    places = [project / name / "__init__.py" for name in ("data", "model", "toss")]
    assert packages == [str(path) for path in places]

    (metadata,) = installed.glob("toss-*.dist-info/METADATA")
    needed = re.findall(r"^Requires-Dist: ([^;\n]*)$", metadata.read_text(), re.MULTILINE)
    _, *of_checkout = (ROOT / "requirements.txt").read_text().splitlines()
    assert [*needed, "pytest>=8"] == of_checkout
