"""Would the tests notice? Put small faults into a copy of the project, one at a time, and see.

    python tests/mutants.py [WORD ...]

mutants.jsonl has a fault per line: `fault` in words, the `file`, the text that stands there once
(`old`) and what replaces it (`new`), and the `tests` that should fail. WORD: only the faults whose
line contains one. Ends with status 1 if a fault goes unnoticed, and with an error if a text is not
found once or a fault keeps the tests from running.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".*", "runs", "__pycache__", "results", "*.ipynb")
AT_ONCE = 2
FAILED = 1  # pytest's exit status: 0 is that all passed, others that they did not run


def faults(words: list[str]) -> list[dict]:
    """The faults to try. Raises ValueError if a text does not stand exactly once in its file."""
    chosen = []
    for line in (ROOT / "tests/mutants.jsonl").read_text(encoding="utf-8").splitlines():
        fault = json.loads(line)
        content = (ROOT / fault["file"]).read_text(encoding="utf-8")
        count = content.count(fault["old"])
        if count != 1:
            raise ValueError(f"{fault['file']} holds {fault['old']!r} {count} times, not once")
        if not words or any(word in line for word in words):
            chosen.append(fault)
    return chosen


def first_failure(fault: dict) -> str | None:
    """The first test that fails on a copy with the fault; None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        file = copy / fault["file"]
        content = file.read_text(encoding="utf-8")
        file.write_text(content.replace(fault["old"], fault["new"]), encoding="utf-8")

        tests = [f"tests/{name}.py" for name in fault["tests"].split()]
        command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=600
        )
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode != FAILED or not found:
        raise RuntimeError(f"{fault['fault']}: the tests did not run\n{done.stdout[-2000:]}")
    return found[1]


def main() -> int:
    chosen = faults(sys.argv[1:])
    unnoticed = 0
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for fault, failure in zip(chosen, threads.map(first_failure, chosen)):
            if failure is None:
                unnoticed += 1
            said = f"noticed by {failure:.100}" if failure else f"NOT NOTICED by {fault['tests']}"
            print(f"{fault['file']}: {fault['fault']}: {said}", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} faults were noticed")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
