"""What the texts name is there: commands and their flags, links, tests, examples in docstrings."""

import doctest
import re
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path

import pytest
from conftest import ROOT, run, script

READMES = [ROOT / folder / "README.md" for folder in (".", "model", "toss", "toss/audit", "data")]
CODE = [file for folder in ("model", "toss", "data") for file in (ROOT / folder).rglob("*.py")]
SCRIPTS = ["train.py", "score.py", "select.py"]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
TORCHRUN = {"--standalone", "--nproc-per-node"}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


MODULES = [module_of(file) for file in CODE if '"__main__"' in file.read_text()]
AUDIT = [name for name in MODULES if name.startswith("toss.audit.")]


@cache
def help_of(command: str, *words: str) -> str:
    """What a command prints with --help."""
    with redirect_stdout(StringIO()) as output, pytest.raises(SystemExit) as stop:
        script(command.removesuffix(".py"), *words, "--help", fast=False)
    assert stop.value.code == 0
    return output.getvalue()


def named_commands(text: str) -> list[tuple[str, str]]:
    """(command, what follows it); `evaluate --run R` is a command of the audit, too."""
    whole = "|".join(re.escape(name) for name in MODULES + SCRIPTS)
    short = "|".join(name.removeprefix("toss.audit.") for name in AUDIT)
    pattern = rf"(?:\b({whole})|`({short}))(?![\w.])([^\n`|#]*)"
    found = []
    for name, audit, rest in re.findall(pattern, text.replace("\\\n", " ")):
        found.append((name or f"toss.audit.{audit}", rest))
    return found


@pytest.mark.parametrize("file", READMES, ids=module_of)
def test_every_command_that_a_readme_names_has_its_flags(file):
    for command, rest in named_commands(file.read_text(encoding="utf-8")):
        first = re.match(r" *([a-z]+)(?!\S)", rest)  # such as `dsir` in `baselines dsir --target`
        subcommand = first.groups() if first else ()
        text = help_of(command, *subcommand)
        unknown = set(FLAG.findall(rest)) - set(FLAG.findall(text)) - TORCHRUN
        assert not unknown, (command, rest)


@pytest.mark.parametrize("file", READMES, ids=module_of)
def test_every_flag_that_a_readme_names_is_one_of_ours(file):
    text = re.sub(r"\]\(([^)]+)\)", "", file.read_text(encoding="utf-8"))
    text = re.sub(r"\b(lm_eval|vllm|alpaca_eval|python evaluate_completions.py)\s[^`]*", "", text)
    text = re.sub(r"\bhf download\s[^`\n]*", "", text)
    known = set(TORCHRUN)
    for command in MODULES + SCRIPTS:
        known |= set(FLAG.findall(help_of(command)))
    assert set(FLAG.findall(text)) <= known


@pytest.mark.parametrize("file", [*READMES, ROOT / "toss/study/RESULTS.md"], ids=module_of)
def test_every_link_of_a_text_leads_somewhere(file):
    text = file.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = file.parent / path if path else file
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors_of(linked), target


def anchors_of(file: Path) -> set[str]:
    """What a link may name of a text: its headings, as GitHub writes them."""
    titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_each_of_the_twelve_decisions_names_its_test():
    """By its file, and by a word for pytest -k."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pins = re.findall(r"\*\[(test_\w+)\]\(\S+: (\w+)\*", text)
    assert len(pins) == 12
    for name, word in pins:
        test = (ROOT / f"tests/{name}.py").read_text(encoding="utf-8")
        assert re.search(rf"def test_\w*{word}", test), word


# Runs commands one after the other, as `python -m` would; none may import torch.
HELP = """
import runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    start = runpy.run_path if name.endswith(".py") else runpy.run_module
    try:
        start(name, run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 0, name
    assert "torch._dynamo" not in sys.modules, name
"""


def test_help_takes_no_longer_than_importing_torch():
    """torch._dynamo alone would take another 1.6 s."""
    done = run("-c", HELP, *SCRIPTS)
    assert done.returncode == 0, done.stderr
    for name in SCRIPTS:
        assert re.search(rf"^usage: .*{re.escape(name)}", done.stdout, re.MULTILINE), name


@pytest.mark.parametrize(
    "file", [file for file in CODE if ">>> " in file.read_text()], ids=module_of
)
def test_the_examples_in_the_docstrings(file):
    examples = file.read_text(encoding="utf-8").count(">>> ")
    assert doctest.testmod(import_module(module_of(file))) == (0, examples)
